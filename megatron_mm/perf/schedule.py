"""The order in which a pipeline rank computes, and its memory in flight, time and bubble.

Pure functions of sizes. The orders are those of megatron-core's two schedules: 1F1B, and
interleaved 1F1B in groups of as many microbatches as ranks (Narayanan et al. 2021, arXiv
2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mm.perf.trace import ChunkTrace


class Event(NamedTuple):
    """One microbatch through one of the rank's stages."""

    forward: bool
    chunk: int
    microbatch: int


def events(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Event]:
    """The passes that pipeline rank `rank` of `ranks` computes in a step, in order.

    Args:
        chunks: stages on each rank; with several, `microbatches` is a multiple of `ranks`.
    """
    total = microbatches * chunks
    if chunks == 1:
        warm_up = min(ranks - rank - 1, total)
    else:
        warm_up = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, total)

    def at(number: int, forward: bool) -> Event:
        if chunks == 1:
            return Event(forward, 0, number)
        round_, inside = divmod(number, ranks * chunks)
        chunk, place = divmod(inside, ranks)
        chunk = chunk if forward else chunks - 1 - chunk
        return Event(forward, chunk, round_ * ranks + place)

    order = [at(number, True) for number in range(warm_up)]
    for number in range(total - warm_up):
        order += [at(warm_up + number, True), at(number, False)]
    return order + [at(number, False) for number in range(total - warm_up, total)]


def activation_peak(order: Sequence[Event], traces: Sequence[ChunkTrace]) -> int:
    """The largest number of bytes of activations that a rank holds at a time in a step.

    Beside what microbatches in flight hold there are tensors between stages. 1F1B's variables
    still name those of the last backward pass. The interleaved schedule exchanges while it
    computes: of every stage one tensor each way is there before its turn, or not yet gone.
    (That it is about one was seen on PP2 x VPP2, which no test of this estimate uses.)
    """
    live = peak = 0
    gradient = others = 0  # of the last backward pass, still named by the schedule's variables
    for event in order:
        trace = traces[event.chunk]
        if event.forward:
            peak = max(peak, live + gradient + others + trace.forward_peak)
            live += trace.held
        else:
            live -= trace.held
            peak = max(peak, live + gradient + trace.backward_peak)
            gradient, others = trace.arrives, 2 * trace.leaves
            live += trace.grows
    early_or_late = sum(trace.arrives + trace.leaves for trace in traces)
    stays = sum(trace.stays for trace in traces)
    return peak + stays + (early_or_late if len(traces) > 1 else 0)


@dataclass(frozen=True)
class Timeline:
    """
    Attributes:
        seconds: from the first forward pass to the last backward pass of any rank.
        busy: seconds that each rank computes.
    """

    seconds: float
    busy: list[float]

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait for each other."""
        return max(0.0, 1 - sum(self.busy) / (len(self.busy) * self.seconds))  # rounding


def timeline(
    ranks: int,
    microbatches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    wire: Sequence[float] = (),
) -> Timeline:
    """Times a step: every rank does its events in order, each as soon as its input is there.

    Args:
        forward, backward: seconds of each stage for a microbatch, in the order of the model.
        wire: seconds from each stage to the next; default: none.
    """
    stages = len(forward)
    wire = wire or [0.0] * stages
    orders = [events(rank, ranks, stages // ranks, microbatches) for rank in range(ranks)]
    done: dict[tuple[bool, int, int], float] = {}
    clock, at, left = [0.0] * ranks, [0] * ranks, sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                event = order[at[rank]]
                stage = event.chunk * ranks + rank
                ready = _ready(event, stage, stages, done, wire)
                if ready is None:
                    break
                took = forward[stage] if event.forward else backward[stage]
                clock[rank] = max(clock[rank], ready) + took
                done[event.forward, stage, event.microbatch] = clock[rank]
                at[rank] += 1
                left -= 1
        if left == before:
            raise ValueError("the ranks' orders wait for each other")
    busy = [
        microbatches * sum(forward[s] + backward[s] for s in range(rank, stages, ranks))
        for rank in range(ranks)
    ]
    return Timeline(max(clock), busy)


def _ready(event: Event, stage: int, stages: int, done: dict, wire: Sequence[float]):
    """The time at which its input is there; None if not known yet."""
    batch = event.microbatch
    if event.forward:
        if stage == 0:
            return 0.0
        sent = done.get((True, stage - 1, batch))
        return None if sent is None else sent + wire[stage - 1]
    if stage == stages - 1:
        return done.get((True, stage, batch))
    sent = done.get((False, stage + 1, batch))
    return None if sent is None else sent + wire[stage]
