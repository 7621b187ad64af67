"""Loss of the held-out rows: the negative log-likelihood of their own answers, by result key.

The model reads each row with its answer, as in training, and no gradient is taken. Ranks exchange
only sums, so every layout gives the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.loading.packing import chunks
from megatron_mm.data.sample import Size
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_from_reader, receive, rounds
from megatron_mm.errors import DataError
from megatron_mm.evaluation.evaluate import Results, open_questions
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.model.layers.output import Predictions

logger = logging.getLogger(__name__)

LOSS, TOKENS = "lm_loss", "answer_tokens"


def held_out_losses(
    engine: Engine, tokenizer: Tokenizer, stop: Callable[[], bool] = lambda: False
) -> Results:
    """Measures the loss of the answers in `valid_data`. Every rank of the job calls it.

    A row that ends without an answer has no loss; one that is too long with its answer is left
    out, and the log says so.

    Returns:
        by result key, the same on every rank: lm_loss, the mean over the supervised tokens (all of
        a row's assistant turns that training would learn), in nats, and answer_tokens, their
        number. Empty if no row has an answer, or `stop` returned true on any rank.

    Raises:
        DataError: on every rank, if a row is bad.
    """
    groups = engine.groups
    questions, keys = open_questions(engine, tokenizer)
    chunks, left_out = broadcast_from_reader(groups, lambda: _plan(engine.run, questions))
    if left_out:
        logger.warning("%d rows have no loss: %s", len(left_out), left_out[0])
    names = sorted({keys[index] for chunk in chunks for index in chunk})
    sums_N2 = torch.zeros(len(names), 2, dtype=torch.float64)
    multiple = token_multiple(engine.run)
    engine.training(False)
    for mine in rounds(groups, chunks):

        def read(mine: Sequence[Sequence[int]] = mine) -> list[Microbatch]:
            return [questions.answered(chunk or chunks[0], multiple) for chunk in mine]

        batches, stopping = receive(groups, read, stop())
        if stopping:
            engine.training(True)
            return {}
        numbered = [torch.tensor([names.index(keys[i]) for i in chunk]) for chunk in mine]
        sums_N2 += _sums(engine, batches, numbered, len(names))
    engine.training(True)
    dist.all_reduce(sums_N2, group=groups.world)
    return {
        name: {LOSS: nats / tokens, TOKENS: int(tokens)}
        for name, (nats, tokens) in zip(names, sums_N2.tolist(), strict=True)
        if tokens
    }


def mean_loss(results: Results) -> float | None:
    """Returns the mean over the tokens of all keys; None if none has a loss."""
    found = [(of[LOSS], of[TOKENS]) for of in results.values() if LOSS in of]
    tokens = sum(count for _, count in found)
    return sum(loss * count for loss, count in found) / tokens if tokens else None


def _plan(run: RunConfig, questions: EvalSet) -> tuple[list[list[int]], list[str]]:
    """Returns the rows of each microbatch, no more than training has in one, and why rows were
    left out."""
    rows, data = run.training.micro_batch_size, run.data
    sizes: dict[int, Size] = {}
    left_out: list[str] = []
    for index in range(len(questions)):
        try:
            size = questions.answered_size(index)
        except DataError as problem:
            left_out.append(str(problem))
            continue
        if size is not None:
            sizes[index] = size
    found, numbers = [*sizes.values()], [*sizes]
    if data.packing:
        split = chunks(found, rows * data.seq_length, data.max_pack_tiles)
    else:
        split = chunks(found, most_rows=rows)
    return [[numbers[place] for place in chunk] for chunk in split], left_out


def _sums(
    engine: Engine, batches: Sequence[Microbatch], keys: Sequence[torch.Tensor], count: int
) -> torch.Tensor:
    """Returns fp64 [count, 2]: nats and tokens by key, of this rank's part of the replica's
    microbatches.

    Args:
        keys: the number of the key of each row of a microbatch; none for a microbatch that only
            keeps other replicas company.
    """

    def logprobs(
        predictions: Predictions, batch: Microbatch, positions: torch.Tensor, **_
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labels_K = batch.labels_T[positions.to(batch.labels_T.device)]
        return predictions.logprobs(labels_K).double().cpu(), positions

    found = engine.forward(batches, lambda batch: batch.supervised, logprobs)
    total_N2 = torch.zeros(count, 2, dtype=torch.float64)
    if not engine.groups.is_last_stage or engine.groups.pg.tp.rank():
        return total_N2
    for batch, of_rows, (logprobs_K, held_K) in zip(batches, keys, found, strict=True):
        if not len(of_rows):
            continue
        # A rank that holds no supervised position is given another one, whose mask is 0.
        mask_K = batch.loss_mask_T.cpu()[held_K].double()
        row_K = torch.searchsorted(batch.cu_seqlens, held_K, right=True) - 1
        key_K = of_rows[row_K.clamp(max=len(of_rows) - 1)]  # the padding is behind the last row
        total_N2.index_add_(0, key_K, torch.stack((-logprobs_K * mask_K, mask_K), 1))
    return total_N2
