"""What crosses each pipeline stage boundary besides the hidden state. Pure functions of stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.pattern import Stage


@dataclass(frozen=True)
class Manifest:
    """What crosses one stage boundary besides the hidden state. `refinements` are pairs."""

    memory: bool
    refinements: tuple[int, ...]


def wire(stages: Sequence[Stage]) -> tuple[Manifest, ...]:
    """What travels from stage i to stage i + 1, one Manifest per boundary.

    The memory travels while a later stage still looks; a refinement travels from the
    stage of its look to the stage of its injection, and is listed in the order of pairs.
    """
    manifests = []
    for boundary in range(1, len(stages)):
        before = [layer for stage in stages[:boundary] for layer in stage.layers]
        after = [layer for stage in stages[boundary:] for layer in stage.layers]
        opened = {layer.pair for layer in before if LAYERS[layer.kind].pair == "opens"}
        closed = {layer.pair for layer in after if LAYERS[layer.kind].pair == "closes"}
        memory = any(LAYERS[layer.kind].reads_memory for layer in after)
        manifests.append(Manifest(memory, tuple(sorted(opened & closed))))
    return tuple(manifests)
