"""The settings of the model: what is computed. They travel with a checkpoint.

Every language family and every vision family has a dataclass of its own, which `type` chooses
(config/families.py); here stands what the shared layers read, and how image and text are fused.

Units: sizes are counts of features, heads, layers or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_mm.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from megatron_mm.config.fields import (
    Chosen,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Sections,
)
from megatron_mm.config.layers.kinds import LAYERS

VisionMemory = Literal["none", "thumbnail", "tiles", "pyramid"]
ImageStream = Literal["thumbnail", "tiles", "all"]


@dataclass
class LanguageConfig:
    """Settings that the shared layers read, whatever the family. A family's own dataclass gives
    every one of them a default and may add more (model/families)."""

    type: str
    """Family of the language model: a folder of model/families, or the dotted path of a
    declaration."""
    vocab_size: PositiveInt
    """Tokens in the vocabulary: rows of the embedding and of the output layer. A vocabulary that
    tensor-parallel ranks do not divide is padded."""
    hidden_size: PositiveInt
    """Features of the hidden state."""
    layernorm_epsilon: PositiveFloat
    """Added to the mean square in every RMSNorm of the language model."""
    init_method_std: PositiveFloat
    """Standard deviation of the weights before training. Output projections of residual branches
    start smaller, by sqrt(2 * layers)."""
    max_position_embeddings: PositiveInt
    """Longest sequence that the model is made for, in tokens."""
    untie_embeddings_and_output_weights: bool
    """Whether the output layer has a weight of its own. A model with tied weights is untied when
    it is converted; training needs true."""
    num_attention_heads: PositiveInt
    """Query heads of gated attention (letter `*`)."""
    num_query_groups: PositiveInt
    """Key and value heads of gated attention; each serves a group of query heads."""
    kv_channels: PositiveInt
    """Features of one attention head."""
    rotary_base: PositiveFloat
    """Base of the rotary embedding's wave lengths (theta)."""
    rotary_percent: PositiveFloat
    """Share of an attention head's features that the rotary embedding turns, up to 1."""
    linear_conv_kernel_dim: PositiveInt
    """Positions that the short convolution of gated DeltaNet (letter `G`) sees."""
    linear_key_head_dim: PositiveInt
    """Features of a key head, and of a query head, of gated DeltaNet."""
    linear_value_head_dim: PositiveInt
    """Features of a value head of gated DeltaNet."""
    linear_num_key_heads: PositiveInt
    """Key heads of gated DeltaNet; each serves several value heads."""
    linear_num_value_heads: PositiveInt
    """Value heads of gated DeltaNet, one state matrix each."""
    num_experts: PositiveInt
    """Routed experts of a mixture of experts (letter `E`)."""
    moe_router_topk: PositiveInt
    """Experts that compute each token, besides the shared one."""
    moe_ffn_hidden_size: PositiveInt
    """Inner features of a routed expert."""
    moe_shared_expert_intermediate_size: PositiveInt
    """Inner features of the shared expert, which computes every token."""
    moe_aux_loss_coeff: NonNegativeFloat
    """Weight of the load-balancing loss beside the main loss; 0 switches it off."""
    moe_router_dtype: Literal["fp32", "fp64"]
    """Precision of the router's scores."""


@dataclass
class VisionConfig:
    """Settings that the projector and the memory read, whatever the family of the encoder. A
    family's own dataclass gives them defaults and adds its own (model/families)."""

    type: str
    """Family of the vision encoder: a folder of model/families, or the dotted path of a
    declaration."""
    vision_hidden_size: PositiveInt
    """Features of a patch, as the encoder hands it on."""
    vision_init_method_std: PositiveFloat
    """Standard deviation of the encoder's weights, and of the memory's projection, before
    training."""


@dataclass
class MemoryConfig:
    """One memory of `fusion.memories`."""

    tiles: VisionMemory = "tiles"
    """The tiles of each image that it holds; none: it is switched off."""
    hidden_size: PositiveInt | None = None
    """Features of a row; none: the language model's hidden_size // 4."""
    coordinates: bool = True
    """Whether the keys of looks carry 2-D patch coordinates; false is a control."""
    images: str = "images"
    """The rows' key for the images that it holds; another than `images` is a control."""


@dataclass
class FusionConfig:
    """The way of the image into the language model: the token stream and CLVR's memories.

    The *stream* is what stands in the token sequence (pixel-shuffled and projected). A *memory* is
    what a look (pattern letter `L`) may attend to: patch features before the shuffle. Their
    resolutions are chosen separately. `config/memories.py` resolves the settings of memories.
    """

    image_stream: ImageStream = "all"
    """The tiles of each image that enter the token stream."""
    pixel_shuffle_factor: PositiveInt = 2
    """Patches along each side of the square that becomes one token of the stream."""
    pixel_shuffle_version: Literal["v1", "v2"] = "v2"
    """The order of stream tokens: v2 in reading order; v1, of the first InternVL releases, leaves
    rows and columns swapped."""
    vision_memory: VisionMemory = "none"
    """The tiles of each image that the memory `vision` holds; pyramid: the thumbnail and the tiles
    together; none: there is no such memory."""
    memory_hidden_size: PositiveInt | None = None
    """Features of a row of the memory `vision`; none: hidden_size // 4."""
    memory_coordinates: bool = True
    """Whether the keys of looks at the memory `vision` carry 2-D patch coordinates; false is a
    control."""
    memories: dict[str, MemoryConfig] = field(default_factory=dict)
    """Further memories by name."""
    look_memories: list[str] = field(default_factory=list)
    """The memory that each look (L) reads, in the order of the pattern, as names of `memories` or
    `vision`; empty: all read the first, which is `vision` where there is one."""
    clvr_num_attention_heads: PositiveInt = 16
    """Heads of a look."""
    clvr_kv_channels: PositiveInt = 64
    """Features of each head of a look."""


@dataclass
class ModelConfig:
    """The model itself. `hybrid_layer_pattern` is the single source of truth for layers: letters of
    config/layers/, such as G = gated DeltaNet, * = attention, E = mixture of experts."""

    hybrid_layer_pattern: str = "GEGEGE*E" * 12
    """Letters of the layers in their order, such as GEGEGE*E; spaces mean nothing. G gated
    DeltaNet, * attention, E mixture of experts, L look at the image, J inject what it found, Q
    glimpse at the place that a token asks for, V show its slots what was found, C mixture of
    experts that hand tokens to further ones."""
    language: Annotated[LanguageConfig, Chosen(LANGUAGE_FAMILIES, "qwen3_next")] = field(
        default_factory=lambda: LANGUAGE_FAMILIES["qwen3_next"].settings()
    )
    vision: Annotated[VisionConfig | None, Chosen(VISION_FAMILIES, "internvit")] = field(
        default_factory=lambda: VISION_FAMILIES["internvit"].settings()
    )
    fusion: FusionConfig = field(default_factory=FusionConfig)
    layers: Annotated[dict, Sections(LAYERS)] = field(default_factory=dict)
    """Settings of letters that have their own, by letter."""

    def __post_init__(self) -> None:
        # One section for each such letter of the pattern, none for others: a model does not depend
        # on letters that happen to be registered.
        kinds = [kind for kind in LAYERS.used(self.hybrid_layer_pattern) if kind.settings]
        self.layers = {kind.letter: self.layer_settings(kind.letter) for kind in kinds}

    def layer_settings(self, letter: str) -> Any:
        """The settings of a letter's own, with defaults unless given; None if it has none."""
        kind = LAYERS[letter]
        return self.layers.get(letter) or (kind.settings and kind.settings())
