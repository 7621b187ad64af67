"""Tokenizers, loaded from a SentencePiece model or a Hugging Face folder."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.data.place_names import PLACE_TOKENS
from megatron_mm.data.tokenizer_checks import (
    check_control_tokens,
    check_files,
    check_vocabulary,
    guarded,
    loading,
)
from megatron_mm.errors import DataError

SPECIAL_TOKENS = {
    "pad_id": "<|endoftext|>",
    "message_start_id": "<|im_start|>",
    "message_end_id": "<|im_end|>",
    "image_start_id": "<img>",
    "image_end_id": "</img>",
    "image_context_id": "<IMG_CONTEXT>",
}
# Tokens of a model that glimpses (data/looks.py); a tokenizer may lack them.
LOOK, LOOK_CONTEXT = "<look>", "<LOOK_CONTEXT>"
LOOK_TOKENS = (LOOK, LOOK_CONTEXT, *PLACE_TOKENS)

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Tokenizer:
    """Encoding of plain text, and the ids of control tokens that the chat template inserts.

    Attributes:
        special_tokens: every token that is no plain text, by its spelling.
        end_ids: tokens that end an answer: `<|im_end|>` first, then the tokenizer's end of text,
            those of generation_config.json beside it (without that file, of config.json, as
            transformers does), and those of the settings.
        path: file or folder that it was loaded from.
        end_tokens: the settings' part of `end_ids`.
        look_id, look_context_id: None: it lacks the token.
    """

    vocab_size: int
    pad_id: int
    message_start_id: int
    message_end_id: int
    image_start_id: int
    image_end_id: int
    image_context_id: int
    special_tokens: dict[str, int]
    end_ids: tuple[int, ...]
    encode: Callable[[str], list[int]]
    decode_known: Callable[[list[int]], str]
    path: str
    end_tokens: tuple[str, ...] = ()
    look_id: int | None = None
    look_context_id: int | None = None

    def __reduce__(self):
        # Its functions cannot be pickled, so another process loads it again.
        return load_tokenizer, (self.path, self.end_tokens)

    def padded_vocab_size(self, multiple: int = 64) -> int:
        """Smallest multiple of `multiple` that holds all ids: the `vocab_size` to set."""
        return -(-self.vocab_size // multiple) * multiple

    def find_forged(self, ids: Sequence[int], *, answer: bool) -> str | None:
        """Returns the spelling of a token among `ids`, the encoding of a row's text, that the text
        may not write; None without one. Control tokens forge an image or a turn; in an answer an
        end would end it for generation and not for training. Other special tokens, such as
        `<box>`, are vocabulary. It looks at ids because a tokenizer may normalise text, such as
        full-width brackets, to a control token."""
        names = {getattr(self, name): token for name, token in SPECIAL_TOKENS.items()}
        ends = set(self.end_ids) if answer else set()
        found = next((index for index in ids if index in names or index in ends), None)
        return None if found is None else names.get(found) or self.decode([found])

    def decode(self, ids: Sequence[int]) -> str:
        """Converts token ids to text, special tokens to their spelling. Ids beyond the vocabulary
        (of a padded model) are left out."""
        return self.decode_known([i for i in map(int, ids) if 0 <= i < self.vocab_size])

    def answer_ids(self, ids: Sequence[int]) -> list[int]:
        """Returns the tokens of a completion before its first end."""
        ids = [int(i) for i in ids]
        end = next((place for place, i in enumerate(ids) if i in self.end_ids), len(ids))
        return ids[:end]

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Returns the text of a completion before its first end. A special token within it is
        spelled out, so that the texts around it do not read as one word."""
        return self.decode(self.answer_ids(ids))


def load_tokenizer(path: str | Path, end_tokens: Sequence[str] = ()) -> Tokenizer:
    """Loads a SentencePiece `.model` file or a Hugging Face tokenizer folder, never from the
    network.

    Args:
        end_tokens: further tokens that end an answer, spelled.

    Raises:
        DataError: it is missing, unreadable or lacks a special token.
    """
    path = Path(path)
    if "\0" not in str(path) and (path.is_dir() or path.is_file()):
        make = _from_huggingface if path.is_dir() else _from_sentencepiece
        with loading(path):
            check_files(path)
            return make(path, tuple(end_tokens))
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


