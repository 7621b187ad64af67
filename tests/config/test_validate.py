"""Sizes that do not divide or make no sense, each with its exact one-line message."""

import pytest

from megatron_mm.config import MODULES, ConfigError, data_parallel_size, load, validate


def run_with(flags: str = "", preset: str = "tiny"):
    return load(None, ["--preset", preset, *flags.split()])


def test_the_demo_model_fits_its_layouts():
    validate(run_with())
    validate(run_with("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"), 4)
    validate(run_with("--expert-model-parallel-size 2 --global-batch-size 8"), 2)


def test_data_parallel_size():
    run = run_with("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4")
    assert data_parallel_size(run, 8) == 1
    assert data_parallel_size(run, 24) == 3
    for world_size in (4, 12, 0):
        with pytest.raises(ConfigError, match=rf"world_size {world_size} .*\(2 \* 1 \* 4 =\) 8"):
            data_parallel_size(run, world_size)


TP = "tensor_model_parallel_size"
CASES = [
    # flags, what the message must contain
    (
        "--hidden-size 97 --tensor-model-parallel-size 2",
        f"hidden_size 97 does not divide by {TP} 2; allowed: a multiple of 2, such as 98",
    ),
    (
        "--num-attention-heads 6 --tensor-model-parallel-size 4",
        f"num_attention_heads 6 does not divide by {TP} 4; allowed: a multiple of 4, such as 8",
    ),
    ("--num-attention-heads 5", "num_attention_heads 5 does not divide by num_query_groups 2"),
    (
        "--num-attention-heads 12 --linear-num-key-heads 6 --linear-num-value-heads 6 "
        "--kv-channels 24 --tensor-model-parallel-size 3",
        "num_query_groups is 2; allowed: one whose 6 heads a group divide, or are divided by, the "
        "4 heads of a rank",
    ),
    (
        "--linear-num-key-heads 4 --tensor-model-parallel-size 2 --context-parallel-size 4",
        "num_attention_heads 4 does not divide by tensor_model_parallel_size * "
        "context_parallel_size (2 * 4 =) 8",
    ),
    (
        "--context-parallel-size 4",
        "linear_num_key_heads 2 does not divide by tensor_model_parallel_size * "
        "context_parallel_size (1 * 4 =) 4",
    ),
    ("--kv-channels 25", "kv_channels 25 does not divide by heads of a query group 2"),
    (
        "--virtual-pipeline-model-parallel-size 2",
        "pipeline_model_parallel_size is 1; allowed: 2 or more with "
        "virtual_pipeline_model_parallel_size",
    ),
    (
        "--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2 "
        "--no-overlap-p2p-comm",
        "overlap_p2p_comm is False; allowed: none or true with "
        "virtual_pipeline_model_parallel_size 2",
    ),
    (
        "--pipeline-model-parallel-size 2 --overlap-p2p-comm",
        "overlap_p2p_comm is True; allowed: none or false with "
        "virtual_pipeline_model_parallel_size None",
    ),
    (
        "--pipeline-model-parallel-size 4 --virtual-pipeline-model-parallel-size 3",
        "pipeline_model_parallel_size 12 is more than the 8 ",
    ),
    (
        "--linear-num-key-heads 1 --tensor-model-parallel-size 2",
        f"linear_num_key_heads 1 does not divide by {TP} 2",
    ),
    (
        "--linear-num-value-heads 5",
        "linear_num_value_heads 5 does not divide by linear_num_key_heads 2",
    ),
    (
        "--expert-model-parallel-size 3",
        "num_experts 8 does not divide by expert_model_parallel_size 3; "
        "allowed: a multiple of 3, such as 9",
    ),
    (
        "--expert-tensor-parallel-size 3",
        "moe_ffn_hidden_size 64 does not divide by expert_tensor_parallel_size 3",
    ),
    (
        "--moe-ffn-hidden-size 65 --tensor-model-parallel-size 2",  # default: TP
        "moe_ffn_hidden_size 65 does not divide by expert_tensor_parallel_size 2",
    ),
    (
        "--moe-shared-expert-intermediate-size 65 --tensor-model-parallel-size 2",
        f"moe_shared_expert_intermediate_size 65 does not divide by {TP} 2",
    ),
    ("--moe-router-topk 9", "moe_router_topk is 9; allowed: 2 to num_experts 8"),
    # The weight of a single expert is 1 whatever its router says.
    ("--moe-router-topk 1", "moe_router_topk is 1; allowed: 2 to num_experts 8"),
    ("--rotary-percent 0.3", "rotary_percent is 0.3; allowed: a share of kv_channels 24"),
    ("--rotary-percent 0.125", "even number of features (this one is 3)"),
    ("--rotary-percent 1.5", "rotary_percent is 1.5"),
    (
        "--vision-hidden-size 66",
        "vision_hidden_size 66 does not divide by vision_num_attention_heads 4",
    ),
    (
        "--vision-ffn-hidden-size 129 --tensor-model-parallel-size 2",
        f"vision_ffn_hidden_size 129 does not divide by {TP} 2",
    ),
    ("--image-size 33", "image_size 33 does not divide by patch_size 8"),
    (
        "--image-size 40 --pixel-shuffle-factor 2",
        "patches per side (image_size 40 / patch_size 8 =) 5 does not divide by "
        "pixel_shuffle_factor 2",
    ),
    (
        "--clvr-num-attention-heads 3 --tensor-model-parallel-size 2",
        f"clvr_num_attention_heads 3 does not divide by {TP} 2",
    ),
    ("--hybrid-layer-pattern GEX", "unknown letter 'X' at position 3"),
    (
        "--pipeline-model-parallel-layout GE*EL|JGE*E",
        "has 2 stages; allowed: pipeline_model_parallel_size 1",
    ),
    ("--pipeline-model-parallel-size 9", "pipeline_model_parallel_size 9 is more than the 8 "),
    ("--seq-length 4097", "seq_length is 4097; allowed: 1 to max_position_embeddings 4096"),
    ("--train-data a b", "train_data[0].samples is None; allowed: above 0, or none in the last"),
    ("--train-data a:0 b", "train_data[0].samples is 0; allowed: above 0"),
    ("--train-data a:3 b:0", "train_data[1].samples is 0; allowed: above 0, or none (last"),
    ("--train-data :3", "train_data[0].path is ''; allowed: a .jsonl or .parquet file"),
    ("--image-mean 0.5", "image_mean is [0.5]; allowed: 3 numbers"),
    ("--image-std 1 0 1", "image_std is [1.0, 0.0, 1.0]; allowed: 3 numbers above 0"),
    ("--no-use-thumbnail", "use_thumbnail is False; allowed: true, because image_stream"),
    ("--no-untie-embeddings-and-output-weights", "is False; allowed: true; tied embeddings"),
    (
        " ".join(f"--freeze-{module}" for module in MODULES),
        "every module is frozen (vision, projector, language, experts, clvr, router); allowed: at "
        "least 1 of their 6 freeze flags false",
    ),
    ("--recompute-num-layers 3", "is 3; allowed: 2, or this value with recompute_granularity full"),
    (
        "--recompute-modules moe --recompute-granularity full",
        "is ['moe']; allowed: ['core_attn'], or this value with recompute_granularity selective",
    ),
    (
        "--train-data a.jsonl:8 b.jsonl:8 --train-iters 5 --global-batch-size 4",
        "train_data holds 16 samples in its 2 phases, but the run's 5 steps need 20; allowed:",
    ),
    (
        "--train-data a.jsonl:8 --train-iters 5 --global-batch-size 4 --objective dpo --packing",
        "train_data holds 8 samples in its 1 phases, but the run's 5 steps need 20; allowed:",
    ),
    ("--num-workers=-1", "num_workers is -1; allowed: 0 to 256"),
    (
        "--train-data a --max-pack-tiles 40",
        "max_pack_tiles is 40; allowed: none, or this value with packing or reinforcement learning",
    ),
    ("--packing --max-pack-tiles 0", "max_pack_tiles is 0; allowed: more than 0"),
    ("--max-image-tokens 0", "max_image_tokens is 0; allowed: more than 0"),
    (
        "--image-stream all --max-image-tokens 600 --seq-length 512",
        "max_image_tokens is 600; allowed: 1 to seq_length 512",
    ),
    ("--memory-hidden-size 40", "hidden_size 96 does not divide by memory_hidden_size 40"),
    ("--lr 0", "optimizer.lr is 0.0; allowed: more than 0"),
    ("--lr=-0.1", "optimizer.lr is -0.1; allowed: more than 0"),
    ("--lr 1e-4 --min-lr 1e-3", "min_lr is 0.001; allowed: 0 to lr 0.0001"),
    ("--lr-decay-style constant --min-lr 1e-5", "min_lr is 1e-05; allowed: 0, or this value with"),
    ("--weight-decay -1", "optimizer.weight_decay is -1.0; allowed: 0 or more"),
    ("--lr-warmup-iters 101", "lr_warmup_iters is 101; allowed: 0 to train_iters 100"),
    ("--adam-beta2 1", "adam_beta2 is 1.0; allowed: 0 to below 1"),
    ("--num-experts 0", "model.language.num_experts is 0; allowed: 1 to 16384"),
    ("--vision-num-layers -1", "model.vision.vision_num_layers is -1; allowed: 1 to 1024"),
    ("--tensor-model-parallel-size 0", f"parallel.{TP} is 0; allowed: more than 0"),
    ("--save-interval 0 --save x", "checkpoint.save_interval is 0; allowed: more than 0"),
    ("--save-interval 5", "save_interval is 5; allowed: none, or this value with save"),
    ("--resume", "resume is True; allowed: false, or this value with save"),
    ("--async-save", "async_save is True; allowed: false, or this value with save"),
    (
        "--keep-last-checkpoints 2",
        "keep_last_checkpoints is 2; allowed: none, or this value with save",
    ),
    (
        "--keep-last-checkpoints 0 --save x",
        "checkpoint.keep_last_checkpoints is 0; allowed: more than 0",
    ),
    ("--finetune", "finetune is True; allowed: false, or this value with load"),
    ("--eval-interval 5", "eval_interval is 5; allowed: none, or this value with valid_data"),
    ("--overlap-param-gather", "overlap_param_gather is True; allowed: false, or true with use_"),
    (
        "--moe-token-dispatcher-type flex",
        "moe_token_dispatcher_type is 'flex'; allowed: alltoall, or flex with expert_model_par",
    ),
    ("--moe-token-dispatcher-type allgather", "allowed: alltoall, flex"),
    ("--lora-rank 0", "lora.lora_rank is 0; allowed: more than 0"),
    ("--lora-rank 4 --lora-alpha 0", "lora.lora_alpha is 0.0; allowed: more than 0"),
    ("--lora-alpha 8", "lora_alpha is 8.0; allowed: 32.0, or this value with lora_rank"),
    ("--lora-targets vision", "lora_targets is ['vision']; allowed: ['language'], or this value"),
    ("--lora-rank 4 --lora-targets vision vision", "at least one of language, vision, projector"),
    ("--lora-rank 4 --lora-targets clvr", "lora-targets[0] is 'clvr'; allowed: language, vision"),
]


