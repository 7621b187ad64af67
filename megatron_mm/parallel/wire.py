"""The packed tensor that crosses a pipeline boundary, and its split on arrival.

megatron-core's 1F1B schedule runs autograd on a single tensor per boundary, so the hidden
state, the vision memories and the pending refinements travel as one tensor [rows, 1, H],
concatenated along the sequence. Each tensor-parallel rank packs its own shard. Rows of a
memory are narrower than H: as many as fit are folded into one.

Shapes: T tokens of this rank's sequence shard, M memory rows of this rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Payload:
    """The state of the model between two layers, on one rank."""

    hidden_T1H: torch.Tensor
    memories: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> [M, 1, its width]
    # (key, number) of a pair -> [T, 1, H]
    refinements: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryShape:
    """One memory on the wire: rows and width before they are folded."""

    name: str
    rows: int
    width: int


@dataclass(frozen=True)
class WireShape:
    """Row counts of each part of the packed tensor of one microbatch on one rank, in order."""

    hidden_rows: int
    memories: tuple[MemoryShape, ...]
    refinements: tuple[tuple[str, int], ...]

    def sizes(self, hidden_size: int) -> list[int]:
        """Returns the rows of each part of the packed tensor."""
        folded = [memory.rows * memory.width // hidden_size for memory in self.memories]
        return [self.hidden_rows, *folded, *([self.hidden_rows] * len(self.refinements))]


def pack(payload: Payload, shape: WireShape) -> torch.Tensor:
    """Returns [rows, 1, H], always a fresh tensor, as schedules want it that free its storage."""
    hidden = payload.hidden_T1H
    parts = [hidden]
    for memory in shape.memories:
        parts.append(payload.memories[memory.name].reshape(-1, 1, hidden.shape[-1]))
    parts += [payload.refinements[pair] for pair in shape.refinements]
    return torch.cat(parts)


def unpack(packed: torch.Tensor, shape: WireShape) -> Payload:
    """Inverts `pack`, differentiably.

    Raises:
        ValueError: if the tensor does not have the number of rows that the batch implies.
    """
    sizes = shape.sizes(packed.shape[-1])
    if sum(sizes) != packed.shape[0]:
        raise ValueError(
            f"a pipeline stage received {packed.shape[0]} rows but its batch implies {sum(sizes)}: "
            "the stages read different batches"
        )
    hidden, *parts = packed.split(sizes)
    count = len(shape.memories)
    memories = {
        memory.name: part.reshape(-1, 1, memory.width)
        for memory, part in zip(shape.memories, parts[:count], strict=True)
    }
    return Payload(hidden, memories, dict(zip(shape.refinements, parts[count:], strict=True)))
