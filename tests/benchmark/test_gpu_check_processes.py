"""A visit's processes and machine when something is wrong with them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_mm.benchmark import measure
from megatron_mm.benchmark.gpu import command, environment, worker
from megatron_mm.benchmark.gpu.attention import cudnn, kernels_of, refusal
from megatron_mm.benchmark.gpu.checks import CHECKS
from megatron_mm.benchmark.gpu.visit import CPU_LOG, Visit, cpu_files
from megatron_mm.doctor import ranks
from support import gpu_checks
from support.gpu_checks import visit

PART = "gradients.reference"
ON_CPU = [check for check in CHECKS if check.on_cpu == PART]


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_revision_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.revision() == "unknown"
    assert ranks._revision() == "no git"


def test_a_driver_that_nobody_tells(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._driver() is None
    script(tmp_path, "nvidia-smi", "#!/bin/sh\necho 580.1\n")
    assert environment._driver() == "580.1"
    script(tmp_path, "nvidia-smi", "#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert environment._driver() is None
    script(tmp_path, "nvidia-smi", "#!/nowhere\n")  # OSError
    assert environment._driver() is None

    def hangs(words, timeout, **_):
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert environment._driver() is None


def test_a_dead_helper_is_seen_at_once(tmp_path):
    """Without a deadline the wait would not end."""
    asked = Visit(tmp_path, dry=True)
    helper = command._on_cpu(ON_CPU, asked)
    helper.kill()
    (tmp_path / CPU_LOG).write_text("first\nout of memory\n")
    with pytest.raises(RuntimeError, match=f"(?s)ended without {PART}.*out of memory"):
        asked.from_cpu(PART)
    helper.join()


def test_a_result_of_a_helper_that_has_ended(tmp_path):
    reader, writer = multiprocessing.Pipe(duplex=False)
    writer.close()
    torch.save({"a": 1}, cpu_files(tmp_path, PART)[0])
    assert Visit(tmp_path, dry=True, helper=reader).from_cpu(PART) == {"a": 1}


def test_a_helper_that_cannot_begin_says_so_for_each_part(tmp_path, monkeypatch):
    def planted():
        raise ValueError("planted")

    monkeypatch.setattr(worker, "_write_to", lambda log: None)
    monkeypatch.setattr(worker, "_without_gpu", planted)
    reader, writer = multiprocessing.Pipe(duplex=False)
    parts = [PART, "plan.predicted"]
    with pytest.raises(ValueError, match="planted"):
        worker.compute_on_cpu(parts, Visit(tmp_path, dry=True, helper=reader), writer)
    for part in parts:
        with pytest.raises(RuntimeError, match="on the CPU: ValueError: planted"):
            Visit(tmp_path, dry=True, helper=reader).from_cpu(part)


def test_the_helper_leaves_two_cores(monkeypatch):
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    for cores in (16, 8, 2, 1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        worker._leave_cores()
    assert found == [14, 6, 1, 1]


def test_a_process_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "START", 1)
    gpu = command._GPU(Visit(tmp_path, dry=False), gpu_checks.that_hangs)
    begin = time.monotonic()
    row = gpu.run(CHECKS[0], 300)
    assert row.problems == ["the process on the GPU did not start within 1 s"]
    assert time.monotonic() - begin < 60 and gpu.process is None


def test_variables_of_a_batch_system(tmp_path, monkeypatch):
    for name in command.OF_A_JOB:
        monkeypatch.setenv(name, "3")
    assert visit(tmp_path, "--minutes", "0", "--only", "environment")[0] == 0
    assert not set(command.OF_A_JOB) & os.environ.keys()


@pytest.mark.launches
def test_measurements_are_kept_without_the_helper(tmp_path, monkeypatch):
    """In a job that a batch system says has eight ranks, of which this would be the fourth."""
    start = command._on_cpu

    def dies(*args):
        helper = start(*args)
        helper.kill()
        return helper

    monkeypatch.setattr(command, "_on_cpu", dies)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("MASTER_PORT", "29511")):
        monkeypatch.setenv(name, value)
    code, rows = visit(tmp_path, "--only", "gradients", "slice")
    assert code == 1
    for name, part in (("gradients", PART), ("slice", "plan.predicted")):
        (problem,) = rows[name]["problems"]
        assert problem == f"RuntimeError: the process on the CPU ended without {part}"
    figures = rows["slice"]["figures"]
    assert {"passes_ms", "update_ms", "waits_at", "top"} < figures.keys()
    assert figures["launches"] > 0 and "planned_passes_ms" not in figures
    assert all(len(way) == 1 for kind in figures["kinds"].values() for way in kind.values())


def test_which_kernel_attends():
    q = torch.randn(1, 2, 8, 16)
    fused = kernels_of(lambda: F.scaled_dot_product_attention(q, q, q))
    assert "_scaled_dot_product_flash_attention_for_cpu" in fused
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        steps = kernels_of(lambda: F.scaled_dot_product_attention(q, q, q))
    assert steps == ["_scaled_dot_product_attention_math"]


def test_cudnn_alone_is_allowed_or_refuses():
    """A CPU has no cuDNN, so nothing takes the tensors: no other kernel stands in."""
    q = torch.randn(1, 2, 8, 16)

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    with cudnn(True):
        assert refusal(attend) is not None
    with cudnn(False):
        assert refusal(attend) is None

    def other() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        refusal(other)
