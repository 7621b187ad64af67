"""Values that hold tensors, as one block of bytes: what a reader sends to its replica.

    [bytes of the outline: int64] [outline] [tensor] [tensor] ...

The outline is the value with a place, a dtype and a shape for each tensor. Tensors begin at
multiples of `ALIGNED` and are views of the block when they are taken out: nothing is copied twice.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

ALIGNED = 16  # the largest element's bytes
HEAD = 8


class _Outliner(pickle.Pickler):
    """Takes the tensors out of a value as it is pickled. One that occurs twice is sent once."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.places: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []
        self.size = 0  # of the tensors, with the gaps between them

    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self.places:
            self.places[id(obj)] = self.size
            self.tensors.append(obj)
            self.size = _aligned(self.size + obj.nbytes)
        return self.places[id(obj)], obj.dtype, tuple(obj.shape)


class _Filler(pickle.Unpickler):
    def __init__(self, outline: bytes, tensors: torch.Tensor):
        super().__init__(io.BytesIO(outline))
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> torch.Tensor:
        place, dtype, shape = pid
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)  # keeps no block alive
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.tensors[place : place + count].view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def wrap(value: Any) -> torch.Tensor:
    """Returns a value as uint8 [n] on the CPU. Its tensors lose what else their storage holds."""
    file = io.BytesIO()
    outliner = _Outliner(file)
    outliner.dump(value)
    outline = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    begin = _aligned(HEAD + len(outline))
    block = torch.zeros(begin + outliner.size, dtype=torch.uint8)
    block[:HEAD] = torch.tensor([len(outline)]).view(torch.uint8)
    block[HEAD : HEAD + len(outline)] = outline
    for tensor in outliner.tensors:
        if tensor.numel():
            place = begin + outliner.places[id(tensor)]
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            block[place : place + len(flat)] = flat
    return block


def unwrap(block: torch.Tensor) -> Any:
    """Inverse of `wrap`. Tensors are views of the block, but for those without elements."""
    count = int(block[:HEAD].view(torch.int64))
    outline = block[HEAD : HEAD + count].numpy().tobytes()
    return _Filler(outline, block[_aligned(HEAD + count) :]).load()
