"""Which ranks encode images: by the settings, and where they leave it open."""

from __future__ import annotations

import pytest

from megatron_mm.config import ConfigError, RunConfig, preset, validate
from megatron_mm.config.vision_parallel import chosen, decided, encoder_share


def run_of(name: str, **parallel) -> RunConfig:
    run = RunConfig(model=preset(name))
    run.data.seq_length = 8192
    for key, value in parallel.items():
        setattr(run.parallel, key, value)
    return run


@pytest.mark.parametrize(
    ("name", "parallel", "way"),
    [
        ("mm-80b", {}, "stage"),
        # InternViT-6B over 13 tiles is 68 % of a sample; an eighth of it is 12.5 %.
        ("mm-80b", dict(pipeline_model_parallel_size=8), "replica"),
        ("mm-80b-300m", dict(pipeline_model_parallel_size=2), "stage"),
        ("qwen3-next-80b-a3b", dict(pipeline_model_parallel_size=8), "stage"),
    ],
)
def test_the_way_that_is_chosen(name, parallel, way):
    run = run_of(name, **parallel)
    assert chosen(run)[0] == way and run.parallel.vision_parallel is None
    assert decided(run).parallel.vision_parallel == way


@pytest.mark.parametrize(
    ("freeze", "share", "way"),
    [
        (False, 0.58, "stage"),
        (False, 0.62, "replica"),
        (True, 0.48, "stage"),
        (True, 0.52, "replica"),
    ],
)
def test_an_encoder_that_learns_runs_forward_twice(freeze, share, way):
    """With a share of s, the first of two stages costs s and each of two beside the encoder
    (1 + s / 3) / 2, or, frozen, 1 / 2: they meet at 0.6 and at 0.5."""
    run = run_of("mm-80b", pipeline_model_parallel_size=2)
    run.training.freeze_vision = freeze
    run.model.vision.vision_num_layers = 1
    while encoder_share(run) < share:
        run.model.vision.vision_num_layers += 1
    assert encoder_share(run) < share + 0.02
    assert chosen(run)[0] == way


def test_what_is_given_stays():
    given = run_of("mm-80b", pipeline_model_parallel_size=8, vision_parallel="stage")
    assert decided(given).parallel.vision_parallel == "stage"
    # Whoever lays out the stages by hand has counted the encoder.
    laid = run_of("tiny", pipeline_model_parallel_size=2)
    laid.parallel.pipeline_model_parallel_layout = "GE *E L | J GE *E"
    assert chosen(laid) == ("stage", "the layout of the pipeline is given")


@pytest.mark.parametrize(
    ("name", "parallel", "message"),
    [
        (
            "qwen3-next-80b-a3b",
            dict(vision_parallel="replica"),
            "vision_parallel is 'replica'; allowed: stage, because model.vision is none",
        ),
        (
            "mm-80b",
            dict(vision_tensor_parallel_size=1),
            "vision_tensor_parallel_size is 1; allowed: none, or 1 or tensor_model_parallel_size 1 "
            "with vision_parallel replica",
        ),
        (
            "mm-80b",
            dict(
                vision_parallel="replica",
                tensor_model_parallel_size=4,
                vision_tensor_parallel_size=2,
            ),
            "vision_tensor_parallel_size is 2; allowed: none, or 1 or tensor_model_parallel_size 4",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_one_line(name, parallel, message):
    with pytest.raises(ConfigError) as caught:
        validate(run_of(name, **parallel))
    assert message in str(caught.value) and "\n" not in str(caught.value)
