"""What crosses each pipeline stage boundary besides the hidden state. Pure functions of stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        looked = {layer.pair for layer in before if layer.kind == "L"}
        waiting = [layer.pair for layer in after if layer.kind == "J" and layer.pair in looked]
        memory = any(layer.kind == "L" for layer in after)
        manifests.append(Manifest(memory, tuple(sorted(waiting))))
    return tuple(manifests)
