"""Transformer Engine's layers against ours, in a small model whose sizes suit it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from megatron_mm.benchmark.gpu.comparing import check_errors
from megatron_mm.benchmark.gpu.gradients import relative, scene_engine, step
from megatron_mm.benchmark.gpu.visit import Row, Skip, Visit
from megatron_mm.benchmark.models import SHAPES, make_run, make_samples
from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.collate import collate
from megatron_mm.data.tiles import image_settings
from megatron_mm.model.backends.choice import missing_transformer_engine

Impl = Literal["local", "transformer_engine"]
# e4m3 keeps 4 bits of bf16's 8: its steps are 16 times as long.
FP8_STEPS = 16
BF16_LOSS, FP8_LOSS = 5e-3, 0.05


def aligned_run(impl: Impl, bf16: bool = True, fp8: bool = False) -> RunConfig:
    """A run of sizes that FP8 takes. A token goes to all experts: if it went to some, rounding
    would change which."""
    run = make_run("tiny")
    language = run.model.language
    language.hidden_size, language.kv_channels = 128, 32
    run.model.fusion.memory_hidden_size = 64
    language.linear_num_key_heads, language.linear_num_value_heads = 8, 16
    language.moe_router_topk = language.num_experts
    run.training.bf16, run.backend.transformer_impl = bf16, impl
    if fp8:
        run.backend.fp8_format, run.backend.fp8_recipe = "hybrid", "tensorwise"
    return run


def check(visit: Visit, row: Row) -> None:
    """Compares outputs of layers, gradients and the loss. In bf16 Transformer Engine may err as our
    layers do in bf16 against fp32; FP8 only stays near."""
    missing = missing_transformer_engine()
    if missing is not None:
        raise Skip(missing)
    exact = _pass(visit, aligned_run("local", bf16=False))
    ours = _pass(visit, aligned_run("local"))
    theirs = _pass(visit, aligned_run("transformer_engine"))
    row.at_most("bf16: loss", abs(theirs["loss"] / exact["loss"] - 1), BF16_LOSS)
    for what in ("layers", "gradients"):
        found, allowed = (relative(x[what], exact[what]) for x in (theirs, ours))
        check_errors(row, f"bf16 {what}", found, allowed)
    row.text.append("bf16 errs as ours")
    from transformer_engine.pytorch import is_fp8_available

    able, reason = is_fp8_available(return_reason=True)
    row.note(fp8=able or reason)
    if able:
        _check_fp8(row, _pass(visit, aligned_run("transformer_engine", fp8=True)), ours, exact)


def _check_fp8(row: Row, found: dict, ours: dict, exact: dict) -> None:
    row.at_most("fp8: loss", abs(found["loss"] / exact["loss"] - 1), FP8_LOSS)
    errors, bf16 = (relative(x["layers"], exact["layers"]) for x in (found, ours))
    worst = max(errors[name] / bf16[name] for name in errors)
    row.at_most("fp8: error of a layer over bf16's", worst, FP8_STEPS)
    broken = [name for name, grad in found["gradients"].items() if not grad.isfinite().all()]
    row.problems += [f"fp8: gradient of {name} is not finite" for name in broken]
    row.text.append("FP8 stays near")


def _pass(visit: Visit, run: RunConfig) -> dict[str, Any]:
    """Returns the result of `gradients.step`, and the first outputs by layer."""
    engine = scene_engine(run, visit.groups)
    shape = replace(SHAPES["tiny"], samples=5, tiles=4, text_only=0.3)
    batch = collate(
        make_samples(run, shape, seed=1),
        settings=image_settings(run),
        pad_id=0,
        pad_multiple=token_multiple(run),
    )
    outputs: list[torch.Tensor] = []
    engine.chunks[0].watch = lambda layer, hidden: outputs.append(hidden.detach().cpu())
    found = step(engine, [batch])
    count, real = len(engine.chunks[0].letters), batch.num_real_tokens
    layers = {f"layer {n}": out[:real] for n, out in enumerate(outputs[:count])}
    return found | {"layers": layers}
