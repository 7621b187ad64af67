"""The checks of a visit to a GPU, on a fake one: every check runs, and faults are seen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_mm.benchmark.gpu.checks import CHECKS
from megatron_mm.benchmark.gpu.command import main
from megatron_mm.benchmark.gpu.te import aligned_run
from megatron_mm.benchmark.gpu.visit import Row
from megatron_mm.config import validate
from support import gpu_checks
from support.gpu_checks import visit
from support.launches import ROOT, environment

NAMES = [check.name for check in CHECKS]
# What neither this environment nor a fake GPU has.
SKIPPED = {
    "fla": "flash-linear-attention is not installed",
    "memory": "a fake GPU has no memory to measure",
    "te": "Transformer Engine is not installed",
}


# The whole command as a user calls it: a minute of CPU time.
@pytest.mark.launches
@pytest.mark.slow
def test_a_dry_visit(tmp_path):
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--dry", "--out", str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900
    )
    rows = {row["name"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(rows) == NAMES
    for name, row in rows.items():
        wanted = "skipped" if name in SKIPPED else "ok"
        assert row["status"] == wanted, row
        assert SKIPPED.get(name, "") in row.get("why", "")
        assert f"{wanted:<8}{name:<12}" in done.stdout
    # The fake GPU computes what the CPU does; another choice of kernel is fp32 rounding.
    figures = rows["gradients"]["figures"]
    for scene in ("plain", "recompute", "lora"):
        assert figures[f"{scene}: worst gradient"] < 1e-5
    assert figures["routes that differ"] == 0
    assert rows["training"]["figures"]["different"] == 0 < rows["training"]["figures"]["tensors"]
    kinds = rows["slice"]["figures"]["kinds"]
    assert {"gated DeltaNet", "attention", "mixture of experts"} < kinds.keys()
    assert all({"forward", "backward"} == kind.keys() for kind in kinds.values())
    assert rows["slice"]["figures"]["launches"] > 0
    steps = [rows["decoding"]["figures"][f"{n} rows"] for n in (16, 128)]
    # Static shapes: a step launches the same whatever the number of rows, few if it is a graph.
    assert 0 < steps[0]["launches"] == pytest.approx(steps[1]["launches"], rel=0.05)


@pytest.mark.launches
def test_a_wrong_delta_rule_fails(tmp_path, capfd):
    code, rows = visit(
        tmp_path,
        *("--only", "environment", "delta_rule"),
        pretend=gpu_checks.with_wrong_delta_rule,
    )
    assert code == 1
    assert rows["environment"]["status"] == "ok"
    assert rows["delta_rule"]["status"] == "failed"
    assert rows["delta_rule"]["problems"][0].startswith("fp32 output is ")
    assert rows["delta_rule"]["figures"]["fp32 output"] > 1e-4
    assert "failed  delta_rule" in capfd.readouterr().out


@pytest.mark.launches
def test_packages_that_are_not_here(tmp_path):
    """Whose checks are not skipped where they are installed: others of their names answer."""
    code, rows = visit(tmp_path, "--only", "fla", "te", pretend=gpu_checks.with_stand_ins)
    assert code == 0, rows
    figures = rows["fla"]["figures"]
    assert rows["fla"]["status"] == rows["te"]["status"] == "ok"
    # The same kernels: in fp32 another order at most, in bf16 the rounding of the inputs' products.
    worst = max(figures["fp32 output"], figures["fp32 state kept"])
    assert worst < 1e-6 < figures["bf16 output"]
    assert {"ours_ms", "fla_ms"} < figures.keys()
    assert rows["te"]["figures"]["bf16 gradients: worst ratio"] < 1.0
    for fp8 in (False, True):
        validate(aligned_run("transformer_engine", fp8=fp8), 1)


@pytest.mark.launches
def test_a_check_that_ends_its_process_costs_no_other(tmp_path):
    code, rows = visit(
        tmp_path,
        *("--only", "environment", "delta_rule", "experts", "te"),
        pretend=gpu_checks.with_a_dying_check,
    )
    assert code == 1
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses == {
        "environment": "ok", "delta_rule": "failed", "experts": "failed", "te": "skipped"
    }  # fmt: skip
    assert rows["delta_rule"]["problems"] == ["the process on the GPU ended with exit code 9"]
    planted, unusable = rows["experts"]["problems"]
    assert planted == "ValueError: planted" and "illegal memory access" in unusable
    assert 'raise ValueError("planted")' in rows["experts"]["error"]


def test_no_check_begins_without_time(tmp_path):
    code, rows = visit(tmp_path, "--minutes", "0", "--only", "environment", "delta_rule")
    assert code == 0 and list(rows) == ["environment", "delta_rule"]
    assert all(row["why"].startswith("no time: it takes about") for row in rows.values())


@pytest.mark.launches
def test_without_a_gpu(capfd):
    assert main(["--only", "environment"]) == 2
    assert "error: there is no CUDA device; --dry" in capfd.readouterr().err


def test_an_unknown_check(capfd):
    assert main(["--only", "gradient"]) == 2
    assert "gradients" in capfd.readouterr().err


def test_the_list(capfd):
    assert main(["--list"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES


def test_a_figure_that_is_no_number_fails():
    row = Row("mine")
    row.at_most("error", float("nan"), 1.0)
    row.at_most("other", 0.5, 1.0)
    assert row.status == "failed" and row.problems == ["error is nan, allowed 1"]
    assert row.as_dict()["figures"]["other"] == 0.5
