"""Knock-out: how much worse the model reads the right spans of a probe with experts removed.

The model reads rows with their own answers. A pass over the probe forbids some experts of one layer
(`Engine.forbidding`) and sums the negative log-likelihood of each skill's tokens. All passes are
done on a round of microbatches before the next is read. Ranks exchange only sums, so every layout
measures the same.

What has been summed so far is kept in a file. An interrupted measurement goes on from there, and a
finished one is not repeated.

Shapes: P passes (the first removes nothing), J labellings (the rows' own, then the shuffled), S
skills, H the two halves of the rows.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.probe import OpenProbe, ProbeBatch, read_round
from megatron_mm.earl.removals import Removal
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.errors import DataError
from megatron_mm.outputs import whole_file

logger = logging.getLogger(__name__)

BLOCK = 32  # passes between two exchanges of sums
SAVE_SECONDS = 30.0  # between two writes of the file


@dataclass
class LossSums:
    """Sums of negative log-likelihoods over the right spans of a probe.

    Attributes:
        nats_PHJS: fp64.
        tokens_HJS: fp64, their number.
    """

    nats_PHJS: torch.Tensor
    tokens_HJS: torch.Tensor

    def rises(self, halves: Sequence[int] = (0, 1)) -> torch.Tensor:
        """Returns fp64 [P - 1, J, S]: the rise of the mean loss of each skill's tokens in each
        removal, over one half or both; 0 where a half has none of them."""
        which = list(halves)
        nats_PJS, tokens_JS = self.nats_PHJS[:, which].sum(1), self.tokens_HJS[which].sum(0)
        mean_PJS = nats_PJS / tokens_JS.clamp(min=1)
        return mean_PJS[1:] - mean_PJS[0]


@dataclass(frozen=True)
class Progress:
    """The file of a measurement that is under way.

    Attributes:
        path: None: nothing is kept.
        key: digest of all that the sums depend on; those of another are not continued.
    """

    path: Path | None
    key: str

    def load(self) -> tuple[int, int, LossSums] | None:
        """Returns (rounds done, passes done of the next, sums so far); None if there are none.

        Raises:
            DataError: the file cannot be read.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            held = torch.load(self.path, weights_only=True)
            key, sums = held["key"], LossSums(held["nats"], held["tokens"])
            done, passes = held["rounds"], held["passes"]
        except OSError as problem:
            raise DataError(f"cannot read {self.path}: {problem.strerror}") from None
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as problem:
            raise DataError(
                f"{self.path} holds no sums of a knock-out ({type(problem).__name__}); "
                "remove it and measure again"
            ) from None
        if key != self.key:
            logger.warning(
                "%s is of another checkpoint, probe or settings; measuring again", self.path
            )
            return None
        return done, passes, sums

    def save(self, rounds: int, passes: int, sums: LossSums) -> None:
        """Writes the file; it is whole or as it was.

        Raises:
            DataError: it cannot be written.
        """
        if self.path is None:
            return
        held = {"key": self.key, "rounds": rounds, "passes": passes}
        try:
            with whole_file(self.path) as partial:
                torch.save(held | {"nats": sums.nats_PHJS, "tokens": sums.tokens_HJS}, partial)
        except (OSError, RuntimeError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem).splitlines()[0]
            raise DataError(f"cannot write {self.path}: {reason}") from None


