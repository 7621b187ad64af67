"""Generates completions with the model that is being trained, on the ranks that train it.

There is no second copy of the weights and no second engine: prompts and single tokens run through
the same layers, schedule and groups as a training step, on any layout. A pipeline works on as many
lanes of rows as it has stages. A prompt is prefilled once for all of its completions. Rows that
finish are refilled with the next prompt as soon as there is room for all of its completions.

Expert parallelism couples the forward passes of all replicas. All ranks of the job therefore take
the same turns, a prefill or a few decoding steps, until the last replica is done.

A step waits for nothing: tokens are drawn on the device and go into the next step from there. The
host reads them at the end of a turn, when it also finds the completions that have ended.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.parallel_state import get_global_memory_buffer

from megatron_mm import platform
from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.sample import Sample, Size
from megatron_mm.data.tiles import image_settings
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import receive
from megatron_mm.generation.exchange import Drawn, on_the_host, row_logits, share, whole_logits
from megatron_mm.generation.graphs import Replayed, recorder
from megatron_mm.generation.lanes import Completion, Lane
from megatron_mm.generation.sampling import Sampling, draw, gumbels, uniforms
from megatron_mm.model.routing import Routes, whole_routes
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.agreement import largest

# Rows per context-parallel rank in a decoding step are a multiple of this. For fewer rows MKL uses
# another matmul kernel, which adds in another order than the trainer's. The outputs of the gated
# delta rule then differ by 2e-8, but the norm after it divides by their size: for a head of size
# 1e-4, log-probabilities were 1e-5 from the trainer's. With the same kernel they are within 3e-6.
KERNEL_ROWS = 4
# A GPU waits for the host, and ranks for each other, once a turn. A row that ends inside a turn is
# computed to its end.
TOKENS_A_TURN = 8


@dataclass(frozen=True)
class Prompts:
    """Prompts of one replica.

    Attributes:
        read: index -> prompt, called only on the replica's reader, once for each and in order. May
            raise DataError.
        numbers: a number per prompt that is unique in the job and seeds the draws of its
            completions. The same on all ranks of the replica.
    """

    read: Callable[[int], Sample]
    numbers: Sequence[int]


def generate(
    engine: Engine,
    prompts: Prompts,
    sampling: Sampling,
    *,
    num_generations: int = 1,
    max_num_seqs: int,
    pad_id: int,
    record_routes: bool = False,
    stop: Callable[[], bool] = lambda: False,
    tokens_a_turn: int = TOKENS_A_TURN,
) -> list[list[Completion]] | None:
    """Generates `num_generations` completions of each prompt of this replica.

    Every rank of the job calls it; replicas may have different numbers of prompts.

    Args:
        max_num_seqs: number of completions a replica generates at a time, but at least those of
            one prompt.
        record_routes: whether to return the experts that this rank's layers chose.
        stop: asked before every turn whether to stop.
        tokens_a_turn: tokens that every row draws before the host looks at them and all ranks
            agree on the next turn. It changes no completion, up to rounding.

    Returns:
        Completions by prompt, the same on all ranks of the replica except for routes, which are
        those of a rank's own layers. None if `stop` returned true on any rank of the job.

    Raises:
        DataError: on every rank, if a prompt could not be read.
    """
    generation = _Generation(
        engine,
        prompts,
        sampling,
        num_generations,
        max_num_seqs,
        pad_id,
        record_routes,
        tokens_a_turn,
    )
    training = engine.chunks[0].training
    engine.training(False)
    try:
        while (turn := generation.next_turn(stop())) is not None:
            with torch.no_grad():
                turn()
    finally:
        engine.training(training)
    return None if generation.stopped else generation.found


class _Generation:
    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        sampling: Sampling,
        group: int,
        rows: int,
        pad_id: int,
        record_routes: bool,
        every: int,
    ):
        self.engine, self.prompts, self.sampling, self.every = engine, prompts, sampling, every
        self.group, self.pad_id, self.record_routes = group, pad_id, record_routes
        run = engine.run
        self.multiple, self.settings = token_multiple(run), image_settings(run)
        self.most = Size(
            run.training.micro_batch_size * run.data.seq_length,
            sys.maxsize if run.data.max_pack_tiles is None else run.data.max_pack_tiles,
        )
        stages = engine.groups.pg.pp.size()
        rows_each, self.row_multiple = rows_of_a_lane(run, group, rows)
        self.lanes = [
            Lane(rows_each, sampling.max_tokens, pad_id, every, sampling.looks)
            for _ in range(stages)
        ]
        self.next_prompt, self.stopped = 0, False
        self.waiting: Sample | None = None  # on the reader: already read, but it did not fit
        self.found: list[list] = [[None] * group for _ in prompts.numbers]
        size = run.model.language.vocab_size
        self.gather: dict[str, Any] = {"groups": engine.groups, "vocab_size": size}
        self.replayed = Replayed(recorder(engine, sampling))

    @property
    def left(self) -> int:
        return len(self.prompts.numbers) - self.next_prompt

    def next_turn(self, stop: bool) -> Callable[[], None] | None:
        """Returns the turn that all ranks of the job take next; None when they are done."""
        fill = int(self.left > 0 and any(lane.free >= self.group for lane in self.lanes))
        steps = min(self.every, max(lane.left for lane in self.lanes))
        rows = max(lane.needed(self.row_multiple) for lane in self.lanes)
        wishes = [int(stop), fill, steps, self.left, rows]
        if self.engine.groups.world.size() > 1:
            wishes = largest(wishes)
        stopped, fill, steps, left, rows = wishes
        self.stopped = bool(stopped)
        if self.stopped or not (fill or steps):
            return None
        if fill:
            return self.prefill
        if not left:  # all lanes of the job stay of one size: ranks may share their rows' experts
            for lane in self.lanes:
                lane.shrink(rows)
        return partial(self.steps, steps)

    def prefill(self) -> None:
        batches, _ = receive(self.engine.groups, self._admit)
        fillings = []
        for lane, batch in zip(self.lanes, batches, strict=True):
            first, self.next_prompt = self.next_prompt, self.next_prompt + len(batch.samples)
            chosen = range(first, self.next_prompt)
            numbers = self.prompts.numbers[chosen.start : chosen.stop]
            fillings.append(lane.fill(batch, chosen, numbers, self.group))
        finish = partial(whole_logits, wanted=last_positions, **self.gather)
        logits = self._forward(batches, last_positions, finish)
        for lane in self.lanes:
            lane.cache.filling = None
        rows = [filling.rows_A for filling in fillings]
        logits = [
            logits_NV.index_select(0, filling.prompt_A.to(logits_NV.device))
            for filling, logits_NV in zip(fillings, logits, strict=False)
        ]
        drawn = self._draw(logits, [uniform[0] for uniform in self._uniforms(rows, 1)])
        for lane, there, (tokens, _) in zip(self.lanes, rows, drawn, strict=True):
            lane.begin(there, tokens)
        self._append(rows, rows, [drawn])

    def steps(self, count: int) -> None:
        """Draws `count` tokens for every row. The host learns of them when all are drawn."""
        every = [torch.arange(lane.cache.rows) for lane in self.lanes]
        longest = [lane.longest for lane in self.lanes]
        uniforms = self._uniforms(every, count)
        noises = [self._route_noise(lane) for lane in self.lanes]
        drawn = []
        for step in range(count):
            for lane, positions, uniform, noise in zip(
                self.lanes, longest, uniforms, noises, strict=True
            ):
                lane.cache.read(positions + step)
                lane.uniform_R.copy_(uniform[step])
                lane.batch.route_noise = noise and noise(step)
            caches = [lane.cache for lane in self.lanes]
            shape = tuple((cache.rows, cache.span, cache.room, *cache.branches) for cache in caches)
            drawn.append(self.replayed.run(self.step, shape, self._addresses))
        self._append(every, [lane.busy_rows for lane in self.lanes], drawn)

    def step(self) -> list[Drawn]:
        """Draws a token for every row. It reads and writes the lanes' tensors where they are."""
        batches = [lane.batch for lane in self.lanes]
        logits = self._forward(batches, None, partial(row_logits, **self.gather))
        drawn = self._draw(logits, [lane.uniform_R for lane in self.lanes])
        drawn = [
            (lane.forced(tokens), logprobs)
            for lane, (tokens, logprobs) in zip(self.lanes, drawn, strict=True)
        ]
        for lane, (tokens, _) in zip(self.lanes, drawn, strict=True):
            lane.advance(tokens)
        return drawn

    def _addresses(self) -> tuple:
        # megatron-core gathers sequences into buffers of the process, which grow by moving.
        shared = get_global_memory_buffer().buffer.values()
        return tuple(lane.addresses for lane in self.lanes), tuple(x.data_ptr() for x in shared)

    def _admit(self) -> list[Microbatch]:
        """Reads the next prompts, consecutive ones for each lane; called on the reader. A lane gets
        more tokens than a training microbatch may hold, or more tiles than a pack may, only if a
        single prompt has more."""
        number, left, batches = self.next_prompt, self.left, []
        for index, lane in enumerate(self.lanes):
            share = min(lane.free // self.group, -(-left // (len(self.lanes) - index)))
            samples: list[Sample] = []
            tokens, tiles = 0, 0
            while len(samples) < share:
                sample = self.waiting or self.prompts.read(number)
                self.waiting = None
                size = sample.size
                tokens, tiles = tokens + size.tokens, tiles + size.tiles
                if samples and (tokens > self.most.tokens or tiles > self.most.tiles):
                    self.waiting = sample
                    break
                samples.append(sample)
                number += 1
            left -= len(samples)
            batches.append(
                collate(
                    samples, settings=self.settings, pad_id=self.pad_id, pad_multiple=self.multiple
                )
            )
        return batches

    def _forward(
        self, batches: list[Microbatch], positions: Callable | None, finish: Callable
    ) -> list[torch.Tensor]:
        """Returns each lane's logits, fp32 [positions, V], on the last stage."""
        caches = [lane.cache for lane in self.lanes]
        routes: list[Routes] | None = [{} for _ in self.lanes] if self.record_routes else None
        logits = self.engine.forward(batches, positions, finish, caches=caches, routes=routes)
        for lane, batch, record in zip(self.lanes, batches, routes or [], strict=False):
            whole = whole_routes(record, self.engine.groups.pg)
            if whole:  # a stage may have no experts
                stacked = torch.stack([whole[index] for index in sorted(whole)], 1)
                segments = None
                if not lane.cache.stepping:
                    segments = Segments.from_cu_seqlens(batch.cu_seqlens, stacked.device)
                lane.cache.routes.put("experts", stacked, segments)
        return logits

    def _uniforms(self, rows: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        """Returns the numbers that the next `count` draws of each lane's rows take, fp64
        [count, rows], on the device; 0 for free rows, which then do the same in turns of any
        size. What they do decides how many rows an expert has, and so its kernel."""
        found = []
        for lane, there in zip(self.lanes, rows, strict=True):
            step = lane.count_R[there] + torch.arange(count).unsqueeze(1)
            free = ~lane.active_R[there]
            numbers = uniforms(self.sampling.seed, lane.number_R[there], step)
            found.append(numbers.masked_fill_(free, 0.0))
        return [platform.moved(x, platform.device()) for x in found]

    def _draw(self, logits: list[torch.Tensor], uniforms: list[torch.Tensor]) -> list[Drawn]:
        """Draws a token for each row of each lane, on the device of every rank of the replica."""
        drawn = [
            draw(logits_NV, self.sampling, uniform)
            for logits_NV, uniform in zip(logits, uniforms, strict=False)
        ]
        return share(drawn, [len(uniform) for uniform in uniforms], self.engine.groups)

    def _append(
        self, drawn_for: list[torch.Tensor], rows: list[torch.Tensor], drawn: list[list[Drawn]]
    ) -> None:
        """Appends drawn tokens to completions.

        Args:
            drawn_for: the rows of each lane that tokens were drawn for, in ascending order.
            rows: those of them that are generating.
        """
        counts = [len(there) for there in drawn_for]
        parts = (x.split(counts) for x in on_the_host(drawn))
        for lane, held, there, tokens, logprobs in zip(
            self.lanes, drawn_for, rows, *parts, strict=True
        ):
            at = torch.searchsorted(held, there)
            stops = self.sampling.stop_ids
            for prompt, sample, completion in lane.append(there, tokens[at], logprobs[at], stops):
                self.found[prompt][sample] = completion

    def _route_noise(self, lane: Lane) -> Callable[[int], dict[int, torch.Tensor]] | None:
        """Returns step -> scaled Gumbel noise, fp32 [R, E], for each MoE layer of this rank; None
        if routers are greedy."""
        sampling, device = self.sampling, platform.device()
        if not sampling.router_temperature:
            return None
        layers = [index for chunk in self.engine.chunks for index in chunk.moe_layers]
        experts = self.engine.run.model.language.num_experts
        first_L = experts * torch.tensor(layers, dtype=torch.int64)
        place_LE = platform.moved(first_L.unsqueeze(1) + torch.arange(experts), device)
        # Free rows do the same in turns of any size, as in `_uniforms`.
        active_R = lane.active_R.long()
        held = lane.number_R * active_R, lane.count_R * active_R, active_R
        number_R, count_R, moving_R = (platform.moved(x, device) for x in held)

        def noise(step: int) -> dict[int, torch.Tensor]:
            drawn = gumbels(sampling.seed, number_R, count_R + step * moving_R, place_LE.flatten())
            scaled = sampling.router_temperature * drawn.view(len(number_R), len(layers), experts)
            return dict(zip(layers, scaled.unbind(1), strict=True))

        return noise


def rows_of_a_lane(run: RunConfig, group: int, rows: int) -> tuple[int, int]:
    """Returns how many rows a lane has, and the number of which that is a multiple.

    Args:
        group: completions of a prompt, which a lane has room for.
        rows: that a replica asks for.
    """
    par = run.parallel
    multiple = math.lcm(token_multiple(run), KERNEL_ROWS * par.context_parallel_size)
    wanted = max(group, -(-rows // par.pipeline_model_parallel_size))
    return -(-wanted // multiple) * multiple, multiple


def last_positions(batch: Microbatch) -> torch.Tensor:
    """Last position of each sample, where its next token is predicted; not of the padding tail."""
    ends = batch.cu_seqlens[1:]
    return ends[ends <= batch.num_real_tokens] - 1