def _from_sentencepiece(path: Path, end_tokens: tuple[str, ...]) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: not a SentencePiece model; set tokenizer_model") from error
    size = model.get_piece_size()
    encode = guarded(model.encode, size)
    vocabulary = {model.id_to_piece(i): i for i in range(size)}
    controls = {t for t, i in vocabulary.items() if model.is_control(i)}
    names = controls | ({*SPECIAL_TOKENS.values(), *LOOK_TOKENS} & vocabulary.keys())
    special = {token: vocabulary[token] for token in sorted(names)}
    spelled = {index: token for token, index in special.items()}

    def decode(ids: list[int]) -> str:
        # The library decodes a control token to nothing.
        pieces: list[str] = []
        plain: list[int] = []
        for index in ids:
            if index in spelled:
                pieces += [model.decode(plain), spelled[index]]
                plain = []
            else:
                plain.append(index)
        return "".join([*pieces, model.decode(plain)])

    required = _required_ids(special, path)
    check_control_tokens(special, [*SPECIAL_TOKENS.values()], path, encode, decode)
    end = model.eos_id()
    ends = [required["message_end_id"], *([] if end < 0 else [end])]
    ends += _configured_ends(path.parent, size)
    ends += _ids(end_tokens, vocabulary, encode, path)
    return Tokenizer(
        vocab_size=size,
        **required,
        special_tokens=special,
        end_ids=tuple(dict.fromkeys(ends)),
        encode=encode,
        decode_known=decode,
        path=str(path),
        end_tokens=end_tokens,
        look_id=vocabulary.get(LOOK),
        look_context_id=vocabulary.get(LOOK_CONTEXT),
    )


def _from_huggingface(path: Path, end_tokens: tuple[str, ...]) -> Tokenizer:
    from transformers import AutoTokenizer  # takes seconds to import

    # A question whether to run a folder's code would leave every rank waiting for an answer.
    model = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    vocabulary = model.get_vocab()
    size = check_vocabulary(vocabulary, path)
    marked = {str(t) for t in model.all_special_tokens}
    marked |= {str(t) for t in model.added_tokens_decoder.values() if t.special}
    names = marked | ({*SPECIAL_TOKENS.values(), *LOOK_TOKENS} & vocabulary.keys())
    special = {token: vocabulary[token] for token in sorted(names) if token in vocabulary}
    required = _required_ids(special, path)
    added = model.added_tokens_decoder
    for token in SPECIAL_TOKENS.values():
        known = added.get(special[token])
        if known is not None and (known.lstrip or known.rstrip):
            raise DataError(
                f"{path}: the token {token} takes the spaces beside it (lstrip or rstrip), which "
                "no text of the template could then have; save the tokenizer without"
            )

    encode = guarded(lambda text: model.encode(text, add_special_tokens=False), size)

    def decode(ids: list[int]) -> str:
        return model.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    check_control_tokens(special, [*SPECIAL_TOKENS.values()], path, encode, decode)
    ends = [required["message_end_id"]]
    ends += [] if model.eos_token_id is None else [model.eos_token_id]
    if not 0 <= ends[-1] < size:
        raise DataError(f"{path}: the end of text is token {ends[-1]} of {size}")
    ends += [*_configured_ends(path, size), *_ids(end_tokens, vocabulary, encode, path)]
    return Tokenizer(
        vocab_size=size,
        **required,
        special_tokens=special,
        end_ids=tuple(dict.fromkeys(ends)),
        encode=encode,
        decode_known=decode,
        path=str(path),
        end_tokens=end_tokens,
        look_id=vocabulary.get(LOOK),
        look_context_id=vocabulary.get(LOOK_CONTEXT),
    )


def _configured_ends(folder: Path, vocab_size: int) -> list[int]:
    """Returns the `eos_token_id` of a folder's generation_config.json or, without that file, of its
    config.json.

    Raises:
        DataError: the file is no JSON object, or an id is out of range.
    """
    path = next(
        (p for n in (GENERATION_CONFIG, "config.json") if (p := folder / n).is_file()), None
    )
    if path is None:
        return []
    try:
        config: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} holds a {type(config).__name__}, not an object")
    found = config.get("eos_token_id")
    if found is None and isinstance(config.get("text_config"), dict):
        found = config["text_config"].get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    for end in ends:
        if type(end) is not int or not 0 <= end < vocab_size:
            raise DataError(f"{path}: eos_token_id {end!r}; the tokenizer has {vocab_size} ids")
    return ends


def _ids(
    tokens: Sequence[str],
    vocabulary: Mapping[str, int],
    encode: Callable[[str], list[int]],
    path: Path,
) -> list[int]:
    """Returns the ids of tokens by their spelling."""
    found = [[vocabulary[t]] if t in vocabulary else encode(t) for t in tokens]
    for token, ids in zip(tokens, found, strict=True):
        if len(ids) != 1:
            raise DataError(
                f"{path}: end_tokens has {token!r}, which is {len(ids)} tokens; allowed: 1"
            )
    return [index for ids in found for index in ids]


def _required_ids(special: dict[str, int], path: Path) -> dict[str, int]:
    missing = [token for token in SPECIAL_TOKENS.values() if token not in special]
    if missing:
        raise DataError(
            f"{path}: the tokenizer lacks {len(missing)} of {len(SPECIAL_TOKENS)} special tokens: "
            f"{', '.join(missing)}; add them to it as special tokens"
        )
    return {name: special[token] for name, token in SPECIAL_TOKENS.items()}
