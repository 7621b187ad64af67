"""Generates completions with the model that is being trained, on the ranks that train it.

There is no second copy of the weights and no second engine: prompts and single tokens run through
the same layers, schedule and groups as a training step, on any layout. A pipeline works on as many
lanes of rows as it has stages. A prompt is prefilled once for all of its completions. Rows that
finish are refilled with the next prompt as soon as there is room for all of its completions.

Expert parallelism couples the forward passes of all replicas. All ranks of the job therefore take
the same turns, prefill or decoding step, until the last replica is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm import platform
from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.sample import Sample
from megatron_mm.data.tiles import image_settings
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import receive
from megatron_mm.generation.lanes import Completion, Lane
from megatron_mm.generation.sampling import Sampling, draw, gumbels, uniforms
from megatron_mm.model.layers.output import Predictions
from megatron_mm.model.routing import Routes, whole_routes
from megatron_mm.model.segments import Segments
from megatron_mm.parallel.groups import Groups

# Rows per context-parallel rank in a decoding step are a multiple of this. For fewer rows MKL uses
# another matmul kernel, which adds in another order than the trainer's. The outputs of the gated
# delta rule then differ by 2e-8, but the norm after it divides by their size: for a head of size
# 1e-4, log-probabilities were 1e-5 from the trainer's. With the same kernel they are within 3e-6.
KERNEL_ROWS = 4


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
) -> list[list[Completion]] | None:
    """Generates `num_generations` completions of each prompt of this replica.

    Every rank of the job calls it; replicas may have different numbers of prompts.

    Args:
        max_num_seqs: number of completions a replica generates at a time, but at least those of
            one prompt.
        record_routes: whether to return the experts that this rank's layers chose.
        stop: asked before every turn whether to stop.

    Returns:
        Completions by prompt, the same on all ranks of the replica except for routes, which are
        those of a rank's own layers. None if `stop` returned true on any rank of the job.

    Raises:
        DataError: on every rank, if a prompt could not be read.
    """
    generation = _Generation(
        engine, prompts, sampling, num_generations, max_num_seqs, pad_id, record_routes
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
    ):
        self.engine, self.prompts, self.sampling = engine, prompts, sampling
        self.group, self.pad_id, self.record_routes = group, pad_id, record_routes
        run = engine.run
        self.multiple, self.settings = token_multiple(run), image_settings(run)
        self.budget = run.training.micro_batch_size * run.data.seq_length
        stages = engine.groups.pg.pp.size()
        rows_each, self.row_multiple = rows_of_a_lane(run, engine.groups.pg, group, rows)
        self.lanes = [Lane(rows_each, sampling.max_tokens) for _ in range(stages)]
        self.next_prompt, self.stopped = 0, False
        self.waiting: Sample | None = None  # on the reader: already read, but it did not fit
        self.found: list[list] = [[None] * group for _ in prompts.numbers]

    @property
    def left(self) -> int:
        return len(self.prompts.numbers) - self.next_prompt

    def next_turn(self, stop: bool) -> Callable[[], None] | None:
        """Returns the turn that all ranks of the job take next; None when they are done."""
        fill = self.left > 0 and any(lane.free >= self.group for lane in self.lanes)
        busy = any(lane.free < lane.cache.rows for lane in self.lanes)
        wishes = torch.tensor([stop, fill, busy], dtype=torch.int32)
        world = self.engine.groups.world
        if world.size() > 1:
            dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=world)
        self.stopped, fill, busy = map(bool, wishes.tolist())
        if self.stopped or not (fill or busy):
            return None
        return self.prefill if fill else self.step

    def prefill(self) -> None:
        batches, _ = receive(self.engine.groups, self._admit)
        fillings = []
        for lane, batch in zip(self.lanes, batches, strict=True):
            first, self.next_prompt = self.next_prompt, self.next_prompt + len(batch.samples)
            chosen = range(first, self.next_prompt)
            numbers = self.prompts.numbers[chosen.start : chosen.stop]
            fillings.append(lane.fill(batch, chosen, numbers, self.group))
        logits = self._forward(batches, last_positions)
        for lane in self.lanes:
            lane.cache.filling = None
        self._advance([f.rows_A for f in fillings], [f.prompt_A for f in fillings], logits)

    def step(self) -> None:
        if not self.left:
            for lane in self.lanes:
                lane.shrink(self.row_multiple)
        batches = [lane.next_tokens(self.pad_id) for lane in self.lanes]
        if self.sampling.router_temperature:
            for lane, batch in zip(self.lanes, batches, strict=True):
                batch.route_noise = self._route_noise(lane)
        logits = self._forward(batches, _everywhere)
        rows = [lane.busy_rows for lane in self.lanes]
        for lane, busy in zip(self.lanes, rows, strict=True):
            lane.cache.lengths_R[busy] += 1
        self._advance(rows, rows, logits)

    def _admit(self) -> list[Microbatch]:
        """Reads the next prompts, consecutive ones for each lane; called on the reader. A lane gets
        more tokens than a training microbatch may hold only if a single prompt has more."""
        number, left, batches = self.next_prompt, self.left, []
        for index, lane in enumerate(self.lanes):
            share = min(lane.free // self.group, -(-left // (len(self.lanes) - index)))
            samples: list[Sample] = []
            tokens = 0
            while len(samples) < share:
                sample = self.waiting or self.prompts.read(number)
                self.waiting = None
                tokens += len(sample.tokens_T)
                if samples and tokens > self.budget:
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

    def _forward(self, batches: list[Microbatch], positions: Callable) -> list[torch.Tensor]:
        """Returns each lane's logits, fp32 [positions, V], on the last stage."""
        size = self.engine.run.model.language.vocab_size
        finish = partial(whole_logits, wanted=positions, groups=self.engine.groups, vocab_size=size)
        caches = [lane.cache for lane in self.lanes]
        routes: list[Routes] | None = [{} for _ in self.lanes] if self.record_routes else None
        logits = self.engine.forward(batches, positions, finish, caches=caches, routes=routes)
        for lane, batch, record in zip(self.lanes, batches, routes or [], strict=False):
            whole = whole_routes(record, self.engine.groups.pg)
            if whole:  # a stage may have no experts
                stacked = torch.stack([whole[index] for index in sorted(whole)], 1)
                segments = Segments.from_cu_seqlens(batch.cu_seqlens, stacked.device)
                lane.cache.routes.put("experts", stacked, segments)
        return logits

    def _advance(
        self, rows: list[torch.Tensor], sources: list[torch.Tensor], logits: list[torch.Tensor]
    ) -> None:
        """Draws the next tokens. For each lane, `rows` are the rows to advance and `sources` the
        rows of its logits to draw from."""
        groups, counts = self.engine.groups, [len(there) for there in rows]
        drawn = torch.zeros(sum(counts), 2, dtype=torch.float64)  # holds any token id exactly
        if groups.is_last_stage:
            parts = [
                self._draw(lane, there, logits_KV.index_select(0, source.to(logits_KV.device)))
                for lane, there, source, logits_KV in zip(
                    self.lanes, rows, sources, logits, strict=True
                )
            ]
            drawn = torch.cat(parts).cpu()
        if groups.replica.size() > 1:
            last = groups.replica.size() - groups.replica.size() // groups.pg.pp.size()
            dist.broadcast(drawn, group=groups.replica, group_src=last)
        for lane, there, part in zip(self.lanes, rows, drawn.split(counts), strict=True):
            tokens, logprobs = part[:, 0].long(), part[:, 1].float()
            ended = lane.advance(there, tokens, logprobs, self.sampling.stop_ids)
            for prompt, sample, completion in ended:
                self.found[prompt][sample] = completion

    def _draw(self, lane: Lane, rows: torch.Tensor, logits_NV: torch.Tensor) -> torch.Tensor:
        uniform = uniforms(self.sampling.seed, lane.number_R[rows], lane.count_R[rows])
        tokens, logprobs = draw(logits_NV, self.sampling, uniform)
        return torch.stack((tokens.double(), logprobs.double()), 1)

    def _route_noise(self, lane: Lane) -> dict[int, torch.Tensor]:
        """Returns scaled Gumbel noise, fp32 [R, E], for each MoE layer of this rank."""
        sampling, device = self.sampling, platform.device()
        layers = [index for chunk in self.engine.chunks for index in chunk.moe_layers]
        experts = self.engine.run.model.language.num_experts
        first_L = experts * torch.tensor(layers, dtype=torch.int64, device=device)
        place_LE = first_L.unsqueeze(1) + torch.arange(experts, device=device)
        number_R, count_R = lane.number_R.to(device), lane.count_R.to(device)
        noise = gumbels(sampling.seed, number_R, count_R, place_LE.flatten())
        noise_RLE = sampling.router_temperature * noise.view(len(number_R), len(layers), experts)
        return dict(zip(layers, noise_RLE.unbind(1), strict=True))


