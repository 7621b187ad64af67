"""The reference model of a run on preference pairs: a checkpoint, or what the run started from.

The starting weights are copied to host memory before the first step, those that learn alone: the
others stay as they are. A resumed run has others by then, and loads them from where its checkpoint
says that they came from. With LoRA the adapters of the copy are switched off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.checkpoint import folders, sharded
from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.config import MODULES
from megatron_mm.convert.live import load_hf
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import is_adapter
from megatron_mm.preference.settings import DPOConfig
from megatron_mm.rl.reference import HeldWeights, Reference, copied, loaded

# {"load": checkpoint} or {"load_hf": folder}; None: drawn from the seed, or not needed.
Origin = dict[str, str] | None


class StartingWeights(HeldWeights):
    """The engine's weights when they first give way to them, without what adapters add."""

    def __init__(self, engine: Engine):
        self._names, learners = _learners(engine)
        self._begun = False
        super().__init__(engine, learners, [])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """See `HeldWeights.in_place`."""
        if not self._begun:
            self._weights = _switched_off(self._names, copied(self._parameters))
            self._begun = True
        with super().in_place():
            yield


def open_reference(engine: Engine) -> tuple[HeldWeights, Origin]:
    """Returns the reference model, and where its weights come from if the settings alone do not say
    so to a run that is resumed. Every rank calls it, before weights and optimizer are loaded.

    Raises:
        CheckpointError: on every rank.
    """
    run = engine.run
    named, checkpoint = run.section(DPOConfig).dpo_ref_load, run.checkpoint
    if named:
        return Reference(engine, named), None
    if not checkpoint.load or checkpoint.finetune:
        return StartingWeights(engine), _origin(engine)
    origin: Origin = _read_run(engine, checkpoint.load)[1]["loader"].get("started_from")
    if not any(run.trains(module) for module in MODULES):  # but adapters
        return StartingWeights(engine), origin
    if origin is None:
        raise CheckpointError(
            f"dpo.dpo_ref_load is None, and {checkpoint.load} names no weights that its run "
            "started from; set dpo_ref_load to a checkpoint of the reference model"
        )
    weights = loaded(engine, lambda: _load(engine, origin))
    every = [param for module in engine.modules for param in module.parameters()]
    place = {id(param): number for number, param in enumerate(every)}
    names, learners = _learners(engine)
    kept = [weights[place[id(param)]] for param in learners]
    return HeldWeights(engine, learners, _switched_off(names, kept)), origin


def _learners(engine: Engine) -> tuple[list[str], list[torch.nn.Parameter]]:
    named = [
        (name, param)
        for module in engine.modules
        for name, param in module.named_parameters()
        if param.requires_grad
    ]
    return [name for name, _ in named], [param for _, param in named]


def _switched_off(names: list[str], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns weights whose adapters add nothing: B of B A x is zero."""
    return [
        torch.zeros_like(weight) if is_adapter(name) and name.endswith(".b") else weight
        for name, weight in zip(names, weights, strict=True)
    ]


def _origin(engine: Engine) -> Origin:
    """Returns what a run that starts here will have loaded."""
    checkpoint = engine.run.checkpoint
    if checkpoint.load_hf:
        return {"load_hf": str(Path(checkpoint.load_hf).resolve())}
    if checkpoint.load:  # the checkpoint itself: `latest` of its folder may move on
        return {"load": str(_read_run(engine, checkpoint.load)[0].resolve())}
    return None


def _load(engine: Engine, origin: dict[str, str]) -> None:
    if "load_hf" in origin:
        load_hf(engine, Path(origin["load_hf"]))
    else:
        sharded.load(engine, Path(origin["load"]), finetune=True)


def _read_run(engine: Engine, folder: str) -> tuple[Path, dict[str, Any]]:
    """Returns (checkpoint, its run.json) as rank 0 finds them."""
    found: list[Any] = [None]
    with raising_together(engine.groups.world, f"cannot load {folder}"):
        if dist.get_rank() == 0:
            found = [folders.resolve(Path(folder))]
    dist.broadcast_object_list(found, src=0, group=engine.groups.world)
    return found[0]
