"""The prompts of a rollout: rows in the data's order, resumable, the same under any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megatron_mm.config.settings import RunConfig
from megatron_mm.data.loading.curriculum import open_curriculum
from megatron_mm.data.loading.reader import Prompt, Reader, too_many_tiles
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError
from megatron_mm.evaluation.scoring import result_key
from megatron_mm.rl.rollout.columns import Columns
from megatron_mm.rl.settings import RLConfig
from megatron_mm.rl.teachers import teacher_of


@dataclass(frozen=True)
class Drawn:
    """Rows of the training data, for one replica."""

    prompts: list[Prompt]  # the rows that could be read
    kept: list[int]  # their numbers
    skipped: list[str]  # the others, each as "file:row: reason"


class PromptSource(Protocol):
    """Where rollouts take their prompts from, and the position there."""

    columns: Columns  # of the rewards

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def numbers(self, count: int) -> list[int]:
        """Draws the next `count` rows for the whole job; returns the numbers of this replica's."""
        ...

    def read(self, numbers: list[int]) -> Drawn:
        """Reads rows by number, on the replica's reader; may raise DataError."""
        ...


class PromptLoader:
    """Hands out the rows of the training data in their shuffled order, each to one replica. The
    state is the number of rows that were drawn for all replicas together, and their columns: a
    resumed run calls its rewards with the same ones.

    Raises:
        DataError: at construction, for settings or files that cannot be used.
    """

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        curriculum = open_curriculum(run.data.train_data, run.training.seed)
        self._place, self.order = curriculum.place, curriculum.description
        names = [source.columns for source in curriculum.sources]
        self.columns = Columns(frozenset().union(*names))
        self._rl = run.section(RLConfig)
        self._reader = Reader(self._with_key(run), tokenizer, curriculum.sources)
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._longest, self._most_tiles = longest_prompt(run), run.data.max_pack_tiles
        self._skip_bad = run.data.on_bad_sample == "skip"
        self.consumed_samples = 0

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed_samples, "columns": self.columns.names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("held"):
            raise DataError(
                f"the checkpoint was packing and holds {len(state['held'])} samples; start from "
                "it with finetune"
            )
        self.consumed_samples = int(state["consumed_samples"])
        self.columns.expect(state.get("columns") or ())  # those of a run of another objective: none

    def numbers(self, count: int) -> list[int]:
        """Draws the next `count` rows for the whole job; returns the numbers of this replica's."""
        first = self.consumed_samples + self._rank
        self.consumed_samples += count
        return list(range(first, self.consumed_samples, self._size))

    def read(self, numbers: list[int]) -> Drawn:
        """Reads rows by number, on the replica's reader.

        Raises:
            DataError: for a bad row, unless `on_bad_sample` is skip.
        """
        found = self._reader.prompts([self._place(number) for number in numbers])
        known = [self._with_teacher(prompt) for prompt in found]
        return sorted_out(known, numbers, self._longest, self._skip_bad, self._most_tiles)

    def _with_key(self, run: RunConfig) -> RunConfig:
        """The run, whose rows may have the column that names their teacher."""
        columns = run.data.extra_columns
        if self._rl.teacher_key is not None:
            columns = [*columns, self._rl.teacher_key]
        return replace(run, data=replace(run.data, extra_columns=columns))

    def _with_teacher(self, prompt: Prompt | str) -> Prompt | str:
        """Returns the row, or why it has no teacher where there are some."""
        if isinstance(prompt, str):
            return prompt
        try:
            teacher_of(prompt.row, prompt.where, self._rl)
        except DataError as error:
            return str(error)
        return prompt

    def close(self) -> None:
        """Closes nothing; a TrainLoader has workers to end."""


def longest_prompt(run: RunConfig) -> int:
    """Returns the most tokens that a prompt may have."""
    return run.data.seq_length - run.section(RLConfig).max_completion_length


def sorted_out(
    found: Sequence[Prompt | str],
    numbers: Sequence[int],
    longest: int,
    skip_bad: bool,
    most_tiles: int | None = None,
) -> Drawn:
    """Returns the rows that can be completed, and why others cannot.

    Args:
        found: each a prompt or why the row is bad; numbers: of them.
        longest: tokens that a prompt may have; most_tiles: tiles; None: any number.
    Raises:
        DataError: for a bad row, unless `skip_bad`.
    """
    checked = [_checked(prompt, longest, most_tiles) for prompt in found]
    skipped = [text for text in checked if isinstance(text, str)]
    if skipped and not skip_bad:
        raise DataError(skipped[0])
    good = {i: prompt for i, prompt in enumerate(checked) if isinstance(prompt, Prompt)}
    return Drawn([*good.values()], [numbers[i] for i in good], skipped)


def _checked(prompt: Prompt | str, longest: int, most_tiles: int | None) -> Prompt | str:
    if isinstance(prompt, str):
        return prompt
    try:
        result_key(prompt.row)  # the name that its reward is reported under
    except DataError as error:
        return f"{prompt.where}: {error}"
    tokens, tiles = prompt.sample.size
    if tokens > longest:
        return (
            f"{prompt.where}: a prompt of {tokens} tokens leaves no room for "
            f"max_completion_length in seq_length: {longest} tokens fit; use fewer tiles or "
            "raise seq_length"
        )
    return too_many_tiles(prompt.where, tiles, most_tiles) or prompt
