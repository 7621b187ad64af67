"""Measures pass rates: completes every row several times and scores the completions, with what
reinforcement learning completes and scores with."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mm.cli import EVERY_RANK
from megatron_mm.data.files.forms import Row
from megatron_mm.data.files.keys import RATED
from megatron_mm.data.files.rows import RowFiles, open_row_files
from megatron_mm.data.loading.reader import Place, Reader
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.errors import DataError
from megatron_mm.pass_rate.output import Tally
from megatron_mm.pass_rate.rated import check_images_beside, line_of
from megatron_mm.pass_rate.rounds import Made, each_row, run_rounds
from megatron_mm.rl.rollout.columns import Columns
from megatron_mm.rl.rollout.draw import complete
from megatron_mm.rl.rollout.failures import check_rewards
from megatron_mm.rl.rollout.prompts import Drawn, longest_prompt, sorted_out
from megatron_mm.rl.rollout.score import Scored, Scorer
from megatron_mm.rl.settings import difficulty_name, resolved

logger = logging.getLogger(__name__)

SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}  # by an image's start


def open_rows(engine: Engine, data: str) -> RowFiles:
    """Opens the rows on every rank, which all call it.

    Raises:
        DataError: on every rank, if a file cannot be read on any.
    """
    rows, error = None, None
    try:
        rows = open_row_files(data, RowGroupCache())
    except DataError as problem:
        error = problem
    raise_together(engine.groups, error)
    assert rows is not None  # else there was an error
    return rows


def measure(
    engine: Engine,
    tokenizer: Tokenizer,
    data: str,
    out: Path,
    key: str,
    per_round: int,
) -> Tally:
    """Writes every row of `data` with its pass rate to `out`. Every rank of the job calls it. A
    row's completions depend on the seed and its number in `data` alone.

    Args:
        key, per_round: see `rounds.run_rounds`.
    Returns:
        rows, and the sums of `right` and `judged` completions, rows `never` and `always` right,
        `skipped`.
    Raises:
        DataError: on every rank: for a row that cannot be read, unless `on_bad_sample` is skip; if
            the rewards of a round failed (`check_rewards`); for a file that cannot be written.
    """
    rated = _Rating(engine, tokenizer, open_rows(engine, data), out, per_round)
    try:
        return run_rounds(engine.groups, out, key, len(rated.rows), per_round, rated, told)
    finally:
        rated.scorer.close()


def told(tally: Tally) -> str:
    """Returns a line about the pass rates so far."""
    sums: Counter = Counter(tally.sums)
    mean = sums["right"] / max(1, sums["judged"])
    return (
        f"{mean:.3f} of {sums['judged']:.0f} completions right, "
        f"{sums['never']:.0f} rows never, {sums['always']:.0f} always"
        + (f", {sums['skipped']:.0f} skipped" if sums["skipped"] else "")
    )


class _Rating:
    """Rates this replica's rows of a round; also the `draw.PromptRows` that it draws."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, rows: RowFiles, out: Path, per_round: int
    ):
        run = engine.run
        self.engine, self.tokenizer, self.rows, self.out = engine, tokenizer, rows, out
        self.rl = resolved(run)
        self.reader = Reader(run, tokenizer, [rows])
        self.longest = longest_prompt(run)
        self.skip_bad = run.data.on_bad_sample == "skip"
        self.columns = Columns(rows.columns)
        self.scorer = Scorer(self.rl, engine, tokenizer, None, self.columns)
        self.judge = self.scorer.names.index(difficulty_name(self.rl))
        self.per_round = per_round

    def read(self, numbers: list[int]) -> Drawn:
        found = self.reader.prompts([Place(0, number) for number in numbers])
        drawn = sorted_out(found, numbers, self.longest, self.skip_bad)
        for number, prompt in zip(drawn.kept, drawn.prompts, strict=True):
            folder = self.rows.locate(number)[0].folder
            check_images_beside(prompt.row, prompt.where, folder, self.out)
        return drawn

    def __call__(self, numbers: list[int], tally: Tally) -> Made:
        self.columns.expect(tally.columns)  # whether the command was ended meanwhile or not
        routes = self.scorer.wants_routes
        rollout = complete(self.engine, self.tokenizer, self, numbers, record_routes=routes)
        scored = self.scorer.score(rollout)
        weights, most = self.scorer.weights, self.rl.max_reward_failures
        # A row that nothing can judge has no accuracy; a short last round may have no others.
        if not tally.rows or tally.rows + self.per_round <= len(self.rows):
            check_rewards(self.engine, scored, weights, [0] * len(scored.groups), 1, most, True)
        made = Made(columns={*self.columns.names})
        if self.engine.groups.is_reader:
            made.sums["skipped"] = len(scored.skipped)
            for what, reasons in (("left out", scored.skipped), ("failed", scored.failures)):
                if reasons:
                    logger.info("%s: %s", what, "; ".join(reasons[:3]), extra=EVERY_RANK)
        jobs = [partial(self._rate, scored, place, made) for place in range(len(scored.groups))]
        each_row(self.engine.groups, made, jobs, self.skip_bad)
        return made

    def _rate(self, scored: Scored, place: int, made: Made) -> None:
        """Adds the line of a row."""
        group, values_GC = scored.groups[place], scored.rewards_PGC[place].clone()
        values_GC[scored.failed_PGC[place]] = torch.nan
        scores = {
            name: [_plain(value) for value in values_GC[:, c].tolist()]
            for c, name in enumerate(scored.names)
        }
        judged_G = values_GC[:, self.judge]
        reached_G = judged_G >= self.rl.difficulty_threshold  # in fp32, as a run compares
        right = [
            None if unknown else reached
            for unknown, reached in zip(judged_G.isnan().tolist(), reached_G.tolist(), strict=True)
        ]
        known, count = [r for r in right if r is not None], sum(r is True for r in right)
        rating = (
            count / len(known) if known else None,
            [self.tokenizer.decode_answer(c.tokens_G.tolist()) for c in group.completions],
            [c.finished for c in group.completions],
            right,
            scores,
        )
        row = {key: value for key, value in group.asked.row.items() if key not in RATED}
        row, files = with_files(row, self.out)
        row |= dict(zip(RATED, rating, strict=True))
        made.lines[group.number, 0] = line_of(row, group.asked.where)
        made.files |= files
        made.sums["right"] += count
        made.sums["judged"] += len(known)
        made.sums["never"] += bool(known) and not count
        made.sums["always"] += bool(known) and count == len(known)


def _plain(value: float) -> float | None:
    """Returns a reward without the digits that fp32 does not hold; None for NaN."""
    return None if value != value else float(f"{value:.7g}")


def with_files(row: Row, out: Path) -> tuple[Row, dict[str, bytes]]:
    """Returns the row with paths in place of the images whose bytes it holds, and these bytes by
    path: below a folder beside `out`, named by their content."""
    files: dict[str, bytes] = {}

    def named(content: bytes) -> str:
        start = next((s for s in SUFFIXES if content.startswith(s)), b"")
        name = hashlib.sha256(content).hexdigest()[:32] + SUFFIXES.get(start, ".image")
        path = f"{out.stem}_images/{name}"
        files[path] = content
        return path

    def on_disk(item: Any) -> Any:
        if isinstance(item, bytes):
            return named(item)
        if isinstance(item, dict) and isinstance(item.get("bytes"), bytes):  # beside its box
            rest = {key: value for key, value in item.items() if key != "bytes"}
            return rest | {"path": named(item["bytes"])}
        return item

    changed = {k: [*map(on_disk, value)] for k, value in row.items() if isinstance(value, list)}
    return row | changed, files
