"""A small byte-level BPE tokenizer as Hugging Face's library has it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_mm.data.tokenizer import SPECIAL_TOKENS


def byte_level_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of Qwen's kind on `texts` and adds our special tokens.

    The first 256 tokens are the bytes, so `vocab_size` - 256 of them are merges.
    """
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS.values())})
    return tokenizer
