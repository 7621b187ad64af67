"""Preference pairs of random words, without images, in the form of each side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_mm.benchmark.models import SHAPES, image_token
from megatron_mm.benchmark.prompts import words
from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.sample import Sample
from megatron_mm.data.tiles import image_settings
from megatron_mm.generation.answers import answered
from megatron_mm.rl.completion_batch import CompletionBatch, completion_batch


class TextPair(NamedTuple):
    """Token ids of a pair, int64; both answers end with `end_token`."""

    prompt: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor

    @property
    def lengths(self) -> tuple[int, int]:
        """The tokens of the chosen and of the rejected side, prompt included."""
        asked = len(self.prompt)
        return asked + len(self.chosen), asked + len(self.rejected)


def end_token(run: RunConfig) -> int:
    """Id of the end of an answer, which no word has."""
    return image_token(run) - 1


def make_pairs(run: RunConfig, name: str, count: int, *, equal: bool, seed: int) -> list[TextPair]:
    """Draws pairs. A prompt and an answer are half as long as a sample of the model's shape: each
    for itself, or, with `equal`, all as long as the mean."""
    rng = np.random.default_rng(seed)
    least, most = (length // 2 for length in SHAPES[name].words)
    ends = [[], [end_token(run)], [end_token(run)]]
    found = []
    for _ in range(count):
        lengths = [(least + most) // 2] * 3 if equal else rng.integers(least, most + 1, 3)
        parts = [
            [*rng.integers(1, end_token(run), n - len(end)), *end]
            for n, end in zip(lengths, ends, strict=True)
        ]
        found.append(TextPair(*(torch.tensor(part) for part in parts)))
    return found


def our_batch(run: RunConfig, pairs: Sequence[TextPair]) -> CompletionBatch:
    """Returns a microbatch as `PairLoader` packs it, chosen and rejected by turns."""
    samples = [
        answered(_prompt(pair, f"synthetic:{n}"), answer, None)
        for n, pair in enumerate(pairs)
        for answer in (pair.chosen, pair.rejected)
    ]
    return completion_batch(
        samples,
        range(len(samples)),
        settings=image_settings(run),
        pad_id=0,
        pad_multiple=token_multiple(run),
    )


def their_rows(pairs: Sequence[TextPair]) -> list[dict[str, str]]:
    """Returns rows for TRL, which joins prompt and answer and puts the end behind."""
    return [
        {
            "prompt": words(pair.prompt),
            "chosen": f" {words(pair.chosen[:-1])}",
            "rejected": f" {words(pair.rejected[:-1])}",
        }
        for pair in pairs
    ]


def padding(pairs: Sequence[TextPair]) -> float:
    """Returns the share of a rectangle of all sides that is padding."""
    lengths = [length for pair in pairs for length in pair.lengths]
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


class Handed:
    """Loader that returns the microbatch it was handed, in place of `PairLoader`."""

    fingerprint, delta = 0, 0.0
    started_from: dict[str, str] | None = None

    def __init__(self) -> None:
        self.batch: CompletionBatch | None = None

    def next_batch(self) -> list[CompletionBatch]:
        assert self.batch is not None  # handed before each step
        return [self.batch]

    def state_dict(self) -> dict[str, Any]:
        return {}


def _prompt(pair: TextPair, where: str) -> Sample:
    tokens = pair.prompt
    return Sample(tokens, tokens.roll(-1), torch.zeros(len(tokens)), [], where)
