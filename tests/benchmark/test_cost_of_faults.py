"""The cost of faults: the arithmetic, the record of a run that starts again, a run with faults."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

from megatron_mm.benchmark import faults
from megatron_mm.benchmark.fault_job import STEP_TIME, FaultJob, Step, _Record, split_config
from megatron_mm.config import RunConfig, dump_yaml
from megatron_mm.errors import ConfigError, LaunchError
from support.trainers import digits_run


def test_the_save_interval_costs_least():
    """By trying: a save costs its stall, a failure the steps since the last save, half an interval
    in the mean."""

    def lost(interval: int, stall: float, step: float, every: int) -> float:
        return stall / interval + interval / 2 * step / every

    for stall, step, every in ((0.05, 0.3, 100), (2.0, 0.5, 400), (0.4, 3.0, 1000)):
        best = min(range(1, every // 2), key=lambda n: lost(n, stall, step, every))
        assert abs(faults.save_interval(stall, step, every) - best) <= 1
    assert faults.save_interval(0.0, 1.0, 100) == 1
    assert faults.save_interval(1e6, 1.0, 100) == 50


def test_steps_trained_again_are_useful_once():
    done = [Step(n, 1.0, None, float(n)) for n in (1, 2, 3, 4)]
    done += [Step(3, 1.5, None, 10.0), Step(4, 1.0, None, 11.0), Step(5, 1.0, None, 12.0)]
    found = faults.cost(done)
    assert (found["steps"], found["steps_trained_again"]) == (5, 2)
    assert found["useful_seconds"] == 5.5  # the later time of step 3
    assert found["wall_seconds"] == 12.0
    assert math.isclose(found["goodput"], 5.5 / 12)


@pytest.mark.parametrize(
    "flags",
    [
        ["--config", "a.yaml", "--lr", "1", "--bf16"],
        ["--lr", "1", "--config=a.yaml", "--bf16"],
        ["--lr", "1", "--bf16", "--config", "a.yaml"],
    ],
)
def test_the_configuration_stands_anywhere(flags):
    assert split_config(flags) == ("a.yaml", ["--lr", "1", "--bf16"])


def test_a_job_needs_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="faults need a run: --config FILE"):
        FaultJob(tmp_path / "job", ["--preset", "tiny"], restarts=0)
    assert not (tmp_path / "job").exists()


def written(path: Path, *iterations: int) -> None:
    lines = [json.dumps({"iteration": n, STEP_TIME: 0.5}) + "\n" for n in iterations]
    lines.append(json.dumps({"iteration": iterations[-1], "accuracy/x": 1}) + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(lines))
    part.replace(path)


def test_a_record_that_is_replaced_repeats_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = _Record(path)
    assert record.new() == []
    written(path, 1, 2, 3)
    assert [step.iteration for step in record.new()] == [1, 2, 3] and record.epoch == 0
    with path.open("a") as stream:
        stream.write(json.dumps({"iteration": 4, STEP_TIME: 0.5}) + '\n{"iterat')
    assert [step.iteration for step in record.new()] == [4]
    written(path, 1, 2)  # the run goes on from step 2
    assert record.new() == [] and record.epoch == 1
    with path.open("a") as stream:
        stream.write(json.dumps({"iteration": 3, STEP_TIME: 0.5}) + "\n")
    assert [step.iteration for step in record.new()] == [3]


@pytest.fixture
def config(tmp_path, scenes) -> Path:
    run: RunConfig = digits_run(scenes, train_iters=40)
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run))
    return path


@pytest.mark.launches
@pytest.mark.kills
@pytest.mark.slow
def test_a_run_goes_on_after_a_kill_and_a_nan(config, tmp_path):
    flags = ["--config", str(config)]
    found = faults.measure(flags, ["kill", "nan"], every=6, count=2, folder=tmp_path / "job")
    kinds = [(fault["kind"], fault["rank"]) for fault in found["faults"]]
    assert kinds == [("kill", 0), ("nan", 1)]
    assert found["steps"] == 18
    again = [fault["steps_again"] for fault in found["faults"]]
    # Those since the newest save, of which one may be on its way, and the step that was under way.
    assert (
        sum(again) == found["steps_trained_again"] and max(again) <= 2 * found["save_interval"] + 1
    )
    assert all(fault["resumed"] > found["quiet"]["step_seconds"] for fault in found["faults"])
    assert 0 < found["goodput"] < 1
    assert "goodput" in faults.text(found)


@pytest.mark.launches
def test_a_run_that_does_not_start_is_one_line(config, tmp_path):
    job = FaultJob(tmp_path / "job", ["--config", str(config), "--lr", "-1"], restarts=0)
    try:
        with pytest.raises(LaunchError, match="waiting for step 1, the agents ended") as caught:
            job.steps_until(1)
    finally:
        job.stop()
    assert "\n" not in str(caught.value) and "lr" in str(caught.value)


def test_a_run_that_is_over_is_not_called_slow(tmp_path):
    job = object.__new__(FaultJob)
    job._folder = tmp_path
    job._agents = [subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])]
    for number in (0, 1):
        (tmp_path / f"node{number}.log").touch()
    job._agents[0].wait()
    try:
        with pytest.raises(LaunchError, match=r"waiting for x, the agents ended with \[0, None\]"):
            job.wait_for(lambda: False, "x")
    finally:
        job._agents[1].kill()
        job._agents[1].wait()
