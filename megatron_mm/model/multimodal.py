"""The fused model: one pipeline stage of it. With virtual stages a rank holds several.

The first stage holds the ViT, the projector and the embedding; the last one the final norm
and the output layer; every stage its share of the layers. What crosses between them is
one packed tensor (parallel/wire.py) whose contents the layer pattern decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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

from megatron_mm import platform
from megatron_mm.config import (
    Manifest,
    RunConfig,
    look_memories,
    model_stages,
    read_memories,
    wire,
)
from megatron_mm.config.families import vision_family, vision_settings
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.memories import VISION
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.images import normalise
from megatron_mm.model.backends.choice import check_dispatcher, choose
from megatron_mm.model.backends.interface import Backend
from megatron_mm.model.context import StreamContext, memory_rows
from megatron_mm.model.core_config import language_config, vision_config
from megatron_mm.model.decode import DecodeCache
from megatron_mm.model.expert_scope import ExpertScope
from megatron_mm.model.layers.linear import ReplicatedLinear, vocab_embedding
from megatron_mm.model.layers.lora import add_lora
from megatron_mm.model.layers.norms import RMSNorm
from megatron_mm.model.layers.output import OutputLayer, Predictions
from megatron_mm.model.layers.projector import Projector
from megatron_mm.model.recompute import Recompute
from megatron_mm.model.routing import RouterTerm, Routes, Routing
from megatron_mm.model.stack import Stack
from megatron_mm.parallel.param_layout import initialize, leave_open, normal
from megatron_mm.parallel.sequence import part, take
from megatron_mm.parallel.wire import MemoryShape, Payload, WireShape, pack, unpack
from megatron_mm.report.metrics import MUTED, Metrics


class VisionTower(nn.Module):
    """Tiles to stream tokens and memory rows, whole on every tensor- and context-parallel rank.

    Context-parallel ranks share the tiles of the ViT among them and gather its features. The
    projection of the memory `vision` is `memory_proj`, those of further memories are
    `memory_projs.<name>`. A memory that no look reads has none.
    """

    def __init__(self, run: RunConfig, config: TransformerConfig, pg: ProcessGroupCollection):
        super().__init__()
        model, self.cp = run.model, pg.cp
        inner = vision_config(run, config)
        family, vision = vision_family(model), vision_settings(model)
        self.grid = family.grid(vision, None)
        encoder, recompute = family.module(), Recompute.of(run.training).vision
        self.vit = encoder(vision, inner, pg.tp, recompute)
        self.scale = torch.tensor(run.data.image_mean), torch.tensor(run.data.image_std)
        if run.backend.compile_vision:
            from megatron_mm.model.compiled import compile_layers  # imports the compiler

            compile_layers(self.vit.layers)
        self.projector = Projector(model, self.grid, inner, pg.tp)
        self.memories = read_memories(model)
        self.memory_proj: ReplicatedLinear | None = None
        self.memory_projs = nn.ModuleDict()
        for memory in self.memories:
            linear = ReplicatedLinear(
                vision.vision_hidden_size,
                memory.width,
                init=normal(vision.vision_init_method_std),
                bias=True,
                dtype=config.params_dtype,
            )
            if memory.name == VISION:
                self.memory_proj = linear
            else:
                self.memory_projs[memory.name] = linear

    def _normalised(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        return normalise(pixels_NCHW, *(platform.moved(x, pixels_NCHW.device) for x in self.scale))

    def _features(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, patches of a tile, V]"""
        if self.cp.size() == 1:
            return self.vit(self._normalised(pixels_NCHW))
        tiles = len(pixels_NCHW)
        padding = pixels_NCHW.new_zeros(-tiles % self.cp.size(), *pixels_NCHW.shape[1:])
        padded = torch.cat((pixels_NCHW, padding))
        mine = self.vit(self._normalised(take(padded, part(len(padded), self.cp))))
        # Backward it sums what every rank's tokens and looks ask of the features.
        return gather_from_sequence_parallel_region(mine, group=self.cp)[:tiles]

    def forward(
        self, batch: Microbatch, rows: Mapping[str, int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns stream tokens [k, H] and, by name, memories [its rows, its width], zero beyond
        the batch's patches.

        A batch without images runs one empty tile whose features count nothing, so that
        every parameter takes part in every backward pass (DDP's overlap asserts it).
        """
        pixels, empty = batch.pixels_NCHW, len(batch.pixels_NCHW) == 0
        if empty:
            pixels = pixels.new_zeros(1, 3, self.grid.height, self.grid.width)
        features = self._features(pixels)
        stream = self.projector(features if empty else features[batch.stream_tiles])
        stream = stream.flatten(0, 1)
        found = {}
        for name in (memory.name for memory in self.memories):
            project = self.memory_proj if name == VISION else self.memory_projs[name]
            chosen = features if empty else features[batch.memories[name].tiles]
            assert project is not None  # every memory in `memories` has one
            memory = project(chosen.flatten(0, 1))
            if empty:
                memory = memory[:1] * 0.0
            padding = memory.new_zeros(rows[name] - len(memory), memory.shape[1])
            found[name] = torch.cat((memory, padding))
        return (stream[:1] * 0.0 if empty else stream), found


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
        # The memories that looks of this stage read.
        here = [
            looks[layer.known_reader].name
            for layer, kind in zip(stage.layers, kinds, strict=True)
            if kind.reads_memory
        ]
        self.reads = [memory for name, memory in self.memories.items() if name in here]
        # Numbers of this stage's expert layers, counted over the whole model.
        layers = zip(stage.layers, kinds, strict=True)
        self.moe_layers = [layer.known_number for layer, kind in layers if kind.routed]
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
            if run.model.vision is not None:
                self.vision = VisionTower(run, config, pg)
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

    def _embed(self, batch: Microbatch, images: bool) -> Payload:
        mine = part(len(batch.tokens_T), self.pg.cp)
        assert self.embedding is not None  # this is the first stage
        hidden = self.embedding(take(batch.tokens_T, mine))  # [T / CP, H], on every TP rank
        memories: dict[str, torch.Tensor] = {}
        if self.vision is not None and images:
            rows = {
                memory.name: memory_rows(batch, memory, self.pg.tp.size())
                for memory in self.vision.memories
            }
            stream, memories = self.vision(batch, rows)
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
            return hidden_TH + 0.0 * stream_kH.sum()
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

        Returns:
            the predictions at these positions on the last stage, else the wire's tensor.
        """
        prompts = _has_prompts(cache)
        if cache is not None and not prompts:
            context = StreamContext.of_step(self.pg, cache)
        else:
            context = StreamContext.build(batch, self.model_config, self.pg, self.reads)
            context.cache = cache
        context.looks, context.watch = looks, self.watch
        context.first_pass_metrics = metrics
        context.routing = Routing.of(batch, self.pg, routes, self.forbidden, router_term)
        if self.expert_scope is not None and torch.is_grad_enabled():
            context.scope = ExpertScope.of(batch, self.expert_scope, self.pg)
        if self.arrives is None:
            payload = self._embed(batch, prompts)
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
        add_lora(model, run.lora, pg.tp)
        if not drawn:
            leave_open(model, platform.device())
        elif platform.device().type != "meta":  # else there is nothing to fill
            initialize(model, run.training.seed)
        model.to(platform.device())
    return chunks
