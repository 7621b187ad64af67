"""Prompts of random words and images in the form of each side, and one reward for both.

A word is a token id in decimal, so that transformers' tokenizer returns the same ids.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from megatron_mm.benchmark.models import SHAPES, image_token, make_samples
from megatron_mm.config import RunConfig
from megatron_mm.data.loading.reader import Prompt
from megatron_mm.data.sample import Sample
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.rl.rollout.columns import Columns
from megatron_mm.rl.rollout.prompts import Drawn

NEVER = -1  # is never drawn, so completions reach the length limit


def make_prompts(run: RunConfig, name: str, count: int, *, images: bool, seed: int) -> list[Sample]:
    """Makes samples of the model's shape without answers. With `images`, all but the last have
    one, with various tilings as in a data set."""
    shape = replace(SHAPES[name], samples=count, text_only=0.0 if images else 1.0)
    if not images:
        return make_samples(run, shape, seed)
    text = make_samples(run, replace(shape, samples=1, text_only=1.0), seed + 1)
    return make_samples(run, replace(shape, samples=count - 1), seed) + text


def even(prompts, completions, completion_ids, **columns) -> list[float]:
    """Reward: the share of even token ids, which differs between completions."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def words(tokens_T: torch.Tensor) -> str:
    return " ".join(map(str, tokens_T.tolist()))


def our_tokenizer(run: RunConfig) -> Tokenizer:
    """Returns a tokenizer with only what a rollout needs."""
    size = run.model.language.vocab_size
    return Tokenizer(
        vocab_size=size,
        pad_id=0,
        message_start_id=NEVER,
        message_end_id=NEVER,
        image_start_id=NEVER,
        image_end_id=NEVER,
        image_context_id=image_token(run),
        special_tokens={},
        end_ids=(NEVER,),
        encode=lambda text: [int(word) for word in text.split()],
        decode_known=lambda ids: " ".join(map(str, ids)),
        path="",
    )


def their_tokenizer(run: RunConfig, end: int | None = None) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of the same words.

    Args:
        end: id of the end of sequence, which no word has; None: the first past the vocabulary.
    """
    size = run.model.language.vocab_size
    end = size if end is None else end
    vocabulary = {str(index): index for index in range(1, size) if index != end}
    # No special token is written like a word: a tokenizer cuts them out of longer words too. The
    # word 0 is unknown to it, so it is id 0 as well.
    inner = WordTokenizer(WordLevel(vocabulary | {"<pad>": 0, "<end>": end}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


class Prompts:
    """Repeats a few rows, in place of the `PromptLoader` of a rollout."""

    def __init__(self, samples: list[Sample]):
        self.columns = Columns()
        self.prompts = [
            Prompt(s, {"messages": [{"role": "user", "content": words(s.tokens_T)}]}, s.where)
            for s in samples
        ]
        self.consumed_samples = 0

    def state_dict(self) -> dict[str, int]:
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consumed_samples = state["consumed_samples"]

    def numbers(self, count: int) -> list[int]:
        self.consumed_samples += count
        return list(range(self.consumed_samples - count, self.consumed_samples))

    def read(self, numbers: list[int]) -> Drawn:
        found = [self.prompts[number % len(self.prompts)] for number in numbers]
        return Drawn(found, numbers, [])
