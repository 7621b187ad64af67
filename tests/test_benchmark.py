"""The benchmark runs and says what it should; how fast anything was is not asserted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
