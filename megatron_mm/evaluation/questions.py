"""Questions of an evaluation: prompts without their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mm.config.settings import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.chat import answer_text
from megatron_mm.data.collate import collate
from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.images import ImageFile, find_image
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.messages import IMAGE_MARK, Message, check_messages
from megatron_mm.data.sample import Sample, SampleBuilder, Size
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError
from megatron_mm.evaluation.scoring import SCORERS, result_key


def judged_by(row: Mapping[str, Any], messages: Sequence[Message], where: str) -> tuple[str, str]:
    """Returns a row's truth and scorer.

    Raises:
        DataError: it has no text to compare with, or its scorer is unknown.
    """
    truth, scorer = row.get("ground_truth"), row.get("scorer") or "exact"
    if truth is None and messages[-1].role == "assistant":
        truth = answer_text(replace(messages[-1], reasoning=None))
    if truth in (None, ""):
        raise DataError(
            f"{where}: no answer to compare with; add a text 'ground_truth' or end with an "
            "assistant turn"
        )
    if not isinstance(truth, str):
        raise DataError(
            f"{where}: ground_truth is a {type(truth).__name__}; an answer is compared with "
            "text or a number"
        )
    if not isinstance(scorer, str) or scorer not in SCORERS:
        raise DataError(f"{where}: scorer {scorer!r} is unknown; use one of {', '.join(SCORERS)}")
    return truth, scorer


@dataclass
class EvalItem:
    """Question of an evaluation. `sample` ends where the answer begins."""

    sample: Sample
    question: str  # the last user turn, its images marked
    ground_truth: str
    skill: str
    form: str
    scorer: str
    key: str  # under which its result is reported
    images: list[ImageFile]


class EvalSet:
    """Questions in a JSONL or parquet file, in file order.

    A row without `ground_truth` is compared with its last answer, a row without `scorer` exactly.

    Args:
        limit: number of rows to use from the start of the file; None: all.

    Raises:
        DataError: at construction, the file is missing or empty; on access, the row is bad.
    """

    def __init__(
        self, path: str | Path, run: RunConfig, tokenizer: Tokenizer, limit: int | None = None
    ) -> None:
        self._rows = open_row_files(path, RowGroupCache())
        self._builder = SampleBuilder(run, tokenizer)
        self._length = len(self._rows) if limit is None else min(limit, len(self._rows))

    def __len__(self) -> int:
        return self._length

    def _row(self, index: int) -> tuple[dict[str, Any], str, Path]:
        """Returns a row, "file:row", and the folder that its images are in."""
        file, number = self._rows.locate(index)
        return file[number], file.where(number), Path(file.folder)

    def key(self, index: int) -> str:
        """Returns the result key of a row without building its sample.

        Raises:
            DataError: the row is bad, or has no truth or scorer to be judged by.
        """
        row, where, _ = self._row(index)
        judged_by(row, check_messages(row, where), where)
        try:
            return result_key(row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    def check(self, index: int) -> None:
        """Reads a row but for the pixels of its images.

        Raises:
            DataError: the row is bad.
        """
        self._builder.check_prompt(*self._row(index))

    def __getitem__(self, index: int) -> EvalItem:
        if not 0 <= index < self._length:
            raise IndexError(index)
        row, where, folder = self._row(index)
        messages = check_messages(row, where)
        truth, scorer = judged_by(row, messages, where)
        questions = [IMAGE_MARK.join(m.texts) for m in messages if m.role == "user"]
        return EvalItem(
            sample=self._builder.prompt(row, where, folder),
            question=questions[-1] if questions else "",
            ground_truth=truth,
            skill=row.get("skill") or "all",
            form=row.get("form") or "direct",
            scorer=scorer,
            key=result_key(row),
            images=[
                find_image(image, number, folder, where)
                for number, image in enumerate(row.get("images") or [], start=1)
            ],
        )

    def answered_size(self, index: int) -> Size | None:
        """Returns the size of a row with its own answer, as training would read it; None if it
        ends without one.

        Raises:
            DataError: the row is bad, or too long with its answer.
        """
        row, where, folder = self._row(index)
        if check_messages(row, where)[-1].role != "assistant":
            return None
        return self._builder.measure(row, where, folder)

    def answered(self, indices: Sequence[int], pad_multiple: int = 1) -> Microbatch:
        """Returns rows with their own answers as a microbatch, as training would read them.

        Raises:
            DataError: a row is bad.
        """
        samples = [self._builder.training(*self._row(index)) for index in indices]
        return self.joined(samples, pad_multiple)

    def joined(self, samples: list[Sample], pad_multiple: int = 1) -> Microbatch:
        """Packs samples of these rows into a microbatch."""
        return collate(
            samples,
            settings=self._builder.settings,
            pad_id=self._builder.tokenizer.pad_id,
            pad_multiple=pad_multiple,
        )
