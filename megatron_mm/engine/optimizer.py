"""Optimizer and scheduler: learning rates, weight decay and freezing by module."""

from __future__ import annotations

import math
import warnings
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_mm import platform
from megatron_mm.config import ParallelConfig, RunConfig
from megatron_mm.model.layers.lora import is_adapter


def module_of(name: str) -> str:
    """Returns the one of `config.MODULES` that a parameter belongs to."""
    if name.startswith("vision.projector."):
        return "projector"
    if name.startswith("vision.memory_proj") or ".looks." in name:
        return "clvr"
    if ".queries." in name:
        return "avm"
    if name.startswith("vision."):
        return "vision"
    if ".router." in name or ".delegate.gate." in name:  # both choose who computes what
        return "router"
    if ".experts." in name:  # not `.shared_experts.`
        return "experts"
    return "language"


def decays(name: str, param: torch.Tensor) -> bool:
    """Whether weight decay applies: not to one-dimensional parameters (norms, biases, layer scales,
    A_log, dt_bias), the class token and the position embedding."""
    return param.dim() > 1 and not name.endswith(("class_token", "positions"))


def freeze(model: torch.nn.Module, run: RunConfig) -> None:
    """Freezes modules whose freeze flag is set and those that LoRA freezes. Adapters are always
    trained."""
    for name, param in model.named_parameters():
        if not run.trains(module_of(name)) and not is_adapter(name):
            param.requires_grad_(False)


def _overrides(
    run: RunConfig, models: list[DistributedDataParallel], scoped: bool
) -> dict[ParamKey, ParamGroupOverride]:
    """Returns an override for each (learning rate, decay) pair that differs from the default.

    Predicates compare identities of parameters, because megatron-core passes them only tensors.
    """
    settings = run.optimizer
    members: dict[tuple[float, float], set[int]] = {}
    named = chain.from_iterable(model.module.named_parameters() for model in models)
    for name, param in named:
        module = module_of(name)
        rate = 1.0 if module == "language" else getattr(settings, f"lr_mult_{module}")
        # An expert whose gradient is zero stays as it is, to the bit, only if it does not decay.
        shrinks = decays(name, param) and not (scoped and module == "experts")
        members.setdefault((rate, float(shrinks)), set()).add(id(param))
    overrides = {}
    for (rate, decay), ids in sorted(members.items()):
        override: ParamGroupOverride = {}
        if rate != 1.0:
            override |= {"max_lr": settings.lr * rate, "min_lr": settings.min_lr * rate}
        if not decay:
            override["wd_mult"] = 0.0
        if override:
            predicate = ParamPredicate(
                name=f"lr x {rate}, decay x {decay}", fn=lambda p, ids=ids: id(p) in ids
            )
            overrides[ParamKey(predicate=predicate)] = override
    return overrides


def distributes(run: RunConfig, pg: ProcessGroupCollection) -> bool:
    """Whether the distributed optimizer is used: only with replicas, without which it would merely
    copy every gradient and parameter once more."""
    replicas = max(pg.dp_cp.size(), pg.expt_dp.size())
    return run.parallel.use_distributed_optimizer and replicas > 1


def overlaps(run: RunConfig, pg: ProcessGroupCollection) -> tuple[bool, bool]:
    """Returns whether (gradient reduction, parameter gather) overlap with computation."""
    hides = pg.dp_cp.size() > 1 and platform.device().type == "cuda"
    reduce, gather = overlap_settings(run.parallel, hides)
    return reduce, gather and distributes(run, pg)


def overlap_settings(parallel: ParallelConfig, hides: bool) -> tuple[bool, bool]:
    """Returns the two overlap settings; those left open are on where they hide communication."""
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    reduce = hides if reduce is None else reduce
    hides = hides and reduce and parallel.use_distributed_optimizer
    return reduce, hides if gather is None else gather


def build_optimizer(
    run: RunConfig,
    models: list[DistributedDataParallel],
    pg: ProcessGroupCollection,
    *,
    scoped: bool = False,
    overlaps_gather: bool = True,
) -> ChainedOptimizer:
    """Builds AdamW, distributed over replicas unless switched off.

    Args:
        scoped: whether experts have a scope; they do not decay then.
        overlaps_gather: False if `models` never gather parameters during their forward pass.
    """
    settings = run.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=run.training.bf16,
        params_dtype=torch.bfloat16 if run.training.bf16 else torch.float32,
        use_distributed_optimizer=distributes(run, pg),
        overlap_param_gather=overlaps_gather and overlaps(run, pg)[1],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = get_megatron_optimizer(
            config,
            models,
            config_overrides=_overrides(run, models, scoped),
            use_gloo_process_groups=False,
            pg_collection=pg,
        )
    assert isinstance(optimizer, ChainedOptimizer)  # of megatron-core 0.19, also if of one part
    for part in optimizer.chained_optimizers:
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, torch.optim.AdamW):  # without apex and Transformer Engine
            # One pass over each tensor instead of ten; megatron-core has no setting for it.
            for group in inner.param_groups:
                group["fused"] = True
    return optimizer


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer, replicas: ProcessGroup) -> float:
    """L2 norm of all gradients of the model, the same on every rank; NaN on every rank if it is not
    finite on any. Needs `prepare_grads`.

    megatron-core's `get_grad_norm` without Transformer Engine and apex, to the bit on the CPU; but
    that reads the norm of every parameter from the device, this one number for all.

    Args:
        replicas: the ranks that hold the same parameters as this one. Without a shared optimizer
            each of them has a sum of its own.
    """
    by_group: dict[ProcessGroup, list[torch.Tensor]] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        gradients = by_group.setdefault(part.get_grad_stats_parallel_group(), [])
        gradients += part.get_grads_for_grad_norm()
    squares = []
    for group, gradients in by_group.items():
        square = torch.zeros((), device=platform.device())
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients))
            square = torch.linalg.vector_norm(norms).square()
        dist.all_reduce(square, group=group)
        squares.append(square)
    found = torch.stack(squares)
    wrong = (~found.isfinite()).any().float()
    if replicas.size() > 1:
        dist.all_reduce(wrong, op=dist.ReduceOp.MAX, group=replicas)
    roots = [square**0.5 for square in found.masked_fill(wrong.bool(), math.nan).tolist()]
    return roots[0] if len(roots) == 1 else math.sqrt(sum(root**2 for root in roots))


def clip_and_step(optimizer: MegatronOptimizer, gradient_norm: float, clip_grad: float) -> None:
    """Clips by a known norm and updates, as `optimizer.step()` does. Needs `prepare_grads`."""
    scale = clip_grad / (gradient_norm + 1.0e-6)  # as in clip_grad_by_total_norm_fp32
    if 0.0 < scale < 1.0:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            gradients = [p.grad for p in part.get_parameters() if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, scale)
    optimizer.step_with_ready_grads()


def build_scheduler(run: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Builds the schedule: warm-up, then decay to min_lr at train_iters, in steps."""
    settings, training = run.optimizer, run.training
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=max(training.train_iters, settings.lr_warmup_iters + 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=training.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
