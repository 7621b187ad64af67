"""Real launches: torchrun and a lone process, what they write, and how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from megatron_mm.config import dump_yaml
from megatron_mm.parallel.rendezvous import begun
from megatron_mm.report.metrics_log import read_metrics
from support.launches import ALONE, ROOT, TIMEOUT, TORCHRUN, environment, launch
from support.trainers import digits_run

pytestmark = pytest.mark.launches

OUR_CODE = str(ROOT / "megatron_mm")
PIPELINE = ("--pipeline-model-parallel-size", "2")


@pytest.fixture
def config(tmp_path, scenes) -> Path:
    run = digits_run(
        scenes, train_iters=3, eval_samples=6, eval_batch_size=4, max_new_tokens=3, report=True,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run))
    assert yaml.safe_load(path.read_text())["training"]["train_iters"] == 3
    return path


def check_results(folder: Path, pipeline: int) -> None:
    results = json.loads((folder / "results.json").read_text())
    # The first six questions: one of each direct skill.
    skills = {"transcribe", "ocr", "count", "spatial", "arithmetic", "multihop"}
    assert results["skills"].keys() == skills
    for skill in results["skills"].values():
        assert skill.keys() == {"accuracy", "chance", "n", "lm_loss", "answer_tokens"}
        assert 0 <= skill["accuracy"] <= 1 and skill["chance"] == 1.0 and skill["n"] == 1
    assert results["iteration"] == 3 and results["seconds"] > 0
    assert results["layout"]["pipeline_model_parallel_size"] == pipeline
    assert len(results["stages"]) == pipeline
    assert " ".join(results["stages"]).split() == list("GEL*EJ")
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [record["iteration"] for record in metrics] == [1, 2, 3, 3]  # and the evaluation
    for record in metrics[:3]:
        assert {
            "train/lm_loss",
            "train/grad_norm",
            "train/learning_rate",
            "train/tokens",
        } <= record.keys()
    assert {f"accuracy/{skill}" for skill in skills} <= metrics[3].keys()
    assert (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_torchrun_trains_evaluates_and_reports(config, tmp_path):
    done = launch(TORCHRUN, "--config", config, *PIPELINE, "--sequence-parallel")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--sequence-parallel: always so here: ") == 1  # by one rank
    check_results(tmp_path / "out", pipeline=2)
    assert f"report: {tmp_path}/out/report.html" in done.stdout


def test_a_process_alone_does_too_and_saves(config, tmp_path):
    done = launch(ALONE, "--config", config, "--save", tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    check_results(tmp_path / "out", pipeline=1)
    assert (tmp_path / "saved" / "latest").read_text() == "iter_0000003\n"


def test_sigterm_saves_and_the_next_launch_goes_on(config, tmp_path):
    """The signal goes to torchrun, as a scheduler would send it; torchrun hands it on."""
    flags = ["--config", str(config), *PIPELINE, "--save", str(tmp_path / "saved")]
    process = subprocess.Popen(
        [*TORCHRUN, *flags, "--train-iters", "5000"],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        seen = []
        for line in process.stderr:  # ends with the process, should it die
            seen.append(line)
            if line.startswith("step 3/"):
                break
        assert seen and seen[-1].startswith("step 3/"), "".join(seen)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=TIMEOUT)
    finally:
        process.terminate()  # not kill, which would leave its workers alone
        process.wait(timeout=TIMEOUT)
    assert OUR_CODE not in rest  # in no traceback
    stopped = json.loads((tmp_path / "saved" / latest(tmp_path) / "run.json").read_text())
    iteration = stopped["iteration"]
    assert iteration >= 3 and stopped["loader"] == {"consumed_samples": 4 * iteration}
    assert [r["iteration"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl")] == list(
        range(1, iteration + 1)
    )
    assert not (tmp_path / "out" / "results.json").exists()

    more = ["--load", tmp_path / "saved", "--train-iters", iteration + 2, "--valid-data", "none"]
    done = launch(TORCHRUN, *flags, *more)
    assert done.returncode == 0, done.stderr
    assert latest(tmp_path) == f"iter_{iteration + 2:07d}"
    metrics = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["iteration"] for record in metrics] == list(range(1, iteration + 3))
    assert [record["train/consumed_samples"] for record in metrics[-2:]] == [
        4 * (iteration + 1), 4 * (iteration + 2),
    ]  # fmt: skip


def latest(folder: Path) -> str:
    return (folder / "saved" / "latest").read_text().strip()


def test_a_bad_row_ends_the_launch_with_one_line(config, tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [json.dumps(row)] * 3 + [json.dumps(row | {"images": ["none.png"]})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    done = launch(TORCHRUN, "--config", config, "--train-data", tmp_path / "rows.jsonl")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(f"error: {tmp_path}/rows.jsonl:4: ")
    assert OUR_CODE not in done.stderr  # in no traceback; torchrun prints one of its own
    assert not (tmp_path / "out" / "results.json").exists()


REFUSED = {
    "an unknown flag": (["--tensor-parallel", "2"], "unknown flag --tensor-parallel"),
    "a size that does not divide": (
        ["--tensor-model-parallel-size", "2", "--linear-num-key-heads", "1"],
        "linear_num_key_heads 1 does not divide by tensor_model_parallel_size 2",
    ),
    "too few ranks": (["--tensor-model-parallel-size", "2"], "world_size 1 does not divide"),
    "no such file": (["--config", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_work_exit_with_2_and_one_line(config, case):
    flags, words = REFUSED[case]
    done = launch(ALONE, "--config", config, *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert not done.stdout


VICTIM = """
import pathlib, signal, sys, time

def stop(number, _):
    time.sleep(4)
    out.write_text(signal.Signals(number).name)
    sys.exit(0)

out = pathlib.Path(sys.argv[1])
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
out.with_suffix(".up").touch()
time.sleep(300)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("patience", "saved"), [("60", True), ("1", False)])
def test_ranks_have_the_time_to_save_that_they_are_given(tmp_path, sent, patience, saved):
    """And hear of SIGUSR1, which torchrun has no name for unless it is told."""
    script, out = tmp_path / "victim.py", tmp_path / "out"
    script.write_text(VICTIM)
    command = [sys.executable, "tools/launch.py", "--standalone", str(script), str(out)]
    environ = environment() | {"STOP_TIMEOUT": patience}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + TIMEOUT
        while not out.with_suffix(".up").exists():
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(sent)
        _, said = process.communicate(timeout=TIMEOUT)
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT)
    assert process.returncode == 1 and f"error: stopped by signal {sent}" in said
    assert out.exists() == saved
    if saved:
        assert out.read_text() == sent.name


def test_a_node_that_comes_back_knows_whether_its_job_trains():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    endpoint = f"127.0.0.1:{store.port}"
    assert not begun(endpoint, "mm")
    C10dRendezvousBackend(store, "mm").set_state(b"two nodes")
    assert begun(endpoint, "mm") and not begun(endpoint, "mm-doctor")
    assert not begun("127.0.0.1:1", "mm") and not begun("no endpoint", "mm")  # nobody is there
