"""Flags of Megatron's that are no settings: accepted where they always hold, else refused."""

from __future__ import annotations

import logging
import re

import pytest
import torch.nn.functional as F
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mm.config import ConfigError, RunConfig, load, make_parser, preset
from megatron_mm.config.flags import parse_flags
from megatron_mm.config.megatron import ALWAYS, REFUSED
from megatron_mm.engine.optimizer import build_scheduler
from megatron_mm.model.core_config import language_config

GIVEN = ["--preset", "tiny", "--tensor-model-parallel-size", "2", "--bf16"]
FLAGS = set(re.findall(r"--[\w-]+", make_parser().format_help()))
# By flag, another value than the one that always holds.
OTHERS = {
    "--attention-backend": "unfused",
    "--cp-comm-type": "p2p",
    "--empty-unused-memory-level": "1",
    "--experimental-attention-variant": "dsa",
    "--distributed-backend": "ucc",
    "--normalization": "LayerNorm",
    "--position-embedding-type": "learned_absolute",
    "--hidden-dropout": "0.1",
    "--attention-dropout": "1e-9",
    "--moe-router-load-balancing-type": "sinkhorn",
    "--moe-router-score-function": "sigmoid",
    "--optimizer": "sgd",
    "--lr-warmup-init": "1e-6",
    "--weight-decay-incr-style": "linear",
    "--dataloader-type": "single",
    "--ckpt-format": "torch",
    "--dist-ckpt-format": "zarr",
    "--dist-ckpt-strictness": "log_all",
}
VALUED = [flag for flag, always in ALWAYS.items() if always.values]


def value_of(flag: str) -> list[str]:
    """The value with which the flag holds."""
    values = ALWAYS[flag].values
    return [{"any": "128"}.get(value, value) for value in values[:1]]


def test_no_flag_is_in_two_tables_or_a_setting():
    assert not set(ALWAYS) & set(REFUSED)
    assert not FLAGS & (set(ALWAYS) | set(REFUSED))
    assert len(ALWAYS) >= 40 and len(REFUSED) >= 100


@pytest.mark.parametrize("flag", ALWAYS)
def test_a_flag_that_always_holds_changes_nothing_and_is_said_once(flag, caplog):
    expected = load(None, GIVEN)
    words = [flag, *value_of(flag)]
    for argv in ([*words, *GIVEN], [*GIVEN, *words], [*GIVEN[:2], *words, *GIVEN[2:]]):
        caplog.clear()
        with caplog.at_level(logging.INFO, "megatron_mm"):
            assert load(None, argv) == expected
        (line,) = caplog.messages
        assert line == f"{' '.join(words)}: always so here: {ALWAYS[flag].why}"


@pytest.mark.parametrize("flag", VALUED)
def test_another_value_is_refused(flag):
    for words in ([flag], [flag, "--bf16"], [f"{flag}="]):
        with pytest.raises(ConfigError, match=f"^{flag} is 'none'; allowed: "):
            parse_flags(words)
    assert parse_flags([f"{flag}={value_of(flag)[0]}"]).accepted
    if flag in OTHERS:
        with pytest.raises(ConfigError) as error:
            parse_flags([flag, OTHERS[flag], "--bf16"])
        allowed = " or ".join(ALWAYS[flag].values)
        assert str(error.value) == (
            f"{flag} is {OTHERS[flag]!r}; allowed: {allowed}: {ALWAYS[flag].why}"
        )


def test_every_value_but_one_is_tried():
    assert set(VALUED) - set(OTHERS) == {"--make-vocab-size-divisible-by"}


def test_dropout_of_zero_may_be_written_in_any_way():
    assert parse_flags(["--hidden-dropout", "0.0", "--attention-dropout=0e0"]).accepted


def test_a_switch_takes_no_value():
    for words in (["--swiglu", "true"], ["--swiglu=true"]):
        with pytest.raises(ConfigError, match="true|swiglu"):
            parse_flags(words)


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_means_something_else_is_refused_with_the_reason(flag):
    for words in ([flag], [flag, "1"], [f"{flag}=1"], ["--bf16", flag, "--swiglu"]):
        with pytest.raises(ConfigError) as error:
            load(None, words)
        message = f"{flag} is Megatron's, but no setting here: {REFUSED[flag]}"
        assert str(error.value) == message
    named = set(re.findall(r"--[\w-]+", REFUSED[flag]))
    assert named <= FLAGS, "what it names instead must exist"


