"""The passes of microbatches through all stages, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)

from megatron_mm import platform
from megatron_mm.config import RunConfig, route_width
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.encoder import EncoderSide
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.model.routing import check_routes
from megatron_mm.parallel.groups import Groups
from megatron_mm.parallel.sequence import held_positions
from megatron_mm.parallel.stage_exchange import Rows, StageExchange
from megatron_mm.report.metrics import MUTED


@dataclass(frozen=True)
class Schedule:
    """The stages that microbatches pass through, and their groups; attributes as of `Engine`."""

    run: RunConfig
    groups: Groups
    models: Sequence[DistributedDataParallel]
    encoder: EncoderSide | None

    def passes[B: Microbatch](
        self,
        batches: Sequence[B],
        positions: Callable[[B], torch.Tensor] | None,
        finish: Callable,
        forward_only: bool,
        of_each: Sequence[dict] = (),
        **model_kwargs,
    ) -> list:
        """Passes the microbatches through all stages.

        Args:
            positions: batch -> where predictions are needed, ascending; None: everywhere.
            finish: applied to the output of the last stage, as `forward_step` says.
            of_each: model arguments of each microbatch; model_kwargs: those of all.
        Returns:
            What the schedule collects on the last stage, one entry for each microbatch.
        """
        pg, device, wanted = self.groups.pg, platform.device(), len(batches)
        chunks = [wrapped.module for wrapped in self.models]
        config = chunks[0].config
        sizes = route_width(self.run.model), self.run.model.language.num_experts

        encoded = None
        if self.encoder is not None:
            encoded = self.encoder.encode(batches, train=not forward_only)

        def feed(chunk: MultimodalModel) -> Iterator[tuple[B, torch.Tensor | None, dict]]:
            for number, batch in enumerate(batches):
                tokens = len(batch.tokens_T)
                if batch.routes is not None:
                    check_routes(batch.routes, chunk.hops, tokens, *sizes)
                own = of_each[number] if number < len(of_each) else {}
                if encoded is not None and chunk.pre_process:
                    own = {**own, "encoded": encoded[min(number, wanted - 1)]}
                held = positions and held_positions(positions(batch), tokens, pg.cp)
                there = batch.tokens_T.device == device
                yield batch if there else batch.to(device), held, own

        if len(self.models) > 1 and forward_only:
            # The interleaved schedule needs a multiple of the pipeline size.
            batches = [*batches, *[batches[-1]] * (-wanted % pg.pp.size())]
        step = forward_step(finish, **model_kwargs)
        if forward_only and pg.pp.size() == 1:  # a schedule's overhead exceeds a small step
            if not _all_stepping(of_each):
                # As the schedules do: Transformer Engine keeps the weights in FP8 until then, and
                # an update or a swap may have come between. Steps follow their prefill's weights.
                self.models[0].set_is_first_microbatch()
            iterator = feed(chunks[0])
            passes = (step(iterator, self.models[0]) for _ in batches)
            return [collect(output, non_loss_data=True) for output, collect in passes]
        common = {
            "forward_step_func": step,
            "data_iterator": [feed(chunk) for chunk in chunks],
            "model": self.models,
            "num_microbatches": len(batches),
            "seq_length": self.run.data.seq_length,  # ignored: `StageExchange` knows shapes
            "micro_batch_size": self.run.training.micro_batch_size,
            "forward_only": forward_only,
            "collect_non_loss_data": forward_only,
            "pg_collection": pg,
        }
        if pg.pp.size() == 1:
            return forward_backward_no_pipelining(**common)

        def rows(manifest: str) -> Rows:
            def of(chunk: int, number: int) -> int:
                cache = of_each[number].get("cache") if number < len(of_each) else None
                stage = chunks[chunk]
                return stage.wire_rows(batches[number], getattr(stage, manifest), cache)

            return of

        common["p2p_communicator"] = StageExchange(
            pg.pp,
            config,
            microbatches=len(batches),
            chunks=len(self.models),
            hidden_size=config.hidden_size,
            arriving=rows("arrives"),
            leaving=rows("leaves"),
        )
        if len(self.models) > 1:
            return forward_backward_pipelining_with_interleaving(**common)[:wanted]
        return forward_backward_pipelining_without_interleaving(**common)


def _all_stepping(of_each: Sequence[dict]) -> bool:
    """Whether all microbatches are steps of decoding."""
    caches = [own.get("cache") for own in of_each]
    return bool(caches) and all(cache is not None and cache.stepping for cache in caches)


def forward_step(finish: Callable, **model_kwargs) -> Callable:
    """Returns the forward-step function for megatron-core's schedules. It takes an iterator over
    (batch, held positions, model arguments of the batch) and a stage, and returns the stage's
    output and the function that the schedule applies to it on the last stage: `finish(output,
    batch, positions, metrics)`."""

    def step(iterator, model):
        batch, held, own = next(iterator)
        output = model(batch, positions=held, **own, **model_kwargs)
        metrics = own.get("metrics", MUTED)
        return output, partial(finish, batch=batch, positions=held, metrics=metrics)

    return step
