"""Reads folders of safetensors without trusting them.

Every number in a header is checked against the file before a tensor is read; pickled weights are
never opened. Content is read directly into the requested tensor, which may be a slice of the
stored one along its first dimension.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mm.checkpoint.plain_pickle import shown
from megatron_mm.errors import ConvertError
from megatron_mm.model.families.transforms import Shape

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
MOST_HEADER = 100 * 2**20  # bytes; the format's own limit
MOST_DIMENSIONS, MOST_SIZE = 16, 2**60
MOST_NAME = 1000  # letters
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What a file of JSON that is not what it should be makes Python raise.
MALFORMED = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(RecursionError, OverflowError, MemoryError),
)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Stored tensor: its file, the offset of its bytes, dtype and shape."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int | None = None, last: int | None = None) -> torch.Tensor:
        """Reads the tensor, or its rows first..last-1.

        Raises:
            ConvertError: the file is too short.
        """
        shape, begin = self.shape, self.offset
        if first is not None:
            assert last is not None  # the two come together
            row = math.prod(shape[1:]) * self.dtype.itemsize
            shape, begin = (last - first, *shape[1:]), begin + first * row
        raw = torch.empty(math.prod(shape) * self.dtype.itemsize, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            view, done = memoryview(raw.numpy()), 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise ConvertError(f"{self.file} ended {len(view) - done} bytes too early")
                done += count
        return raw.view(self.dtype).view(shape)


def read_header(path: Path) -> dict[str, Stored]:
    """Returns name -> stored tensor of one file.

    Raises:
        ConvertError: the header does not describe exactly the bytes that follow it.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= min(MOST_HEADER, size - 8):
            raise ConvertError(f"{path} is no safetensors file: {size} bytes, header {length}")
        text = stream.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        found = {n: _entry(path, 8 + length, n, entry) for n, entry in entries.items()}
    except ConvertError:
        raise
    except MALFORMED as error:
        problem = shown(repr(error), 200)
        raise ConvertError(f"{path} has a header that cannot be read: {problem}") from None
    at = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            raise ConvertError(f"{path}: {name} begins at byte {tensor.offset}, expected {at}")
        at += tensor.nbytes
    if at != size:
        raise ConvertError(f"{path} has {size} bytes, its header describes {at}")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict:
    made: dict[str, object] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{shown(name)} is given twice")
        made[name] = value
    return made


def _entry(path: Path, base: int, name: str, entry: dict) -> Stored:
    if not name.isprintable() or not 0 < len(name) <= MOST_NAME:
        raise ConvertError(f"{path}: {shown(name)} is no name of a tensor")
    begin, end = entry["data_offsets"]
    kind, shape = entry["dtype"], entry["shape"]
    if type(kind) is not str or kind not in DTYPES:
        raise ConvertError(f"{path}: dtype {shown(repr(kind)[:200])} of {name} is unknown")
    if type(shape) is not list or len(shape) > MOST_DIMENSIONS:
        raise ConvertError(f"{path}: {name} has no shape of up to {MOST_DIMENSIONS} dimensions")
    # Checked before anything is multiplied, also where another dimension is 0.
    whole = [type(n) is int and 0 <= n < MOST_SIZE for n in (begin, end, *shape)]
    if not all(whole) or math.prod(n for n in shape if n) >= MOST_SIZE:
        raise ConvertError(
            f"{path}: {name} has a shape or offsets that are no sizes: "
            f"{shown(repr(shape)[:200])} at {shown(repr((begin, end))[:200])}"
        )
    stored = Stored(path, base + begin, DTYPES[kind], tuple(shape))
    if stored.nbytes != end - begin:
        raise ConvertError(
            f"{path}: {name} of shape {shape} and dtype {kind} has {stored.nbytes} bytes, its "
            f"header says {begin} to {end}"
        )
    return stored


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Returns name -> stored tensor of a model's folder. Reads only headers.

    Raises:
        ConvertError: there are no safetensors, the index disagrees with the files or names a file
            outside of the folder, or a file is damaged.
    """
    if not folder.is_dir():
        raise ConvertError(f"{folder} is not a folder")
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        found = _from_index(folder, index)
        files = {tensor.file for tensor in found.values()}
        if single.is_file() and single not in files:
            # transformers loads the file. It leaves the index behind when it saves a model anew.
            raise ConvertError(
                f"{folder} holds {SINGLE}, and {INDEX} of {len(files)} other files; remove what "
                "is not the model"
            )
        return found
    if single.is_file():
        return read_header(single)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise ConvertError(
            f"{folder / pickled[0]} is pickled and could run code: not opened; "
            "save the model as safetensors first"
        )
    raise ConvertError(f"{folder} has neither {INDEX} nor {SINGLE}")


def _from_index(folder: Path, index: Path) -> dict[str, Stored]:
    if (size := index.stat().st_size) > MOST_HEADER:
        raise ConvertError(f"{index} has {size} bytes; up to {MOST_HEADER} are allowed")
    try:
        places = json.loads(index.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        files = sorted(set(places.values()))
    except MALFORMED as error:
        raise ConvertError(f"{index} is no index: {shown(repr(error), 200)}") from None
    tensors: dict[str, Stored] = {}
    for name in files:
        # Links to other folders are allowed, as in Hugging Face's cache; paths are not.
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
            or not name.isprintable()
            or len(name) > 255
        ):
            named = shown(repr(name)[:200])
            raise ConvertError(f"{index} names {named}; allowed: a .safetensors file beside it")
        if not (folder / name).is_file():
            raise ConvertError(f"{folder / name} is missing; {index.name} names it")
        held = read_header(folder / name)
        for tensor in held:
            if places.get(tensor) != name:
                raise ConvertError(
                    f"{folder / name} holds {tensor}, which {index.name} places in "
                    f"{shown(repr(places.get(tensor))[:200])}"
                )
        tensors |= held
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise ConvertError(
            f"{folder / places[absent[0]]} does not hold {shown(absent[0])}, which "
            f"{index.name} places there"
        )
    return tensors
