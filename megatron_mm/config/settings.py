"""The settings of a run, as torch-free dataclasses with Megatron's field names.

`RunConfig` is the whole tree. `ModelConfig` (settings_model.py) says *what* is computed;
everything else says how and where this run computes it. Each leaf is also a command line flag in
Megatron's spelling (`flags.py`), so names are unique over the whole tree.

Units: times are seconds; steps are optimizer steps ("iterations" in Megatron's words).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_mm.config.fields import (
    Bounds,
    Named,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Samples,
    Sections,
    Workers,
)
from megatron_mm.config.objectives import OBJECTIVES
from megatron_mm.config.settings_model import ModelConfig
from megatron_mm.errors import ConfigError

RecomputeModule = Literal["core_attn", "moe", "vision"]
# Parts of a model that learn, or are frozen, by themselves; `engine.optimizer.module_of` says which
# parameters belong to which.
MODULES = ("vision", "projector", "language", "experts", "clvr", "avm", "router")
LoraTarget = Literal["language", "vision", "projector"]
Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]


@dataclass
class ParallelConfig:
    """Parallel layout. Data parallelism is the rest of the world size."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every matrix product; more than 1 implies sequence parallelism."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Ranks that hold consecutive parts of the layers."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Stages of each pipeline rank, dealt round-robin (interleaved 1F1B); none: one stage."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of every microbatch."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the routed experts of a layer."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share the products of one expert; none: tensor_model_parallel_size."""
    pipeline_model_parallel_layout: str | None = None
    """The layer pattern with | at the stage boundaries, in the order of the model; none: stages of
    equal cost."""
    overlap_p2p_comm: bool | None = None
    """Overlap the exchange between stages with compute; none: with virtual stages, and only with
    them."""
    use_distributed_optimizer: bool = True
    """Share the optimizer's state among the replicas (ZeRO 1)."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients during the backward pass; none: with replicas on a GPU, because on a CPU
    gloo's threads would take the cores from compute."""
    overlap_param_gather: bool | None = None
    """Gather parameters during the forward pass, with the distributed optimizer; none: with
    replicas on a GPU."""
    vision_parallel: Literal["stage", "replica"] | None = None
    """Which ranks encode images. stage: those of the first pipeline stage, as part of it. replica:
    all of a data-parallel replica, each a share of the tiles of all microbatches, before the
    pipeline begins and again for gradients after it has ended. Default: replica where the
    encoder costs more than each stage would with its share, unless the layout is given."""
    vision_tensor_parallel_size: PositiveInt | None = None
    """Ranks that share each linear of the encoder, with vision_parallel replica: 1 or, by default,
    tensor_model_parallel_size."""
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = "alltoall"
    """How tokens reach experts on other ranks; flex is DeepEP. Megatron's allgather needs streams
    of one length and is not offered."""
    moe_shared_expert_overlap: bool = False
    """Compute the shared expert while tokens travel; with alltoall."""
    distributed_timeout_minutes: PositiveInt = 10
    """Minutes until a collective that waits for a rank fails on every rank."""


