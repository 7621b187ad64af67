"""The fake GPU of this process.

Torch has one set of functions for a process, and one GPU for a rank; so has this package: `GPU` is
the only state that its parts share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tools.fake_gpu.counts import Counts, Recorder, call_site

NAME = "NVIDIA H100 (fake)"
DEVICES = 8  # of the machine
MEMORY = 80 << 30  # bytes


class Gpu:
    """
    Attributes:
        recorder: counts launches and waits.
        index: the device that this rank chose (`torch.cuda.set_device`).
        capture: of the CUDA graph that is being recorded (graphs.py).
        means_meta: the device "meta" was asked for by that name. Elsewhere it stands for the GPU:
            of all devices without a driver, it is the one that autograd serves.
    """

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.index = 0
        self._pinned: dict[int, StorageWeakRef] = {}
        self.capture: Any = None
        self.means_meta = False
        # Copies to the CPU that the host has not waited for: (where, numbers).
        self._on_their_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    def counting(self) -> AbstractContextManager[Counts]:
        """See `Recorder.counting`."""
        return self.recorder.counting()

    def labelled(self, label: str) -> AbstractContextManager[None]:
        """See `Recorder.labelled`."""
        return self.recorder.labelled(label)

    def compute(self, func, *args: Any, **kwargs: Any) -> Any:
        """Runs an operator on CPU tensors, or records it."""
        if self.capture is not None:
            return self.capture.run(func, args, kwargs)
        return func(*args, **kwargs)

    def launch(self, operator: str) -> None:
        """Counts a kernel, unless it is only recorded."""
        if self.capture is None:
            self.recorder.launch(operator)

    def wait(self, reason: str) -> None:
        """The host waits: all that the GPU was asked for is done.

        Raises:
            RuntimeError: CUDA's, while a graph is recorded.
        """
        self.refuse_in_capture(reason)
        self.recorder.wait(reason)
        arrived, self._on_their_way = self._on_their_way, []
        for target, numbers in arrived:
            target.copy_(numbers)

    def refuse_in_capture(self, what: str) -> None:
        if self.capture is not None:
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing: {what} at "
                f"{call_site()}"
            )

    def send(self, target: torch.Tensor, numbers: torch.Tensor) -> None:
        """Copies to a CPU tensor without a wait. Until the next one it holds garbage: code that
        reads it too early computes something else than on the CPU."""
        self.refuse_in_capture("copy to the CPU")
        self._on_their_way.append((target, numbers.clone()))
        target.fill_(GARBAGE.get(target.dtype, -1))

    def pin(self, tensor: torch.Tensor) -> None:
        """Pins the memory of a CPU tensor."""
        storage = StorageWeakRef(tensor.untyped_storage())
        self._pinned = {key: ref for key, ref in self._pinned.items() if not ref.expired()}
        self._pinned[storage.cdata] = storage

    def has_pinned(self, tensor: torch.Tensor) -> bool:
        found = self._pinned.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    @contextmanager
    def meaning_meta(self) -> Iterator[None]:
        before, self.means_meta = self.means_meta, True
        try:
            yield
        finally:
            self.means_meta = before


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GARBAGE = dict.fromkeys(FLOATS, float("nan")) | {torch.uint8: 255, torch.bool: True}

GPU = Gpu()
