"""Records the routes and next tokens of a model of ours, on any layout.

Shapes: T positions of the stream, t those that a rank holds, K supervised ones, L recorded layers,
k experts and n tokens recorded at a position, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from megatron_mm.data.batch import Microbatch
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.errors import DataError
from megatron_mm.mimic.recorded import Place, Recorded, place_of
from megatron_mm.mimic.rounds import Rows, read_rounds, to_rank_0
from megatron_mm.mimic.text import answer_starts, row_digest, token_digest
from megatron_mm.model.layers.output import Predictions
from megatron_mm.parallel.sequence import gather_shards
from megatron_mm.report.metrics import Metrics

AT_ONCE = 1024  # positions whose logits are held, in fp32: 600 MB of a whole vocabulary
Keep = Callable[[Place, Recorded], None]
Top = tuple[torch.Tensor, torch.Tensor]  # int, fp: the likeliest, and their probabilities


@dataclass
class Watch:
    """A `model.routing.RouterTerm` that notes the likeliest experts and teaches nothing."""

    layers: Collection[int]
    top: int
    noted: dict[tuple[str, ...], dict[int, Top]] = field(default_factory=dict)

    def __call__(
        self,
        logits_tE: torch.Tensor,
        batch: Microbatch,
        moe_index: int,
        positions: range,
        metrics: Metrics,
    ) -> None:
        if moe_index in self.layers:
            mine = self.noted.setdefault(tuple(batch.samples), {})
            mine[moe_index] = top_experts(logits_tE.float().softmax(1), self.top)


def top_experts(probabilities_tE: torch.Tensor, k: int) -> Top:
    """Returns the k likeliest experts, int16, and their probabilities, fp16."""
    best = probabilities_tE.topk(k, dim=1)
    return best.indices.to(torch.int16), best.values.to(torch.float16)


def top_tokens(predictions: Predictions, n: int) -> Top:
    """Returns the n likeliest next tokens of the whole vocabulary at each position, int32 [K, n],
    and their log-probabilities, fp32: on every tensor-parallel rank."""
    parts = predictions.hidden_KH.split(AT_ONCE)  # the same on all of them
    found = [_top_tokens(replace(predictions, hidden_KH=part), n) for part in parts]
    tokens, logprobs = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _top_tokens(predictions: Predictions, n: int) -> Top:
    logits_KV, tp = predictions.logits().float(), predictions.tp
    mass_K1 = logits_KV.logsumexp(1, keepdim=True)
    values_Kn, tokens_Kn = logits_KV.topk(min(n, logits_KV.shape[1]), dim=1)
    tokens_Kn = tokens_Kn + tp.rank() * logits_KV.shape[1]
    if tp.size() > 1:
        mass_K1, values_Kn, tokens_Kn = (
            torch.cat(_of_all(x, tp), 1) for x in (mass_K1, values_Kn, tokens_Kn)
        )
    values_Kn, place_Kn = values_Kn.topk(n, dim=1)
    logprobs_Kn = values_Kn - mass_K1.logsumexp(1, keepdim=True)
    # A position that is sure of one token may round to more than 0.
    return tokens_Kn.gather(1, place_Kn).int().cpu(), logprobs_Kn.clamp(max=0.0).cpu()


def _of_all(mine: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return parts


@dataclass
class _Parts:
    """Parts of one row's record that have come so far, from several ranks."""

    digests: tuple[bytes, bytes] | None = None
    start: torch.Tensor | None = None
    routes: dict[int, Top] = field(default_factory=dict)
    answers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def whole(self, layers: Sequence[int]) -> Recorded:
        assert self.digests is not None and self.start is not None  # of the row's reader
        self.answers.sort(key=lambda part: int(part[0][0]))  # of context-parallel ranks
        return Recorded(
            *self.digests,
            self.start,
            *(torch.stack([self.routes[layer][i] for layer in layers], 1) for i in (0, 1)),
            *(torch.cat([part[i] for part in self.answers]) for i in (1, 2)),
        )


