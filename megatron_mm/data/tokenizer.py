"""Tokenizers, loaded from a SentencePiece model or a Hugging Face folder."""

from __future__ import annotations

import io
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.errors import DataError

SPECIAL_TOKENS = {
    "pad_id": "<|endoftext|>",
    "message_start_id": "<|im_start|>",
    "message_end_id": "<|im_end|>",
    "image_start_id": "<img>",
    "image_end_id": "</img>",
    "image_context_id": "<IMG_CONTEXT>",
}


@dataclass(frozen=True)
class Tokenizer:
    """Encoding of plain text, and the ids of control tokens that the chat template inserts.

    Callers reject text in which `find_special` finds a control token, so data cannot forge a turn
    or an image.
    """

    vocab_size: int
    pad_id: int
    message_start_id: int
    message_end_id: int
    image_start_id: int
    image_end_id: int
    image_context_id: int
    special_tokens: dict[str, int]
    encode: Callable[[str], list[int]]
    decode_plain: Callable[[list[int]], str]
    path: str  # of the file or folder it was loaded from

    def __reduce__(self):
        # Its functions cannot be pickled, so another process loads it again.
        return load_tokenizer, (self.path,)

    def padded_vocab_size(self, multiple: int = 64) -> int:
        """Smallest multiple of `multiple` that holds all ids: the `vocab_size` to set."""
        return -(-self.vocab_size // multiple) * multiple

    def find_special(self, text: str) -> str | None:
        """Returns a special token that occurs in `text`, or None."""
        return next((token for token in self.special_tokens if token in text), None)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Converts token ids to text. Ids beyond the vocabulary (of a padded model) are left out,
        and special tokens too if `skip_special`."""
        names = {index: token for token, index in self.special_tokens.items()}
        pieces: list[str] = []
        plain: list[int] = []
        for index in [int(i) for i in ids]:
            if index in names:
                pieces += [self.decode_plain(plain), "" if skip_special else names[index]]
                plain = []
            elif 0 <= index < self.vocab_size:
                plain.append(index)
        return "".join([*pieces, self.decode_plain(plain)])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a SentencePiece `.model` file or a Hugging Face tokenizer folder, never from the
    network.

    Raises:
        DataError: it is missing, unreadable or lacks a special token.
    """
    path = Path(path)
    if path.is_dir():
        return _from_huggingface(path)
    if path.is_file():
        return _from_sentencepiece(path)
    raise DataError(
        f"tokenizer_model {str(path)!r} is neither a SentencePiece file nor a folder; "
        "set tokenizer_model"
    )


def train_sentencepiece(
    texts: Iterable[str], out: str | Path, vocab_size: int, phrases: Sequence[str] = ()
) -> Tokenizer:
    """Trains a byte-pair model on `texts`, writes it to `out` and loads it.

    Digits stay single tokens, whitespace is kept, and unseen characters are spelled in bytes, so
    any text round-trips. Each of `phrases` becomes one token. A small corpus may give fewer than
    `vocab_size` tokens.
    """
    import sentencepiece

    symbols = [*SPECIAL_TOKENS.values(), "\n", *phrases]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        # SentencePiece matches symbols after it has replaced spaces by its space mark.
        user_defined_symbols=[symbol.replace(" ", "\u2581") for symbol in symbols],
        required_chars="".join(c for c in string.printable if c.isprintable() and c != " "),
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    Path(out).write_bytes(buffer.getvalue())
    return load_tokenizer(out)


def _from_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: not a SentencePiece model; set tokenizer_model") from error
    found = {token: model.piece_to_id(token) for token in SPECIAL_TOKENS.values()}
    special = {t: i for t, i in found.items() if model.id_to_piece(i) == t}
    return Tokenizer(
        vocab_size=model.get_piece_size(),
        **_required_ids(special, path),
        special_tokens=special,
        encode=model.encode,
        decode_plain=model.decode,
        path=str(path),
    )


def _from_huggingface(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        model = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: no tokenizer can be loaded from this folder: {reason}") from error
    vocabulary = model.get_vocab()
    marked = {str(t) for t in model.all_special_tokens}
    marked |= {str(t) for t in model.added_tokens_decoder.values() if t.special}
    names = marked | (set(SPECIAL_TOKENS.values()) & set(vocabulary))
    special = {token: vocabulary[token] for token in sorted(names) if token in vocabulary}
    return Tokenizer(
        vocab_size=max(vocabulary.values()) + 1,  # ids may have gaps
        **_required_ids(special, path),
        special_tokens=special,
        encode=lambda text: model.encode(text, add_special_tokens=False),
        decode_plain=lambda ids: model.decode(ids, clean_up_tokenization_spaces=False),
        path=str(path),
    )


def _required_ids(special: dict[str, int], path: Path) -> dict[str, int]:
    missing = [token for token in SPECIAL_TOKENS.values() if token not in special]
    if missing:
        raise DataError(
            f"{path}: the tokenizer lacks {len(missing)} of {len(SPECIAL_TOKENS)} special tokens: "
            f"{', '.join(missing)}; add them to it as special tokens"
        )
    return {name: special[token] for name, token in SPECIAL_TOKENS.items()}
