"""Files of tensors beside the data: one safetensors file, whose tensor `head` holds a JSON object.

Files come from other people, so every size is checked against the file before it is used
(`convert/hf_files.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_mm.convert.hf_files import MALFORMED, Stored, read_header
from megatron_mm.errors import ConvertError, DataError

HEAD = "head"
MOST_HEAD = 2**26  # bytes


def write(path: Path, head: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a file; it is whole or not there at all.

    Raises:
        DataError: it cannot be written.
    """
    from safetensors.torch import save_file

    text = torch.frombuffer(bytearray(json.dumps(head).encode()), dtype=torch.uint8)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({HEAD: text, **{k: v.contiguous() for k, v in tensors.items()}}, partial)
        partial.replace(path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise DataError(f"{path} cannot be written: {' '.join(str(error).split())}") from None


def check_place(path: Path) -> None:
    """Raises DataError for a file that could not be written: better before hours of work."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.open("ab").close()
        partial.unlink()
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; name another --out") from None


class SideFile:
    """An opened file.

    Args:
        what: the kind of file, for messages.
        form: the format that its head must name.
        tensors: name -> (dtype, number of dimensions) of its tensors.
    Raises:
        DataError: it cannot be read, is of another format, or its tensors are others.
    """

    def __init__(
        self, path: str | Path, what: str, form: str, tensors: Mapping[str, tuple[torch.dtype, int]]
    ):
        self.name = f"{what} {path}"
        try:
            self._stored: dict[str, Stored] = read_header(Path(path))
        except OSError as error:
            raise DataError(f"{self.name}: {error.strerror}") from None
        except (ConvertError, ValueError) as error:
            raise DataError(f"{what} {error}") from None
        self.head = self._read_head(form)
        for name, (dtype, dimensions) in tensors.items():
            stored = self._stored.get(name)
            if stored is None:
                raise DataError(f"{self.name}: {name} is missing; write the file again")
            if stored.dtype != dtype or len(stored.shape) != dimensions:
                raise DataError(
                    f"{self.name}: {name} is {stored.dtype} of {len(stored.shape)} dimensions, "
                    f"expected {dtype} of {dimensions}; write the file again"
                )

    def _read_head(self, form: str) -> dict[str, Any]:
        stored = self._stored.get(HEAD)
        if stored is None or stored.dtype != torch.uint8 or stored.nbytes > MOST_HEAD:
            raise DataError(f"{self.name}: it has no head; this version reads {form!r}")
        try:
            head = json.loads(self.read(HEAD).numpy().tobytes())
        except MALFORMED:
            raise DataError(f"{self.name}: its head is not JSON; write the file again") from None
        found = head.get("format") if isinstance(head, dict) else type(head).__name__
        if found != form:
            raise DataError(
                f"{self.name}: format is {str(found)[:80]!r}; this version reads {form!r}"
            )
        return head

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def read(self, name: str, first: int | None = None, last: int | None = None) -> torch.Tensor:
        """Reads a tensor, or its rows first..last-1.

        Raises:
            DataError: the file is shorter than it was when it was opened.
        """
        try:
            return self._stored[name].read(first, last)
        except (OSError, ConvertError) as error:
            raise DataError(f"{self.name}: {error}") from None

    def sizes(self, values: Any, *names: str) -> list[int]:
        """Returns whole numbers from 1 of an object of the head.

        Raises:
            DataError: one is missing or is no such number.
        """
        found = []
        for name in names:
            value = values.get(name) if isinstance(values, dict) else None
            if type(value) is not int or not 1 <= value < 2**31:
                raise DataError(
                    f"{self.name}: {name} is {str(value)[:80]!r}, no size; write the file again"
                )
            found.append(value)
        return found
