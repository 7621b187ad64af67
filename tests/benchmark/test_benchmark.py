"""The benchmark runs and says what it should; how fast anything was is not asserted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEAKS = ("ours", "transformers")
VERSIONS = {"cpu", "cores", "threads", "python", "torch", "transformers", "megatron-core"}


@pytest.fixture
def benchmark(tmp_path, monkeypatch, capfd):
    """In this process, which has torch and transformers imported already."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("benchmark")

    def run(*args: str) -> dict:
        file = tmp_path / "out.json"
        capfd.readouterr()
        assert tool.main([*args, "--json", str(file)]) == 0
        return read(file, capfd.readouterr().out)

    return run


def read(file: Path, said: str) -> dict:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(said) == found and set(found["environment"]) == VERSIONS
    return found


# 10 s of CPU time: both sides are built, compared and timed.
@pytest.mark.slow
def test_train_against_transformers(benchmark):
    arguments = "train --against transformers --models tiny --samples 2 --rounds 3 --warmup 0"
    found = benchmark(*arguments.split())["models"]["tiny"]
    assert len(found["losses"]) == found["rounds"] == 3
    assert found["ratio"] > 0 and found["ratio_quartiles"][0] <= found["ratio_quartiles"][1]
    assert found["ours_tokens_per_second"] > 0 and found["transformers_tokens_per_second"] > 0
    assert found["memory"].keys() == {"padded", "one by one"}
    for memory in (sides[key] for sides in found["memory"].values() for key in PEAKS):
        # Weights and both moments of Adam stay between steps, in fp32.
        assert memory["kept_bytes"] >= 3 * 4 * found["parameters"]
        assert memory["peak_bytes"] == memory["kept_bytes"] + memory["step_bytes"]
    # Both compute the same steps: fp32 rounding at first (2e-7 measured), which Adam then
    # magnifies (2e-6 after three updates). Another weight or label is seen at 1e-2.
    assert max(found["loss_differences"]) < 1e-4


def test_delta_rule(benchmark):
    shapes = benchmark("gdn", "--rounds", "1", "--warmup", "0")["shapes"]
    assert {s["length"] for s in shapes} == {24, 256, 2048}
    assert {s["head_width"] for s in shapes} == {16, 64, 128}
    # Two fp32 algorithms, output and every gradient; measured up to 1e-6.
    assert max(s["largest_difference"] for s in shapes) < 1e-5


def test_clvr(benchmark):
    arguments = "clvr --models tiny --samples 3 --rounds 2 --warmup 0"
    found = benchmark(*arguments.split())["models"]["tiny"]
    tokens = found["tokens_per_step"]
    assert tokens["looking"] == tokens["blind"]
    assert sum(tokens["looking"]) < sum(tokens["full"])
    assert 1.0 < found["clvr_flops_ratio"] < 2.0
    assert found["summary_over_full_stream"]["rounds"] == 2


@pytest.mark.launches
def test_convert_against_a_copy(tmp_path):
    """In a process of its own: what is measured is its memory."""
    file = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "convert", "--json", str(file)]
    command += f"--gigabytes 0.1 --rounds 1 --warmup 0 --folder {tmp_path}".split()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read(file, done.stdout)
    assert found["bytes"] > 0.1e9 and found["tensors"] > 50 and found["copy"]["ratio"] == 1
    for side in ("hf_to_megatron", "megatron_to_hf"):
        assert found[side]["ratio"] > 0 and found[side]["bytes_per_second"] > 0
        # Python, torch and megatron-core alone are half of what is allowed here.
        assert 0 < found[side]["peak_bytes"] < found["allowed_peak_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_reinforcement_learning(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # importing it fails, installed or not
    arguments = "rl --against transformers --models tiny --rounds 1 --warmup 0 --tokens 4"
    found = benchmark(*arguments.split())
    found = found["models"]["tiny"]
    assert found["grpo_step"].startswith("not installed") and "pip install" in found["grpo_step"]
    drawn = found["generation"]
    assert len(set(drawn["prompt_tiles"])) > 2 and len(set(drawn["prompt_tokens"])) > 2
    # With images and text, of four lengths: a tile in the wrong row or a padded state shows.
    assert drawn["prompts_of_equal_greedy_tokens"] == {"padded": 4, "prompt by prompt": 4}
    assert drawn["ratio"] > 0 and drawn["with_recorded_routes"]["ratio"] > 0
    growth = found["token_at_512_over_16"]
    assert growth.keys() == {"gated delta rule", "attention"}
    # It reads 32 times the positions; 3.4 times the processor time measured.
    assert growth["attention"]["cpu_ratio"] > growth["gated delta rule"]["cpu_ratio"] > 0


def test_a_step_of_grpo_without_trl(benchmark):
    """Our side of the comparison: completions of the asked length, and weights that move."""
    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    rl, grpo, prompts = (
        importlib.import_module(f"megatron_mm.benchmark.{n}") for n in ("rl", "grpo", "prompts")
    )
    run = rl._run("tiny")
    samples = prompts.make_prompts(run, "tiny", 2, images=False, seed=0)
    grpo.grpo_run(run, 2, 4, 5, max(len(sample.tokens_T) for sample in samples))
    groups.start(ParallelConfig())
    try:
        ours = grpo.OurGRPO(run, groups.build(ParallelConfig()), prompts.Prompts(samples))
        weight = ours.engine.chunks[0].output_layer.weight
        before = weight.detach().clone()
        lengths = [ours.step(), ours.step()]
        ours.close()
    finally:
        groups.stop()
    assert lengths == [5.0, 5.0] and not weight.equal(before)
