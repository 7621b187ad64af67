"""Guards around a tokenizer that nobody has vouched for: what it raises, and what it gives."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mm.errors import DataError

PROBE = "assistant\n"  # every conversation has it
MAX_FILE = 2**29  # bytes of a file; the largest tokenizer in use has 2**26


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turns whatever a library raises on a damaged folder or file into one line.

    Raises:
        DataError: in its place.
    """
    try:
        with _silent():
            yield
    except (DataError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise DataError(f"{path}: no tokenizer can be loaded from it: {reason(error)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Throws away what libraries print meanwhile, which is what stands in the files: it would reach
    the terminal raw, from Rust too, so that Python's streams are not enough."""
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)
        os.close(nowhere)


def reason(error: BaseException) -> str:
    """Returns the kind and the text of an error, in one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def guarded(encode: Callable[[str], Any], vocab_size: int) -> Callable[[str], list[int]]:
    """Returns `encode` with its failures, and ids beyond the vocabulary, as ValueError."""

    def encode_or_say(text: str) -> list[int]:
        try:
            ids = encode(text)
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ValueError(f"the tokenizer fails: {reason(error)}") from None
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"the tokenizer gives the ids {min(ids)} to {max(ids)} of {vocab_size}"
            )
        return ids

    return encode_or_say


def check_files(folder: Path) -> None:
    """Checks the sizes of a tokenizer's files, which libraries read whole.

    Raises:
        DataError: one is too large, or no plain file.
    """
    paths = folder.iterdir() if folder.is_dir() else [folder]
    for path in paths:
        if path.suffix not in (".json", ".model", ".txt", ".jinja", ".tiktoken"):
            continue
        if path.is_dir() or not path.exists():
            continue  # what a library makes of that is one line
        if not path.is_file():  # a pipe would never end
            raise DataError(f"{path}: no plain file; copy the tokenizer's files")
        if path.stat().st_size > MAX_FILE:
            raise DataError(f"{path}: {path.stat().st_size} bytes; allowed: {MAX_FILE}")


def check_vocabulary(vocabulary: Mapping[str, int], path: Path) -> int:
    """Returns the number of ids, gaps included.

    Raises:
        DataError: there is none, one is no id, or gaps are most of them.
    """
    ids = vocabulary.values()
    if not vocabulary or not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"{path}: a vocabulary of {len(vocabulary)} tokens, some without an id")
    size = max(ids) + 1
    if size > 4 * len(vocabulary) + 2**16:
        raise DataError(f"{path}: {len(vocabulary)} tokens have ids up to {size - 1}; number them")
    return size


def check_control_tokens(
    special: Mapping[str, int],
    required: Sequence[str],
    path: Path,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
) -> None:
    """Checks that the control tokens are different tokens and that plain text can be written.

    Raises:
        DataError: two are one, one is not written by its spelling, or a probe becomes nothing or a
            control token.
    """
    named: dict[int, str] = {}
    for token in required:
        twin = named.setdefault(special[token], token)
        if twin != token:
            raise DataError(f"{path}: {twin} and {token} are both token {special[token]}")
    try:
        ids = encode(PROBE)
        spelled = decode(ids)
    except ValueError as error:
        raise DataError(f"{path}: {PROBE!r} cannot be encoded: {error}") from None
    if not ids or not spelled or named.keys() & {*ids}:
        raise DataError(f"{path}: {PROBE!r} becomes the tokens {ids[:8]}; it must be plain text")
    for index, token in named.items():
        if (found := decode([index])) != token:
            raise DataError(f"{path}: token {index} is {token} and is decoded as {found[:80]!r}")
