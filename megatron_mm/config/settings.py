"""Every setting of a run, as torch-free dataclasses with Megatron's field names.

The tree has two halves. `ModelConfig` says *what* is computed and travels with a
checkpoint; everything else in `RunConfig` says how and where this run computes it.
Each leaf is also a command line flag in Megatron's spelling (`flags.py`), so names
are unique over the whole tree: vision leaves carry the prefix `vision_`.

Units: sizes are counts of features, heads, layers or tokens; times are seconds;
steps are optimizer steps ("iterations" in Megatron's words).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_mm.config.fields import Sections
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.settings_rl import RLConfig

VisionMemory = Literal["none", "thumbnail", "tiles"]
ImageStream = Literal["thumbnail", "tiles", "all"]
# core_attn: whatever mixes positions (attention, delta rule, look), without its projections;
# moe: a whole mixture of experts; vision: a whole layer of the ViT.
RecomputeModule = Literal["core_attn", "moe", "vision"]
LoraTarget = Literal["language", "vision", "projector"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]


@dataclass
class LanguageConfig:
    """Qwen3-Next: gated DeltaNet, gated attention and mixture-of-experts layers."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    layernorm_epsilon: float = 1e-6
    init_method_std: float = 0.02
    max_position_embeddings: int = 262144
    untie_embeddings_and_output_weights: bool = True
    # Gated attention: grouped queries, partial rotary embedding, per-head q/k norm.
    num_attention_heads: int = 16
    num_query_groups: int = 2
    kv_channels: int = 256
    rotary_base: float = 10_000_000.0
    rotary_percent: float = 0.25
    # Gated DeltaNet (linear attention).
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    # Mixture of experts with one gated shared expert.
    num_experts: int = 512
    moe_router_topk: int = 10
    moe_ffn_hidden_size: int = 512
    moe_shared_expert_intermediate_size: int = 512
    moe_aux_loss_coeff: float = 0.001
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"


@dataclass
class VisionConfig:
    """InternViT: a ViT with a class token, layer scale and learned positions."""

    vision_num_layers: int = 24
    vision_hidden_size: int = 1024
    vision_ffn_hidden_size: int = 4096
    vision_num_attention_heads: int = 16
    vision_normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    vision_layernorm_epsilon: float = 1e-6
    vision_add_qkv_bias: bool = True
    vision_qk_layernorm: bool = False  # RMSNorm over the full width (InternViT-6B)
    vision_layer_scale_init: float = 0.1
    vision_init_method_std: float = 0.02
    image_size: int = 448  # pixels along one side of a square tile
    patch_size: int = 14  # pixels along one side of a square patch


@dataclass
class FusionConfig:
    """How the image enters the language model: the token stream and CLVR's memory.

    The *stream* is what stands in the token sequence (pixel-shuffled and projected);
    the *memory* is what a look (pattern letter `L`) may attend to: patch features
    before the shuffle. The two resolutions are chosen separately.
    """

    image_stream: ImageStream = "all"
    pixel_shuffle_factor: int = 2  # s: s*s patches become one stream token
    pixel_shuffle_version: Literal["v1", "v2"] = "v2"  # v1 leaves rows and columns swapped
    vision_memory: VisionMemory = "none"
    memory_hidden_size: int | None = None  # default: hidden_size // 4
    memory_coordinates: bool = True  # 2-D patch coordinates on the keys; False is a control
    clvr_num_attention_heads: int = 16
    clvr_kv_channels: int = 64


@dataclass
class ModelConfig:
    """The model itself. `hybrid_layer_pattern` is the single source of truth for layers: letters of
    config/layers/, such as G = gated DeltaNet, * = attention, E = mixture of experts."""

    hybrid_layer_pattern: str = "GEGEGE*E" * 12
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
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


