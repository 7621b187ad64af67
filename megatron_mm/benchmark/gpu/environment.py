"""The machine: what is installed, and the peaks that the planner assumes shares of."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess

import torch

from megatron_mm.benchmark.gpu.timing import medians, milliseconds
from megatron_mm.benchmark.gpu.visit import Row, Visit
from megatron_mm.benchmark.measure import environment, revision
from megatron_mm.perf.hardware import GPU, GPUS, Assumptions

# Beside those of `measure.environment`.
PACKAGES = ("triton", "flash-linear-attention", "transformer-engine")


def check(visit: Visit, row: Row) -> None:
    """Measures products, copies and launches; names card and packages."""
    peaks(visit, row)
    card = torch.cuda.get_device_properties(0)
    built = torch.cuda.get_arch_list()
    capability = f"sm_{card.major}{card.minor}"
    row.note(
        card=card.name,
        capability=capability,
        memory_bytes=card.total_memory,
        multiprocessors=card.multi_processor_count,
        driver=_driver(),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        revision=revision(),
        **environment(),
        **{name: _version(name) for name in PACKAGES},
    )
    # A build for sm_80 runs on all of 8.x, one for another major does not.
    if built and not any(name.startswith(f"sm_{card.major}") for name in built):
        row.problems.append(f"torch is built for {', '.join(built)}, the card is {capability}")
    row.text.append(f"{card.name}, {capability}, driver {row.figures['driver']}")
    row.text.append(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    missing = [name for name in PACKAGES if row.figures[name] is None]
    row.text += [f"without {', '.join(missing)}"] if missing else []


def peaks(visit: Visit, row: Row) -> None:
    """Measures what `Assumptions` are shares of: a bf16 product, a copy, a launch."""
    size, device = visit.size(8192, 64), visit.device
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    source = torch.zeros(visit.size(1 << 30, 1 << 10), device=device, dtype=torch.uint8)
    target, small = torch.empty_like(source), torch.zeros(1, device=device)
    launches = visit.size(2000, 4)

    def many() -> None:
        for _ in range(launches):
            small.add_(1)

    found = medians({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10)
    row.note(launch_us=round(1e3 * milliseconds(many) / launches, 2))
    if visit.dry:
        return
    gpu, assumed = planned_gpu(torch.cuda.get_device_name(0)), Assumptions()
    flops = 2 * size**3 / found["product"] * 1e3
    moved = 2 * len(source) / found["copy"] * 1e3
    row.note(
        bf16_tflops=round(flops / 1e12, 1),
        copy_tb_per_s=round(moved / 1e12, 2),
        share_of_bf16_peak=round(flops / gpu.bf16_flops, 3),
        share_of_bandwidth=round(moved / gpu.bandwidth, 3),
        planner_assumes={
            "gpu": gpu.name,
            "share_of_bf16_peak": assumed.compute,
            "share_of_bandwidth": assumed.bandwidth,
            "launch_us": assumed.launch * 1e6,
        },
    )
    row.text.append(f"bf16 {flops / 1e12:.0f} TFLOP/s, copies {moved / 1e12:.2f} TB/s")


def planned_gpu(card: str) -> GPU:
    """The planner's entry for a card; H100 for one that it does not know."""
    longest_first = sorted(GPUS, key=len, reverse=True)  # a GB200 is no B200
    name = next((name for name in longest_first if name in card), "H100")
    return GPUS[name]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver's version, None where nvidia-smi does not tell it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    words = ["--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run([tool, *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode:  # it prints why
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
