"""The contents of the wire: what crosses a boundary of pipeline stages besides the hidden state.

Pure functions of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.pattern import Stage


@dataclass(frozen=True)
class Manifest:
    """Contents of one stage boundary besides the hidden state, each in the order of the wire.

    Attributes:
        memories: names, in alphabetical order.
        refinements: keys and numbers of pairs, ascending.
    """

    memories: tuple[str, ...]
    refinements: tuple[tuple[str, int], ...]


def wire(stages: Sequence[Stage], read: Sequence[str]) -> tuple[Manifest, ...]:
    """Returns the contents of the boundary between stage i and stage i + 1, for every i.

    A memory travels up to the last stage with a look that reads it; a refinement from the stage of
    its look to the stage of its injection.

    Args:
        read: the name of the memory that each layer reads, by `Layer.reader`.
    """
    manifests = []
    for boundary in range(1, len(stages)):
        before = [layer for stage in stages[:boundary] for layer in stage.layers]
        after = [layer for stage in stages[boundary:] for layer in stage.layers]
        opened = {layer.refinement for layer in before if LAYERS[layer.kind].pair == "opens"}
        closed = {layer.refinement for layer in after if LAYERS[layer.kind].pair == "closes"}
        memories = {read[layer.known_reader] for layer in after if LAYERS[layer.kind].reads_memory}
        manifests.append(Manifest(tuple(sorted(memories)), tuple(sorted(opened & closed))))
    return tuple(manifests)