@pytest.mark.parametrize("text", ["", " ", "\t", "\n", "a\0b", "\0"])
@pytest.mark.parametrize("key", ["save", "load", "load-hf", "output-dir"])
def test_a_folder_without_a_name(key, text):
    """An empty --save would be the current folder, and an empty --load no checkpoint at all."""
    with pytest.raises(ConfigError) as error:
        validate(load(None, ["--preset", "tiny", f"--{key}", text]))
    name = key.replace("-", "_")
    allowed = "the path of a folder" if key == "output-dir" else "none, or the path of a folder"
    if "\0" in text:  # no text of any setting holds it
        name, allowed = f"--{key}", "text of up to 65536 characters without NUL"
    assert str(error.value) == f"{name} is {text!r}; allowed: {allowed}"


@pytest.mark.parametrize(("flags", "words"), CASES)
def test_refused(flags, words):
    with pytest.raises(ConfigError) as error:
        validate(run_with(flags))
    message = str(error.value)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("flags", "world_size", "words"),
    [
        ("--tensor-model-parallel-size 2", 3, "world_size 3 does not divide by "),
        (
            "--expert-model-parallel-size 4",
            6,
            "expert_tensor_parallel_size * expert_model_parallel_size * "
            "pipeline_model_parallel_size (1 * 4 * 1 =) 4; allowed: a multiple of 4, such as 8",
        ),
        (
            "--global-batch-size 6 --pipeline-model-parallel-size 2 "
            "--virtual-pipeline-model-parallel-size 2",
            4,
            "the number of microbatches (global_batch_size / (1 * 2) =) 3 does not divide by "
            "pipeline_model_parallel_size 2",
        ),
        (
            "--global-batch-size 6 --micro-batch-size 2",
            2,
            "global_batch_size 6 does not divide by micro_batch_size * data_parallel_size "
            "(2 * 2 =) 4; allowed: a multiple of 4, such as 8",
        ),
    ],
)
def test_refused_for_a_world_size(flags, world_size, words):
    run = run_with(flags)
    validate(run)  # nothing is wrong with the run itself
    with pytest.raises(ConfigError) as error:
        validate(run, world_size)
    assert words in str(error.value)