def test_an_unknown_flag_is_refused_as_before_with_its_neighbours():
    with pytest.raises(ConfigError, match="unknown flag --sequence-paralel; did you mean"):
        parse_flags(["--sequence-paralel"])
    with pytest.raises(ConfigError, match="^unknown flag --qqqq; allowed: the flags of --help"):
        parse_flags(["--swiglu", "--qqqq", "1"])


def test_a_launch_script_of_megatrons_runs():
    """The arguments of Megatron's Mixtral example and of its Qwen3-Next model that stay as they
    are."""
    script = """
    --use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768
    --hidden-size 96 --num-attention-heads 4 --init-method-std 0.01 --attention-dropout 0.0
    --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
    --untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2
    --no-masked-softmax-fusion --no-position-embedding --rotary-base 1000000 --qk-layernorm
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall
    --make-vocab-size-divisible-by 1 --micro-batch-size 1 --global-batch-size 256 --lr 1e-4
    --train-iters 500 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1
    --lr-warmup-iters 50 --clip-grad 1.0 --bf16 --overlap-grad-reduce --overlap-param-gather
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 1
    --expert-model-parallel-size 2 --use-distributed-optimizer --sequence-parallel --use-flash-attn
    --log-interval 1 --save-interval 100 --save out --distributed-timeout-minutes 60 --seed 1
    --transformer-impl transformer_engine --recompute-granularity selective --ckpt-format torch_dist
    --distributed-backend nccl --no-gradient-accumulation-fusion --use-cpu-initialization
    """
    flags = parse_flags(["--preset", "tiny", *script.split()])
    assert len(flags.accepted) == 20 and ("parallel", "use_distributed_optimizer") in flags.values


# ---- what the accepted flags say, in the model and the settings that are built ----

CORE = language_config(load(None, GIVEN))
MEANS = {
    "--sequence-parallel": CORE.sequence_parallel,
    "--swiglu": CORE.gated_linear_unit and CORE.activation_func is F.silu,
    "--disable-bias-linear": not CORE.add_bias_linear,
    "--normalization": CORE.normalization == "RMSNorm",
    "--apply-layernorm-1p": CORE.layernorm_zero_centered_gamma,
    "--moe-shared-expert-gate": CORE.moe_shared_expert_gate,
    "--moe-router-load-balancing-type": CORE.moe_router_load_balancing_type == "aux_loss",
    "--moe-router-score-function": CORE.moe_router_score_function == "softmax",
    "--no-bias-swiglu-fusion": not CORE.bias_activation_fusion,
    "--no-bias-dropout-fusion": not CORE.bias_dropout_fusion,
    "--no-masked-softmax-fusion": not CORE.masked_softmax_fusion,
    "--no-rope-fusion": not CORE.apply_rope_fusion,
    "--no-gradient-accumulation-fusion": not CORE.gradient_accumulation_fusion,
    "--calculate-per-token-loss": CORE.calculate_per_token_loss,
}


@pytest.mark.parametrize("flag", MEANS)
def test_it_holds_in_megatron_cores_settings(flag):
    assert flag in ALWAYS and MEANS[flag]


def test_without_tensor_parallelism_there_is_no_sequence_to_split():
    assert not language_config(RunConfig(model=preset("tiny"))).sequence_parallel


def test_the_schedule_is_the_runs(monkeypatch):
    """--override-opt_param-scheduler, --lr-warmup-init 0, --weight-decay-incr-style constant."""
    asked = {}
    monkeypatch.setattr(
        OptimizerParamScheduler, "__init__", lambda self, optimizer, **words: asked.update(words)
    )
    build_scheduler(RunConfig(), None)
    assert asked["override_opt_param_scheduler"] and asked["init_lr"] == 0
    assert not asked["use_checkpoint_opt_param_scheduler"]
    assert asked["wd_incr_style"] == "constant" and asked["start_wd"] == asked["end_wd"]
