"""CUDA graphs: a list of operators that is recorded once and run again.

As on a GPU, recording computes nothing: what it wrote is put back, and what it made holds garbage
until the first replay. Tensors stay where they are, and numbers that the host had in hand are those
of the recording for ever. Nothing in it may wait.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tools.fake_gpu.process import GARBAGE, GPU
from tools.fake_gpu.rules import computes


class Capture:
    """A recording that is being made."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []  # (written, what it held)
        self._made: list[torch.Tensor] = []

    def run(self, func, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs an operator of CPU tensors once, for the shapes of what follows, and records it."""
        for written in _written(func, args, kwargs):
            self._before.append((written, written.clone()))
        out = func(*args, **kwargs)
        if computes(func):
            known = {id(x) for x in pytree.tree_leaves((args, kwargs))}
            self._made += [t for t in _tensors(out) if id(t) not in known]
            self.steps.append(partial(_again, func, args, kwargs, out))
        return out

    def end(self) -> list[Callable[[], None]]:
        """Undoes what was computed, and returns the steps."""
        for tensor in self._made:
            tensor.fill_(GARBAGE.get(tensor.dtype, -1))
        for written, held in reversed(self._before):
            written.copy_(held)
        return self.steps


class CUDAGraph:
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False):
        self._steps: list[Callable[[], None]] = []

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        if GPU.capture is not None:
            raise RuntimeError("CUDA error: a graph is being captured in this stream already")
        GPU.capture = Capture()

    def capture_end(self) -> None:
        capture, GPU.capture = GPU.capture, None
        self._steps = capture.end()

    def replay(self) -> None:
        GPU.launch("graph")
        for step in self._steps:
            step()

    def reset(self) -> None:
        self._steps = []

    def pool(self) -> tuple[int, int]:
        return (0, 0)


class graph:
    """In the place of `torch.cuda.graph`: a context in which a graph is recorded."""

    def __init__(self, cuda_graph: CUDAGraph, pool=None, stream=None, **kwargs: Any):
        self.cuda_graph = cuda_graph

    def __enter__(self) -> None:
        GPU.wait("cuda.synchronize")
        self.cuda_graph.capture_begin()

    def __exit__(self, *error: object) -> None:
        self.cuda_graph.capture_end()


def _again(func, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
        if old is not new:
            old.copy_(new)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _written(func, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that an operator writes to."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    return [t for name in names for t in _tensors(given.get(name))]
