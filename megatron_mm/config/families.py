"""Families: what a published model declares in its folder of `model/families`.

`model.language.type` and `model.vision.type` name a family. A declaration imports no torch: parts
that need it are given by dotted path and imported when they are asked for.

A new family is a folder and a line in a registry below; a family of your own is registered by a
plug-in, or named by the dotted path of its declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from megatron_mm.config.layers.counting import Linear
from megatron_mm.plugins import Registry, import_object

if TYPE_CHECKING:
    from megatron_mm.config.settings import ParallelConfig
    from megatron_mm.config.settings_model import (
        FusionConfig,
        LanguageConfig,
        ModelConfig,
        VisionConfig,
    )

HF = Mapping[str, Any]  # a config.json, or a part of it


@dataclass(frozen=True)
class LanguageFamily[S: LanguageConfig]:
    """A language model around layers of the pattern.

    Attributes:
        title: the name that people know.
        settings: dataclass of `model.language`, a subclass of LanguageConfig.
        presets: name -> function that makes a whole model.
        rows: dotted path of {letter: rows of the table of Hugging Face names}; under "" those of
            tensors outside layers.
        carried: prefixes of tensors in Hugging Face folders that no module here computes with.
            They travel beside the model, bitwise.
        hf_type: `model_type` of the transformers config.
        hf_classes: names of the transformers classes of the config and of the text-only model.
        to_hf: keywords of the transformers config.
        from_hf: the text-only model of a transformers config, from (config, its dotted place for
            messages, whether the output layer is the embedding).
        released: a published config.json as the transformers config of the text model; any other
            config comes back as it is.
        check: raises ConfigError for settings that the family's own fields rule out.
        modules: letter -> dotted path of the torch half that computes it in this family; a letter
            that is not there is computed by its kind's (`LayerKind.module`).
    """

    title: str
    settings: type[S]
    presets: Mapping[str, Callable[[], ModelConfig]]
    rows: str
    carried: tuple[str, ...]
    hf_type: str
    hf_classes: tuple[str, str]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    from_hf: Callable[[HF, str, bool], ModelConfig]
    released: Callable[[HF], HF] = lambda config: config
    check: Callable[[S, ParallelConfig], None] = lambda language, parallel: None
    modules: Mapping[str, str] = field(default_factory=dict)

    def hf_rows(self) -> Mapping[str, tuple]:
        """Letter -> rows of the table of names. Imports torch."""
        return import_object(self.rows, f"{self.title}'s rows")


@dataclass(frozen=True)
class PatchGrid:
    """The patches of one tile, in reading order.

    Attributes:
        height, width: of the tile, in pixels.
        patch: side of a square patch, in pixels.
    """

    height: int
    width: int
    patch: int

    @property
    def rows(self) -> int:
        return self.height // self.patch

    @property
    def columns(self) -> int:
        return self.width // self.patch

    @property
    def patches(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class EncoderCost:
    """Sizes of an encoder's matrix products.

    Attributes:
        embedding: once for each patch.
        layer: the linears of one layer, once for each position. Attention stands behind the first.
        layers: their number.
        positions: those of one tile, among which each attends to all; class tokens included.
        width: features of all heads together.
    """

    embedding: Linear
    layer: tuple[Linear, ...]
    layers: int
    positions: int
    width: int


@dataclass(frozen=True)
class VisionFamily[S: VisionConfig]:
    """A vision encoder, and the transformers model that fuses it with a language model.

    Attributes:
        title, settings, presets: as for a language family; a preset makes `model.vision` alone.
        build: dotted path of the encoder: a module made of (settings, TransformerConfig of its
            linears, tensor-parallel group, whether layers are recomputed), from pixels
            [N, 3, height, width] to features [N, patches, vision_hidden_size] in reading order;
            `layers` are its layers, for `compile_vision`.
        rows: dotted path of its rows in the table of Hugging Face names.
        grid: the patches of a tile of (height, width) pixels; None: of the size that images are
            cut to. Tokens, the memory's rows and their coordinates follow from it.
        core: fields of megatron-core's TransformerConfig for its linears on so many
            tensor-parallel ranks.
        cost: sizes of its matrix products.
        check: raises ConfigError for sizes that do not divide.
        hf_encoder_type: `model_type` of the encoder's transformers config.
        hf_type, hf_classes: `model_type`, config class and model class of the fused transformers
            model.
        to_hf: keywords of the fused config, from (model, keywords of the text config, id of the
            image token).
        from_hf: the model that a fused config describes.
        released: a config of the family's own releases in transformers' words; any other config
            comes back as it is.
    """

    title: str
    settings: type[S]
    presets: Mapping[str, Callable[[], S]]
    build: str
    rows: str
    grid: Callable[[S, tuple[int, int] | None], PatchGrid]
    core: Callable[[S, int], dict[str, Any]]
    cost: Callable[[S], EncoderCost]
    check: Callable[[S, FusionConfig, ParallelConfig], None]
    hf_encoder_type: str
    hf_type: str
    hf_classes: tuple[str, str]
    to_hf: Callable[[ModelConfig, dict[str, Any], int], dict[str, Any]]
    from_hf: Callable[[HF], ModelConfig]
    released: Callable[[HF], HF] = lambda config: config

    def module(self) -> Any:
        """The class of the encoder. Imports torch."""
        return import_object(self.build, f"{self.title}'s encoder")

    def hf_rows(self) -> tuple:
        """Rows of the table of names. Imports torch."""
        return import_object(self.rows, f"{self.title}'s rows")


HERE = "megatron_mm.model.families"
LANGUAGE_FAMILIES: Registry[LanguageFamily[Any]] = Registry(
    "language family",
    {name: f"{HERE}.{name}.family.FAMILY" for name in ("qwen3_next", "qwen3_5_moe")},
    kind="LanguageFamily",
    needs=[part.name for part in fields(LanguageFamily)],
)
VISION_FAMILIES: Registry[VisionFamily[Any]] = Registry(
    "vision family",
    {"internvit": f"{HERE}.internvit.family.FAMILY"},
    kind="VisionFamily",
    needs=[part.name for part in fields(VisionFamily)],
)


def language_family(model: ModelConfig) -> LanguageFamily[Any]:
    return LANGUAGE_FAMILIES[model.language.type]


def vision_family(model: ModelConfig) -> VisionFamily[Any]:
    """The family of a model that has a vision encoder."""
    return VISION_FAMILIES[vision_settings(model).type]


def vision_settings(model: ModelConfig) -> VisionConfig:
    """`model.vision` of a model that has a vision encoder."""
    assert model.vision is not None
    return model.vision
