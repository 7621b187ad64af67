"""Engine: a model in megatron-core's DDP, schedule, optimizer and scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm import platform
from megatron_mm.config import RunConfig, experts_needed
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.encoder import EncoderSide
from megatron_mm.engine.objective import Objective
from megatron_mm.engine.optimizer import (
    build_optimizer,
    build_scheduler,
    clip_and_step,
    distributes,
    freeze,
    gradient_norm,
    overlaps,
)
from megatron_mm.engine.schedule import Schedule
from megatron_mm.engine.weight_set import WeightSet
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.decode import DecodeCache
from megatron_mm.model.layers.interface import Scheduled
from megatron_mm.model.layers.output import Predictions
from megatron_mm.model.multimodal import MultimodalModel, build, build_encoder
from megatron_mm.model.routing import RouterTerm, Routes, check_forbidden
from megatron_mm.parallel.groups import Groups
from megatron_mm.report.metrics import DIVISOR, MUTED, Metrics


@dataclass
class Engine:
    """Model, optimizer and scheduler of one rank.

    Attributes:
        models: this rank's pipeline stages, each wrapped by DDP; one unless there are virtual
            stages.
        encoder: the encoder, where it stands beside the pipeline.
        moving: sets of weights that follow the model's, by name. They belong to the state of the
            run: checkpoints hold them.
    """

    run: RunConfig
    groups: Groups
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    encoder: EncoderSide | None = None
    moving: dict[str, WeightSet] = field(default_factory=dict)

    @property
    def chunks(self) -> list[MultimodalModel]:
        """This rank's pipeline stages, in model order."""
        return [wrapped.module for wrapped in self.models]

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Everything of this rank that has parameters: its stages, and the encoder beside them."""
        return [*self.chunks, *([] if self.encoder is None else [self.encoder.module])]

    @property
    def wrapped(self) -> list[DistributedDataParallel]:
        """Everything that has gradients: `models`, and the encoder beside them if it is trained."""
        beside = None if self.encoder is None else self.encoder.ddp
        return self.models if beside is None else [*self.models, beside]

    @property
    def config(self) -> TransformerConfig:
        return self.chunks[0].config

    @property
    def schedule(self) -> Schedule:
        """The passes through all stages."""
        return Schedule(self.run, self.groups, self.models, self.encoder)

    @classmethod
    def create(
        cls,
        run: RunConfig,
        groups: Groups,
        backend: Backend | None = None,
        *,
        drawn: bool = True,
        expert_scope: torch.Tensor | None = None,
    ) -> Engine:
        """Builds the engine of this rank. Every rank calls it.

        Args:
            backend: replaces the backend that the settings choose.
            drawn: False if weights are loaded next: parameters are NaN until then.
            expert_scope: bool [S, L, E], the experts of each layer that learn from the positions
                of a skill, and from no other (`model/expert_scope.py`); None: from all.
        """
        chunks = build(run, groups.pg, backend, drawn=drawn)
        config = chunks[0].config
        reduce, gather = overlaps(run, groups.pg)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=distributes(run, groups.pg),
            overlap_grad_reduce=reduce,
            overlap_param_gather=gather,
            grad_reduce_in_fp32=True,
        )
        models = []
        for number, chunk in enumerate(chunks):
            freeze(chunk, run)
            if expert_scope is not None:
                chunk.expert_scope = expert_scope.to(platform.device())
            models.append(
                DistributedDataParallel(
                    config,
                    ddp,
                    chunk,
                    disable_bucketing=number > 0,  # only the first has communication to hide
                    pg_collection=groups.pg,
                )
            )
        encoder = None
        if groups.encoder is not None:
            module = build_encoder(run, groups.encoder.pg.tp, drawn=drawn)
            freeze(module, run)
            of_encoder = replace(
                ddp,
                use_distributed_optimizer=distributes(run, groups.encoder.pg),
                overlap_grad_reduce=False,  # its gradients are ready after all others
                overlap_param_gather=False,
            )
            encoder = EncoderSide.create(run, groups, module, of_encoder)
        config.finalize_model_grads_func = partial(finish_gradients, encoder)
        config.no_sync_func = _each(models, "no_sync")
        if ddp.overlap_grad_reduce:
            config.grad_sync_func = _each(models, "start_grad_sync")
        if ddp.overlap_param_gather:
            config.param_sync_func = _each(models, "start_param_sync")
        scoped = expert_scope is not None
        optimizer = build_optimizer(run, models, groups.pg, scoped=scoped)
        if encoder is not None and encoder.ddp is not None:
            also = build_optimizer(run, [encoder.ddp], encoder.pg, overlaps_gather=False)
            # Its constructor wants one configuration of all; these differ in what is distributed.
            optimizer.chained_optimizers += also.chained_optimizers
            optimizer.model_chunks += also.model_chunks
            optimizer.is_stub_optimizer &= also.is_stub_optimizer
        config.grad_scale_func = optimizer.scale_loss
        scheduler = build_scheduler(run, optimizer)
        return cls(run, groups, models, optimizer, scheduler, encoder)

    @property
    def expert_scope(self) -> torch.Tensor | None:
        """The scope that was given to `create`."""
        return self.chunks[0].expert_scope

    def training(self, mode: bool) -> None:
        """Switches every stage to training or evaluation."""
        for model in self.modules:
            model.train(mode)

    def forward_backward[B: Microbatch](
        self, batches: Sequence[B], objective: Objective[B]
    ) -> list[Metrics]:
        """Accumulates the gradients of one step.

        Returns:
            The numbers of each microbatch that this rank's layers and, on the last stage, the
            objective added to the metrics.
        """
        for model in self.wrapped:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        pg = self.groups.pg
        found = [Metrics() for _ in batches]
        self.at_progress()
        counts = pg.tp.rank() == 0  # tensor-parallel ranks have the same loss

        def finish(output: Predictions, batch: B, positions: torch.Tensor, metrics: Metrics):
            metrics = metrics.for_objective() if counts else MUTED
            total, divisor = objective.loss(output, batch, positions, pg, metrics)
            metrics.sum(DIVISOR, divisor)
            return total, divisor, {}

        self.schedule.passes(
            batches,
            objective.positions,
            finish,
            forward_only=False,
            of_each=[{"metrics": metrics} for metrics in found],
            router_term=objective.router_term,
        )
        return found

    def gradient_norm(self) -> float:
        """L2 norm of all gradients of the model before clipping, the same on every rank."""
        self.optimizer.prepare_grads()
        return gradient_norm(self.optimizer, self.groups.pg.dp_cp)

    def update(self, gradient_norm: float) -> None:
        """Clips the gradients, updates the parameters and advances the schedule.

        Args:
            gradient_norm: as returned by `gradient_norm` for these gradients.
        """
        clip_and_step(self.optimizer, gradient_norm, self.run.optimizer.clip_grad)
        self.pass_over()

    def pass_over(self) -> None:
        """Advances the schedule without an update."""
        self.scheduler.step(increment=1)
        self.at_progress()

    def at_progress(self) -> None:
        """Gives layers that change as training goes on the state of the next step, so that what
        comes before it, such as a rollout, has it too."""
        done = self.scheduler.num_steps / max(1, self.run.training.train_iters)
        for chunk in self.chunks:
            for module in chunk.modules():
                if isinstance(module, Scheduled):
                    module.at_progress(done)

    def learning_rate(self) -> float:
        """Current learning rate of the language model; other modules have multiples of it."""
        return float(self.scheduler.get_lr({}))

    def forward[B: Microbatch](
        self,
        batches: Sequence[B],
        positions: Callable[[B], torch.Tensor] | None,
        finish: Callable,
        looks: dict[int, list[torch.Tensor]] | None = None,
        caches: Sequence[DecodeCache] | None = None,
        routes: Sequence[Routes] | None = None,
        router_term: RouterTerm | None = None,
    ) -> list:
        """Runs only forward passes.

        Args:
            positions: as in `Objective`; None: everywhere, and `finish` is given None.
            finish: (predictions, batch, positions) -> result, called on the last stage, as
                `Objective.loss`.
            looks: if given, filled with the attention weights of this stage's looks.
            caches: if given, the decoding cache of each microbatch. With virtual stages the number
                of microbatches must then be a multiple of the pipeline size.
            routes: if given, one for each microbatch, filled with the experts that this rank's
                layers chose at its positions (`model.routing.whole_routes` gathers them).
            router_term: if given, called with the logits of this rank's routers; what it returns
                counts for nothing.

        Returns:
            The results of `finish` for each microbatch, on the last stage.
        """
        given = {"cache": caches, "routes": routes}
        of_each = [
            {name: values[n] for name, values in given.items() if values is not None}
            for n in range(len(batches))
        ]

        def collect(output: Predictions, metrics: Metrics, non_loss_data: bool = True, **which):
            return finish(output, **which)

        with torch.no_grad():
            return self.schedule.passes(
                batches,
                positions,
                collect,
                forward_only=True,
                of_each=of_each,
                looks=looks,
                router_term=router_term,
            )

    @contextmanager
    def forbidding(self, experts: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """Disables experts inside the context, for evaluation.

        Args:
            experts: MoE index -> bool [E], True for disabled experts; of all layers, on every
                rank.

        Raises:
            ValueError: fewer experts remain than a position needs.
        """
        model, layers = self.run.model, self.config.num_layers
        check_forbidden(experts, layers, experts_needed(model), model.language.num_experts)
        device = platform.device()
        for chunk in self.chunks:
            chunk.forbidden = {index: mask.to(device) for index, mask in experts.items()}
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.forbidden = {}


def finish_gradients(
    encoder: EncoderSide | None,
    models: list[DistributedDataParallel],
    num_tokens: torch.Tensor | None = None,
    **given,
) -> None:
    """Finishes the gradients of a step, as the schedules ask when their last pass is done."""
    if encoder is not None:
        encoder.backward()
    finalize_model_grads(models, num_tokens, **given)  # `num_tokens` becomes that of all ranks
    if encoder is not None:
        encoder.finish(num_tokens)


def _each(models: list[DistributedDataParallel], method: str) -> Callable | list[Callable]:
    """Returns the method of each model as the schedules expect it: one, or a list if there are
    virtual stages."""
    functions = [getattr(model, method) for model in models]
    return functions if len(functions) > 1 else functions[0]