@dataclass
class BackendConfig:
    """Whose code computes the language stack; the model and its checkpoints are the same.

    `local` is torch, on any device. `transformer_engine` needs CUDA, bf16 and Transformer Engine,
    and runs the stack's linears and routed experts in FP8 once `fp8_format` is set.
    """

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Whose linears, experts and attention compute the language stack."""
    gdn_kernel: Literal["auto", "torch", "fla"] = "auto"
    """Kernel of the gated delta rule; auto: flash-linear-attention on a GPU that has it, else
    torch."""
    decoding_cuda_graph: bool = True
    """Replay decoding steps as CUDA graphs on a GPU, but not with pipeline or expert parallelism
    and not where a step waits for the host."""
    deterministic_mode: bool = False
    """Only algorithms that repeat a run on GPUs bit for bit, and with it resume bitwise; slower.
    The delta rule is then torch's."""
    compile_vision: bool = False
    """Compile the ViT's layers with torch.compile, which fuses the work between their products;
    on one tensor-parallel rank. The first steps take longer."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """Switches FP8 on. hybrid: gradients in e5m2, everything else in e4m3."""
    # Megatron's default is delayed. It keeps a history of maxima that checkpoints do not hold, so
    # the first step after a resume rounds otherwise; the other recipes keep nothing.
    fp8_recipe: Fp8Recipe = "tensorwise"
    """How FP8 tensors are scaled; mxfp8 needs Blackwell, and delayed does not resume exactly."""
    fp8_amax_history_len: PositiveInt = 1
    """Steps of maxima that the recipe delayed keeps."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of the kept maxima scales a tensor; delayed only."""
    first_last_layers_bf16: bool = False
    """Keep some layers at both ends out of FP8."""
    num_layers_at_start_in_bf16: PositiveInt = 1
    """Layers at the start that stay in bf16, with first_last_layers_bf16."""
    num_layers_at_end_in_bf16: PositiveInt = 1
    """Layers at the end that stay in bf16, with first_last_layers_bf16."""


@dataclass
class DataSource:
    """One part of a mixture. Of every n samples, weight / (sum of weights) * n come from it,
    give or take one; each source goes through shuffled epochs of its own."""

    path: str = ""
    """A .jsonl or .parquet file, or a pattern with * that names several."""
    weight: float = 1.0
    """Share of the samples, relative to the other weights; 0 switches the source off."""


@dataclass
class DataPhase:
    """One phase of the curriculum: a file, or a mixture of files, read in shuffled epochs until
    `samples` are used."""

    path: str = ""
    """A .jsonl or .parquet file, or a pattern with * that names several."""
    samples: int | None = None
    """Samples of the phase; none: until training ends, in the last phase only."""
    mixture: list[DataSource] = field(default_factory=list)
    """Sources read side by side, in place of `path`."""


@dataclass
class DataConfig:
    """Files that are read, and how their rows become samples."""

    train_data: list[DataPhase] = field(default_factory=list)
    """Training data, phase by phase; the flag takes PATH or PATH:SAMPLES for each."""
    valid_data: str | None = None
    """Rows that are answered and scored by skill; JSONL or parquet."""
    tokenizer_model: str = ""
    """A SentencePiece .model file or a Hugging Face folder."""
    end_tokens: list[str] = field(default_factory=list)
    """Tokens that end an answer, besides <|im_end|>, the tokenizer's end of text, and eos_token_id
    of a generation_config.json beside the tokenizer."""
    extra_columns: list[str] = field(default_factory=list)
    """Further keys of rows that are accepted though nothing uses them; * accepts any. In
    reinforcement learning other keys go to the reward functions and need not be named."""
    seq_length: PositiveInt = 4096
    """Tokens of the longest sample; a longer one is an error and is never cut."""
    packing: bool = False
    """Fill a microbatch with whole samples up to micro_batch_size * seq_length tokens;
    global_batch_size then counts places of seq_length tokens."""
    max_pack_tiles: PositiveInt | None = None
    """Most image tiles that the ViT sees at once: in a pack, a microbatch of RL or prompts read
    together. A row of training that has more is bad. none: as many as the tokens allow."""
    num_workers: Workers = 0
    """Processes that read ahead for each replica; 0: rows are read between the steps."""
    max_num_tiles: Annotated[int, Bounds(ge=1, le=256)] = 12
    """Most tiles of an image in InternVL's dynamic tiling, the thumbnail not counted."""
    max_image_tokens: PositiveInt | None = None
    """Most image tokens of a row, counted as the stream tokens of every tile that the ViT sees; a
    row beyond it gets fewer tiles per image. none: no limit but seq_length."""
    use_thumbnail: bool = True
    """Add a thumbnail of the whole image to images of several tiles."""
    memory_images: str = "images"
    """The rows' key for the images of the memory `vision`. Any other key is a control:
    looks then see the right kind of image, but not this row's."""
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of red, green and blue (0 to 1) that normalisation subtracts."""
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of red, green and blue that normalisation divides by."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or leave it out, count it and report it."""


