"""The slice of mm-80b that is measured, and what the planner predicts of it.

Predictions need a process without GPU: the planner's tensors have no memory.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from typing import Any, Literal

from megatron_mm.benchmark.gpu.visit import Visit
from megatron_mm.config import RunConfig, preset, validate
from megatron_mm.config.families import vision_settings
from megatron_mm.model.backends.fla_here import missing_fla
from megatron_mm.model.families.internvit.settings import InternViTSettings
from megatron_mm.perf.assumed import planned_batch
from megatron_mm.perf.hardware import GPUS, Assumptions
from megatron_mm.perf.pieces import trace_pieces
from megatron_mm.perf.predict import played, predict
from megatron_mm.perf.rank import plan_rank

# Every kind of layer once or more; two mixers of each kind and a look between them.
PATTERN = "GE L GE *E J GE *E"


def slice_run(dry: bool) -> RunConfig:
    """A few layers of mm-80b at their widths, with the 32 experts that a rank has under EP16, and
    four layers of its ViT; one sample of 8,192 tokens with an image of 13 tiles."""
    run = RunConfig(model=preset("tiny" if dry else "mm-80b"))
    run.model.hybrid_layer_pattern = PATTERN
    run.training.bf16 = True
    run.training.micro_batch_size = run.training.global_batch_size = 1
    run.data.seq_length, run.data.max_num_tiles = (64, 4) if dry else (8192, 12)
    if not dry:
        run.model.language.num_experts = 32
        vision = vision_settings(run.model)
        assert isinstance(vision, InternViTSettings)  # the preset's
        vision.vision_num_layers = 4
    validate(run, 1)
    return run


def predicted(dry: bool) -> dict[str, dict[str, Any]]:
    """Predictions by kernel of the delta rule: `torch`, and `fla` where it is installed. Whether it
    works is known beside the GPU alone (`planned`)."""
    installed = importlib.util.find_spec("fla") is not None
    kernels: tuple[Literal["torch", "fla"], ...] = ("torch", "fla")
    return {kernel: _with(kernel, dry) for kernel in kernels[: 1 + installed]}


def planned(visit: Visit) -> dict[str, Any]:
    """The predictions for the kernel that the slice runs with."""
    kernel = "torch" if missing_fla() else "fla"
    return visit.from_cpu("plan.predicted")[kernel]


def _with(kernel: Literal["torch", "fla"], dry: bool) -> dict[str, Any]:
    """By GPU: seconds (forward, backward) of the whole and of each letter, FIRST and LAST; of the
    update; of the passes by term. Beside them, bytes at the peak."""
    run = slice_run(dry)
    run.backend.gdn_kernel = kernel
    plan = plan_rank(run, 0, 1, planned_batch(run))
    pieces = trace_pieces(run, images=1, supervised=1.0)
    assumed = Assumptions()
    found: dict[str, Any] = {"peak_bytes": plan.total, "state_bytes": plan.state.total}
    for gpu in GPUS.values():
        parts = {
            name: [played(kernels, {}, gpu, assumed).seconds for kernels in of.traces[0].kernels]
            for name, of in pieces.plans.items()
        }
        whole = predict(run, 1, [plan], gpu, assumed)
        (terms,) = whole.terms
        found[gpu.name] = {
            "whole": whole.stages[0],
            "update": whole.update.seconds,
            "terms": asdict(terms),
            "parts": parts,
        }
    return found
