"""Megatron's flags that are no settings here: those that always hold, and why others are rejected.

The names are those of Megatron-LM's megatron/training/arguments.py and of its examples. A flag that
sets something here too is a setting (`settings.py`) and in neither table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.errors import ConfigError


@dataclass(frozen=True)
class Always:
    """A flag whose meaning holds in every run.

    Attributes:
        why: what holds.
        values: the values that mean it; empty for a flag without a value.
    """

    why: str
    values: tuple[str, ...] = ()

    def allows(self, value: str) -> bool:
        """Whether a value means what holds; 0.0 is 0."""
        return ANY in self.values or any(_same(value, known) for known in self.values)


ANY = "any"  # in `values`: every value

_ONE_FORMAT = "every checkpoint is megatron-core's distributed format and re-shards onto any layout"

ALWAYS: dict[str, Always] = {
    # Parallel layout
    "--sequence-parallel": Always("tensor parallelism splits the sequence too"),
    "--cp-comm-type": Always("context parallelism trades the sequence for heads", ("a2a",)),
    "--distributed-backend": Always("NCCL on GPUs, gloo where there are none", ("nccl",)),
    "--make-vocab-size-divisible-by": Always(
        "the vocabulary is padded to what tensor parallelism needs; no loss, sample, checkpoint or "
        "export sees the padding",
        (ANY,),
    ),
    # Model
    "--use-mcore-models": Always("the model stands on megatron-core's parallel layers"),
    "--swiglu": Always("experts are SwiGLU"),
    "--disable-bias-linear": Always("the language stack's linears have no bias"),
    "--normalization": Always("the language stack's norm", ("RMSNorm",)),
    "--apply-layernorm-1p": Always("the weights of RMSNorm are stored as their distance from 1"),
    "--qk-layernorm": Always("attention normalises queries and keys"),
    "--attention-output-gate": Always("attention has an output gate"),
    "--group-query-attention": Always("num_query_groups says how many groups there are"),
    "--position-embedding-type": Always("attention uses rotary embeddings", ("rope",)),
    "--use-rotary-position-embeddings": Always("attention uses rotary embeddings"),
    "--no-position-embedding": Always("there is no learned one"),
    "--hidden-dropout": Always("there is no dropout", ("0",)),
    "--attention-dropout": Always("there is no dropout", ("0",)),
    "--moe-shared-expert-gate": Always("the shared expert has a gate"),
    "--moe-grouped-gemm": Always("a rank's experts are one layer of stacked weights"),
    "--moe-router-load-balancing-type": Always(
        "the only one; moe_aux_loss_coeff 0 switches it off", ("aux_loss",)
    ),
    "--moe-router-score-function": Always("weights of experts are a softmax", ("softmax",)),
    # Kernels
    "--use-flash-attn": Always("attention is torch's fused kernel, or Transformer Engine's"),
    "--attention-backend": Always(
        "attention is torch's fused kernel, or Transformer Engine's", ("auto", "flash")
    ),
    "--attention-softmax-in-fp32": Always("the fused kernel of attention sums in fp32"),
    "--no-masked-softmax-fusion": Always("attention has no softmax of its own to fuse"),
    "--no-rope-fusion": Always("the rotation is not fused"),
    "--no-bias-swiglu-fusion": Always("there is no bias to fuse"),
    "--no-bias-gelu-fusion": Always("there is no bias to fuse"),
    "--no-bias-dropout-fusion": Always("there is no dropout to fuse"),
    "--no-persist-layer-norm": Always("norms are torch's kernels, or Transformer Engine's"),
    "--no-gradient-accumulation-fusion": Always("gradients are added after their product"),
    # Training
    "--optimizer": Always("AdamW, with decoupled decay", ("adam",)),
    "--calculate-per-token-loss": Always("the loss is a mean over all tokens of a step"),
    "--accumulate-allreduce-grads-in-fp32": Always("gradients are summed in fp32"),
    "--lr-warmup-init": Always("the warm-up begins there", ("0",)),
    "--weight-decay-incr-style": Always("weight decay does not change", ("constant",)),
    "--override-opt_param-scheduler": Always("the schedule is this run's, not the checkpoint's"),
    "--override-opt-param-scheduler": Always("the schedule is this run's, not the checkpoint's"),
    "--use-cpu-initialization": Always("weights are drawn on the CPU, alike on every layout"),
    "--no-async-tensor-model-parallel-allreduce": Always(
        "sequence parallelism gathers and scatters in its place"
    ),
    "--check-for-nan-in-loss-and-grad": Always("a number that is not finite ends the run"),
    "--is-hybrid-model": Always("the layer pattern names every layer"),
    "--experimental-attention-variant": Always(
        "the layer pattern's G is gated DeltaNet", ("gated_delta_net",)
    ),
    "--empty-unused-memory-level": Always("the allocator keeps its memory", ("0",)),
    "--exit-signal-handler": Always("SIGTERM saves and ends the run"),
    "--reset-position-ids": Always("positions begin anew in every packed sample"),
    "--reset-attention-mask": Always("a packed sample sees only itself"),
    "--no-create-attention-mask-in-dataloader": Always("no mask is a matrix"),
    "--use-tiling": Always("images are tiled, up to max_num_tiles"),
    "--dataloader-type": Always("rows are read in shuffled epochs", ("cyclic",)),
    # Checkpoints
    "--use-dist-ckpt": Always(_ONE_FORMAT),
    "--ckpt-format": Always(_ONE_FORMAT, ("torch_dist",)),
    "--dist-ckpt-format": Always(_ONE_FORMAT, ("torch_dist",)),
    "--auto-detect-ckpt-format": Always(_ONE_FORMAT),
    "--dist-ckpt-optim-fully-reshardable": Always(_ONE_FORMAT),
    "--ckpt-fully-parallel-save": Always("replicas share the writing"),
    "--ckpt-assume-constant-structure": Always("a run's checkpoints hold the same tensors"),
    "--dist-ckpt-strictness": Always("missing and unexpected tensors are errors", ("raise_all",)),
    "--exit-on-missing-checkpoint": Always("a checkpoint that load does not find is an error"),
}

_BY_PATTERN = "the layer pattern says it: use --hybrid-layer-pattern"
_BY_FILES = "data are JSONL or parquet rows: use --train-data and --valid-data"
_BY_FOLDER = "the tokenizer is a folder or a .model file: use --tokenizer-model alone"
_BY_STEPS = "steps are counted, not samples: use --train-iters and --lr-warmup-iters"
_BY_ITERS = "the rate decays until the end of the run: use --train-iters and --min-lr"
_BY_FINETUNE = "optimizer, generators and data position load together: use --finetune to load none"
_BY_VIRTUAL = "use --virtual-pipeline-model-parallel-size, the stages of each pipeline rank"
_BY_LAYOUT = "use --pipeline-model-parallel-layout; without it stages have equal cost"
_BY_OUTPUT = "all output of a run goes to one folder: use --output-dir"
_BY_CONFIG = "settings come from --config and flags, and the model must be the checkpoint's"
_SAVED_WHOLE = "a checkpoint always holds what a run needs to go on; export for the weights alone"
_NO_CAPACITY = "no token is dropped: leave it out"
_NOT_FUSED = "this fusion is not used: leave it out"
_NOT_MEASURED = "it is not measured: leave it out"
_NOT_ROUTED_SO = "Qwen3-Next's router has no such term: leave it out"
_NOT_WIRED = "it is not wired in: leave it out"
_FP16 = "there is no fp16: use --bf16"
_NOT_THIS_MODEL = "the models of this program have none"

REFUSED: dict[str, str] = {
    # Model
    "--num-layers": _BY_PATTERN,
    "--encoder-num-layers": _BY_PATTERN,
    "--decoder-num-layers": _BY_PATTERN,
    "--hybrid-override-pattern": _BY_PATTERN,
    "--moe-layer-freq": _BY_PATTERN,
    "--linear-attention-freq": _BY_PATTERN,
    "--spec": _BY_PATTERN,
    "--ffn-hidden-size": "every MLP is a mixture of experts: use --moe-ffn-hidden-size",
    "--norm-epsilon": "use --layernorm-epsilon",
    "--padded-vocab-size": "padding follows from the layout: use --vocab-size",
    "--squared-relu": "experts are SwiGLU",
    "--quick-geglu": "experts are SwiGLU",
    "--openai-gelu": "experts are SwiGLU",
    "--add-qkv-bias": "the language stack's linears have no bias; for the ViT use "
    "--vision-add-qkv-bias",
    "--use-rope-scaling": f"{_NOT_THIS_MODEL}: use --rotary-base",
    "--rotary-seq-len-interpolation-factor": f"{_NOT_THIS_MODEL}: use --rotary-base",
    "--rotary-interleaved": "halves of a head are turned, not pairs",
    "--multi-latent-attention": _NOT_THIS_MODEL,
    "--window-size": _NOT_THIS_MODEL,
    "--apply-query-key-layer-scaling": "attention normalises queries and keys instead",
    "--mtp-num-layers": "layers of multi-token prediction are carried to the export, not trained",
    "--init-method-xavier-uniform": "weights are drawn from a normal: use --init-method-std",
    "--img-h": "tiles are square: use --image-size",
    "--img-w": "tiles are square: use --image-size",
    "--patch-dim": "use --patch-size",
    "--pixel-shuffle": "use --pixel-shuffle-factor",
    "--disable-vision-class-token": "InternViT has one, which never leaves the ViT",
    "--language-model-type": "use --preset, or a file",
    "--vision-model-type": "use --preset, or a file",
    "--freeze-LM": "use --freeze-language, --freeze-experts and --freeze-router",
    "--freeze-ViT": "use --freeze-vision",
    "--freeze-vision-projection": "use --freeze-projector",
    "--use-legacy-models": "the model stands on megatron-core's parallel layers",
    # Experts
    "--moe-router-pre-softmax": "weights of the chosen experts sum to 1, unlike Megatron's",
    "--moe-router-topk-scaling-factor": _NOT_ROUTED_SO,
    "--moe-router-enable-expert-bias": _NOT_ROUTED_SO,
    "--moe-router-num-groups": _NOT_ROUTED_SO,
    "--moe-router-group-topk": _NOT_ROUTED_SO,
    "--moe-z-loss-coeff": _NOT_ROUTED_SO,
    "--moe-expert-capacity-factor": _NO_CAPACITY,
    "--moe-pad-expert-input-to-capacity": _NO_CAPACITY,
    "--moe-token-drop-policy": _NO_CAPACITY,
    "--moe-layer-recompute": "use --recompute-granularity selective with --recompute-modules moe",
    "--moe-enable-deepep": "use --moe-token-dispatcher-type flex",
    "--moe-enable-routing-replay": "use --routing-replay",
    "--moe-router-force-load-balancing": "tools/benchmark.py spreads routes evenly: leave it out",
    "--moe-permute-fusion": "it is on where Transformer Engine has its kernels: leave it out",
    "--moe-router-fusion": _NOT_FUSED,
    # Layout
    "--num-layers-per-virtual-pipeline-stage": _BY_VIRTUAL,
    "--num-virtual-stages-per-pipeline-rank": _BY_VIRTUAL,
    "--decoder-first-pipeline-num-layers": _BY_LAYOUT,
    "--decoder-last-pipeline-num-layers": _BY_LAYOUT,
    "--account-for-embedding-in-pipeline-split": _BY_LAYOUT,
    "--account-for-loss-in-pipeline-split": _BY_LAYOUT,
    "--no-overlap-p2p-communication": "the schedule says it: use --overlap-p2p-comm none",
    "--use-tp-pp-dp-mapping": "ranks are ordered tensor, context, data, pipeline",
    "--tp-comm-overlap": _NOT_WIRED,
    "--overlap-moe-expert-parallel-comm": _NOT_WIRED,
    "--delay-wgrad-compute": _NOT_WIRED,
    "--defer-embedding-wgrad-compute": _NOT_WIRED,
    "--overlap-param-gather-with-optimizer-step": _NOT_WIRED,
    "--hierarchical-context-parallel-sizes": _NOT_WIRED,
    "--nccl-communicator-config-path": "set NCCL's variables",
    "--high-priority-stream-groups": _NOT_WIRED,
    "--disable-gloo-process-groups": "ranks take their decisions over gloo: leave it out",
    "--use-torch-fsdp2": "parameters are not sharded: use --use-distributed-optimizer",
    "--use-megatron-fsdp": "parameters are not sharded: use --use-distributed-optimizer",
    "--num-distributed-optimizer-instances": "there is one: leave it out",
    # Kernels
    "--cross-entropy-loss-fusion": _NOT_FUSED,
    "--cross-entropy-fusion-impl": _NOT_FUSED,
    "--enable-cuda-graph": "only decoding steps are captured: use --decoding-cuda-graph",
    "--cuda-graph-impl": "only decoding steps are captured: use --decoding-cuda-graph",
    "--fp8-param-gather": "parameters are gathered in bf16: use --fp8-format",
    "--use-te": "use --transformer-impl transformer_engine",
    # Training
    "--fp16": _FP16,
    "--loss-scale": _FP16,
    "--initial-loss-scale": _FP16,
    "--grad-reduce-in-bf16": "gradients are summed in fp32: leave it out",
    "--ddp-average-in-collective": "gradients are sums over tokens, divided once: leave it out",
    "--use-precision-aware-optimizer": "the optimizer's state is fp32: leave it out",
    "--recompute-activations": "use --recompute-granularity selective",
    "--recompute-method": "blocks are consecutive: use --recompute-num-layers",
    "--train-samples": _BY_STEPS,
    "--lr-warmup-samples": _BY_STEPS,
    "--lr-warmup-fraction": "use --lr-warmup-iters",
    "--lr-decay-iters": _BY_ITERS,
    "--lr-decay-samples": _BY_ITERS,
    "--lr-wsd-decay-style": "use --lr-decay-style constant, linear or cosine",
    "--decoupled-lr": "use --lr-mult-vision and its siblings",
    "--start-weight-decay": "weight decay does not change: use --weight-decay",
    "--end-weight-decay": "weight decay does not change: use --weight-decay",
    "--rampup-batch-size": "the batch does not grow: use --global-batch-size",
    "--no-check-for-nan-in-loss-and-grad": "a number that is not finite ends the run",
    "--rerun-mode": "a number that is not finite ends the run: leave it out",
    "--check-for-spiky-loss": "use --loss-spike-factor",
    "--check-for-large-grads": "a number that is not finite ends the run: use --loss-spike-factor",
    "--skip-train": "a run that has ended only evaluates: use --resume --save",
    "--optimizer-cpu-offload": "the optimizer's state stays on the device: leave it out",
    "--moe-input-jitter-eps": _NOT_ROUTED_SO,
    "--moe-router-bias-update-rate": _NOT_ROUTED_SO,
    "--distribute-saved-activations": "tensor parallelism splits the sequence: leave it out",
    "--profile": "wrap the launch in a profiler: leave it out",
    "--log-progress": "every step is in metrics.jsonl: leave it out",
    "--exit-interval": "use --train-iters or --exit-duration-in-mins",
    "--apply-wd-to-qk-layernorm": "norms never decay: leave it out",
    "--data-parallel-random-init": "replicas begin alike: leave it out",
    "--te-rng-tracker": "no layer draws random numbers: leave it out",
    "--inference-rng-tracker": "no layer draws random numbers: leave it out",
    "--manual-gc": "Python's collector runs by itself: leave it out",
    "--manual-gc-interval": "Python's collector runs by itself: leave it out",
    "--sft": "use --objective sft",
    "--perform-rl-step": "use --objective grpo",
    "--grpo-group-size": "use --num-generations",
    "--grpo-kl-beta": "use --beta",
    "--grpo-clamp-eps-lower": "use --epsilon",
    "--grpo-clamp-eps-upper": "use --epsilon-high",
    "--grpo-iterations": "use --num-iterations",
    # Data
    "--data-path": _BY_FILES,
    "--train-data-path": _BY_FILES,
    "--valid-data-path": _BY_FILES,
    "--test-data-path": _BY_FILES,
    "--split": "files are not split: use --valid-data",
    "--data-cache-path": "nothing is cached: leave it out",
    "--mock-data": _BY_FILES,
    "--dataset-config": _BY_FILES,
    "--no-mmap-bin-files": _BY_FILES,
    "--eval-iters": "evaluation counts rows: use --eval-samples",
    "--eod-mask-loss": "the loss is over the assistant's turns: leave it out",
    "--tokenizer-type": _BY_FOLDER,
    "--vocab-file": _BY_FOLDER,
    "--merge-file": _BY_FOLDER,
    "--tokenizer-prompt-format": "the chat template is built in: leave it out",
    "--decoder-seq-length": "use --seq-length",
    "--encoder-seq-length": "use --seq-length",
    # Checkpoints and logs
    "--no-load-optim": _BY_FINETUNE,
    "--no-load-rng": _BY_FINETUNE,
    "--no-save-optim": _SAVED_WHOLE,
    "--no-save-rng": _SAVED_WHOLE,
    "--use-checkpoint-args": _BY_CONFIG,
    "--use-checkpoint-opt_param-scheduler": "the schedule is this run's: set it here",
    "--use-checkpoint-opt-param-scheduler": "the schedule is this run's: set it here",
    "--pretrained-checkpoint": "use --load with --finetune",
    "--ckpt-step": "name the folder of the step: use --load",
    "--ckpt-convert-format": f"{_ONE_FORMAT}: leave it out",
    "--non-persistent-save-interval": "every checkpoint is kept alike: use --save-interval",
    "--save-retain-interval": "use --keep-last-checkpoints",
    "--ckpt-fully-parallel-load": "each rank reads what it holds: leave it out",
    "--use-persistent-ckpt-worker": "a thread writes: use --async-save",
    "--tensorboard-dir": _BY_OUTPUT,
    "--tensorboard-log-interval": "use --log-interval",
    "--tensorboard-queue-size": "it has torch's size: leave it out",
    "--wandb-save-dir": _BY_OUTPUT,
    "--wandb-exp-name": "set the variable WANDB_NAME",
    "--log-params-norm": _NOT_MEASURED,
    "--log-num-zeros-in-grad": _NOT_MEASURED,
    "--log-memory-to-tensorboard": _NOT_MEASURED,
    "--log-loss-scale-to-tensorboard": _FP16,
    "--log-batch-size-to-tensorboard": _NOT_MEASURED,
    "--log-world-size-to-tensorboard": _NOT_MEASURED,
    "--log-straggler": "ranks that are slow are named by themselves: leave it out",
    "--no-barrier-with-level-1-timing": _NOT_MEASURED,
    "--log-timers-to-tensorboard": _NOT_MEASURED,
    "--log-validation-ppl-to-tensorboard": _NOT_MEASURED,
    "--timing-log-level": _NOT_MEASURED,
    "--log-throughput": "tokens and seconds of every step are in metrics.jsonl: leave it out",
    "--wandb-entity": "set the variable WANDB_ENTITY",
}


def take(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes the flags of `ALWAYS` out of what no setting has read.

    Returns:
        The words that are left, and a line for each flag that was taken.

    Raises:
        ConfigError: for a flag of `REFUSED`, and for a value that means something else.
    """
    left: list[str] = []
    lines: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag in REFUSED:
            raise ConfigError(f"{flag} is Megatron's, but no setting here: {REFUSED[flag]}")
        always = ALWAYS.get(flag)
        if always is None:
            left.append(word)
            continue
        if equals and not always.values:
            raise ConfigError(f"{flag} is {value!r}; allowed: the flag without a value")
        if always.values:
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
            if not value or not always.allows(value):
                allowed = " or ".join(always.values)
                raise ConfigError(
                    f"{flag} is {value or 'none'!r}; allowed: {allowed}: {always.why}"
                )
        said = f"{flag} {value}".strip()
        lines.append(f"{said}: always so here: {always.why}")
    return left, lines


def _same(value: str, known: str) -> bool:
    try:
        return float(value) == float(known)
    except ValueError:
        return value == known
