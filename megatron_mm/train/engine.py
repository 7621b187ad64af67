"""One optimizer step: megatron-core's DDP, schedule, optimizer and scheduler around a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm import platform
from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.multimodal import MultimodalModel, build
from megatron_mm.parallel.groups import Groups
from megatron_mm.train.objective import Objective
from megatron_mm.train.optimizer import build_optimizer, build_scheduler, freeze


@dataclass
class Engine:
    """
    Attributes:
        models: this rank's pipeline stages, each wrapped by DDP; one without virtual stages.
    """

    run: RunConfig
    groups: Groups
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def chunks(self) -> list[MultimodalModel]:
        """This rank's pipeline stages, in the order of the model."""
        return [wrapped.module for wrapped in self.models]

    @property
    def config(self) -> TransformerConfig:
        return self.chunks[0].config

    @classmethod
    def create(cls, run: RunConfig, groups: Groups) -> Engine:
        destroy_moe_metrics_tracker()  # process-wide, and as long as the last model was deep
        chunks = build(run, groups.pg)
        config, parallel = chunks[0].config, run.parallel
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            grad_reduce_in_fp32=True,
        )
        models = []
        for number, chunk in enumerate(chunks):
            freeze(chunk, run)
            models.append(
                DistributedDataParallel(
                    config,
                    ddp,
                    chunk,
                    disable_bucketing=number > 0,  # only the first has communication to hide
                    pg_collection=groups.pg,
                )
            )
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = _each(models, "no_sync")
        if parallel.overlap_grad_reduce:
            config.grad_sync_func = _each(models, "start_grad_sync")
        if parallel.overlap_param_gather:
            config.param_sync_func = _each(models, "start_param_sync")
        optimizer = build_optimizer(run, models, groups.pg)
        config.grad_scale_func = optimizer.scale_loss
        return cls(run, groups, models, optimizer, build_scheduler(run, optimizer))

    def training(self, mode: bool) -> None:
        """Switch every stage to training or to evaluation."""
        for model in self.models:
            model.train(mode)

    def forward_backward(self, batches: Sequence[Microbatch], objective: Objective) -> list:
        """Accumulate the gradients of one step; the objective's sums on the last stage."""
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        pg = self.groups.pg

        def finish(output: torch.Tensor, batch: Microbatch):
            return objective.loss(output, batch, pg)

        return self._schedule(batches, finish, forward_only=False)

    def gradient_norm(self) -> float:
        """Over every parameter of the model, before clipping; the same on every rank."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def update(self) -> None:
        """Clip, step, advance the schedule."""
        self.optimizer.step()
        self.scheduler.step(increment=1)

    def learning_rate(self) -> float:
        """Of the language model; other modules have multiples of it."""
        return float(self.scheduler.get_lr({}))

    def forward(
        self,
        batches: Sequence[Microbatch],
        finish: Callable,
        looks: dict[int, list[torch.Tensor]] | None = None,
    ) -> list:
        """Forward passes only: `finish(logits, batch)` per microbatch on the last stage.

        Args:
            looks: if given, filled with the attention weights of this stage's looks.
        """

        def collect(output: torch.Tensor, batch: Microbatch, non_loss_data: bool = True):
            return finish(output, batch)

        with torch.no_grad():
            return self._schedule(batches, collect, forward_only=True, looks=looks)

    def _schedule(
        self, batches: Sequence[Microbatch], finish: Callable, forward_only: bool, **model_kwargs
    ) -> list:
        def forward_step(iterator, model):
            batch = next(iterator)
            return model(batch, **model_kwargs), partial(finish, batch=batch)

        pg, wanted = self.groups.pg, len(batches)
        if len(self.models) > 1 and forward_only:
            # The interleaved schedule takes whole rounds of microbatches only.
            batches = [*batches, *[batches[-1]] * (-wanted % pg.pp.size())]
        device = platform.device()
        common = {
            "forward_step_func": forward_step,
            "data_iterator": [(b.to(device) for b in batches) for _ in self.models],
            "model": self.models,
            "num_microbatches": len(batches),
            "seq_length": self.run.data.seq_length,  # shapes are exchanged, not derived from it
            "micro_batch_size": self.run.training.micro_batch_size,
            "forward_only": forward_only,
            "collect_non_loss_data": forward_only,
            "pg_collection": pg,
        }
        if pg.pp.size() == 1:
            return forward_backward_no_pipelining(**common)
        common["p2p_communicator"] = P2PCommunicator(pp_group=pg.pp, config=self.config)
        if len(self.models) > 1:
            return forward_backward_pipelining_with_interleaving(**common)[:wanted]
        return forward_backward_pipelining_without_interleaving(**common)


def _each(models: list[DistributedDataParallel], method: str) -> Callable | list[Callable]:
    """What the schedules expect: one function, or with virtual stages one of each."""
    functions = [getattr(model, method) for model in models]
    return functions if len(functions) > 1 else functions[0]
