"""The layers of one pipeline stage, in the order of the pattern.

Keys hold global layer numbers (`layers.7.mixer`, `layers.7.moe`, `looks.0`, `queries.0`), on every
stage and under every layout; sides never shift them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.config import Layer, RunConfig, Stage
from megatron_mm.config.families import language_family
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.context import StreamContext
from megatron_mm.model.layers.interface import BuildContext, LayerModule, torch_half
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.recompute import Recompute, recomputed
from megatron_mm.parallel.wire import Payload


class SubLayer(nn.Module):
    """Pre-norm residual around a numbered layer.

    The precision is entered here and not around the stack, so that a recomputed layer runs in
    it again.

    Attributes:
        lora_linears: the last names of the linears inside that can have an adapter.
        hands_stream: whether the inner layer is also given the hidden state before the norm
            (`LayerKind.reads_stream`).
    """

    def __init__(
        self,
        inner: LayerModule,
        hidden_size: int,
        eps: float,
        config: TransformerConfig,
        backend: Backend,
        layer: int,
        lora_linears: tuple[str, ...] = (),
        hands_stream: bool = False,
    ):
        super().__init__()
        self.precision = partial(backend.precision, config, layer)
        self.lora_linears, self.hands_stream = lora_linears, hands_stream
        self.norm = RMSNorm(
            hidden_size, eps, partial_gradient=config.sequence_parallel, dtype=config.params_dtype
        )
        self.inner = inner

    def forward(self, hidden_t1H: torch.Tensor, context: StreamContext, *args) -> torch.Tensor:
        """[t, 1, H] -> the same; the arguments are those of `LayerModule.run`."""
        with self.precision():
            normed = self.norm(hidden_t1H, context.scale_of(self.norm))
            stream = (hidden_t1H,) if self.hands_stream else ()
            return hidden_t1H + self.inner.run(normed, context, *args, *stream)


class Stack(nn.Module):
    """Runs a stage's letters over a payload: numbered layers transform the hidden state, a side
    that opens a pair puts a refinement aside, one that closes it adds the refinement."""

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        pg: ProcessGroupCollection,
        stage: Stage,
        backend: Backend,
    ):
        super().__init__()
        language, modules = run.model.language, language_family(run.model).modules
        self.precision = partial(backend.precision, config, None)
        self.recompute = Recompute.of(run.training)
        self.blocks = _blocks(stage.layers, self.recompute.sublayers)
        self.kinds = {layer.kind: LAYERS[layer.kind] for layer in stage.layers}
        self.layers = nn.ModuleDict()
        for letter in LAYERS.of_pair("opens"):
            if LAYERS[letter].key not in self._modules:
                self.add_module(LAYERS[letter].key, nn.ModuleDict())
        for layer in stage.layers:
            kind = self.kinds[layer.kind]
            if kind.module is None:
                continue
            given = BuildContext(run, layer, config, pg, backend, self.recompute)
            module = torch_half(kind, modules.get(layer.kind)).build(given)
            if kind.numbered:
                module = SubLayer(
                    module,
                    language.hidden_size,
                    language.layernorm_epsilon,
                    config,
                    backend,
                    layer.known_number,
                    kind.lora,
                    kind.reads_stream,
                )
            held, name = self._place(layer)
            held[name] = module

    def forward(self, payload: Payload, context: StreamContext) -> Payload:
        with self.precision():
            for block in self.blocks:
                if self.recompute.sublayers is None:
                    payload = self._block(block, payload, context)
                else:
                    payload = recomputed(self._block, block, payload, context, context=context)
        return payload

    def _block(self, layers: Sequence[Layer], payload: Payload, context: StreamContext) -> Payload:
        hidden, waiting = payload.hidden_T1H, dict(payload.refinements)
        for layer in layers:
            pair = self.kinds[layer.kind].pair
            if pair == "closes":
                hidden = hidden + waiting.pop(layer.refinement)
            elif pair == "opens":
                waiting[layer.refinement] = self._run(layer, hidden, payload, context)
            else:
                hidden = self._run(layer, hidden, payload, context)
            context.tap(layer, hidden)
        return Payload(hidden, payload.memories, waiting)

    def _place(self, layer: Layer) -> tuple[nn.ModuleDict, str]:
        """The dict that holds the layer's module, and its name there."""
        key = self.kinds[layer.kind].key
        if not layer.numbered:
            return getattr(self, key), str(layer.pair)
        number = str(layer.number)
        if number not in self.layers:
            self.layers[number] = nn.ModuleDict()
        return self.layers[number], key

    def _run(
        self, layer: Layer, hidden: torch.Tensor, payload: Payload, context: StreamContext
    ) -> torch.Tensor:
        kind, (held, name) = self.kinds[layer.kind], self._place(layer)
        module, state = held[name], None
        make = (module.inner if layer.numbered else module).State
        if context.cache is not None and make is not None:
            number = layer.known_number if layer.numbered else layer.known_pair
            state = context.cache.state(layer.kind, number, make)
        memories = (payload.memories,) if kind.reads_memory else ()
        run = module if layer.numbered else module.run
        if self.recompute.repeats(kind.recompute):
            return recomputed(run, hidden, context, state, *memories, context=context)
        return run(hidden, context, state, *memories)


def _blocks(layers: Sequence[Layer], size: int | None) -> list[tuple[Layer, ...]]:
    """The sub-layers in blocks of `size` numbered ones; sides go with the layer before them."""
    if size is None:
        return [tuple(layers)]
    blocks: list[list[Layer]] = [[]]
    for layer in layers:
        if layer.numbered and sum(other.numbered for other in blocks[-1]) == size:
            blocks.append([])
        blocks[-1].append(layer)
    return [tuple(block) for block in blocks]
