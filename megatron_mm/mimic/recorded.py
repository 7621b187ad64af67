"""The file of a teacher's routes and answers, row by row of the data.

A row is known by its file's name and its number, and by a digest of its text, so that routes of
other rows are refused; a checksum of what was recorded tells damage. Rows of all files stand one
after the other: of row r the recorded positions are offset[r] to offset[r + 1].

    file, row       int32 [R]           which row of which file of the head's `files`, from 1
    digest, tokens  uint8 [R, 16]       of its text; of the tokens of its answers
    checksum        int64 [R]           of the row's part of the tensors below
    offset          int64 [R + 1]
    start           int32 [N]           character of the answers at which each token begins
    experts         int16 [N, L, k]     likeliest experts of the recorded layers
    weights         fp16  [N, L, k]     their probabilities among all experts
    answers         int32 [N, n]        likeliest next tokens; n may be 0
    logprobs        fp32  [N, n]        their log-probabilities among all tokens
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mm.mimic.side_files import open_new

Place = tuple[str, int]  # name of the file without its folders, row from 1
FORMAT = "megatron_mm teacher routes 1"
OF_ROW = ("start", "experts", "weights", "answers", "logprobs")
TENSORS = {
    "file": (torch.int32, 1),
    "row": (torch.int32, 1),
    "digest": (torch.uint8, 2),
    "tokens": (torch.uint8, 2),
    "checksum": (torch.int64, 1),
    "offset": (torch.int64, 1),
    "start": (torch.int32, 1),
    "experts": (torch.int16, 3),
    "weights": (torch.float16, 3),
    "answers": (torch.int32, 2),
    "logprobs": (torch.float32, 2),
}


@dataclass(frozen=True)
class TeacherSizes:
    """The teacher of a file.

    Attributes:
        identity: what tells it from other teachers.
        num_layers: all of them; num_experts: of a layer.
    """

    identity: str
    num_layers: int
    num_experts: int
    vocab_size: int


@dataclass(frozen=True)
class Recorded:
    """Record of one row; shapes as in the file, of its positions.

    Attributes:
        digest, tokens: see `text.row_digest` and `text.token_digest`.
    """

    digest: bytes
    tokens: bytes
    start: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor
    logprobs: torch.Tensor

    def checksum(self) -> int:
        """Returns the checksum of what was recorded."""
        total = 0
        for name in OF_ROW:
            total = zlib.crc32(getattr(self, name).contiguous().numpy().tobytes(), total)
        return total


def place_of(where: str) -> Place:
    """Returns (name of the file without its folders, row from 1) of "file:row"."""
    path, _, row = where.rpartition(":")
    return Path(path).name, int(row)


def write_routes(
    path: Path,
    teacher: TeacherSizes,
    layers: Sequence[int],
    rows: Mapping[Place, Recorded],
    source: str,
) -> None:
    """Writes a file, a row at a time.

    Args:
        layers: the recorded ones, ascending.
        rows: by `place_of`.
        source: where the teacher stood, to be read by people.
    """
    order = sorted(rows)
    files = sorted({name for name, _ in order})
    known: dict[str, list[Any]] = {"digest": [], "tokens": [], "checksum": [], "length": [0]}
    shapes: dict[str, tuple[int, ...]] = {}  # of one position
    for place in order:
        one = rows[place]
        known["digest"].append(_bytes(one.digest))
        known["tokens"].append(_bytes(one.tokens))
        known["checksum"].append(one.checksum())
        known["length"].append(len(one.start))
        shapes = {name: tuple(getattr(one, name).shape[1:]) for name in OF_ROW}
    offset = torch.tensor(known["length"]).cumsum(0)
    tensors = {
        "file": torch.tensor([files.index(name) for name, _ in order], dtype=torch.int32),
        "row": torch.tensor([row for _, row in order], dtype=torch.int32),
        "digest": torch.stack(known["digest"]),
        "tokens": torch.stack(known["tokens"]),
        "checksum": torch.tensor(known["checksum"]),
        "offset": offset,
    }
    head = {
        "format": FORMAT,
        "teacher": asdict(teacher),
        "layers": list(layers),
        "files": files,
        "source": source,
    }
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    total = int(offset[-1])
    kinds |= {name: (TENSORS[name][0], (total, *shape)) for name, shape in shapes.items()}
    with open_new(path, head, kinds) as put:
        for name, tensor in tensors.items():
            put(name, tensor, 0)
        for place, first in zip(order, offset.tolist(), strict=False):
            one = rows[place]
            for name in OF_ROW:
                put(name, getattr(one, name), first)


def _bytes(digest: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
