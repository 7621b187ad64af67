"""Sockets of a rank: groups connect when they are used, and the limit is raised and checked."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.config import ParallelConfig
from megatron_mm.doctor.ranks import examine
from megatron_mm.parallel import descriptors, groups
from support.launches import ROOT, environment

FEW = 300


def test_the_need_by_hand():
    # Two groups of 1,024 ranks, and 512 for everything else.
    assert descriptors.needed(1024) == 2560
    assert descriptors.problem(2560, 1024) is None
    said = descriptors.problem(1024, 1024)
    assert "may open 1,024 files and sockets, 1,024 ranks need 2,560" in said
    assert "\n" not in said


RAISED = """
import os, resource
from megatron_mm.config import ParallelConfig
from megatron_mm import platform
platform.install()
from megatron_mm.parallel import groups
groups.start(ParallelConfig())
print(*resource.getrlimit(resource.RLIMIT_NOFILE), os.environ["TORCH_GLOO_LAZY_INIT"])
"""


def run_with_few(code: str) -> tuple[subprocess.CompletedProcess, int]:
    """Runs Python code in a process of a low limit; returns it and the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard)),
    )  # fmt: skip
    return done, hard


# 6 s of CPU time: a process with its imports.
@pytest.mark.slow
def test_a_rank_raises_its_limit_as_it_starts():
    done, hard = run_with_few(RAISED)
    assert done.stdout.split() == [str(hard), str(hard), "1"], done.stderr


AGENT = """
import resource, runpy, sys
sys.argv = ["launch.py", "--standalone", "--no-python", "bash", "-c", "ulimit -Sn"]
runpy.run_path("tools/launch.py", run_name="__main__")
"""


@pytest.mark.launches
def test_an_agent_and_its_ranks_have_the_raised_limit():
    done, hard = run_with_few(AGENT)
    assert done.stdout.split() == [str(hard)], done.stderr


SOCKETS = """
import os
from megatron_mm import platform
platform.install()
from megatron_mm.config import ParallelConfig
from megatron_mm.parallel import groups

def sockets():
    files = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(f).startswith("socket") for f in files if os.path.lexists(f))

groups.start(ParallelConfig())
before = sockets()
built = groups.build(ParallelConfig())
os.write(1, f"{sockets() - before}\\n".encode())
groups.stop()
"""


@pytest.mark.launches
def test_groups_connect_when_they_are_used(tmp_path):
    """Four ranks; a group that holds all of them would connect each to three others at once, and
    there are more than four such groups."""
    script = tmp_path / "sockets.py"
    script.write_text(SOCKETS)
    counts = {}
    for lazy in ("1", "0"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        variables = environment() | {"PYTHONPATH": str(ROOT)}
        if lazy == "0":
            variables["TORCH_GLOO_LAZY_INIT"] = lazy
        done = subprocess.run(
            [*command, "--nproc-per-node", "4", str(script)],
            capture_output=True, text=True, env=variables, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        counts[lazy] = [int(n) for n in done.stdout.split()]
        assert len(counts[lazy]) == 4
    assert min(counts["0"]) - max(counts["1"]) >= 3 * 4, counts


def on_rank_twins() -> list:
    groups.build(ParallelConfig(expert_model_parallel_size=2))
    return [value for name, value in vars(parallel_state).items() if name.endswith("_GLOO")]


def test_no_group_of_megatron_core_has_a_twin(ranks):
    for twins in ranks(4, on_rank_twins):
        assert len(twins) > 3 and not any(twins)


def on_rank_examined(limits: list[int]):
    limit = limits[dist.get_rank()]
    original, descriptors.raise_limit = descriptors.raise_limit, lambda: limit
    try:
        return examine([])
    finally:
        descriptors.raise_limit = original


def test_the_doctor_names_the_rank_that_has_too_few(ranks):
    for lines, problem in ranks(2, on_rank_examined, [20_000, 515]):
        assert lines[-1] == ("descriptors", "515, 516 are needed", False)
        assert f"rank 1 on {os.uname().nodename}: a process may open 515 files" in problem
    for lines, problem in ranks(2, on_rank_examined, [20_000, 516]):
        assert ("descriptors", "516, 516 are needed", True) in lines and problem is None
