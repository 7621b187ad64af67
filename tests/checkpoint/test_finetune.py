"""Weights only: how CLVR is added to a base model, and how precision or freezing is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.compatible import check_model
from megatron_mm.config import to_dict
from megatron_mm.errors import CheckpointError
from support.checkpoint_runs import (
    PATTERN,
    create,
    load_whole,
    tiny_run,
    train,
    train_and_save,
    untrained,
    weights,
    whole,
)

BASE = "GE *E"


@pytest.fixture(scope="module")
def base(ranks, tmp_path_factory):
    """(folder, whole tensors) of a model without looks."""
    folder = tmp_path_factory.mktemp("base")
    return folder, ranks(2, train_and_save, tiny_run(dict(ep=2), pattern=BASE), folder)[0]


@pytest.mark.parametrize(
    ("size", "parallel", "pattern", "key"),
    [
        (1, {}, PATTERN, "looks"),
        (2, dict(pp=2), PATTERN, "looks"),
        (2, dict(tp=2), PATTERN, "looks"),
        (2, dict(tp=2), "GE Q *E V", "queries"),
    ],
)
def test_sides_are_added_to_a_base_model(ranks, base, size, parallel, pattern, key):
    folder, stored = base
    run = tiny_run(parallel, pattern=pattern, freeze_language=True)
    state, tensors = ranks(size, load_whole, run, folder, True)[0]
    run.training.seed += 1
    initial = weights(ranks(size, untrained, run)[0])
    found, stored = weights(tensors), weights(stored)
    added = found.keys() - stored.keys()
    assert sorted(state["initialized"]) == sorted(added)
    assert any(f"{key}.0." in name for name in added)
    assert any("memory_proj" in name for name in added)
    for name, tensor in found.items():
        assert torch.equal(tensor, initial[name] if name in added else stored[name]), name
    assert not any(t.any() for k, t in tensors.items() if k.startswith(("exp_avg", "step")))


def finetuned_in_bf16(run, folder: Path) -> dict:
    engine = create(run)
    sharded.load(engine, folder, finetune=True)
    before = whole(engine)
    train(engine, range(1))
    return {"before": before, "after": whole(engine)}


@pytest.mark.parametrize("plain", [False, True])
def test_main_parameters_follow_the_weights(ranks, base, plain):
    """Else the first update would write the random initial weights back."""
    folder, stored = base
    run = tiny_run(dict(use_distributed_optimizer=not plain), bf16=True)
    found = ranks(2, finetuned_in_bf16, run, folder)[0]
    for name, tensor in weights(stored).items():
        before = found["before"]
        assert torch.equal(before[f"weight.{name}"], tensor.bfloat16().float()) or torch.equal(
            before[f"weight.{name}"], tensor
        )
        assert torch.equal(before[f"master.{name}"], before[f"weight.{name}"])
        moved = (found["after"][f"master.{name}"] - before[f"master.{name}"]).abs().max()
        assert moved <= 0.011  # one Adam step of learning rate 0.01 at most, with decay


def saved_with_sides(folder: Path) -> None:
    train_and_save(tiny_run(pattern="GE L Q *E J V"), folder)


def test_sides_can_be_left_behind(ranks, tmp_path):
    """The control arm starts from the checkpoint that has them."""
    ranks(1, saved_with_sides, tmp_path)
    state, tensors = ranks(1, load_whole, tiny_run(pattern=BASE), tmp_path, True)[0]
    assert state["initialized"] == []
    assert any("looks" in key for key in state["ignored"])  # which the run says
    assert not any("looks" in name or "queries" in name for name in tensors)


def other_training_settings(folder: Path) -> dict:
    """Settings of training, not of the model, may change between save and load."""
    run = tiny_run(pattern=BASE)
    run.model.language.moe_aux_loss_coeff = 0.5
    run.model.language.init_method_std = 0.3
    return sharded.load(create(run), folder)


def test_training_settings_may_change(ranks, base):
    folder, _ = base
    state = ranks(1, other_training_settings, folder)[0]
    assert state["iteration"] > 0


def test_the_schedule_of_windows_may_change_and_their_form_may_not():
    stored = tiny_run(pattern="GE Q *E V").model
    model = tiny_run(pattern="GE Q *E V").model
    model.layers["Q"].query_box_loss_coeff, model.layers["Q"].query_first_scale = 1.0, 0.2
    check_model(to_dict(stored), model, finetune=False)
    model.layers["Q"].query_grid = 3
    with pytest.raises(CheckpointError, match="query_grid is 2 there and 3 here"):
        check_model(to_dict(stored), model, finetune=False)


def changed(there: str, here: str, **settings) -> list[str]:
    """`check_model` of two patterns, the second with other settings, for a fine-tune."""
    stored, model = tiny_run(pattern=there).model, tiny_run(pattern=here).model
    for key, value in settings.items():
        setattr(model.layers["Q"] if key.startswith("query") else model.fusion, key, value)
    return check_model(to_dict(stored), model, finetune=True)


def test_added_pairs_never_take_the_weights_of_others():
    """Weights of pairs are found by number: the first look there is the first look here."""
    assert changed("GE *E L GE J *E", "GE*E L GE J L *E J") == []  # behind it
    assert changed("GE *E L GE J L *E J", "GE *E L GE J *E") == []  # the last one is dropped
    others = changed("GE *E L GE J *E", "GE Q *E V L GE J *E")  # of another kind
    assert others and not any("looks" in line for line in others)
    moved = changed("GE *E L GE J *E", "L GE *E J GE *E")
    assert moved == [
        "looks.0 was behind 4 and 6 letters of the base, is behind 0 and 4",
    ]
    for there, here in (
        ("GE *E L GE J *E", "GE L *E J L GE J *E"),  # added before it
        ("GE L *E J L GE J *E", "GE *E L GE J *E"),  # the first one is dropped
    ):
        with pytest.raises(CheckpointError, match="another pair of letters: looks.0 was behind"):
            changed(there, here)


@pytest.mark.parametrize(
    "setting",
    [
        {"query_grid": 3},
        {"query_min_scale": 0.04},
        {"query_spread": 0.7},
        {"clvr_kv_channels": 32},
        {"memory_coordinates": False},
        {"pixel_shuffle_version": "v1"},
    ],
)
def test_a_fine_tune_keeps_the_form_of_sides_that_stay(setting):
    """No shape tells these apart, so they would be another model in silence."""
    ((key, value),) = setting.items()
    with pytest.raises(
        CheckpointError, match=f"it holds another model: .*{key} is .* {value!r} here"
    ):
        changed("GE Q *E V", "GE Q *E V", **setting)


def test_a_fine_tune_says_what_it_changes():
    assert changed("GE Q *E V", "GE Q *E V") == []
    assert changed("GE Q *E V", "GE Q *E V", query_place="oracle", image_stream="all") == [
        "fusion.image_stream was 'thumbnail', is 'all'",
        "layers.Q.query_place was 'hidden', is 'oracle'",
    ]
    # A side that is new has the form that this run gives it.
    assert changed("GE *E", "GE Q *E V", query_grid=3, clvr_kv_channels=32)
    with pytest.raises(CheckpointError, match="pixel_shuffle_version"):
        changed("GE *E", "GE Q *E V", pixel_shuffle_version="v1")
