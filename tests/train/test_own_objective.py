"""An objective that nobody registered, by the dotted path of its declaration: its setting, its
steps, its metric, a run that goes on; and objectives that cannot be used."""

from __future__ import annotations

import json

import pytest

from megatron_mm.config import ConfigError, RunConfig, load, to_dict, validate
from megatron_mm.config.load import run_of_checkpoint
from megatron_mm.config.objectives import OBJECTIVES
from megatron_mm.errors import DataError
from megatron_mm.parallel import groups
from megatron_mm.report.metrics_log import read_metrics
from megatron_mm.train import loop
from megatron_mm.train.trainer import Trainer
from support.fingerprints import state_hash
from support.smoothed import Smoothing
from support.trainers import LAYOUTS, digits_run

PATH = "support.smoothed.SMOOTHED"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Removes after a test the parts that it registered."""
    monkeypatch.setattr(OBJECTIVES, "_parts", dict(OBJECTIVES._parts))


def smoothed_run(scenes, share: float, **settings) -> RunConfig:
    run = digits_run(scenes, train_iters=4, valid_data=None, **settings)
    run.training.objective, run.objectives["smoothing"] = PATH, Smoothing(share)
    return run


def test_its_setting_stands_in_files_and_is_a_flag(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"training: {{objective: {PATH}}}\nsmoothing: {{label_smoothing: 0.3}}\n")
    assert load(str(path)).section(Smoothing) == Smoothing(0.3)
    assert load(str(path), ["--label-smoothing", "0.2"]).section(Smoothing) == Smoothing(0.2)
    run = load(None, ["--objective", PATH, "--preset", "tiny", "--label-smoothing", "0.4"])
    assert run.section(Smoothing) == Smoothing(0.4) and to_dict(run)["smoothing"]
    validate(run, 1)
    run.objectives["smoothing"] = Smoothing(1.0)
    with pytest.raises(ConfigError, match="smoothing.label_smoothing is 1.0; allowed: 0 to below"):
        validate(run)
    run.training.objective = "sft"
    run.objectives["smoothing"] = Smoothing(0.4)
    with pytest.raises(ConfigError, match="allowed: 0.1 with objective sft, which does not read"):
        validate(run)


def test_a_checkpoint_of_it_is_read_without_it():
    tree = to_dict(load(None, ["--objective", PATH, "--preset", "tiny", "--seed", "5"]))
    OBJECTIVES._parts.pop(PATH)
    run = run_of_checkpoint(tree)
    assert (run.training.objective, run.training.seed) == ("sft", 5)
    assert run.model == load(None, ["--preset", "tiny"]).model


def on_rank_steps(run: RunConfig, cut: int | None = None, folder=None) -> list[dict]:
    trainer = Trainer(run, groups.build(run.parallel))
    found = []
    while trainer.iteration < run.training.train_iters:
        metrics = {k: v for k, v in trainer.step().items() if "time" not in k}
        found.append(metrics | {"state": state_hash(trainer.engine)})
        if trainer.iteration == cut:
            run.checkpoint.save = str(folder)
            trainer.save()
    return found


@pytest.mark.parametrize("name", ["one rank", "PP2", "DP2"])
def test_it_trains_and_goes_on(ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    whole = ranks(size, on_rank_steps, smoothed_run(scenes, 0.5, **sizes), 2, tmp_path)
    resumed = smoothed_run(scenes, 0.5, **sizes)
    resumed.checkpoint.load = str(tmp_path)
    rest = ranks(size, on_rank_steps, resumed)
    for rank in range(size):
        assert rest[rank] == whole[rank][2:]
        assert [step["train/uniform_loss"] for step in whole[rank]] == [
            step["train/uniform_loss"] for step in whole[0]
        ]
    plain = ranks(size, on_rank_steps, digits_run(scenes, train_iters=4, valid_data=None, **sizes))
    # Without smoothing it is supervised fine-tuning, with it another loss.
    unsmoothed = ranks(size, on_rank_steps, smoothed_run(scenes, 0.0, **sizes))
    assert [s["state"] for s in unsmoothed[0]] == [s["state"] for s in plain[0]]
    assert whole[0][-1]["state"] != plain[0][-1]["state"]
    assert whole[0][-1]["train/uniform_loss"] < unsmoothed[0][-1]["train/uniform_loss"]


def on_rank_guarded(run: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(run, groups.build(run.parallel)).step()
    return str(caught.value)


def test_a_guard_needs_the_name_of_a_loss_that_is_reported(ranks, scenes):
    run = smoothed_run(scenes, 0.5, loss_spike_factor=3.0)
    run.training.objective = "support.smoothed.OWN_NAME"
    for said in ranks(2, on_rank_guarded, run):
        assert "'support.smoothed.OWN_NAME', train/my_loss, which its steps do not report" in said
        assert "train/lm_loss" in said and "\n" not in said


def on_rank_loop(run: RunConfig) -> None:
    loop.train(run, groups.build(run.parallel))


def test_the_loop_logs_its_metric(ranks, scenes, tmp_path):
    run = smoothed_run(scenes, 0.5, output_dir=str(tmp_path))
    ranks(1, on_rank_loop, run)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert len(records) == 4 and all(record["train/uniform_loss"] > 0 for record in records)
    assert json.dumps(to_dict(run))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sftt", "unknown objective sftt; did you mean sft?"),
        ("kto", "unknown objective kto; allowed: dpo, grpo, sft"),
        ("support.smoothed.CLASHING", "has the name of optimizer.lr; every setting is a flag"),
        ("nowhere.DPO", "objective nowhere.DPO cannot be imported: ModuleNotFoundError"),
        ("support.smoothed.HALF", "objective support.smoothed.HALF has no `source`; it needs"),
        (
            "support.smoothed.LabelSmoothing",
            "objective support.smoothed.LabelSmoothing has no `objective`; it needs objective, sou",
        ),
    ],
)
def test_an_objective_that_cannot_be_used_is_one_line(name, message):
    with pytest.raises(ConfigError) as caught:
        load(None, ["--objective", name])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def on_rank_refused(run: RunConfig) -> str:
    try:
        Trainer(run, groups.build(run.parallel))
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "LOSSLESS",
            "objective support.smoothed.LOSSLESS: its objective WithoutLoss has no `loss`; it "
            "needs positions, loss, router_term",
        ),
        (
            "NOWHERE",
            "`objective` of objective support.smoothed.NOWHERE: support.smoothed.Missing cannot be "
            "imported: AttributeError",
        ),
    ],
)
def test_a_torch_half_that_lacks_a_part_is_one_line_on_every_rank(ranks, scenes, name, message):
    run = digits_run(scenes, **LAYOUTS["PP2"][1])
    run.training.objective = f"support.smoothed.{name}"
    for said in ranks(2, on_rank_refused, run):
        assert message in said and "\n" not in said
