"""The run that a measurement of pass rates computes with: from flags and a stored run."""

from __future__ import annotations

import pytest

from megatron_mm.config import ConfigError, load, to_dict
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.pass_rate.runs import DATA, REWARDS, SAMPLING, run_of_flags
from megatron_mm.rl.settings import RLConfig
from support.trainers import digits_run, with_glimpses


def stored_of(scenes) -> dict:
    run = digits_run(scenes, objective="grpo", reward_funcs=["tags"], seq_length=96)
    return to_dict(run)


def test_flags_and_the_file_of_a_run_say_how_to_sample(scenes, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "rl: {reward_funcs: [exact, tags], difficulty_reward: exact, temperature: 0.5, beta: 0.1}\n"
        "training: {seed: 9, objective: grpo}\n"
    )
    flags = ["--config", str(tmp_path / "run.yaml"), "--temperature", "0.7", "--seq-length", "80"]
    flags += ["--max-completion-length", "16"]
    run = run_of_flags(stored_of(scenes), flags, 1, scores=True)
    rl = run.section(RLConfig)
    assert (rl.reward_funcs, rl.temperature, run.training.seed) == (["exact", "tags"], 0.7, 9)
    assert run.data.seq_length == 80 and rl.beta == 0  # nothing is trained
    assert run_of_flags(stored_of(scenes), [], 1, scores=False).data.seq_length == 96


def test_a_run_that_was_packed_or_taught_boxes_can_be_measured(scenes):
    """These are of its training, and no flags of this command."""
    sizes = dict(packing=True, num_workers=2, max_pack_tiles=40)
    run = with_glimpses(digits_run(scenes, seq_length=96, **sizes))
    query_settings(run.model).query_box_loss_coeff = 1.0
    flags = ["--reward-funcs", "exact", "--max-completion-length", "16"]
    found = run_of_flags(to_dict(run), flags, 1, scores=True)
    assert (found.data.packing, found.data.num_workers) == (False, 0)
    assert found.data.max_pack_tiles == 40  # it bounds the prompts that are read together
    assert query_settings(found.model).query_box_loss_coeff == 0
    assert found.model.hybrid_layer_pattern == run.model.hybrid_layer_pattern


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_any_number_of_rows_at_a_time_fits(scenes, size):
    flags = ["--reward-funcs", "exact", "--max-completion-length", "16"]
    layout = ["--pipeline-model-parallel-size", "2", "--micro-batch-size", str(size)]
    for world in (2, 4):
        run = run_of_flags(stored_of(scenes), [*flags, *layout], world, scores=True)
        assert run.training.micro_batch_size == size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--reward-funcs exact --lr 1",
            "--lr is not for this command; allowed: its own flags, --plugins, the",
        ),
        ("--max-completion-length 9", "rl.reward_funcs is []; allowed: at least 1 reward"),
        (
            "--max-completion-length 9 --reward-funcs exact tags",
            "rl.difficulty_reward is None; allowed: one of the 2 reward_",
        ),
        ("--reward-funcs exact --max-completion-length 96", "allowed: less than seq_length = 96"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(scenes, flags, message):
    with pytest.raises(ConfigError) as caught:
        run_of_flags(stored_of(scenes), flags.split(), 1, scores=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_names_of_flags_are_settings():
    names = {path[-1] for path in _paths(to_dict(load(None, [])))}
    assert {*DATA, *SAMPLING, *REWARDS} <= names


def _paths(tree, at=()):
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from _paths(value, (*at, key))
