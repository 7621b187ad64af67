"""The fused model: one pipeline stage of it. With virtual stages a rank holds several.

The first stage holds the ViT, the projector and the embedding; the last one the final norm
and the output layer; every stage its share of the layers. What crosses between them is
one packed tensor (parallel/wire.py) whose contents the layer pattern decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm import platform
from megatron_mm.config import (
    Manifest,
    RunConfig,
    hops,
    look_memories,
    model_stages,
    read_memories,
    route_width,
    wire,
)
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.layers.queries import QUERY
from megatron_mm.data.batch import Microbatch
from megatron_mm.model.backends.choice import check_dispatcher, choose
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.context import StreamContext, memory_rows
from megatron_mm.model.core_config import language_config
from megatron_mm.model.decode import DecodeCache
from megatron_mm.model.expert_scope import ExpertScope
from megatron_mm.model.layers.linear import vocab_embedding
from megatron_mm.model.layers.lora import add_lora
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.layers.output import OutputLayer, Predictions
from megatron_mm.model.routing import RouterTerm, Routes, Routing
from megatron_mm.model.stack import Stack
from megatron_mm.model.vision_tower import Encoded, Encoder, VisionTower, padded
from megatron_mm.parallel.param_layout import initialize, leave_open, normal
from megatron_mm.parallel.sequence import part, take
from megatron_mm.parallel.wire import MemoryShape, Payload, WireShape, pack, unpack
from megatron_mm.report.metrics import MUTED, Metrics


class MultimodalModel(MegatronModule):
    """One stage of the model, the `chunk`-th of this pipeline rank.

    forward(batch) returns predictions on the last stage, else the packed tensor for the next one.
    """

    def __init__(
        self,
        run: RunConfig,
        pg: ProcessGroupCollection,
        config: TransformerConfig,
        backend: Backend,
        chunk: int = 0,
    ):
        super().__init__(config)
        # megatron-core's schedule and gradient reduction ask for these two.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.model_config, self.pg = run.model, pg
        language = run.model.language
        plan = model_stages(run)
        looks = look_memories(run.model)
        boundaries = wire(plan, [memory.name for memory in looks])
        index = chunk * pg.pp.size() + pg.pp.rank()
        stage = plan[index]
        self.pre_process, self.post_process = index == 0, index == len(plan) - 1
        self.arrives: Manifest | None = None if self.pre_process else boundaries[index - 1]
        self.leaves: Manifest | None = None if self.post_process else boundaries[index]
        kinds = [LAYERS[layer.kind] for layer in stage.layers]
        self.memories = {memory.name: memory for memory in looks}
        self.encoded = read_memories(run.model)  # what comes out of the encoder, beside the stream
        # The memories that looks of this stage read.
        here = [
            looks[layer.known_reader].name
            for layer, kind in zip(stage.layers, kinds, strict=True)
            if kind.reads_memory
        ]
        self.reads = [memory for name, memory in self.memories.items() if name in here]
        self.asks = any(layer.kind == QUERY.letter for layer in stage.layers)
        # Numbers of this stage's expert layers, counted over the whole model.
        layers = zip(stage.layers, kinds, strict=True)
        self.moe_layers = [layer.known_number for layer, kind in layers if kind.routed]
        # How many experts compute a position in each hop of these layers.
        self.hops = {n: of for n, of in hops(run.model).items() if n in self.moe_layers}
        self.route_width = route_width(run.model)
        # By that number a bool mask [experts]: True for an expert that no token may be sent to.
        self.forbidden: dict[int, torch.Tensor] = {}
        # With an expert scope, bool [S, L, E]: the experts that learn from a skill's positions.
        self.expert_scope: torch.Tensor | None = None
        self.letters = "".join(layer.kind for layer in stage.layers)
        self.received: torch.Tensor | None = None
        self.watch: Callable | None = None  # diagnostics: (layer, hidden) as each layer ends
        init, dtype = normal(language.init_method_std), config.params_dtype
        self.vision: VisionTower | None = None
        self.embedding: nn.Module | None = None
        self.final_norm: nn.Module | None = None
        self.output_layer: OutputLayer | None = None
        if self.pre_process:
            if run.model.vision is not None and run.parallel.vision_parallel != "replica":
                self.vision = VisionTower(run, config, pg.tp, pg.cp)
            self.embedding = vocab_embedding(
                language.vocab_size, language.hidden_size, config=config, init=init, tp=pg.tp
            )
        self.language = Stack(run, config, pg, stage, backend)
        if self.post_process:
            self.final_norm = RMSNorm(
                language.hidden_size,
                language.layernorm_epsilon,
                partial_gradient=config.sequence_parallel,
                dtype=dtype,
            )
            self.output_layer = OutputLayer(
                language.hidden_size, language.vocab_size, init=init, tp=pg.tp, dtype=dtype
            )

    def set_input_tensor(self, tensor) -> None:
        """Called by the schedule with what the previous stage sent."""
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def _wire_shape(self, batch: Microbatch, manifest: Manifest, images: bool) -> WireShape:
        tp = self.pg.tp.size()
        travel = [self.memories[name] for name in manifest.memories] if images else []
        shapes = (MemoryShape(m.name, memory_rows(batch, m, tp) // tp, m.width) for m in travel)
        tokens = len(batch.tokens_T) // self.pg.tp_cp.size()
        return WireShape(tokens, tuple(shapes), manifest.refinements)

    def wire_rows(
        self, batch: Microbatch, manifest: Manifest, cache: DecodeCache | None = None
    ) -> int:
        """Returns the rows of the packed tensor [rows, 1, H] with these contents on this rank.

        Args:
            cache: as in `forward`.
        """
        shape = self._wire_shape(batch, manifest, _has_prompts(cache))
        return sum(shape.sizes(self.model_config.language.hidden_size))

    def _embed(self, batch: Microbatch, images: bool, encoded: Encoded | None) -> Payload:
        mine = part(len(batch.tokens_T), self.pg.cp)
        assert self.embedding is not None  # this is the first stage
        hidden = self.embedding(take(batch.tokens_T, mine))  # [T / CP, H], on every TP rank
        memories: dict[str, torch.Tensor] = {}
        if self.model_config.vision is not None and images:
            rows = {m.name: memory_rows(batch, m, self.pg.tp.size()) for m in self.encoded}
            if self.vision is not None:
                stream, memories = self.vision(batch, rows)
            else:
                assert encoded is not None  # the engine gives it with every microbatch
                stream = encoded.stream_kH
                memories = {k: padded(memory, rows[k]) for k, memory in encoded.memories.items()}
            hidden = self._fill_in(hidden, stream.to(hidden.dtype), batch.stream_positions, mine)
        hidden = hidden.unsqueeze(1)
        memories = {name: memory.unsqueeze(1) for name, memory in memories.items()}
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg.tp)
            memories = {
                name: scatter_to_sequence_parallel_region(memory, group=self.pg.tp)
                for name, memory in memories.items()
            }
        return Payload(hidden, memories)

    def _fill_in(
        self,
        hidden_TH: torch.Tensor,
        stream_kH: torch.Tensor,
        positions: torch.Tensor,
        mine: range,
    ) -> torch.Tensor:
        """Put the image tokens (at ascending positions of the whole stream) in their places."""
        bounds = torch.tensor([mine.start, mine.stop])
        first, last = torch.searchsorted(positions, bounds).tolist()
        if first == last:
            # Nothing to fill in, but the ViT's collectives run backward on every rank.
            return hidden_TH if self.vision is None else hidden_TH + 0.0 * stream_kH.sum()
        places = platform.moved(positions[first:last] - mine.start, hidden_TH.device)
        return hidden_TH.index_copy(0, places, stream_kH[first:last])

    def _predictions(
        self, hidden_t1H: torch.Tensor, positions: torch.Tensor | None, first: int
    ) -> Predictions:
        if self.config.sequence_parallel:
            # Backward, the parts of the gradient from every slice of the vocabulary are summed.
            hidden_t1H = gather_from_sequence_parallel_region(hidden_t1H, group=self.pg.tp)
        if positions is not None:
            rows = platform.moved(positions - first, hidden_t1H.device)
            hidden_t1H = hidden_t1H.index_select(0, rows)
        assert self.output_layer is not None  # this is the last stage
        return self.output_layer(hidden_t1H)

    def forward(
        self,
        batch: Microbatch,
        positions: torch.Tensor | None = None,
        looks: dict[int, list[torch.Tensor]] | None = None,
        cache: DecodeCache | None = None,
        routes: Routes | None = None,
        router_term: RouterTerm | None = None,
        metrics: Metrics = MUTED,
        encoded: Encoded | None = None,
    ) -> torch.Tensor | Predictions:
        """
        Args:
            positions: int64 [K] on the CPU, where in the stream predictions are wanted; all of them
                in this context-parallel rank's part of it. None: everywhere there.
            looks: if given, filled with the attention weights of this stage's looks, by pair.
            cache: of the rows being decoded; a prefill fills rows of it, a step reads it: then the
                batch is one token of every row, each a sample of its own.
            routes: if given, filled with the experts chosen at this rank's positions.
            router_term: added to the loss by every layer of experts of this stage.
            metrics: takes what layers add to the metrics of this microbatch.
            encoded: its images on the first stage, where the encoder stands beside the pipeline.

        Returns:
            the predictions at these positions on the last stage, else the wire's tensor.
        """
        prompts = _has_prompts(cache)
        if cache is not None and not prompts:
            context = StreamContext.of_step(self.pg, cache)
        else:
            context = StreamContext.build(batch, self.model_config, self.pg, self.reads, self.asks)
            context.cache = cache
        context.looks, context.watch = looks, self.watch
        context.first_pass_metrics = metrics
        context.routing = Routing.of(
            batch,
            self.pg,
            self.hops,
            self.route_width,
            routes,
            self.forbidden,
            router_term,
            self.language.recompute.routes and torch.is_grad_enabled(),
        )
        if self.expert_scope is not None and torch.is_grad_enabled():
            context.scope = ExpertScope.of(batch, self.expert_scope, self.pg)
        if self.arrives is None:
            payload = self._embed(batch, prompts, encoded)
        else:
            payload = unpack(self.received, self._wire_shape(batch, self.arrives, prompts))
        payload = self.language(payload, context)
        if self.leaves is not None:
            return pack(payload, self._wire_shape(batch, self.leaves, prompts))
        first = part(len(batch.tokens_T), self.pg.cp).start
        assert self.final_norm is not None  # this is the last stage
        hidden = self.final_norm(payload.hidden_T1H, context.scale_of(self.final_norm))
        return self._predictions(hidden, positions, first)


def _has_prompts(cache: DecodeCache | None) -> bool:
    """Whether rows may have images: none has in a step of decoding."""
    return cache is None or not cache.stepping


def build(
    run: RunConfig,
    pg: ProcessGroupCollection,
    backend: Backend | None = None,
    *,
    drawn: bool = True,
) -> list[MultimodalModel]:
    """This rank's stages, initialised from the seed alone, on this rank's device.

    Args:
        backend: instead of the one that the settings choose.
        drawn: False if weights are loaded next: parameters are NaN until then.
    """
    backend = backend or choose(run.backend)
    check_dispatcher(run.parallel)
    config = language_config(run)
    chunks = [
        MultimodalModel(run, pg, config, backend, chunk)
        for chunk in range(run.parallel.virtual_pipeline_model_parallel_size or 1)
    ]
    for model in chunks:
        _complete(model, run, pg.tp, drawn)
    return chunks


def build_encoder(run: RunConfig, tp: ProcessGroup, *, drawn: bool = True) -> Encoder:
    """The encoder beside the pipeline, initialised and placed as `build` does.

    Args:
        tp: the ranks that share its linears.
    """
    encoder = Encoder(run, language_config(run), tp)
    _complete(encoder, run, tp, drawn)
    return encoder


def _complete(model: MegatronModule, run: RunConfig, tp: ProcessGroup, drawn: bool) -> None:
    add_lora(model, run.lora, tp)
    if not drawn:
        leave_open(model, platform.device())
    elif platform.device().type != "meta":  # else there is nothing to fill
        initialize(model, run.training.seed)
    model.to(platform.device())