@dataclass
class OptimizerConfig:
    """AdamW with Megatron's schedule. Rates of single modules are multiples of `lr`."""

    lr: PositiveFloat = 1e-4
    """Highest learning rate, reached after the warm-up."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """Form of the decay from lr to min_lr over train_iters."""
    lr_warmup_iters: NonNegativeInt = 0
    """Steps over which the rate grows linearly from 0 to lr."""
    lr_mult_vision: NonNegativeFloat = 1.0
    """Learning rate of the vision encoder, as a multiple of lr."""
    lr_mult_projector: NonNegativeFloat = 1.0
    """Learning rate of the projector, as a multiple of lr."""
    lr_mult_experts: NonNegativeFloat = 1.0
    """Learning rate of the routed experts, as a multiple of lr."""
    lr_mult_clvr: NonNegativeFloat = 1.0
    """Learning rate of the looks and their memory, as a multiple of lr."""
    lr_mult_avm: NonNegativeFloat = 1.0
    """Learning rate of the glimpses (letter Q), as a multiple of lr; their memory has that of
    lr_mult_clvr."""
    lr_mult_router: NonNegativeFloat = 1.0
    """Learning rate of the routers of experts, as a multiple of lr."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's decoupled decay; norms, biases, A_log and dt_bias never decay."""
    adam_beta1: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Bounds(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Term added to Adam's denominator."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""


@dataclass
class TrainingConfig:
    """Length, batches and memory of training."""

    objective: Annotated[str, Named(OBJECTIVES)] = "sft"
    """Objective that is trained. sft: supervised fine-tuning; grpo: reinforcement learning, with
    the settings of the section rl; dpo: preference pairs, with those of the section dpo."""
    train_iters: PositiveInt = 100
    """Optimizer steps of the whole run."""
    exit_duration_in_mins: PositiveFloat | None = None
    """Minutes after which the run ends early, and evaluates. They begin when the run is
    ready to train and count saves and evaluations; a resumed run counts anew."""
    micro_batch_size: Samples = 1
    """Samples, or preference pairs, of one forward pass of one replica; with packing, places of
    seq_length tokens, or of two times that."""
    global_batch_size: Samples = 1
    """Samples of an optimizer step over all replicas; with packing, places of seq_length tokens;
    in reinforcement learning, completions; of preference pairs always the pairs."""
    seed: NonNegativeInt = 1234
    """Seed of initialisation, of the order of samples and of sampling; the same seed gives the
    same model under every layout."""
    bf16: bool = False
    """Compute in bfloat16, with fp32 master weights and gradient sums."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """full: keep only the input of every recompute_num_layers sub-layers; selective: run
    recompute_modules again in the backward pass."""
    recompute_num_layers: PositiveInt = 2
    """Sub-layers (letters of the pattern) of a recomputed block, with full."""
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["core_attn"])
    """Parts that selective recompute runs again. core_attn: what mixes positions, without its
    projections; moe: a whole mixture of experts; vision: a whole layer of the ViT."""
    check_weight_hash_across_dp_replicas_interval: PositiveInt | None = 100
    """Steps between comparisons of all copies of parameters: of data-, tensor-, context- and
    expert-parallel ranks. A copy that differs ends the run. They are also compared at the first
    step and before each checkpoint; none: never."""
    loss_spike_factor: NonNegativeFloat = 0.0
    """How many times the median of the last 32 losses a loss may be before the update of its step
    is held back; 0: any. Not with objectives that generate."""
    freeze_vision: bool = False
    """Do not train the vision encoder."""
    freeze_projector: bool = False
    """Do not train the projector."""
    freeze_language: bool = False
    """Do not train the language model; its routed experts, routers, looks and glimpses have flags
    of their own."""
    freeze_experts: bool = False
    """Do not train the routed experts; shared experts are part of the language model."""
    freeze_clvr: bool = False
    """Do not train the looks and their memory."""
    freeze_avm: bool = False
    """Do not train the glimpses (letter Q)."""
    freeze_router: bool = False
    """Do not train the routers of experts."""


@dataclass
class LoraConfig:
    """Low-rank adapters on the linears of whole modules; off unless `lora_rank` is set.

    A target's own parameters are frozen, whatever its freeze flag says, and its adapters
    train. With the language model as a target its routed experts are frozen too; they have no
    adapters. Modules that are no target (the router and CLVR among them) follow their flags.
    """

    lora_rank: PositiveInt | None = None
    """Rank of the adapters; none: no adapters."""
    lora_alpha: PositiveFloat = 32.0
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_rank."""
    lora_targets: list[LoraTarget] = field(default_factory=lambda: ["language"])
    """Modules whose linears get adapters."""

    def adapts(self, module: str) -> bool:
        """Whether the linears of this module get adapters."""
        return self.lora_rank is not None and module in self.lora_targets

    def freezes(self, module: str) -> bool:
        """Whether this module's own parameters are frozen because adapters train in their place."""
        return self.adapts(module) or (module == "experts" and self.adapts("language"))


@dataclass
class CheckpointConfig:
    """Checkpoints that a run writes, and the one it starts from."""

    save: str | None = None
    """Folder of the run's checkpoints."""
    save_interval: PositiveInt | None = None
    """Steps between checkpoints; none: only at the end."""
    async_save: bool = False
    """Go on training while a checkpoint is written."""
    keep_last_checkpoints: PositiveInt | None = None
    """Checkpoints kept; older ones are deleted once a newer is complete. none: all."""
    load: str | None = None
    """Checkpoint, or folder of checkpoints, to start from."""
    load_hf: str | None = None
    """Hugging Face folder to take the weights from, in place of `load`."""
    finetune: bool = False
    """Load weights only: no optimizer state, generators or data position."""
    resume: bool = False
    """Go on from the newest checkpoint in `save`, where there is one, whatever load says: for jobs
    that a scheduler starts again by the same command."""


@dataclass
class LoggingConfig:
    """Outputs of a run: metrics, console, report."""

    output_dir: str = "runs/default"
    """Folder of metrics, results and the report."""
    log_interval: PositiveInt = 1
    """Steps between lines on the console."""
    tensorboard: bool = True
    """Write TensorBoard's files into output_dir."""
    wandb_mode: Literal["disabled", "offline", "online"] = "offline"
    """Mode of Weights & Biases."""
    wandb_project: str = "megatron_mm"
    """Project of Weights & Biases."""


@dataclass
class EvaluationConfig:
    """Questions of valid_data, answered and scored by skill; and the loss of their own answers."""

    eval_interval: PositiveInt | None = None
    """Steps between evaluations; none: only at the end."""
    eval_samples: PositiveInt | None = None
    """Rows of valid_data in an evaluation, the first of the file; none: all."""
    eval_batch_size: Samples = 32
    """Rows that are answered together."""
    max_new_tokens: PositiveInt = 64
    """Most tokens of an answer."""
    report: bool = False
    """Write report.html at the end."""


_OF_OBJECTIVES = Sections(OBJECTIVES, flat=True)


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
    objectives: Annotated[dict[str, Any], _OF_OBJECTIVES] = field(
        default_factory=_OF_OBJECTIVES.defaults
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def trains(self, module: str) -> bool:
        """Whether the own parameters of one of `MODULES` learn; adapters are not among them."""
        return not (getattr(self.training, f"freeze_{module}") or self.lora.freezes(module))

    def section[T](self, settings: type[T]) -> T:
        """The settings of this type that an objective has: `run.section(RLConfig)`.

        Raises:
            ConfigError: if no known objective has them.
        """
        for found in self.objectives.values():
            if isinstance(found, settings):
                return found
        raise ConfigError(f"the run has no settings {settings.__name__}; set training.objective")