def test_text_only_models_cannot_look():
    flags = "--preset qwen3-next-80b-a3b --seq-length 128"
    validate(load(None, flags.split()))
    run = load(None, [*flags.split(), "--hybrid-layer-pattern", "GELGEJ"])
    with pytest.raises(ConfigError, match="has 1 L but model.vision is none"):
        validate(run)
    run = load(None, [*flags.split(), "--vision-memory", "tiles"])
    with pytest.raises(ConfigError, match="vision_memory is 'tiles'; allowed: none"):
        validate(run)


def test_adapters_learn_where_everything_else_is_frozen():
    flags = " ".join(f"--freeze-{module}" for module in MODULES)
    validate(run_with(f"{flags} --lora-rank 4 --lora-targets projector"))


def test_adapters_need_the_module_they_adapt():
    flags = ["--preset", "qwen3-next-80b-a3b", "--seq-length", "128", "--lora-rank", "4"]
    validate(load(None, flags))
    run = load(None, [*flags, "--lora-targets", "language", "vision"])
    with pytest.raises(ConfigError, match=r"\['language'\], because model.vision is none"):
        validate(run)


def test_looks_without_a_memory_are_a_legal_control_arm():
    # 3 CLVR heads do not divide by 2, but no look is built.
    flags = "--vision-memory none --clvr-num-attention-heads 3 --tensor-model-parallel-size 2"
    validate(run_with(flags))


@pytest.mark.parametrize("tp", [2, 4, 8, 16])
def test_the_80b_model_splits_its_2_key_value_groups_and_25_vision_heads(tp):
    validate(run_with(f"--tensor-model-parallel-size {tp}", preset="mm-80b"))