def rows_of_a_lane(
    run: RunConfig, pg: ProcessGroupCollection, group: int, rows: int
) -> tuple[int, int]:
    """Returns how many rows a lane has, and the number of which that is a multiple.

    Args:
        group: completions of a prompt, which a lane has room for.
        rows: that a replica asks for.
    """
    multiple = math.lcm(token_multiple(run), KERNEL_ROWS * pg.cp.size())
    wanted = max(group, -(-rows // pg.pp.size()))
    return -(-wanted // multiple) * multiple, multiple


def last_positions(batch: Microbatch) -> torch.Tensor:
    """Last position of each sample, where its next token is predicted; not of the padding tail."""
    ends = batch.cu_seqlens[1:]
    return ends[ends <= batch.num_real_tokens] - 1


def _everywhere(batch: Microbatch) -> torch.Tensor:
    return torch.arange(len(batch.tokens_T))


def whole_logits(
    predictions: Predictions,
    batch: Microbatch,
    positions: torch.Tensor,
    wanted: Callable[[Microbatch], torch.Tensor],
    groups: Groups,
    vocab_size: int,
) -> torch.Tensor:
    """Gathers logits, fp32 [wanted positions, V], on every tensor- and context-parallel rank.

    Args:
        predictions: at `positions`, the wanted ones that this context-parallel rank holds.
        wanted: batch -> all wanted positions.
    """
    tp, cp = groups.pg.tp, groups.pg.cp
    logits = predictions.logits().float()
    if tp.size() > 1:
        slices = [torch.empty_like(logits) for _ in range(tp.size())]
        dist.all_gather(slices, logits, group=tp)
        logits = torch.cat(slices, 1)[:, :vocab_size]  # without padding
    if cp.size() > 1:
        everywhere = wanted(batch)
        whole = logits.new_zeros(len(everywhere), logits.shape[1])
        whole[torch.isin(everywhere, positions)] = logits[torch.isin(positions, everywhere)]
        dist.all_reduce(whole, group=cp)
        logits = whole
    return logits