@dataclass
class ParallelConfig:
    """Where it is computed. Data parallelism is what is left of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    # Stages per pipeline rank, dealt round-robin (interleaved 1F1B).
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # default: tensor_model_parallel_size
    # hybrid_layer_pattern with `|` at the stage boundaries, in the order of the model;
    # default: balanced by cost.
    pipeline_model_parallel_layout: str | None = None
    overlap_p2p_comm: bool | None = None  # default: with virtual stages, and only with them
    use_distributed_optimizer: bool = True
    # Default: with replicas, on a GPU; on a CPU gloo's threads would take the cores from compute.
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None  # likewise, with the distributed optimizer
    # How tokens reach experts on other ranks; flex is DeepEP. Megatron's allgather needs streams of
    # one length.
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = "alltoall"
    # The shared expert is computed while tokens travel; with alltoall.
    moe_shared_expert_overlap: bool = False
    distributed_timeout_minutes: int = 10


@dataclass
class BackendConfig:
    """Whose code computes the language stack; the model and its checkpoints are the same.

    `local` is torch, on any device. `transformer_engine` needs CUDA, bf16 and Transformer Engine,
    and runs the stack's linears and routed experts in FP8 once `fp8_format` is set.
    """

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    # auto: flash-linear-attention on a GPU that has it, else torch.
    gdn_kernel: Literal["auto", "torch", "fla"] = "auto"
    fp8_format: Literal["hybrid", "e4m3"] | None = None  # hybrid: gradients in e5m2
    # Megatron's default is delayed. It keeps a history of maxima that checkpoints do not hold, so
    # the first step after a resume rounds otherwise; the other recipes keep nothing.
    fp8_recipe: Fp8Recipe = "tensorwise"
    fp8_amax_history_len: int = 1  # steps; delayed only
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"  # delayed only
    first_last_layers_bf16: bool = False  # keep some layers at both ends out of FP8
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1


@dataclass
class DataSource:
    """One part of a mixture. Of every n samples, weight / (sum of weights) * n come from it,
    give or take one; each source goes through shuffled epochs of its own."""

    path: str = ""
    weight: float = 1.0  # 0 switches the source off


@dataclass
class DataPhase:
    """One leg of the curriculum: a file, or a mixture of files, read in shuffled epochs until
    `samples` are used. A path is .jsonl or .parquet, or a pattern with * that names several."""

    path: str = ""
    samples: int | None = None  # None: until training ends (only the last phase may)
    mixture: list[DataSource] = field(default_factory=list)  # instead of `path`


@dataclass
class DataConfig:
    train_data: list[DataPhase] = field(default_factory=list)
    valid_data: str | None = None  # JSONL or parquet evaluated per skill
    tokenizer_model: str = ""  # a SentencePiece .model file or a Hugging Face folder
    seq_length: int = 4096  # longest sample in tokens; a longer one is an error, never cut
    # Packing: a microbatch is filled with whole samples up to micro_batch_size * seq_length
    # tokens, and global_batch_size counts the seq_length-token places of a step, not samples.
    packing: bool = False
    num_workers: int = 0  # processes that read ahead for each replica's reader; 0: in the reader
    max_num_tiles: int = 12  # InternVL dynamic tiling, thumbnail not counted
    # Of all images of a row together, at tokens_per_tile for every tile that the ViT sees;
    # a row beyond it gets fewer tiles per image. Default: no limit but seq_length.
    max_image_tokens: int | None = None
    use_thumbnail: bool = True
    # The rows' key for the images that looks see. Another than the stream's is a control: looks
    # that see the right kind of image, but not this row's.
    memory_images: str = "images"
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    on_bad_sample: Literal["error", "skip"] = "error"  # skip: counted and reported


@dataclass
class OptimizerConfig:
    """AdamW with Megatron's schedule. Per-module rates are multiples of `lr`."""

    lr: float = 1e-4
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_iters: int = 0
    lr_mult_vision: float = 1.0
    lr_mult_projector: float = 1.0
    lr_mult_clvr: float = 1.0
    lr_mult_router: float = 1.0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainingConfig:
    objective: Literal["sft", "grpo"] = "sft"  # grpo: reinforcement learning, see RLConfig
    train_iters: int = 100
    exit_duration_in_mins: float | None = None  # of training: end early, and evaluate
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seed: int = 1234
    bf16: bool = False
    # full: only the input of every recompute_num_layers sub-layers is kept; selective: the
    # insides of recompute_modules are not.
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_num_layers: int = 2
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["core_attn"])
    freeze_vision: bool = False
    freeze_projector: bool = False
    freeze_language: bool = False
    freeze_clvr: bool = False
    freeze_router: bool = False


@dataclass
class LoraConfig:
    """Low-rank adapters on the linears of whole modules; off unless `lora_rank` is set.

    A target's own parameters are frozen, whatever its freeze flag says, and its adapters
    train. Modules that are no target (the router and CLVR among them) follow their flags.
    """

    lora_rank: int | None = None
    lora_alpha: float = 32.0  # what adapters add is scaled by lora_alpha / lora_rank
    lora_targets: list[LoraTarget] = field(default_factory=lambda: ["language"])

    def adapts(self, module: str) -> bool:
        return self.lora_rank is not None and module in self.lora_targets


@dataclass
class CheckpointConfig:
    save: str | None = None
    save_interval: int | None = None  # steps; default: only at the end
    async_save: bool = False  # training goes on while a checkpoint is written
    keep_last_checkpoints: int | None = None  # delete older ones once a newer is complete
    load: str | None = None
    load_hf: str | None = None  # a Hugging Face folder: weights only, instead of `load`
    finetune: bool = False  # load weights only: no optimizer, RNG or data position
    # Go on from the newest checkpoint in `save`, where there is one, whatever the others say: for
    # jobs that a launcher or a scheduler starts again by the same command.
    resume: bool = False


@dataclass
class LoggingConfig:
    output_dir: str = "runs/default"
    log_interval: int = 1
    tensorboard: bool = True
    wandb_mode: Literal["disabled", "offline", "online"] = "offline"
    wandb_project: str = "megatron_mm"


@dataclass
class EvaluationConfig:
    eval_interval: int | None = None  # steps; default: only at the end
    eval_samples: int | None = None  # rows of valid_data per evaluation; default: all
    eval_batch_size: int = 32  # rows generated together
    max_new_tokens: int = 64
    report: bool = False  # write report.html at the end


@dataclass
class RunConfig:
    plugins: list[str] = field(default_factory=list)
    """Modules imported before the settings are read. They may register layers, families,
    objectives and other parts of their own; a checkpoint that needs them does not import them."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
