"""Small models with a second hop (letter C), away from where it computes nothing."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import partial

import torch

from megatron_mm.config import RunConfig, route_width
from megatron_mm.config.layers.cascade import CascadeSettings
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.model.routing import FREE, NOT_HANDED
from megatron_mm.parallel.param_layout import layouts
from support.batches import small_run
from support.invariance import invariance_run
from support.layouts import steps_batches

PATTERN = "GC L *E GC L J *C J"  # a layer without a second hop among those that have one
# Where the gate is: all tokens handed over, those above 1/2, all or none by the routes given.
SOFT, HARD = dict(delegate_hard_from=1.0), dict(delegate_hard_from=0.0)


def cascade_run(pattern: str = PATTERN, training: dict | None = None, **settings) -> RunConfig:
    """Returns the invariance tests' run with this pattern and these settings of C."""
    priced = {"delegate_price": 0.02, "delegate_price_warmup": 0.0}
    run = with_cascade(small_run(), pattern, **priced | settings)
    return invariance_run(run, **training or {})


def with_cascade(run: RunConfig, pattern: str = "GC L *C J", **settings) -> RunConfig:
    """Returns the run, its layers of experts with a second hop."""
    layers = {"C": CascadeSettings(**settings)}
    run.model = replace(run.model, hybrid_layer_pattern=pattern, layers=layers)
    return run


def move_off_zero(engine: Engine, forget: tuple[str, ...] = ()) -> None:
    """Moves every scale and gate away from where they start, by the same values on every layout.

    Args:
        forget: ends of names of parameters whose tensor-parallel reduction is left out.
    """
    for name, param, layout in layouts(*engine.modules):
        if ".delegate." in name and name.endswith(("scale", "gate.weight", "norm.weight")):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            whole = torch.randn(layout.global_shape, generator=generator)
            layout.held(param.data).copy_(whole[layout.block] * 0.3)
        if forget and name.endswith(forget):
            assert param.sequence_parallel, f"{name} has no reduction to forget"
            param.sequence_parallel = False
    engine.optimizer.reload_model_params()


def close_gates(model: torch.nn.Module) -> None:
    """Makes every gate hard, whatever else was done to its parameters."""
    for name, param in model.named_parameters():
        if name.endswith(".delegate.hard"):
            param.data.fill_(1.0)


def forgetting(*ends: str):
    """`move_off_zero` that leaves reductions out."""
    return partial(move_off_zero, forget=ends)


def all_or_nobody(run: RunConfig, pad_multiple: int) -> list[Microbatch]:
    """Returns the microbatches of a step with routes: nobody of the odd ones is handed over, of the
    first only the latter half of its positions is, by routes that name experts; all others are
    free. So some ranks have no row in the second hop, whatever the layout."""
    batches = []
    for number, batch in enumerate(steps_batches(run, pad_multiple)):
        tokens, k = len(batch.tokens_T), run.model.language.moe_router_topk
        routes = torch.full((tokens, route_width(run.model)), FREE, dtype=torch.int16)
        if number % 2:
            routes[:, k:] = NOT_HANDED
        elif number == 0:
            routes[: tokens // 2, k:] = NOT_HANDED
            routes[tokens // 2 :, k:] = torch.tensor([4, 1])
        without = routes.clone()
        without[:, k:] = NOT_HANDED
        plain = {1: without}  # the layer without a second hop
        batches.append(replace(batch, routes=dict.fromkeys((0, 2, 3), routes) | plain))
    return batches
