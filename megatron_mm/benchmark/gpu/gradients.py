"""A training step of a small model with every kind of layer, against the same step on the CPU.

Routes are the CPU's: where the logits of two experts are nearly equal, rounding decides which is
chosen, and the steps would be of two models. The device's own choices are compared with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_mm.benchmark.gpu.comparing import check_errors, difference
from megatron_mm.benchmark.gpu.visit import Row, Visit
from megatron_mm.benchmark.models import SHAPES, make_batch, make_run, make_samples
from megatron_mm.config import ParallelConfig, RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.model.routing import Routes, whole_routes
from megatron_mm.parallel import groups
from megatron_mm.parallel.groups import Groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.sft import SupervisedFineTuning

# fp32 in another order of summation: thirty times what layouts of CPU ranks differ by (3e-6), a
# tenth of what products in TF32 would (10 bits of mantissa).
FP32 = 1e-4
# Of positions in all layers; rounding turns a choice in ten thousands.
OTHER_ROUTES = 1e-3
# A loss in bf16: no logit errs by much more than a step of rounding (2^-8), their mean by less.
BF16_LOSS = 2**-7
SMALL = 256  # elements; of fewer the norm of an error is as random as they are
SCENES = ("plain", "recompute", "lora")


def scene_run(scene: str, bf16: bool = False) -> RunConfig:
    """A run of the preset `tiny` with two looks in flight at once and the balancing loss."""
    run = make_run("tiny")
    run.model.hybrid_layer_pattern = "GE L *E GE L J *E J"
    run.model.language.moe_aux_loss_coeff = 0.01
    run.training.bf16 = bf16
    # Where Transformer Engine is installed, megatron-core multiplies an fp32 router's in TF32.
    run.model.language.moe_router_dtype = "fp64"
    if scene == "recompute":
        run.training.recompute_granularity = "full"
    if scene == "lora":
        run.lora.lora_rank, run.lora.lora_targets = 4, ["language", "vision"]
    return run


def scene_batches(run: RunConfig) -> list[Microbatch]:
    """Two packed microbatches with images of several tilings and text without any."""
    shape = replace(SHAPES["tiny"], samples=5, tiles=4, text_only=0.3)
    return [make_batch(run, make_samples(run, shape, seed)) for seed in (1, 2)]


def scene_engine(run: RunConfig, job: Groups) -> Engine:
    """An engine in which nothing is zero that would hide a gradient: out-projections of looks and
    halves of adapters start so."""
    engine = Engine.create(run, job)
    generator = torch.Generator().manual_seed(3)
    for _, param, _ in layouts(*engine.chunks):
        if param.dim() > 1 and not param.any():
            param.data.copy_(0.1 * torch.randn(param.shape, generator=generator))
    engine.optimizer.reload_model_params()
    return engine


def chosen_routes(engine: Engine, batches: Sequence[Microbatch]) -> list[Routes]:
    """The experts that the routers choose, of each microbatch, on the CPU."""
    records: list[Routes] = [{} for _ in batches]
    positions = SupervisedFineTuning().positions
    engine.forward(batches, positions, lambda *_, **__: None, routes=records)
    found = [whole_routes(record, engine.groups.pg) for record in records]
    return [{index: routes.cpu() for index, routes in record.items()} for record in found]


def step(engine: Engine, batches: Sequence[Microbatch]) -> dict[str, Any]:
    """Loss, gradient norm and gradients of a step, and the loss after its update."""
    objective = SupervisedFineTuning()

    def loss() -> float:
        parts = engine.forward_backward(batches, objective)
        total, count = sum(part.pair("train/lm_loss") for part in parts)
        return float(total / count)

    before, norm = loss(), engine.gradient_norm()
    params = {name: p for name, p, _ in layouts(*engine.chunks) if p.requires_grad}
    gradients = {name: p.main_grad.float().cpu().clone() for name, p in params.items()}
    engine.update(norm)
    return {"loss": before, "norm": norm, "gradients": gradients, "after": loss()}


def reference(dry: bool) -> dict[str, Any]:
    """The CPU's routes and steps: of every scene in fp32, of the first in bf16."""
    del dry  # the model is small
    groups.start(ParallelConfig())
    job = groups.build(ParallelConfig())
    run = scene_run("plain")
    routes = chosen_routes(scene_engine(run, job), scene_batches(run))
    steps = {scene: _step_of(scene, False, job, routes) for scene in SCENES}
    steps["bf16"] = _step_of("plain", True, job, routes)
    groups.stop()
    return {"routes": routes, "steps": steps}


def _step_of(scene: str, bf16: bool, job: Groups, routes: list[Routes]) -> dict[str, Any]:
    run = scene_run(scene, bf16)
    batches = scene_batches(run)
    for batch, given in zip(batches, routes, strict=True):
        batch.routes = given
    return step(scene_engine(run, job), batches)


def check(visit: Visit, row: Row) -> None:
    """Compares the steps, and the device's own routes."""
    known = visit.from_cpu("gradients.reference")
    routes, steps = known["routes"], known["steps"]
    run = scene_run("plain")
    own = chosen_routes(scene_engine(run, visit.groups), scene_batches(run))
    row.at_most("routes that differ", _other_routes(own, routes), OTHER_ROUTES)
    for scene in SCENES:
        found, wanted = _step_of(scene, False, visit.groups, routes), steps[scene]
        for what in ("loss", "norm", "after"):
            row.at_most(f"{scene}: {what}", abs(found[what] / wanted[what] - 1), FP32)
        errors = relative(found["gradients"], wanted["gradients"])
        worst = max(errors, key=errors.__getitem__)
        row.note({f"{scene}: worst gradient of": worst})
        row.at_most(f"{scene}: worst gradient", errors[worst], FP32)
    row.text.append(f"fp32 gradients within {row.figures['plain: worst gradient']:.1e}")
    _check_bf16(row, _step_of("plain", True, visit.groups, routes), steps["bf16"], steps["plain"])


def _check_bf16(row: Row, found: dict, cpu: dict, wanted: dict) -> None:
    """A gradient in bf16 may be off by about what bf16 costs on the CPU, where the same tensors are
    rounded: from 0.2 % to 40 %, by where a parameter stands."""
    row.at_most("bf16: loss", abs(found["loss"] / wanted["loss"] - 1), BF16_LOSS)
    errors, allowed = (relative(x["gradients"], wanted["gradients"]) for x in (found, cpu))
    check_errors(row, "bf16 gradients", errors, allowed)
    row.text.append(f"bf16 errs {row.figures['bf16 gradients: ratio of all']:.2f} times the CPU's")


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors by name, without those of zero; tensors of few elements are taken together,
    each over its own norm."""
    errors, small_found, small_wanted = {}, [], []
    for name, gradient in wanted.items():
        norm = gradient.norm()
        if not norm:
            continue
        if gradient.numel() < SMALL:
            small_found.append(found[name].flatten() / norm)
            small_wanted.append(gradient.flatten() / norm)
        else:
            errors[name] = difference(found[name], gradient)
    if small_wanted:
        together = torch.cat(small_found), torch.cat(small_wanted)
        errors["small ones"] = difference(*together)
    return errors


def _other_routes(found: list[Routes], wanted: list[Routes]) -> float:
    """Share of positions, over all layers, whose experts are not the same."""
    pairs = [
        (of_layer.sort(1).values, other[index].sort(1).values)
        for of_batch, other in zip(found, wanted, strict=True)
        for index, of_layer in of_batch.items()
    ]
    different = sum(int((a != b).any(1).sum()) for a, b in pairs)
    return different / sum(len(a) for a, _ in pairs)
