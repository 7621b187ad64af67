"""Recorded rows on disk until their file is written: 100,000 rows of an 80B teacher are 100 GB."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mm.errors import DataError
from megatron_mm.mimic.recorded import OF_ROW, TENSORS, Place, Recorded
from megatron_mm.outputs import check_writable


@dataclass(frozen=True)
class _Held:
    """Where a row lies in the spool, and what else is known of it."""

    at: int
    digest: bytes
    tokens: bytes
    shapes: tuple[tuple[int, ...], ...]  # of `OF_ROW`


class RouteSpool(Mapping[Place, Recorded]):
    """Rows that come in any order, as a mapping for `recorded.write_routes`. They lie in a file
    without a name in the folder of `path`, so that nothing stays whatever ends the process.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self._rows: dict[Place, _Held] = {}
        check_writable(path, "--out", DataError)
        self._file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115, for its life
        self._path = path

    def add(self, place: Place, row: Recorded) -> None:
        """Adds a row.

        Raises:
            DataError: the disk is full.
        """
        parts = [getattr(row, name).contiguous() for name in OF_ROW]
        try:
            at = self._file.seek(0, 2)
            for part in parts:
                self._file.write(part.numpy().tobytes())
            self._file.flush()  # or reading would, where a full disk is no one's to tell
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error.strerror}") from None
        shapes = tuple(tuple(part.shape) for part in parts)
        self._rows[place] = _Held(at, row.digest, row.tokens, shapes)

    def __getitem__(self, place: Place) -> Recorded:
        held = self._rows[place]
        parts, at = [], held.at
        for name, shape in zip(OF_ROW, held.shapes, strict=True):
            dtype = TENSORS[name][0]
            count = torch.Size(shape).numel()
            raw = self._read(at, count * dtype.itemsize)
            at += len(raw)
            flat = torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)
            parts.append(flat.view(shape))
        return Recorded(held.digest, held.tokens, *parts)

    def _read(self, at: int, size: int) -> bytearray:
        try:
            self._file.seek(at)
            raw = bytearray(self._file.read(size))
        except OSError as error:
            raise DataError(f"{self._path}: recorded rows are lost: {error.strerror}") from None
        assert len(raw) == size  # it was flushed
        return raw

    def __iter__(self) -> Iterator[Place]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
