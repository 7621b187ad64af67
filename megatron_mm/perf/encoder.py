"""The encoder beside the pipeline (`vision_parallel` replica) on one rank, in a whole step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed import ProcessGroup

from megatron_mm.data.batch import Dealt, Microbatch
from megatron_mm.engine.encoder import EncoderSide
from megatron_mm.model.vision_tower import Encoded
from megatron_mm.perf.again import repeats
from megatron_mm.perf.kernels import Kernel, Link, Work
from megatron_mm.perf.recorder import Recorder
from megatron_mm.perf.standins import fused_kernels


@dataclass(frozen=True)
class EncoderTrace:
    """Memory and work of the two passes; bytes beside parameters and gradients.

    Attributes:
        elements, trained: parameters of the encoder here, and those of them that have gradients.
        leaves: bytes of what all microbatches read during the schedule; on the first stage.
        first_peak: the most that the pass before the schedule holds.
        second_peak: the most that the pass after it holds, leaves and their gradients included;
            0 if nothing in the encoder is trained.
        forward, backward: work of the passes; the second encodes again.
        kernels: of the two passes, in the order of their launch; none in a rough plan.
    """

    elements: int
    trained: int
    leaves: int
    first_peak: int
    second_peak: int
    forward: Work
    backward: Work
    kernels: tuple[Sequence[Kernel], Sequence[Kernel]] = ((), ())

    @property
    def peak(self) -> int:
        """The most that either pass holds."""
        return max(self.first_peak, self.second_peak)

    @property
    def model_flops(self) -> int:
        """FLOPs of a step on one rank, nothing computed twice."""
        once = self.backward.flops - self.backward.again
        # Where the second pass runs, it encodes everything again.
        return max(self.forward.flops, once)


def dealt(batch: Microbatch, count: int, group: ProcessGroup) -> list[Microbatch]:
    """Returns `count` microbatches like this one as this rank has them, an owner of their tiles.

    Args:
        group: all owners.
    """
    owner, owners = group.rank(), group.size()
    tiles = len(batch.pixels_NCHW)
    deals = [Dealt(number * tiles, tiles) for number in range(count)]
    return [
        replace(batch, dealt=deal, pixels_NCHW=batch.pixels_NCHW[: len(deal.of(owner, owners))])
        for deal in deals
    ]


def trace_encoder(
    side: EncoderSide, recorder: Recorder, batch: Microbatch, microbatches: int
) -> tuple[EncoderTrace, Encoded]:
    """Runs the encoder of a fake rank for a step of microbatches like this one.

    Returns:
        the trace, and what one microbatch's first stage is given, which no recorder has counted.
    """
    batches = dealt(batch, microbatches, side.owners)
    start, begin = recorder.rebase(), len(recorder.kernels)
    with fused_kernels(recorder.add), recorder:
        encoded = side.encode(batches, train=True)
    first_peak, leaves = recorder.peak - start, recorder.live - start
    middle = len(recorder.kernels)
    trains = side.waiting is not None
    second_peak = 0
    if trains:
        with fused_kernels(recorder.add), repeats(recorder), recorder:
            for leaf in (x for one in encoded for x in (one.stream_kH, *one.memories.values())):
                if leaf.requires_grad:  # as the schedule leaves them
                    leaf.grad = torch.empty_like(leaf)
            recorder.rebase()
            side.backward()
        second_peak = recorder.peak - start
    passes = recorder.kernels[begin:middle], recorder.kernels[middle:]
    params = [*side.module.parameters()]
    found = EncoderTrace(
        sum(param.numel() for param in params),
        sum(param.numel() for param in params if param.requires_grad),
        leaves,
        first_peak,
        second_peak,
        Work.of(passes[0]),
        Work.of(passes[1]),
        passes,
    )
    one = encoded[0]
    given = Encoded(
        _like(one.stream_kH), {name: _like(rows) for name, rows in one.memories.items()}
    )
    return found, given


def rough_encoder(alone: EncoderTrace, samples: int, stages: int, first: bool) -> EncoderTrace:
    """A rank's share of the encoder in a step, from that of one sample without a pipeline.

    Args:
        samples: of the replica in a step.
        stages: pipeline ranks that share them; first: whether this one reads what they make.
    """
    share = samples / stages
    sent = Work(sent=Counter({Link("all_to_all", "owners"): round(alone.leaves * share)}))
    leaves = alone.leaves * samples if first else 0
    own = round(alone.leaves * share)
    return replace(
        alone,
        leaves=leaves,
        first_peak=alone.first_peak + 2 * own + 2 * leaves,
        second_peak=alone.second_peak and alone.second_peak + 2 * own + 4 * leaves,
        forward=alone.forward.times(share) + sent,
        backward=alone.backward.times(share) + (sent if alone.second_peak else Work()),
        kernels=((), ()),
    )


def _like(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(leaf.detach()).requires_grad_(leaf.requires_grad)