def record(
    engine: Engine,
    tokenizer: Tokenizer,
    rows: Rows,
    layers: Sequence[int],
    top: int,
    answers: int,
    keep: Keep | None,
) -> None:
    """Reads rows and hands on what was recorded of each, on rank 0. Every rank of the job calls it.

    Args:
        layers: moe indices, ascending; top: experts of each; answers: next tokens, 0 or more.
        keep: called with each row, by `place_of`; None on other ranks than 0.
    Raises:
        DataError: on every rank, if a row is bad, or as `keep`.
    """
    texts: dict[str, tuple[tuple[bytes, bytes], torch.Tensor]] = {}

    def see(row: Mapping, where: str, sample) -> None:
        digests = row_digest(row, where), token_digest(sample)
        texts[where] = digests, answer_starts(sample, tokenizer)

    engine.training(False)
    for batches, new in read_rounds(engine, tokenizer, rows, see, lambda batch, _: batch):
        watch, pg = Watch({*layers}, top), engine.groups.pg
        said = engine.forward(
            batches,
            lambda batch: batch.supervised,
            lambda predictions, batch, positions: (
                positions,
                *(top_tokens(predictions, answers) if answers else _none(len(positions))),
            ),
            router_term=watch,
        )
        parts: dict[str, _Parts] = defaultdict(_Parts)
        for number, (batch, counts) in enumerate(zip(batches, new, strict=True)):
            noted = watch.noted.get(tuple(batch.samples), {})
            here = sorted(noted)
            whole: list[torch.Tensor] = []
            if here:  # every rank of tp_cp has the same layers
                whole = [
                    gather_shards(torch.stack([noted[i][part] for i in here], 1), pg).cpu()
                    for part in (0, 1)
                ]
            if not counts:
                continue
            if here and pg.tp_cp.rank() == 0:
                _cut_routes(parts, batch, here, whole)
            if engine.groups.is_last_stage and pg.tp.rank() == 0:
                _cut_answers(parts, batch, *said[number])
            if engine.groups.is_reader:
                for where in batch.samples:
                    parts[where].digests, parts[where].start = texts[where]
        texts.clear()
        merged: dict[str, _Parts] = defaultdict(_Parts)
        for of_rank in to_rank_0(engine, dict(parts)):
            for where, part in of_rank.items():
                into = merged[where]
                into.digests, into.start = part.digests or into.digests, _either(part, into)
                into.routes |= part.routes
                into.answers += part.answers
        error = None
        try:
            for where, part in merged.items():
                assert keep is not None  # only rank 0 is told
                keep(place_of(where), part.whole(layers))
        except DataError as problem:
            error = str(problem)
        raise_together(engine.groups, error)
    engine.training(True)


def _none(count: int) -> Top:
    return torch.zeros(count, 0, dtype=torch.int32), torch.zeros(count, 0)


def _either(part: _Parts, into: _Parts) -> torch.Tensor | None:
    return into.start if part.start is None else part.start


def _segments(batch: Microbatch) -> list[tuple[str, int, int]]:
    bounds = batch.cu_seqlens.tolist()
    return list(zip(batch.samples, bounds, bounds[1:], strict=False))  # the tail has no row


def _cut_routes(
    parts: dict[str, _Parts], batch: Microbatch, layers: list[int], whole: list[torch.Tensor]
) -> None:
    """Adds the routes of some layers, [T, L, k], to each row."""
    for where, begin, end in _segments(batch):
        chosen = batch.loss_mask_T[begin:end].nonzero().flatten() + begin
        for number, layer in enumerate(layers):
            parts[where].routes[layer] = whole[0][chosen, number], whole[1][chosen, number]


def _cut_answers(
    parts: dict[str, _Parts],
    batch: Microbatch,
    positions_K: torch.Tensor,
    tokens_Kn: torch.Tensor,
    logprobs_Kn: torch.Tensor,
) -> None:
    """Adds next tokens at some positions to their rows."""
    taught_K = batch.loss_mask_T[positions_K] > 0  # a rank without any computes one that is not
    for where, begin, end in _segments(batch):
        here = (positions_K >= begin) & (positions_K < end) & taught_K
        if here.any():
            parts[where].answers.append((positions_K[here], tokens_Kn[here], logprobs_Kn[here]))


def check_top(layers: Sequence[int], known: Sequence[int], top: int, experts: int) -> None:
    """Raises DataError for layers without experts, or more experts than there are."""
    odd = [layer for layer in layers if layer not in known]
    if odd:
        raise DataError(
            f"--layers names {odd[0]}; allowed: the teacher's layers of experts, "
            f"{', '.join(map(str, known))}"
        )
    if top > experts:
        raise DataError(f"--top is {top}; allowed: up to {experts}, the teacher's experts")
