"""One microbatch through one stage of a rank, forward and backward, with everything it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from megatron.core.pipeline_parallel.schedules import backward_step
from megatron.core.pipeline_parallel.schedules import forward_step as schedule_forward
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_mm import platform
from megatron_mm.config.layers.cascade import second_hop_share
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine, finish_gradients
from megatron_mm.engine.objective import Objective
from megatron_mm.engine.schedule import forward_step
from megatron_mm.model.vision_tower import Encoded
from megatron_mm.parallel.sequence import held_positions
from megatron_mm.perf.again import repeats
from megatron_mm.perf.fake import META
from megatron_mm.perf.kernels import Kernel, Work
from megatron_mm.perf.recorder import Recorder
from megatron_mm.perf.standins import balance, fused_kernels, updating


@dataclass(frozen=True)
class ChunkTrace:
    """Memory and work of one microbatch on one stage; bytes without parameters and gradients.

    Attributes:
        arrives, leaves: bytes of the packed tensor from the stage before and to the one after.
        forward_peak: the most that the forward pass holds, what arrived included.
        held: what stays until the backward pass.
        backward_peak: the most that the backward pass holds.
        forward, backward: work; a backward pass includes recomputation (`Work.again`).
        kernels: of the two passes, in the order of their launch; none in a rough plan.
        stays: bytes that the first microbatch leaves behind for good (megatron-core's buffer of
            gathered activations); in none of the above.
        grows: bytes that every backward pass leaves until the end of the step: the gradients of
            what the encoder beside the pipeline made.
    """

    arrives: int
    leaves: int
    forward_peak: int
    held: int
    backward_peak: int
    forward: Work
    backward: Work
    kernels: tuple[Sequence[Kernel], Sequence[Kernel]] = ((), ())
    stays: int = 0
    grows: int = 0

    @property
    def model_flops(self) -> int:
        """FLOPs of both passes, nothing computed twice."""
        return self.forward.flops + self.backward.flops - self.backward.again


def trace_chunk(
    engine: Engine,
    recorder: Recorder,
    chunk: int,
    batch: Microbatch,
    objective: Objective,
    encoded: Encoded | None = None,
) -> ChunkTrace:
    """Runs stage `chunk` of a fake rank once. Its DDP adds up gradients as in a step.

    Args:
        batch: of the objective.
        encoded: of the first stage, from an encoder beside the pipeline.
    """
    wrapped, model = engine.models[chunk], engine.chunks[chunk]
    balance(model, len(batch.tokens_T), recorder.wait, second_hop_share(engine.run))
    if wrapped.ddp_config.overlap_param_gather:
        wrapped.disable_forward_pre_hook(param_sync=False)  # once a step: see trace_once
    before = recorder.live
    with (
        _scale_of_its_own(),
        fused_kernels(recorder.add),
        repeats(recorder),
        recorder,
        wrapped.no_sync(),
    ):
        found = _once(engine, recorder, chunk, batch, objective, encoded)
    model.received = None
    grows = 0 if encoded is None else _gradients_of(encoded)
    stays = recorder.live - before - grows
    return replace(
        found,
        stays=stays,
        grows=grows,
        forward_peak=found.forward_peak - stays,
        held=found.held - stays,
        backward_peak=found.backward_peak - stays,
    )


@contextmanager
def _scale_of_its_own() -> Iterator[None]:
    """Sets aside the scale of the balancing loss, which megatron-core keeps in a class: a tensor of
    the last step of this process, which may have data, while a trace has none."""
    kept = MoEAuxLossAutoScaler.main_loss_backward_scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    try:
        yield
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = kept


def _gradients_of(encoded: Encoded) -> int:
    leaves = (encoded.stream_kH, *encoded.memories.values())
    return sum(_bytes(leaf.grad) for leaf in leaves if leaf.grad is not None)


def _once(
    engine: Engine,
    recorder: Recorder,
    chunk: int,
    batch: Microbatch,
    objective: Objective,
    encoded: Encoded | None,
) -> ChunkTrace:
    wrapped, model, config = engine.models[chunk], engine.chunks[chunk], engine.config
    pg, kwargs = engine.groups.pg, {"router_term": objective.router_term}
    held_at = held_positions(objective.positions(batch), len(batch.tokens_T), pg.cp)

    def finish(output, batch, positions, metrics):
        return (*objective.loss(output, batch, positions, pg, metrics), {})

    def feed():
        own = {"encoded": encoded} if model.pre_process and encoded is not None else {}
        yield batch.to(platform.device()), held_at, own

    start, begin = recorder.rebase(), len(recorder.kernels)
    arrived = None
    if model.arrives is not None:
        rows, dtype = model.wire_rows(batch, model.arrives), config.pipeline_dtype
        shape = rows, 1, config.hidden_size
        arrived = torch.empty(shape, dtype=dtype, device=META, requires_grad=True)
    output, _ = schedule_forward(
        forward_step(finish, **kwargs),
        feed(),
        wrapped,
        1,
        arrived,
        [],
        config,
        pg.cp.size(),
        is_last_stage=model.post_process,
    )
    forward_peak, held = recorder.peak - start, recorder.live - start
    middle = len(recorder.kernels)
    d_output = None if model.post_process else torch.empty_like(output)
    recorder.rebase()
    backward_step(arrived, output, d_output, config)
    passes = recorder.kernels[begin:middle], recorder.kernels[middle:]
    return ChunkTrace(
        arrives=0 if arrived is None else _bytes(arrived),
        leaves=0 if d_output is None else _bytes(d_output),
        forward_peak=forward_peak,
        held=held,
        backward_peak=recorder.peak - start,
        forward=Work.of(passes[0]),
        backward=Work.of(passes[1]),
        kernels=passes,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def trace_once(engine: Engine, recorder: Recorder) -> list[Kernel]:
    """Runs what a step does however many microbatches it has, and returns its kernels: gradients
    cleared, and exchanged; their norm, clipping, the update; parameters gathered."""
    begin = len(recorder.kernels)
    clipped = (10 * max(1.0, engine.run.optimizer.clip_grad)) ** 2
    with recorder, updating(recorder, clipped):
        for model in engine.wrapped:
            model.zero_grad_buffer()
        engine.optimizer.zero_grad()
        # A real number: it is divided by.
        tokens = torch.ones((), dtype=torch.int)
        finish_gradients(engine.encoder, engine.models, tokens, pg_collection=engine.groups.pg)
        engine.update(engine.gradient_norm())
        ddp = engine.models[0].ddp_config
        # Without overlap each optimizer of the chain gathers at the end of its step.
        if ddp.use_distributed_optimizer and ddp.overlap_param_gather:
            for model in engine.models:
                model.start_param_sync(force_sync=True)
    return recorder.kernels[begin:]
