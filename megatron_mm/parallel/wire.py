"""What crosses a pipeline boundary: one packed tensor, split again on arrival.

megatron-core's 1F1B schedule runs autograd on a single tensor per boundary, so the hidden
state, the vision memory and the pending refinements travel as one tensor [rows, 1, H],
concatenated along the sequence. Each tensor-parallel rank packs its own shard. The
memory, narrower than H, is folded H / M rows into one.

Shapes: T tokens of this rank's sequence shard, M memory rows of this rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Payload:
    """The state of the model between two layers, on one rank."""

    hidden_T1H: torch.Tensor
    memory_M1C: torch.Tensor | None = None  # C: memory width
    refinements: dict[int, torch.Tensor] = field(default_factory=dict)  # pair -> [T, 1, H]


@dataclass(frozen=True)
class WireShape:
    """How many rows of what lie in the packed tensor of one microbatch on one rank."""

    hidden_rows: int
    memory_rows: int  # unfolded rows of width memory_width; 0 if the memory does not travel
    memory_width: int
    refinements: tuple[int, ...]


def pack(payload: Payload, shape: WireShape) -> torch.Tensor:
    """[rows, 1, H], always a fresh tensor (the schedule may free its storage)."""
    hidden = payload.hidden_T1H
    parts = [hidden]
    if shape.memory_rows:
        parts.append(payload.memory_M1C.reshape(-1, 1, hidden.shape[-1]))
    parts += [payload.refinements[pair] for pair in shape.refinements]
    return torch.cat(parts)


def unpack(packed: torch.Tensor, shape: WireShape) -> Payload:
    """The inverse of `pack`, differentiable.

    Raises:
        ValueError: the tensor does not have the number of rows that the batch implies.
    """
    width = packed.shape[-1]
    memory_folded = shape.memory_rows * shape.memory_width // width
    sizes = [shape.hidden_rows, memory_folded, *([shape.hidden_rows] * len(shape.refinements))]
    if sum(sizes) != packed.shape[0]:
        raise ValueError(
            f"a pipeline stage received {packed.shape[0]} rows but its batch implies {sum(sizes)}: "
            "the stages read different batches"
        )
    hidden, memory, *refined = packed.split(sizes)
    return Payload(
        hidden,
        memory.reshape(-1, 1, shape.memory_width) if shape.memory_rows else None,
        dict(zip(shape.refinements, refined, strict=True)),
    )
