"""The layers of one pipeline stage, in the order the pattern gives.

Keys hold global layer numbers (`layers.7.mixer`, `layers.7.moe`, `looks.0`), on every stage
and under every layout; looks and injections never shift them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.config import Layer, RunConfig, Stage, effective_pattern, num_layers
from megatron_mm.config.families import language_family
from megatron_mm.model.backends.choice import Backend
from megatron_mm.model.context import StreamContext
from megatron_mm.model.layers.clvr import Look
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.recompute import Recompute, recomputed
from megatron_mm.parallel.wire import Payload


class SubLayer(nn.Module):
    """Pre-norm residual around a mixer or a mixture of experts.

    The precision is entered here and not around the stack, so that a recomputed layer runs in
    it again.
    """

    def __init__(
        self,
        inner: nn.Module,
        hidden_size: int,
        eps: float,
        config: TransformerConfig,
        backend: Backend,
        layer: int,
    ):
        super().__init__()
        self.precision = partial(backend.precision, config, layer)
        self.norm = RMSNorm(
            hidden_size, eps, partial_gradient=config.sequence_parallel, dtype=config.params_dtype
        )
        self.inner = inner

    def forward(self, hidden_t1H: torch.Tensor, *args) -> torch.Tensor:
        with self.precision():
            return hidden_t1H + self.inner(self.norm(hidden_t1H), *args)


class Stack(nn.Module):
    """Runs a stage's letters over a payload: G, *, E transform the hidden state, L puts a
    refinement aside, J adds it."""

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        pg: ProcessGroupCollection,
        stage: Stage,
        backend: Backend,
    ):
        super().__init__()
        model, language, family = run.model, run.model.language, language_family(run.model)
        self.precision = partial(backend.precision, config, None)
        self.recompute = Recompute.of(run.training)
        self.blocks = _blocks(stage.layers, self.recompute.sublayers)
        eps = language.layernorm_epsilon
        std = language.init_method_std
        # GPT-2's rule: residual branches start smaller the deeper the model.
        out_std = std / (2 * num_layers(effective_pattern(model))) ** 0.5
        self.layers = nn.ModuleDict()
        self.looks = nn.ModuleDict()
        again = self.recompute.core_attn
        for layer in stage.layers:
            if layer.kind == "L":
                self.looks[str(layer.pair)] = Look(model, config, pg, again)
            if layer.kind in "G*E":
                module = family.module(layer.kind)
                if layer.kind == "E":
                    inner = module(config, pg, layer.number, std, out_std, backend)
                else:
                    inner = module(language, config, pg, out_std, backend, again)
                key, part = str(layer.number), "moe" if layer.kind == "E" else "mixer"
                if key not in self.layers:
                    self.layers[key] = nn.ModuleDict()
                self.layers[key][part] = SubLayer(
                    inner, language.hidden_size, eps, config, backend, layer.number
                )

    def forward(self, payload: Payload, context: StreamContext) -> Payload:
        with self.precision():
            for block in self.blocks:
                if self.recompute.sublayers is None:
                    payload = self._block(block, payload, context)
                else:
                    payload = recomputed(self._block, block, payload, context, context=context)
        return payload

    def _block(self, layers: Sequence[Layer], payload: Payload, context: StreamContext) -> Payload:
        hidden, waiting, cache = payload.hidden_T1H, dict(payload.refinements), context.cache
        for layer in layers:
            if layer.kind == "L":
                look = self.looks[str(layer.pair)]
                record = context.look_record(layer.pair)
                state = cache and cache.look(layer.pair)
                waiting[layer.pair] = look(
                    hidden, payload.memory_M1C, context.memory, record, state
                )
            elif layer.kind == "J":
                hidden = hidden + waiting.pop(layer.pair)
            elif layer.kind == "E":
                moe = self.layers[str(layer.number)]["moe"]
                if self.recompute.moe:
                    hidden = recomputed(moe, hidden, context, context=context)
                else:
                    hidden = moe(hidden, context)
            elif layer.kind == "*":
                hidden = self.layers[str(layer.number)]["mixer"](
                    hidden,
                    context.segments,
                    context.rotary,
                    cache and cache.attention(layer.number),
                )
            else:
                hidden = self.layers[str(layer.number)]["mixer"](
                    hidden, context.segments, cache and cache.delta(layer.number)
                )
            context.tap(layer, hidden)
        return Payload(hidden, payload.memory_M1C, waiting)


def _blocks(layers: Sequence[Layer], size: int | None) -> list[tuple[Layer, ...]]:
    """The sub-layers in blocks of `size`; looks and injections go with what stands before."""
    if size is None:
        return [tuple(layers)]
    blocks: list[list[Layer]] = [[]]
    for layer in layers:
        if layer.kind in "G*E" and sum(other.kind in "G*E" for other in blocks[-1]) == size:
            blocks.append([])
        blocks[-1].append(layer)
    return [tuple(block) for block in blocks]
