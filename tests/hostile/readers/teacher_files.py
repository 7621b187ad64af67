"""A teacher's routes, and maps of experts."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from megatron_mm.data.sample import Sample
from megatron_mm.errors import DataError
from megatron_mm.mimic import expert_map, recorded, route_file
from megatron_mm.mimic.text import row_digest, token_digest
from tests.hostile.mutate import mutated_bytes, mutated_tree

NAME = "a teacher's routes, and maps of experts"
ALLOWED = (DataError,)
ROW: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
ROW["messages"].append({"role": "assistant", "content": "b"})
SAMPLE = Sample(torch.arange(5), torch.arange(5), torch.tensor([0, 0, 1.0, 1, 1]), [], "x")
TEACHER: dict[str, Any] = {"identity": "t", "num_layers": 2, "num_experts": 4, "vocab_size": 9}
HEADS: tuple[dict[str, Any], ...] = (
    {"format": recorded.FORMAT, "teacher": TEACHER, "layers": [0, 1], "files": ["x"]},
    {"format": expert_map.FORMAT, "teacher": "t", "layers": [[0, 0], [1, 1]], "info": {}},
)


def _routes() -> dict[str, torch.Tensor]:
    digests = (row_digest(ROW, "x:1"), token_digest(SAMPLE))
    held = recorded.Recorded(
        *digests,
        torch.tensor([0, 1, 2], dtype=torch.int32),
        torch.tensor([[[0, 3], [1, 2]]] * 3, dtype=torch.int16),
        torch.full((3, 2, 2), 0.4, dtype=torch.float16),
        torch.tensor([[1], [2], [3]], dtype=torch.int32),
        torch.full((3, 1), -0.5),
    )
    found = {name: getattr(held, name) for name in recorded.OF_ROW}
    found |= {
        name: torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None]
        for name, digest in zip(("digest", "tokens"), digests, strict=True)
    }
    found |= {name: torch.tensor([value], dtype=torch.int32) for name, value in
              (("file", 0), ("row", 1))}  # fmt: skip
    return found | {"checksum": torch.tensor([held.checksum()]), "offset": torch.tensor([0, 3])}


TENSORS = (_routes(), {"experts": torch.full((2, 4, 3), 1 / 3)})


def make(rng: Random, folder: Path) -> tuple[int, Path]:
    """Writes one of the two files with some values, sizes, names or bytes changed."""
    kind = rng.randrange(2)
    head, held = HEADS[kind], dict(TENSORS[kind])
    if rng.random() < 0.5:
        head = mutated_tree(rng, head)
    text = json.dumps(head).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = mutated_bytes(rng, text)
    for _ in range(rng.randrange(3)):
        name = rng.choice(sorted(held))
        match rng.randrange(5):
            case 0:
                del held[name]
            case 1:
                held[name] = held[name][: rng.randrange(3)]
            case 2:
                held[name] = held[name].to(rng.choice((torch.int64, torch.float32, torch.int16)))
            case 3:
                held[name] = held[name].unsqueeze(rng.randrange(2))
            case 4:
                values = held[name] = held[name].contiguous().clone()
                bound = rng.choice((0, -1, 7, 2**14))
                begin = rng.randrange(max(values.numel(), 1))
                values.view(-1)[begin:] = torch.tensor(bound).to(values.dtype)
        if not held:
            break
    held["head"] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
    data = save({name: t.contiguous().clone() for name, t in held.items()})
    path = folder / "file.st"
    path.write_bytes(mutated_bytes(rng, data) if rng.random() < 0.4 else data)
    return kind, path


def read(value: tuple[int, Path]) -> None:
    """Reads the file and uses it as training does."""
    kind, path = value
    if kind == 1:
        whole = path.with_name("routes.st")
        held = _routes() | {"head": torch.frombuffer(
            bytearray(json.dumps(HEADS[0]).encode()), dtype=torch.uint8)}  # fmt: skip
        whole.write_bytes(save({name: t.contiguous().clone() for name, t in held.items()}))
        found = expert_map.load_expert_map(path, route_file.RouteFile(whole), [0, 1], 3)
        assert all(a.shape == (4, 3) for a in found.experts.values())
        return
    routes = route_file.RouteFile(path)
    number = routes.number_of(ROW, "x:1")
    held_row = routes.recorded(number, "x:1")
    assert int(held_row.experts.max()) < routes.teacher.num_experts
    routes.aligned(ROW, "x:1", SAMPLE, _Letters(), answers=True)


class _Letters:
    """A tokenizer that writes one letter for each token."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)
