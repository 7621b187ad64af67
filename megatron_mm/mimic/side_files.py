"""Files of tensors beside the data: one safetensors file, whose tensor `head` holds a JSON object.

Files come from other people, so every size is checked against the file before it is used
(`convert/hf_files.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_mm.convert.hf_files import MALFORMED, SINGLE, Stored, read_header
from megatron_mm.convert.hf_writer import lay_out
from megatron_mm.convert.work import nbytes
from megatron_mm.errors import ConvertError, DataError
from megatron_mm.model.families.transforms import Shape
from megatron_mm.outputs import whole_file

HEAD = "head"
MOST_HEAD = 2**26  # bytes


Put = Callable[[str, torch.Tensor, int], None]


def write(path: Path, head: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a file; it is whole or not there at all.

    Raises:
        DataError: it cannot be written.
    """
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with open_new(path, head, kinds) as put:
        for name, tensor in tensors.items():
            put(name, tensor, 0)


@contextmanager
def open_new(
    path: Path, head: Mapping[str, Any], tensors: Mapping[str, tuple[torch.dtype, Shape]]
) -> Iterator[Put]:
    """Opens a new file to be written part by part; it is whole at the end, or not there at all.

    Args:
        tensors: name -> (dtype, shape).
    Yields:
        a function that writes rows of a tensor: (name, the rows, number of the first).
    Raises:
        DataError: it cannot be written.
    """
    text = torch.frombuffer(bytearray(json.dumps(head).encode()), dtype=torch.uint8)
    kinds = {HEAD: (text.dtype, tuple(text.shape)), **tensors}
    listed = [(name, shape, dtype) for name, (dtype, shape) in kinds.items()]
    places, heads, sizes = lay_out(listed, sys.maxsize)  # one file
    try:
        with whole_file(path) as partial, partial.open("wb") as stream:
            stream.write(heads[SINGLE])
            stream.truncate(sizes[SINGLE])

            def put(name: str, tensor: torch.Tensor, first: int) -> None:
                place = places[name]
                assert tensor.dtype == place.dtype, name
                stream.seek(place.offset + first * nbytes(place.shape[1:], place.dtype.itemsize))
                stream.write(tensor.contiguous().numpy().tobytes())

            put(HEAD, text, 0)
            yield put
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


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
