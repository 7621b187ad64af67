"""Times conversion both ways against a plain copy of the same folder, until it is on disk."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mm.benchmark.measure import Peak, interleave
from megatron_mm.config import ModelConfig, RunConfig, to_transformers_dict
from megatron_mm.convert import to_hf, to_megatron
from megatron_mm.convert.export_inputs import as_json
from megatron_mm.convert.folder import CONFIG, check_folder, open_folder
from megatron_mm.convert.hf_writer import TensorWriter, create_files, lay_out, write_index
from megatron_mm.convert.mapping import write_links
from megatron_mm.convert.work import nbytes
from megatron_mm.model.blueprint import blueprint
from megatron_mm.model.families.qwen3_next.settings import Qwen3NextSettings

PIECE = 2**24


def synthetic_model(gigabytes: float) -> ModelConfig:
    """Returns a text-only model with Qwen3-Next's widths and as many experts as fit in bf16."""
    language = Qwen3NextSettings(
        vocab_size=65536 if gigabytes >= 2 else 1024,
        num_experts=8,
        moe_router_topk=2,
    )
    model = ModelConfig(hybrid_layer_pattern="GE*E", language=language, vision=None)
    sizes = {n: nbytes(p.global_shape, 2) for n, p in blueprint(model).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name) // 8
    rest = sum(size for name, size in sizes.items() if ".experts." not in name)
    language.num_experts = max(8, round((gigabytes * 10**9 - rest) / experts) + 1)
    return model


def make_folder(folder: Path, model: ModelConfig) -> None:
    """Writes random tensors in the released form: one per expert, shards of 1 GB."""
    links = write_links(model, blueprint(model), "text")
    tensors = [(n, tuple(s), torch.bfloat16) for link in links for n, s in link.hf_tensors()]
    places, heads, sizes = lay_out(tensors, shard_bytes=10**9)
    folder.mkdir()
    create_files(folder, heads, sizes)
    write_index(folder, places)
    longest = max(torch.Size(shape).numel() for _, shape, _ in tensors)
    noise = torch.randn(longest, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with TensorWriter(folder, places) as writer:
        for number, (name, shape, _) in enumerate(tensors):
            count = torch.Size(shape).numel()
            writer.write(name, noise[:count].roll(number % 997).view(shape))
        writer.finish()
    words = to_transformers_dict(model)
    (folder / CONFIG).write_bytes(as_json(words))


def copy(source: Path, target: Path) -> None:
    """Copies every file, 16 MB at a time, with fsync at its end."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as a, (target / path.name).open("wb", buffering=0) as b:
            while piece := a.read(PIECE):
                b.write(piece)
            os.fsync(b.fileno())


def compare(rounds: int, warmup: int, gigabytes: float, folder: Path | None) -> dict[str, Any]:
    """Returns bytes per second of both directions and of the copy, and peak memory.

    The source is read once before each side, so that it is in the page cache if it fits.

    Args:
        folder: working folder on the disk to measure; default: the system's temporary one.
    """
    root = Path(tempfile.mkdtemp(prefix="convert-", dir=folder))
    try:
        return _compare(root, rounds, warmup, gigabytes)
    finally:
        shutil.rmtree(root)


def _compare(root: Path, rounds: int, warmup: int, gigabytes: float) -> dict[str, Any]:
    model = synthetic_model(gigabytes)
    source_folder, mega = root / "hf", root / "mega"
    make_folder(source_folder, model)
    group = dist.new_group(backend="gloo")

    def forward(target: Path) -> None:
        source = open_folder(source_folder)
        parameters = blueprint(source.model)
        mapping = source.mapping(parameters)
        check_folder(source, mapping)
        run = RunConfig(model=source.model)
        run.training.bf16 = True
        to_megatron.convert(source, mapping, parameters, run, target, group, quiet=True)

    def backward(target: Path) -> None:
        to_hf.convert(to_hf.open_checkpoint(mega), target, group, shard_bytes=10**9, quiet=True)

    forward(mega)
    total = sum(path.stat().st_size for path in source_folder.glob("*.safetensors"))
    peaks: dict[str, int] = {}

    def side(name: str, source: Path, work: Callable[[Path], None]) -> Callable[[int], float]:
        def run(number: int) -> float:
            target = root / f"{name}{number}"
            for path in source.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        while file.read(PIECE):
                            pass
            os.sync()
            begin = time.perf_counter()
            with Peak() as peak:
                work(target)
            seconds = time.perf_counter() - begin
            peaks[name] = max(peaks.get(name, 0), peak.bytes)
            shutil.rmtree(target)
            return seconds

        return run

    sides = {
        "copy": side("copy", source_folder, lambda target: copy(source_folder, target)),
        "hf_to_megatron": side("hf_to_megatron", source_folder, forward),
        "megatron_to_hf": side("megatron_to_hf", mega, backward),
    }
    found = interleave(list(sides.values()), rounds + warmup)
    seconds = {
        name: [timed.result for timed in runs[warmup:]]
        for name, runs in zip(sides, found, strict=True)
    }
    shapes = [s for k in write_links(model, blueprint(model), "text") for _, s in k.hf_tensors()]
    largest = max(nbytes(shape, 2) for shape in shapes)
    result: dict[str, Any] = {
        "bytes": total,
        "tensors": len(shapes),
        "largest_tensor_bytes": largest,
        "allowed_peak_bytes": 3 * largest + 2**30,
        "rounds": rounds,
    }
    for name, times in seconds.items():
        pairs = [c / t for c, t in zip(seconds["copy"], times, strict=True)]
        result[name] = {
            "bytes_per_second": round(total / statistics.median(times)),
            "ratio": round(statistics.median(seconds["copy"]) / statistics.median(times), 3),
            "ratio_range": [round(min(pairs), 3), round(max(pairs), 3)],
            "peak_bytes": peaks[name],
        }
    return result
