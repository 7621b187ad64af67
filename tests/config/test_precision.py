"""Needs of FP8: alignment, padding, and the combinations that are refused."""

import pytest

from megatron_mm.config import (
    BackendConfig,
    ConfigError,
    fp8_alignment,
    load,
    token_multiple,
    validate,
)

ENGINE = "--transformer-impl transformer_engine --bf16"
# The demo's model has odd sizes; these fit.
ALIGNED = (
    "--hidden-size 64 --memory-hidden-size 32 --num-attention-heads 4 --num-query-groups 2 "
    "--kv-channels 32 "
    "--linear-num-key-heads 8 --linear-num-value-heads 16 --linear-key-head-dim 16 "
    "--linear-value-head-dim 16 --moe-ffn-hidden-size 32 "
    "--moe-shared-expert-intermediate-size 64"
)
FP8 = f"{ENGINE} {ALIGNED} --fp8-format hybrid"


def run_with(flags: str, preset: str = "tiny"):
    return load(None, ["--preset", preset, *flags.split()])


def test_the_default_works_everywhere():
    backend = BackendConfig()
    assert (backend.transformer_impl, backend.gdn_kernel, backend.fp8_format) == (
        "local",
        "auto",
        None,
    )


RECIPES = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
def test_every_recipe_fits_aligned_sizes(recipe, fp8_format):
    run = run_with(f"{FP8} --fp8-format {fp8_format} --fp8-recipe {recipe}")
    validate(run)
    assert fp8_alignment(run) == RECIPES[recipe]


def test_tokens_are_padded_for_every_rank_of_tensor_parallelism():
    assert token_multiple(run_with("")) == 1
    assert token_multiple(run_with("--tensor-model-parallel-size 2")) == 2
    assert token_multiple(run_with("--context-parallel-size 2")) == 2
    assert token_multiple(run_with(FP8)) == 16
    assert token_multiple(run_with(f"{FP8} --tensor-model-parallel-size 2")) == 32
    assert token_multiple(run_with(f"{FP8} --fp8-recipe mxfp8")) == 32


CASES = [
    # flags, what the message must contain
    (
        "--fp8-recipe mxfp8",
        "fp8_recipe is 'mxfp8'; allowed: 'tensorwise', or this value with fp8_f",
    ),
    ("--first-last-layers-bf16", "first_last_layers_bf16 is true; allowed: false, or this value"),
    (f"{FP8} --num-layers-at-end-in-bf16 2", "num_layers_at_end_in_bf16 is 2; allowed: 1, or this"),
    (f"{FP8} --fp8-amax-history-len 9", "allowed: 1, or this value with fp8_recipe delayed"),
    ("--fp8-format hybrid --bf16", "fp8_format is 'hybrid'; allowed: none, or hybrid with"),
    ("--fp8-format hybrid", "transformer_impl transformer_engine"),
    ("--transformer-impl transformer_engine", "allowed: 'local', or bf16 true"),
    (
        f"{FP8} --fp8-recipe delayed --first-last-layers-bf16",
        "first_last_layers_bf16 is true; allowed: false with fp8_recipe delayed",
    ),
    (
        f"{FP8} --first-last-layers-bf16 --num-layers-at-end-in-bf16 99",
        "num_layers_at_end_in_bf16 is 99; allowed: 1 to",
    ),
    (
        f"{FP8} --fp8-recipe delayed --recompute-granularity full",
        "recompute_granularity is 'full'; allowed with fp8_recipe delayed",
    ),
    (f"{FP8} --fp8-recipe currentish", "--fp8-recipe is 'currentish'"),
    (f"{FP8} --fp8-format int8", "--fp8-format is 'int8'"),
    (f"{FP8} --hidden-size 72 --memory-hidden-size 24", "hidden_size 72 on a tensor"),
    (f"{FP8} --moe-ffn-hidden-size 24", "moe_ffn_hidden_size 24 on a tensor-parallel rank"),
    (
        f"{FP8} --fp8-recipe mxfp8 --moe-ffn-hidden-size 48",
        "does not divide by 32; allowed with fp8_recipe mxfp8: a multiple of 32",
    ),
    (
        f"{FP8} --moe-ffn-hidden-size 16 --expert-tensor-parallel-size 2",
        "moe_ffn_hidden_size 8 on a tensor-parallel rank does not divide by 16",
    ),
    (
        f"{FP8} --moe-shared-expert-intermediate-size 16 --tensor-model-parallel-size 2",
        "moe_shared_expert_intermediate_size 8 on a tensor-parallel rank",
    ),
    (f"{FP8} --linear-num-key-heads 2 --linear-num-value-heads 4", "rows of in_proj 200 on"),
]


@pytest.mark.parametrize("flags, words", CASES)
def test_refused_in_one_line(flags, words):
    with pytest.raises(ConfigError) as caught:
        validate(run_with(flags))
    message = str(caught.value)
    assert words in message and "\n" not in message


def test_the_80b_model_takes_fp8_up_to_tensor_parallel_two():
    """Its in_proj has 16 x 772 rows: 6,176 on each of 2 ranks; 8 ranks would have 1,544 rows, no
    multiple of 16."""
    flags = f"{ENGINE} --fp8-format hybrid"
    validate(run_with(flags, "mm-80b"))
    run = run_with(flags, "mm-80b")
    run.model.vision = None
    run.model.hybrid_layer_pattern = "GEGEGE*E" * 12
    run.model.fusion.vision_memory = "none"
    run.parallel.tensor_model_parallel_size = 2
    validate(run)
    run.parallel.tensor_model_parallel_size = 8
    with pytest.raises(ConfigError, match="rows of in_proj 1544 .* divide by 16"):
        validate(run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--compile-vision", "compile_vision is true; allowed with deterministic_mode: false ("),
        ("--gdn-kernel fla", "gdn_kernel is 'fla'; allowed with deterministic_mode: auto, torch ("),
        (
            "--moe-token-dispatcher-type flex --expert-model-parallel-size 2 --bf16",
            "moe_token_dispatcher_type is 'flex'; allowed with deterministic_mode: alltoall (",
        ),
        (f"{FP8} --fp8-recipe delayed", "fp8_recipe is 'delayed'; allowed with deterministic_mode"),
    ],
)
def test_what_does_not_repeat_is_refused_in_deterministic_mode(flags, message):
    validate(run_with("--deterministic-mode"))
    validate(run_with(f"{FP8} --deterministic-mode"))
    with pytest.raises(ConfigError) as caught:
        validate(run_with(f"{flags} --deterministic-mode"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_compiled_layers_are_for_one_tensor_parallel_rank():
    validate(run_with("--compile-vision"))
    with pytest.raises(
        ConfigError, match="compile_vision is true with tensor_model_parallel_size 2"
    ):
        validate(run_with("--compile-vision --tensor-model-parallel-size 2"))
