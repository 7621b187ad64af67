"""Routes recorded and replayed on the ranks of a layout."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from megatron_mm.config import ParallelConfig, RunConfig, num_layers, token_multiple
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.model.layers.cascade import Scores
from megatron_mm.model.layers.moe import Router
from megatron_mm.model.routing import Routes, whole_routes
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from support.batches import microbatch
from support.cascades import move_off_zero
from support.layouts import steps_batches
from support.weights import move_looks_off_zero

SHAKING = 1e-6  # of logits around 0.1: a few last digits of fp32


def random_routes(run: RunConfig, batch: Microbatch, seed: int) -> Routes:
    """Returns random experts, with every fifth position left to the router."""
    generator = torch.Generator().manual_seed(seed)
    language = run.model.language
    routes = {}
    for index in range(num_layers(run.model.hybrid_layer_pattern)):
        order = torch.rand(len(batch.tokens_T), language.num_experts, generator=generator)
        routes[index] = order.argsort(1)[:, : language.moe_router_topk].to(torch.int16)
        routes[index][index % 5 :: 5] = -1
    return routes


def look_alikes(run: RunConfig, pad_multiple: int, replayed: bool = True) -> list[Microbatch]:
    """Returns four microbatches that differ only in their routes.

    Taking another one's routes raises no error; only the gradients are wrong.
    """
    batch = microbatch(run.model, 5, (1, 0, 2), pad_multiple)
    if not replayed:
        return [batch] * 4
    return [replace(batch, routes=random_routes(run, batch, seed)) for seed in range(4)]


without_routes = partial(look_alikes, replayed=False)


def other_microbatchs_routes(run: RunConfig, pad_multiple: int) -> list[Microbatch]:
    """Gives the first microbatch the second's routes, as a process-wide slot would by mistake."""
    first, second, *rest = look_alikes(run, pad_multiple)
    return [second, second, *rest]


def perturb_routers(engine: Engine) -> None:
    """Moves every router by the same values on every layout, far enough to change most choices."""
    for name, param, layout in layouts(*engine.modules):
        if name.endswith("router.weight"):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            param.data += torch.randn(layout.global_shape, generator=generator)[layout.block]


def record(engine: Engine, batches: list[Microbatch]) -> tuple[list[Routes], list]:
    """Runs a forward pass and records the routes it takes.

    Returns:
        The whole routes of all layers for each microbatch, on every rank; the logits, on the last
        stage.
    """
    pg, records = engine.groups.pg, [{} for _ in batches]
    logits = engine.forward(
        batches,
        lambda batch: torch.arange(len(batch.tokens_T)),
        lambda predictions, **_: predictions.logits(),
        routes=records,
    )
    found = []
    for one in records:
        parts = [None] * engine.groups.replica.size()
        dist.all_gather_object(parts, whole_routes(one, pg), group=engine.groups.replica)
        for part in parts:
            for index, routes in part.items():
                same = [torch.equal(routes, p[index]) for p in parts if index in p]
                assert all(same), f"ranks disagree on the routes of layer {index}"
        found.append({i: routes for part in parts for i, routes in part.items()})
    return found, logits


def record_and_replay(
    run: RunConfig,
    parallel: ParallelConfig,
    multiple: int | None = None,
    prepare: Callable[[Engine], None] = move_looks_off_zero,
):
    """Records routes and replays them before and after a change of every router.

    Returns:
        The routes recorded, the routes of the changed routers, their routes while replaying; the
        logits of the recording and of a replay before the change.
    """
    run.parallel = parallel
    engine = Engine.create(run, groups.build(parallel))
    prepare(engine)
    batches = steps_batches(run, multiple or token_multiple(run))
    dp = engine.groups.pg.dp
    batches = batches[dp.rank() :: dp.size()]
    routes, logits = record(engine, batches)
    replays = [replace(b, routes=r) for b, r in zip(batches, routes, strict=True)]
    _, again = record(engine, replays)
    perturb_routers(engine)
    return routes, record(engine, batches)[0], record(engine, replays)[0], logits, again


def forbid(run: RunConfig, forbidden: Routes):
    """Returns the routes before, while and after some experts are forbidden, or the error."""
    engine = Engine.create(run, groups.build(run.parallel))
    batches = steps_batches(run, 1)[:1]
    before, _ = record(engine, batches)
    try:
        with engine.forbidding(forbidden):
            during, _ = record(engine, batches)
    except ValueError as error:
        return str(error)
    return before[0], during[0], record(engine, batches)[0][0]


def refusal(run: RunConfig, routes: Routes) -> str:
    """Returns the error of a step with these routes, "" if there is none."""
    engine = Engine.create(run, groups.build(run.parallel))
    batch = replace(microbatch(run.model, 5, (1,)), routes=routes)
    try:
        record(engine, [batch])
    except ValueError as error:
        return str(error)
    return ""


def tie(engine: Engine) -> None:
    """Makes every choice close: all experts of a router have equal logits, and gates of a second
    hop are at 1/2 within a few last digits."""
    move_off_zero(engine)
    for module in _choosing(engine):
        weight = module.weight.data
        if len(weight) > 1:
            weight.copy_(weight[:1].expand_as(weight))
            continue
        weight.mul_(SHAKING)
        if module.bias is not None:
            module.bias.data.zero_()
    engine.optimizer.reload_model_params()


def tie_and_shake(engine: Engine) -> None:
    """`tie`, and whatever is computed again in the backward pass chooses from other last digits, as
    on a GPU."""
    tie(engine)
    for number, module in enumerate(_choosing(engine)):
        method = "forward" if isinstance(module, Scores) else "gating"
        setattr(module, method, partial(_shaken, getattr(module, method), number))


def _choosing(engine: Engine) -> list[Router | Scores]:
    return [m for c in engine.chunks for m in c.modules() if isinstance(m, (Router, Scores))]


def _shaken(compute: Callable, seed: int, x: torch.Tensor) -> torch.Tensor:
    found = compute(x)
    if torch._C._current_graph_task_id() == -1:  # no backward pass is under way
        return found
    generator = torch.Generator().manual_seed(seed)
    return found + SHAKING * torch.randn(found.shape, generator=generator)