def digest(*parts: object) -> str:
    """Returns the sha256 of parts that have a stable `repr`."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()


def stamps(path: str) -> list[tuple[str, int, int]]:
    """Returns name, size and time of change of a file, of all in a folder, or of all that match a
    pattern (`data.files.rows.open_row_files` likewise takes a file by its name first): a digest of
    their content would take as long as reading them."""
    place = Path(path)
    if place.is_dir():
        inside = [*place.rglob("*")]
    else:
        inside = [place] if place.exists() else [*map(Path, glob(path, recursive=True))]
    found = [(str(file), file.stat()) for file in sorted(inside) if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def measure_losses(
    engine: Engine,
    tokenizer: Tokenizer,
    opened: OpenProbe,
    planned: Sequence[Removal],
    progress: Progress,
) -> LossSums | None:
    """Measures the losses of a probe with nothing removed and in each removal. Every rank of the
    job calls it.

    Returns:
        the sums, on rank 0.
    Raises:
        DataError: on every rank, if a row is bad, no span is right, or the file of the progress
            cannot be read or written.
    """
    passes: list[Removal | None] = [None, *planned]
    plan, groups = opened.plan, engine.groups
    _check_right(opened)
    rounds, first, sums = _resumed(engine, opened, len(passes), progress)
    engine.training(False)
    saved = time.monotonic()
    with _bar(len(passes) * opened.rounds, rounds * len(passes) + first) as bar:
        while rounds < opened.rounds:
            batches = read_round(engine, tokenizer, opened, rounds)
            for start in range(first, len(passes), BLOCK):
                block = passes[start : start + BLOCK]
                nats_PHJS = torch.zeros(len(block), 2, 1 + plan.shuffles, len(plan.skills)).double()
                for of_pass, removal in zip(nats_PHJS, block, strict=True):
                    of_pass += _losses(engine, batches, removal, len(plan.skills))
                    bar.update()
                dist.all_reduce(nats_PHJS, group=groups.world)
                sums.nats_PHJS[start : start + BLOCK] += nats_PHJS
                if start == 0:
                    sums.tokens_HJS += _counted(engine, batches, len(plan.skills))
                done = start + BLOCK >= len(passes)
                rounds, first = (rounds + 1, 0) if done else (rounds, start + BLOCK)
                error = None
                finished = rounds == opened.rounds
                if dist.get_rank() == 0 and (finished or time.monotonic() - saved >= SAVE_SECONDS):
                    try:
                        progress.save(rounds, first, sums)
                    except DataError as problem:
                        error = problem
                    saved = time.monotonic()
                raise_together(groups, error)
    engine.training(True)
    return sums if dist.get_rank() == 0 else None


def _check_right(opened: OpenProbe) -> None:
    spans = [span for _, found in opened.plan.rows.values() for span in found]
    if not any(span.right for span in spans):
        raise DataError(
            f"0 of {len(spans)} labelled spans in {len(opened.plan.rows)} rows are right; a "
            "knock-out measures right spans: give rows whose answers are right, or use --method "
            "lift"
        )


def _resumed(
    engine: Engine, opened: OpenProbe, passes: int, progress: Progress
) -> tuple[int, int, LossSums]:
    """Returns (rounds done, passes done of the next, sums); the sums count on rank 0 only."""
    plan, error = opened.plan, None
    shape = 2, 1 + plan.shuffles, len(plan.skills)
    sums = LossSums(torch.zeros(passes, *shape).double(), torch.zeros(*shape).double())
    place: list = [(0, 0)]
    if dist.get_rank() == 0:
        try:
            if (held := progress.load()) is not None:
                rounds, first, sums = held
                place = [(rounds, first)]
        except DataError as problem:
            error = problem
    raise_together(engine.groups, error)
    dist.broadcast_object_list(place, src=0, group=engine.groups.world)
    return *place[0], sums


def _losses(
    engine: Engine, batches: list[ProbeBatch], removal: Removal | None, skills: int
) -> torch.Tensor:
    """Returns fp64 [H, J, S]: the sums of this rank's part of the replica's microbatches."""
    forbidden = {}
    if removal is not None:
        layer, experts = removal
        forbidden[layer] = torch.zeros(engine.run.model.language.num_experts, dtype=torch.bool)
        forbidden[layer][list(experts)] = True
    right = {id(one.batch): one for one in batches}

    def logprobs(predictions, batch, positions, **_):
        labels_K = batch.labels_T[positions.to(batch.labels_T.device)]
        return predictions.logprobs(labels_K).double().cpu(), positions

    def positions(batch):
        return _right(right[id(batch)])

    with engine.forbidding(forbidden):
        found = engine.forward([one.batch for one in batches], positions, logprobs)
    total_HJS = torch.zeros(2, batches[0].skill_JT.shape[0], skills, dtype=torch.float64)
    if engine.groups.is_last_stage and engine.groups.pg.tp.rank() == 0:
        for one, (logprobs_K, held_K) in zip(batches, found, strict=True):
            total_HJS[one.half] -= _by_skill(one, held_K, logprobs_K, skills)
    return total_HJS


def _counted(engine: Engine, batches: list[ProbeBatch], skills: int) -> torch.Tensor:
    """Returns fp64 [H, J, S]: the tokens of a round, of all replicas."""
    total_HJS = torch.zeros(2, batches[0].skill_JT.shape[0], skills, dtype=torch.float64)
    if engine.groups.is_reader:  # the others of the replica hold the same
        for one in batches:
            held_K = _right(one)
            ones_K = torch.ones(len(held_K), dtype=torch.float64)
            total_HJS[one.half] += _by_skill(one, held_K, ones_K, skills)
    dist.all_reduce(total_HJS, group=engine.groups.world)
    return total_HJS


def _right(one: ProbeBatch) -> torch.Tensor:
    """Returns the positions that predict tokens of right spans."""
    return one.right_T.nonzero().flatten()


def _by_skill(
    one: ProbeBatch, held_K: torch.Tensor, value_K: torch.Tensor, skills: int
) -> torch.Tensor:
    """Returns fp64 [J, S]: values of positions, summed by their skill in each labelling."""
    inside_K = one.right_T[held_K]  # a rank that holds none is given another position
    skill_JK, value_K = one.skill_JT[:, held_K[inside_K]].long(), value_K[inside_K]
    total_JS = torch.zeros(len(skill_JK), skills, dtype=torch.float64)
    return total_JS.scatter_add_(1, skill_JK, value_K.expand_as(skill_JK))


def _bar(total: int, done: int):
    from tqdm import tqdm

    shown = dist.get_rank() == 0 and sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc="knock-out", unit="pass", disable=not shown)
