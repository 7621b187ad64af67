"""Folders of safetensors: headers with other values, damaged bytes, indices of other files."""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron_mm.convert.hf_files import DTYPES, INDEX, SINGLE, stored_tensors
from megatron_mm.errors import ConvertError
from support.mutations import altered, damaged

NAME = "safetensors"
ALLOWED = (ConvertError,)

PIECES = (
    *(b'{"a":', b"[", b"]", b"}", b'"', b",", b"null", b"1e400", b"-1", b"9" * 5000, b"NaN"),
    *(b"1180591620717411303424", b"0", b'"dtype"', b"\\ud800", b"\xff", bytes(8), b"\xff" * 8),
)


def make(rng: random.Random, folder: Path) -> Path:
    """A folder with one file or two and their index."""
    names = [f"layers.{n}.weight" for n in range(rng.randrange(1, 8))]
    files = [SINGLE] if rng.random() < 0.6 else ["a.safetensors", "b.safetensors"]
    places = {name: rng.choice(files) for name in names}
    for file in files:
        _write(rng, folder / file, [name for name in names if places[name] == file])
    if len(files) > 1:
        index = {"metadata": {"total_size": 5}, "weight_map": places}
        content = json.dumps(altered(rng, index) if rng.random() < 0.5 else index).encode()
        (folder / INDEX).write_bytes(
            damaged(rng, content, PIECES) if rng.random() < 0.3 else content
        )
    return folder


def _write(rng: random.Random, path: Path, names: list[str]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        dtype = rng.choice(list(DTYPES))
        shape = [rng.randrange(5) for _ in range(rng.randrange(4))]
        size = DTYPES[dtype].itemsize
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    if rng.random() < 0.6:
        header = altered(rng, header)
    raw = json.dumps(header).encode()
    raw = damaged(rng, raw, PIECES) if rng.random() < 0.4 else raw
    content = len(raw).to_bytes(8, "little") + raw + rng.randbytes(at)
    path.write_bytes(damaged(rng, content) if rng.random() < 0.2 else content)


def read(folder: Path) -> None:
    """Reads every tensor, whole and by rows."""
    for tensor in stored_tensors(folder).values():
        tensor.read()
        if tensor.shape:
            tensor.read(0, tensor.shape[0] // 2)
