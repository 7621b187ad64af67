"""Gradients of one training step on any layout, gathered into whole tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mm.config import ParallelConfig, RunConfig, token_multiple
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.model import multimodal
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import SIZES, microbatch
from support.gathering import at_rank_0
from support.weights import move_looks_off_zero

# Images of each sample in the four microbatches of a step; one microbatch has none.
STEP = ((1, 0, 2), (0, 0), (2,), (1, 1, 1))


def steps_batches(run: RunConfig, pad_multiple: int):
    """Returns the four microbatches of a step."""
    return [microbatch(run.model, seed, images, pad_multiple) for seed, images in enumerate(STEP)]


def parallel_config(**sizes) -> ParallelConfig:
    """Returns the settings of a layout, from short names (`SIZES`) or full ones."""
    return ParallelConfig(**{SIZES.get(name, name): value for name, value in sizes.items()})


def detach_memory_on_the_wire(engine: Engine, only: str | None = None) -> None:
    """Cuts the gradient of memories on the wire, as sending them as tensors of their own would.

    Args:
        only: the memory that is cut; default: all.
    """
    pack = multimodal.pack

    def broken(payload, shape):
        memories = {
            name: memory.detach() if only in (None, name) else memory
            for name, memory in payload.memories.items()
        }
        return pack(replace(payload, memories=memories), shape)

    multimodal.pack = broken


def swap_memories_on_the_wire(engine: Engine) -> None:
    """Sender and receiver disagree about the order of memories."""
    pack = multimodal.pack

    def broken(payload, shape):
        return pack(payload, replace(shape, memories=shape.memories[::-1]))

    multimodal.pack = broken


def swap_memories_of_looks(engine: Engine) -> None:
    """Each look reads the other's memory."""
    for chunk in engine.chunks:
        for look in chunk.language.looks.values():
            look.reads = {"overview": "detail", "detail": "overview"}[look.reads]


def forget_reduction(engine: Engine, suffix: str) -> None:
    """Leaves the partial gradients of these parameters unsummed over tensor-parallel ranks."""
    for name, param, _ in layouts(*engine.modules):
        if name.endswith(suffix):
            assert param.sequence_parallel, f"{name} has no reduction to forget"
            param.sequence_parallel = False


def gather(named_blocks: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """Returns whole tensors from every rank's (global shape, place, block) on rank 0, {} elsewhere.

    After reduction, the ranks that hold the same block must hold the same values; the largest
    relative difference is returned under "replicas".
    """
    whole, seen = {}, {}
    worst = 0.0
    for part in at_rank_0(named_blocks):
        for name, (shape, block_slices, values) in part.items():
            tensor = whole.setdefault(name, torch.zeros(shape))
            filled = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            if filled[block_slices].all():
                scale = values.norm().clamp(min=1e-12)
                worst = max(worst, float((tensor[block_slices] - values).norm() / scale))
            tensor[block_slices] = values
            filled[block_slices] = True
    assert all(mask.all() for mask in seen.values()), "a part of a tensor is on no rank"
    whole["replicas"] = torch.tensor(worst)
    return whole


def step_gradients(
    run: RunConfig,
    parallel: ParallelConfig,
    sabotage=None,
    pad_multiple: int | None = None,
    make_batches=steps_batches,
    objective=None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns the loss and the whole gradient of every parameter after four microbatches.

    It runs on every rank; `sabotage(engine)` may break something first.
    """
    run.parallel = parallel
    run.parallel.use_distributed_optimizer = False  # gradients stay whole on every replica
    made = groups.build(parallel)
    engine = Engine.create(run, made)
    move_looks_off_zero(engine)
    multiple = pad_multiple or token_multiple(run)
    batches = make_batches(run, multiple)
    dp, rank = made.pg.dp.size(), made.pg.dp.rank()
    batches = batches[rank::dp]
    if made.encoder is not None:  # every rank gets the tiles that it encodes
        batches = broadcast_batches(made, batches)
    pack = multimodal.pack
    try:
        if sabotage:
            sabotage(engine)
        parts = engine.forward_backward(batches, objective or SupervisedFineTuning())
    finally:
        multimodal.pack = pack  # the rank lives on
    loss = torch.zeros(2, dtype=torch.float64)
    for metrics in parts:
        loss += metrics.pair("train/lm_loss")
    dist.all_reduce(loss, group=made.world)
    blocks = {
        name: (layout.global_shape, layout.block, layout.held(param.main_grad).clone())
        for name, param, layout in layouts(*engine.modules)
        if param.requires_grad
    }
    return float(loss[0] / loss[1]), gather(blocks)


def saved_bytes(run: RunConfig) -> int:
    """Returns the bytes that one forward pass keeps for the backward pass, on one rank.

    A tensor counts once; parameters do not count.
    """
    made = groups.build(ParallelConfig())
    (model,) = multimodal.build(run, made.pg)
    batch = steps_batches(run, 1)[0]
    known = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    return sum(storage.nbytes() for storage in kept.values())
