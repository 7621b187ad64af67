"""The vision tower: tiles to stream tokens and memory rows. It is a part of the first stage, or
stands beside the pipeline (`vision_parallel`), where the engine runs it (engine/encoder.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm import platform
from megatron_mm.config import RunConfig, read_memories
from megatron_mm.config.families import vision_family, vision_settings
from megatron_mm.config.memories import VISION
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.images import normalise
from megatron_mm.model.core_config import vision_config
from megatron_mm.model.layers.linear import ReplicatedLinear
from megatron_mm.model.layers.projector import Projector
from megatron_mm.model.recompute import Recompute
from megatron_mm.parallel.param_layout import normal
from megatron_mm.parallel.sequence import part, take


class VisionTower(nn.Module):
    """Tiles to stream tokens and memory rows, whole on every tensor- and context-parallel rank.

    Context-parallel ranks share the tiles of the ViT among them and gather its features. The
    projection of the memory `vision` is `memory_proj`, those of further memories are
    `memory_projs.<name>`. A memory that no look reads has none.

    Args:
        cp: None: tiles are not shared here.
    """

    def __init__(
        self,
        run: RunConfig,
        config: TransformerConfig,
        tp: ProcessGroup,
        cp: ProcessGroup | None = None,
    ):
        super().__init__()
        model, self.cp = run.model, cp
        inner = vision_config(run, config, tp.size())
        family, vision = vision_family(model), vision_settings(model)
        self.grid = family.grid(vision, None)
        encoder, recompute = family.module(), Recompute.of(run.training).vision
        self.vit = encoder(vision, inner, tp, recompute)
        self.scale = torch.tensor(run.data.image_mean), torch.tensor(run.data.image_std)
        if run.backend.compile_vision:
            from megatron_mm.model.compiled import compile_layers  # imports the compiler

            compile_layers(self.vit.layers)
        self.projector = Projector(model, self.grid, inner, tp)
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

    def features(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, patches of a tile, V]"""
        if self.cp is None or self.cp.size() == 1:
            return self.vit(self._normalised(pixels_NCHW))
        tiles = len(pixels_NCHW)
        padding = pixels_NCHW.new_zeros(-tiles % self.cp.size(), *pixels_NCHW.shape[1:])
        padded = torch.cat((pixels_NCHW, padding))
        mine = self.vit(self._normalised(take(padded, part(len(padded), self.cp))))
        # Backward it sums what every rank's tokens and looks ask of the features.
        return gather_from_sequence_parallel_region(mine, group=self.cp)[:tiles]

    def stream(self, features_NPV: torch.Tensor) -> torch.Tensor:
        """Stream tokens of these tiles, [tokens, H]."""
        return self.projector(features_NPV).flatten(0, 1)

    def memory(self, name: str, features_NPV: torch.Tensor) -> torch.Tensor:
        """Memory rows of these tiles, [N P, width]."""
        project = self.memory_proj if name == VISION else self.memory_projs[name]
        assert project is not None  # every memory in `memories` has one
        return project(features_NPV.flatten(0, 1))

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
        features = self.features(pixels)
        stream = self.stream(features if empty else features[batch.stream_tiles])
        found = {}
        for name in (memory.name for memory in self.memories):
            memory = self.memory(name, features if empty else features[batch.memories[name].tiles])
            found[name] = padded(memory[:1] * 0.0 if empty else memory, rows[name])
        return (stream[:1] * 0.0 if empty else stream), found


class Encoder(MegatronModule):
    """The vision tower beside the pipeline (`vision_parallel` replica). Its parameters have the
    names that they have in a first stage."""

    def __init__(self, run: RunConfig, config: TransformerConfig, tp: ProcessGroup):
        super().__init__(config)
        self.vision = VisionTower(run, config, tp)


@dataclass(frozen=True)
class Encoded:
    """A microbatch's images, encoded beside the pipeline for its first stage.

    Attributes:
        stream_kH: the tokens of the stream, as `VisionTower.forward` returns them.
        memories: by name [rows, width], without padding.
    """

    stream_kH: torch.Tensor
    memories: dict[str, torch.Tensor]


def padded(rows_MW: torch.Tensor, count: int) -> torch.Tensor:
    """The rows, and zeros up to this many."""
    return torch.cat((rows_MW, rows_MW.new_zeros(count - len(rows_MW), rows_MW.shape[1])))
