"""Rejects a run whose sizes do not divide or make no sense, before anything is built.

Types are right already (`load.py`). Each rule is one line; each message names the key, its
value and what would be allowed, with both numbers where one does not divide the other.
"""

from __future__ import annotations

from megatron_mm.config.families import language_family, vision_family
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.memories import check_memories, memories
from megatron_mm.config.objectives import check_objective, declaration
from megatron_mm.config.pattern import effective_pattern, model_stages, modules_of, parse_pattern
from megatron_mm.config.precision import check_backend
from megatron_mm.config.rules import divides, expert_tensor_parallel_size, head_ranks, require
from megatron_mm.config.settings import (
    DataPhase,
    LoraConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_mm.config.settings_model import ModelConfig
from megatron_mm.config.tree import leaves, optional, value_at
from megatron_mm.errors import ConfigError


def validate(run: RunConfig, world_size: int | None = None) -> None:
    """Raises ConfigError for the first setting that cannot work.

    `world_size` is the number of ranks; without it the rules about ranks and the global
    batch are not checked.
    """
    _check_bounds(run)
    _check_language(run.model, run.parallel)
    _check_layers(run)
    _check_vision(run.model, run.parallel)
    check_memories(run)
    _check_pattern(run)
    _check_pipeline(run.parallel)
    _check_dispatcher(run)
    _check_vision_parallel(run)
    _check_data(run)
    _check_training(run)
    _check_lora(run)
    check_backend(run)
    check_objective(run)
    if world_size is not None:
        _check_world(run, world_size)


def data_parallel_size(run: RunConfig, world_size: int) -> int:
    """Returns the number of model replicas on `world_size` ranks.

    Raises:
        ConfigError: if none fits.
    """
    tp = run.parallel.tensor_model_parallel_size
    cp = run.parallel.context_parallel_size
    pp = run.parallel.pipeline_model_parallel_size
    sizes = "tensor_model_parallel_size * context_parallel_size * pipeline_model_parallel_size"
    divides("world_size", world_size, f"{sizes} ({tp} * {cp} * {pp} =)", tp * cp * pp)
    return world_size // (tp * cp * pp)


def _check_bounds(run: RunConfig) -> None:
    for leaf in leaves(RunConfig):
        value = value_at(run, leaf.path)
        inner, _ = optional(leaf.hint)
        if leaf.bounds is not None and value is not None and inner in (int, float):
            require(value in leaf.bounds, ".".join(leaf.path), value, str(leaf.bounds))


def _check_language(model: ModelConfig, parallel: ParallelConfig) -> None:
    lm, tp = model.language, parallel.tensor_model_parallel_size
    by_tp = ("tensor_model_parallel_size", tp)
    divides("hidden_size", lm.hidden_size, *by_tp)
    divides("num_attention_heads", lm.num_attention_heads, *head_ranks(parallel))
    require(
        lm.untie_embeddings_and_output_weights,
        "untie_embeddings_and_output_weights",
        lm.untie_embeddings_and_output_weights,
        "true; tied embeddings cannot be trained yet",
    )
    language_family(model).check(lm, parallel)


def _check_layers(run: RunConfig) -> None:
    parse_pattern(run.model.hybrid_layer_pattern)
    for kind in LAYERS.used(run.model.hybrid_layer_pattern):
        kind.check(run)


def _check_vision(model: ModelConfig, parallel: ParallelConfig) -> None:
    fusion = model.fusion
    if model.vision is None:
        require(
            fusion.vision_memory == "none",
            "vision_memory",
            fusion.vision_memory,
            "none, because model.vision is none",
        )
        return
    vision_family(model).check(model.vision, fusion, parallel)


def _check_pattern(run: RunConfig) -> None:
    model = run.model
    layers = parse_pattern(model.hybrid_layer_pattern)
    readers = [layer.kind for layer in layers if LAYERS[layer.kind].reads_memory]
    if model.vision is None and readers:
        sides = " and ".join(LAYERS.of_role("side"))
        raise ConfigError(
            f"hybrid_layer_pattern {model.hybrid_layer_pattern!r} has {len(readers)} {readers[0]} "
            f"but model.vision is none; allowed: a pattern without {sides}"
        )
    left = [k.letter for k in LAYERS.used(effective_pattern(model)) if k.reads_memory]
    allowed = f"another one with {', '.join(left)} in the pattern"
    seen = memories(model) or not left
    require(bool(seen), "vision_memory", model.fusion.vision_memory, allowed)
    model_stages(run)  # raises when the layout does not fit


def _check_pipeline(parallel: ParallelConfig) -> None:
    virtual = parallel.virtual_pipeline_model_parallel_size
    interleaved = (virtual or 1) > 1
    if interleaved:
        size = parallel.pipeline_model_parallel_size
        allowed = "2 or more with virtual_pipeline_model_parallel_size"
        require(size > 1, "pipeline_model_parallel_size", size, allowed)
    overlap = parallel.overlap_p2p_comm
    require(
        overlap is None or overlap == interleaved,
        "overlap_p2p_comm",
        overlap,
        f"none or {str(interleaved).lower()} with virtual_pipeline_model_parallel_size {virtual}; "
        f"the interleaved schedule computes wrong gradients without it, the plain one lacks it",
    )


def _check_dispatcher(run: RunConfig) -> None:
    parallel = run.parallel
    if parallel.moe_token_dispatcher_type == "flex":
        ranks = parallel.expert_model_parallel_size * expert_tensor_parallel_size(parallel)
        allowed = "alltoall, or flex with expert_model_parallel_size 2 or more"
        require(ranks > 1, "moe_token_dispatcher_type", "flex", allowed)
        dtype = run.model.language.moe_router_dtype
        require(dtype == "fp32", "moe_router_dtype", dtype, "fp32 with dispatcher type flex")


def _check_vision_parallel(run: RunConfig) -> None:
    parallel = run.parallel
    size, tp = parallel.vision_tensor_parallel_size, parallel.tensor_model_parallel_size
    beside = parallel.vision_parallel == "replica"
    allowed = f"none, or 1 or tensor_model_parallel_size {tp} with vision_parallel replica"
    fine = size is None or (beside and size in (1, tp))
    require(fine, "vision_tensor_parallel_size", size, allowed)
    allowed = "stage, because model.vision is none"
    fine = not beside or run.model.vision is not None
    require(fine, "vision_parallel", parallel.vision_parallel, allowed)


def _check_data(run: RunConfig) -> None:
    data, fusion, phases = run.data, run.model.fusion, run.data.train_data
    longest = run.model.language.max_position_embeddings
    allowed = f"1 to max_position_embeddings {longest}"
    require(data.seq_length <= longest, "seq_length", data.seq_length, allowed)
    allowed = f"1 to seq_length {data.seq_length}, or none"
    fine = data.max_image_tokens is None or data.max_image_tokens <= data.seq_length
    stream_holds_all = run.model.vision is not None and fusion.image_stream == "all"
    fine = fine or not stream_holds_all  # tiles beside the stream may well be more
    require(fine, "max_image_tokens", data.max_image_tokens, allowed)
    allowed = "none, or this value with packing or reinforcement learning"
    # Where nothing is trained it bounds the prompts that are read together.
    bounds = data.packing or declaration(run).generates or not data.train_data
    fine = data.max_pack_tiles is None or bounds
    require(fine, "max_pack_tiles", data.max_pack_tiles, allowed)
    for index, phase in enumerate(phases):
        key = f"train_data[{index}]"
        _check_sources(phase, key)
        last = index == len(phases) - 1
        allowed = f"above 0, or none {'(last phase)' if last else 'in the last phase only'}"
        fine = last if phase.samples is None else phase.samples > 0
        require(fine, f"{key}.samples", phase.samples, allowed)
    for key in ("image_mean", "image_std"):
        value = getattr(data, key)
        require(len(value) == 3, key, value, "3 numbers (red, green, blue)")
    require(min(data.image_std) > 0, "image_std", data.image_std, "3 numbers above 0")
    if run.model.vision is not None and fusion.image_stream == "thumbnail":
        allowed = "true, because image_stream is thumbnail"
        require(data.use_thumbnail, "use_thumbnail", data.use_thumbnail, allowed)


def is_path(text: str) -> bool:
    """Whether a text can be a path: it is not blank, and holds no NUL, which ends a path in C."""
    return bool(text.strip()) and "\0" not in text


def _check_sources(phase: DataPhase, key: str) -> None:
    if not phase.mixture:
        require(bool(phase.path), f"{key}.path", phase.path, "a .jsonl or .parquet file")
        return
    require(not phase.path, f"{key}.path", phase.path, "none beside a mixture")
    for index, source in enumerate(phase.mixture):
        at = f"{key}.mixture[{index}]"
        require(bool(source.path), f"{at}.path", source.path, "a .jsonl or .parquet file")
        fine = 0 <= source.weight < float("inf")  # NaN is neither
        require(fine, f"{at}.weight", source.weight, "0 or more")
    weights = [source.weight for source in phase.mixture]
    require(sum(weights) > 0, f"{key}.mixture weights", weights, "at least 1 above 0")


def _check_training(run: RunConfig) -> None:
    opt, train, par = run.optimizer, run.training, run.parallel
    built = modules_of(run.model)
    if not any(run.lora.adapts(module) or run.trains(module) for module in built):
        raise ConfigError(
            f"every module is frozen ({', '.join(built)}); allowed: at least 1 of their "
            f"{len(built)} freeze flags false"
        )
    for key, of in (("recompute_num_layers", "full"), ("recompute_modules", "selective")):
        value, usual = getattr(train, key), getattr(TrainingConfig(), key)
        fits = value == usual or train.recompute_granularity == of
        require(fits, key, value, f"{usual}, or this value with recompute_granularity {of}")
    factor, sure = train.loss_spike_factor, not declaration(run).generates
    allowed = f"0, or more than 1{'' if sure else f'; 0 with objective {train.objective}'}"
    require(not factor or (factor > 1 and sure), "loss_spike_factor", factor, allowed)
    phases = [phase.samples for phase in run.data.train_data]
    # Packed samples are known to suffice only once their lengths are known.
    known = not run.data.packing or declaration(run).rows_when_packed
    if phases and phases[-1] is not None and known:
        needed = declaration(run).rows(run)
        held = sum(samples for samples in phases if samples is not None)
        if held < needed:
            raise ConfigError(
                f"train_data holds {held} samples in its {len(phases)} phases, but the run's "
                f"{train.train_iters} steps need {needed}; allowed: leave `samples` out of the "
                "last phase"
            )
    require(opt.min_lr <= opt.lr, "min_lr", opt.min_lr, f"0 to lr {opt.lr}")
    falls = opt.lr_decay_style != "constant"
    allowed = "0, or this value with lr_decay_style linear or cosine"
    require(falls or not opt.min_lr, "min_lr", opt.min_lr, allowed)
    iters = train.train_iters
    allowed = f"0 to train_iters {iters}"
    require(opt.lr_warmup_iters <= iters, "lr_warmup_iters", opt.lr_warmup_iters, allowed)
    # megatron-core gathers parameters from the distributed optimizer's shards only.
    needs = par.use_distributed_optimizer and par.overlap_grad_reduce
    allowed = "false, or true with use_distributed_optimizer and overlap_grad_reduce"
    value = par.overlap_param_gather
    require(needs or not value, "overlap_param_gather", value, allowed)
    for key, other, given, present in (
        ("save_interval", "save", run.checkpoint.save_interval, run.checkpoint.save),
        ("async_save", "save", run.checkpoint.async_save, run.checkpoint.save),
        ("resume", "save", run.checkpoint.resume, run.checkpoint.save),
        (
            "keep_last_checkpoints",
            "save",
            run.checkpoint.keep_last_checkpoints,
            run.checkpoint.save,
        ),
        ("finetune", "load", run.checkpoint.finetune, run.checkpoint.load),
        ("eval_interval", "valid_data", run.evaluation.eval_interval, run.data.valid_data),
    ):
        off = "false" if given is True else "none"
        require(not given or bool(present), key, given, f"{off}, or this value with {other}")
    for key in ("save", "load", "load_hf"):
        path = getattr(run.checkpoint, key)
        require(path is None or is_path(path), key, path, "none, or the path of a folder")
    path = run.logging.output_dir
    require(is_path(path), "output_dir", path, "the path of a folder")
    path = run.data.valid_data
    require(path is None or is_path(path), "valid_data", path, "none, or the path of a file")
    both = run.checkpoint.load_hf and run.checkpoint.load
    require(not both, "load_hf", run.checkpoint.load_hf, "none, or this value without load")


def _check_lora(run: RunConfig) -> None:
    lora, targets = run.lora, run.lora.lora_targets
    if lora.lora_rank is None:
        default = LoraConfig()
        for key in ("lora_alpha", "lora_targets"):
            value, off = getattr(lora, key), getattr(default, key)
            require(value == off, key, value, f"{off!r}, or this value with lora_rank")
        return
    allowed = "at least one of language, vision, projector, each once"
    require(bool(targets) and len({*targets}) == len(targets), "lora_targets", targets, allowed)
    if run.model.vision is None:
        allowed = "['language'], because model.vision is none"
        require(targets == ["language"], "lora_targets", targets, allowed)


def _check_world(run: RunConfig, world_size: int) -> None:
    par, train = run.parallel, run.training
    dp = data_parallel_size(run, world_size)
    pp, ep, expert_tp = (
        par.pipeline_model_parallel_size,
        par.expert_model_parallel_size,
        expert_tensor_parallel_size(par),
    )
    sizes = (
        "expert_tensor_parallel_size * expert_model_parallel_size * pipeline_model_parallel_size"
    )
    by_key = f"{sizes} ({expert_tp} * {ep} * {pp} =)"
    divides("world_size", world_size, by_key, expert_tp * ep * pp)
    micro = train.micro_batch_size
    by_key = f"micro_batch_size * data_parallel_size ({micro} * {dp} =)"
    divides("global_batch_size", train.global_batch_size, by_key, micro * dp)
    check_replicas = declaration(run).check_replicas
    if check_replicas is not None:
        check_replicas(run, dp)
    if (par.virtual_pipeline_model_parallel_size or 1) > 1:
        microbatches = train.global_batch_size // (micro * dp)
        key = f"the number of microbatches (global_batch_size / ({micro} * {dp}) =)"
        divides(key, microbatches, "pipeline_model_parallel_size", pp)
