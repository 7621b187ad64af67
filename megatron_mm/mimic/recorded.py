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

import torch

from megatron_mm.mimic.side_files import write

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


def place_of(where: str) -> tuple[str, int]:
    """Returns (name of the file without its folders, row from 1) of "file:row"."""
    path, _, row = where.rpartition(":")
    return Path(path).name, int(row)


def write_routes(
    path: Path,
    teacher: TeacherSizes,
    layers: Sequence[int],
    rows: Mapping[tuple[str, int], Recorded],
    source: str,
) -> None:
    """Writes a file.

    Args:
        layers: the recorded ones, ascending.
        rows: by `place_of`.
        source: where the teacher stood, to be read by people.
    """
    order = sorted(rows)
    files = sorted({name for name, _ in order})
    held = [rows[place] for place in order]
    lengths = torch.tensor([0, *(len(one.start) for one in held)])
    tensors = {
        "file": torch.tensor([files.index(name) for name, _ in order], dtype=torch.int32),
        "row": torch.tensor([row for _, row in order], dtype=torch.int32),
        "digest": torch.stack([_bytes(one.digest) for one in held]),
        "tokens": torch.stack([_bytes(one.tokens) for one in held]),
        "checksum": torch.tensor([one.checksum() for one in held]),
        "offset": lengths.cumsum(0),
    }
    tensors |= {name: torch.cat([getattr(one, name) for one in held]) for name in OF_ROW}
    head = {
        "format": FORMAT,
        "teacher": asdict(teacher),
        "layers": list(layers),
        "files": files,
        "source": source,
    }
    write(path, head, tensors)


def _bytes(digest: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
