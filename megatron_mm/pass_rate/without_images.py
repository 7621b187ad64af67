"""Preference pairs by dropped images: the rejected answer is the chosen one, cut in half and
continued by a model that does not see the images. DropoutNTP of MPO, arXiv 2411.10442, section 3.2;
InternVL's `mmpr_data_pipeline_dropout_ntp.py`.

It needs no truth: what is invented without the picture is the worse answer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mm.data.chat import answer_text
from megatron_mm.data.files.forms import Row
from megatron_mm.data.files.keys import LOOKS, RATED
from megatron_mm.data.loading.reader import Prompt, reading
from megatron_mm.data.messages import ESCAPED_MARK, IMAGE_MARK, check_messages
from megatron_mm.data.place_names import without_places
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import LOOK, Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_from_reader
from megatron_mm.errors import DataError
from megatron_mm.generation.answers import answered
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.pass_rate.measure import open_rows, with_files
from megatron_mm.pass_rate.output import Tally
from megatron_mm.pass_rate.pairs import answer_of, pair_row, sides
from megatron_mm.pass_rate.rated import check_images_beside, line_of, rated
from megatron_mm.pass_rate.rounds import Made, each_row, run_rounds
from megatron_mm.rl.rollout.prompts import longest_prompt, sorted_out
from megatron_mm.rl.settings import RLConfig

ROW = 1 << 16  # more pairs than a row has


@dataclass(frozen=True)
class _Cut:
    """An answer of a row, cut in half.

    Attributes:
        number: of the answer, unique in the job.
        prompt: ends where the continuation begins.
        row: as it was before it was rated.
    """

    number: int
    prompt: Prompt
    row: Row
    chosen: str
    kept: tuple[int, ...]


def drop_images(
    engine: Engine,
    tokenizer: Tokenizer,
    data: str,
    out: Path,
    key: str,
    per_round: int,
    *,
    most: int,
    unfinished: bool,
) -> Tally:
    """Writes a pair for each of at most `most` answers of every row with images: its right
    completions, or its own last answer if it is not rated. Every rank of the job calls it.

    Args:
        key, per_round: see `rounds.run_rounds`.
        unfinished: whether continuations that were cut at the length limit may be sides.
    Raises:
        DataError: on every rank, for a row that cannot be read, unless `on_bad_sample` is skip, or
            a file that cannot be written.
    """
    rows = open_rows(engine, data)
    continued = _Continuing(engine, tokenizer, rows, out, most, unfinished)
    return run_rounds(engine.groups, out, key, len(rows), per_round, continued, told)


def told(tally: Tally) -> str:
    """Returns a line about the pairs so far."""
    sums: Counter = Counter(tally.sums)
    return (
        f"{sums['pairs']:.0f} pairs; left out: {sums['no images']:.0f} rows without images, "
        f"{sums['no answer']:.0f} without a right answer, {sums['skipped']:.0f} bad; "
        f"{sums['equal']:.0f} equal sides, {sums['unfinished']:.0f} unfinished, "
        f"{sums['unusable']:.0f} empty or with a control token"
    )


class _Continuing:
    """Makes the pairs of this replica's rows of a round."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        rows: Any,
        out: Path,
        most: int,
        unfinished: bool,
    ):
        run = engine.run
        self.engine, self.tokenizer, self.rows, self.out = engine, tokenizer, rows, out
        self.most, self.unfinished, self.rl = most, unfinished, run.section(RLConfig)
        self.builder = SampleBuilder(run, tokenizer)
        self.longest = longest_prompt(run)
        self.skip_bad = run.data.on_bad_sample == "skip"
        memories = self.builder.settings.memories if self.builder.settings else ()
        self.image_keys = ("images", *(m.images for m in memories if m.images != "images"))

    def __call__(self, numbers: list[int], _: Tally) -> Made:
        made = Made()
        cuts: list[_Cut] = []

        def read() -> list[int]:
            found = [cut for number in numbers for cut in self._cuts(number, made.sums)]
            drawn = sorted_out(
                [cut if isinstance(cut, str) else cut.prompt for cut in found],
                range(len(found)),
                self.longest,
                self.skip_bad,
            )
            made.sums["skipped"] += len(drawn.skipped)
            cuts.extend(found[place] for place in drawn.kept)
            return [cut.number for cut in cuts]

        groups, rl = self.engine.groups, self.rl
        kept = broadcast_from_reader(groups, read)
        sampling = Sampling(
            self.tokenizer.end_ids,
            rl.max_completion_length,
            rl.temperature,
            rl.top_p,
            rl.top_k,
            self.engine.run.training.seed,
        )
        found = generate(
            self.engine,
            Prompts(lambda index: cuts[index].prompt.sample, kept),
            sampling,
            max_num_seqs=rl.max_num_seqs,
            pad_id=self.tokenizer.pad_id,
        )
        assert found is not None  # nothing stops this generation
        jobs = [
            partial(self._pair, cut, completion.tokens_G.tolist(), completion.finished, made)
            for cut, (completion,) in zip(cuts, found, strict=False)  # elsewhere there are no cuts
        ]
        each_row(groups, made, jobs, self.skip_bad)
        return made

    def _cuts(self, number: int, sums: Counter) -> list[Any]:
        """Returns the cut answers of a row, or why it is bad."""
        file, index = self.rows.locate(number)
        where = file.where(index)
        cuts: list[Any] = []
        try:
            with reading(where):
                row = file[index]
                if not row.get("images"):
                    sums["no images"] += 1
                    return []
                check_images_beside(row, where, file.folder, self.out)
                bare = {key: value for key, value in row.items() if key not in RATED}
                answers = self._answers(row, where)
                sums["no answer"] += not answers
                blind = without_images(bare, self.image_keys, where)
                prompt = self.builder.prompt(blind, where, file.folder) if answers else None
                for place, chosen in enumerate(answers[: self.most]):
                    ids = self.tokenizer.encode(chosen)
                    kept = ids[: len(ids) // 2]
                    assert prompt is not None  # there are answers
                    # There is nothing to look at.
                    sample = answered(prompt, prompt.tokens_T.new_tensor(kept), None)
                    asked = Prompt(sample, bare, where)
                    cuts.append(_Cut(number * ROW + place, asked, bare, chosen, tuple(kept)))
        except DataError as error:
            return [str(error)]
        return cuts

    def _answers(self, row: Row, where: str) -> list[str]:
        if "completions" in row:
            return sides(rated(row, where), False, Counter())[0]
        last = check_messages(row, where)[-1]
        answer = answer_of(answer_text(last)) if last.role == "assistant" else None
        return [] if answer is None else [answer]

    def _pair(self, cut: _Cut, drawn: list[int], finished: bool, made: Made) -> None:
        ids = [*cut.kept, *self.tokenizer.answer_ids(drawn)]
        rejected = answer_of(self.tokenizer.decode(ids))
        fate = "pairs"
        if not finished and not self.unfinished:
            fate = "unfinished"
        elif rejected is None:
            fate = "unusable"
        elif rejected == cut.chosen:
            fate = "equal"
        if fate == "pairs":
            assert rejected is not None  # it is usable
            row, files = with_files(cut.row, self.out)
            where = cut.prompt.where
            pair = pair_row(row, cut.chosen, rejected, where, self.image_keys)
            made.lines[divmod(cut.number, ROW)] = line_of(pair, where)
            made.files |= files
        made.sums[fate] += 1


def without_images(row: Row, image_keys: tuple[str, ...], where: str) -> Row:
    """Returns the row as if it had never had images: without them, their marks, a line break behind
    a mark, and the looks at them. Raises DataError."""
    check_messages(row, where)
    messages = [_blind(turn) for turn in row["messages"]]
    gone = (*image_keys, LOOKS)
    return {key: v for key, v in row.items() if key not in gone} | {"messages": messages}


def _blind(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a message of a user without images, one of the assistant without looks."""
    content, role = turn.get("content"), turn.get("role")
    if role == "assistant":
        change = _unlooked
    elif role == "user":
        change = _unmarked
    else:
        return turn
    if isinstance(content, list):
        parts = [part for part in content if part.get("type") != "image"]
        content = [p | {"text": change(p["text"])} if "text" in p else p for p in parts]
    elif isinstance(content, str):
        content = change(content)
    return turn | {"content": content}


def _unlooked(text: str) -> str:
    return without_places(text).replace(LOOK, "")


def _unmarked(text: str) -> str:
    texts = text.split(ESCAPED_MARK)
    for mark in (IMAGE_MARK + "\n", IMAGE_MARK):
        texts = [text.replace(mark, "") for text in texts]
    return ESCAPED_MARK.join(texts)
