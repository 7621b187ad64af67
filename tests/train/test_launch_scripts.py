"""The scripts of examples/launch without their nodes, and what the doctor says of two."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_mm.config import make_parser

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"


@pytest.mark.parametrize("copied", [False, True], ids=["its own", "a copy"])
def test_slurm_starts_the_nodes_in_the_folder_of_the_call(copied, tmp_path):
    """Slurm runs a copy of the script in its spool, with its own variables."""
    (tmp_path / "bin").mkdir()
    original = "/home/me/mine.sbatch" if copied else LAUNCH / "slurm.sbatch"
    job = f"   Command={original} a.yaml"
    for name, text in {
        "scontrol": f'[ "$1 $2" = "show hostnames" ] && echo n1 || echo "{job}"',
        "srun": 'echo "$RDZV_ENDPOINT $PWD $*"',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    spool = tmp_path / "spool"
    spool.write_text((LAUNCH / "slurm.sbatch").read_text())
    folder = ROOT if copied else tmp_path
    slurm = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1",
        "SLURM_CPUS_PER_TASK": "96",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(spool), "a.yaml", "--lr", "1"],
        cwd="/", env=os.environ | slurm, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    node = "examples/launch/node.sh" if copied else LAUNCH / "node.sh"
    flags = "--cpus-per-task=96 --kill-on-bad-exit=0"
    said = f"n1:20007 {folder} {flags} {node} a.yaml --lr 1\n"
    assert done.stdout == said


def test_what_differs_between_ranks_is_named():
    doctor = importlib.import_module("megatron_mm.doctor.ranks")
    notes = [
        {
            "host": f"node{n}",
            "same": {"torch": "2.11.0", "code": "aa"},
            "settings": {},
            "problem": "",
        }
        for n in range(3)
    ]
    assert doctor.difference(notes) is None
    notes[2]["same"] = {"torch": "2.10.0", "code": "aa"}
    assert doctor.difference(notes) == (
        "torch differs: rank 2 on node2 has 2.10.0, rank 0 on node0 has 2.11.0; give every node "
        "the same"
    )
    notes[1]["problem"] = "unknown flag --x"
    assert doctor.difference(notes) == "rank 1 on node1 refuses the run: unknown flag --x"


SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    text = path.read_text()
    for named in re.findall(r"(?:examples|tools)/[\w./-]+\.(?:yaml|sh|py|sbatch)", text):
        assert (ROOT / named).is_file(), named
    trainer = text[text.index("-m megatron_mm.train") :] if "-m megatron_mm.train" in text else ""
    known = make_parser().format_help()
    flags = re.findall(r"(?<![\w-])--[a-z][a-z-]+", trainer)
    assert all(flag in known for flag in flags)


def test_the_manifest_names_what_there_is():
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert job["kind"] == "JobSet"
    (part,) = job["spec"]["replicatedJobs"]
    template = part["template"]["spec"]
    (container,) = template["template"]["spec"]["containers"]
    for path in container["command"]:
        assert (ROOT / path).is_file(), path
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(env["NNODES"]) == template["parallelism"] == template["completions"] == 32
    assert int(env["NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # The first pod of the only job of the set, under the set's own service.
    name = job["metadata"]["name"]
    host, port = env["RDZV_ENDPOINT"].split(":")
    assert host == f"{name}-{part['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    asked = set(env)
    script = (LAUNCH / "node.sh").read_text()
    assert all(word in script for word in asked)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["expandable_segments:True", "", f"/scratch/triton-{os.getuid()}"]),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512", "TRITON_CACHE_DIR": "/mine"},
            ["", "max_split_size_mb:512", "/mine"],
        ),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, ["a:1", "", f"/scratch/triton-{os.getuid()}"]),
    ],
)
def test_memory_and_kernels_of_a_gpu_are_looked_after(tmp_path, given, expected):
    """By node.sh, unless the user did it."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_CACHE_DIR")
    python = tmp_path / "python"
    lines = "\n".join(f'echo "${{{name}:-}}"' for name in names)
    python.write_text(f"#!/usr/bin/env bash\n{lines}\n")
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in names}
    words = {"PYTHON": str(python), "SKIP_DOCTOR": "1", "TMPDIR": "/scratch"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "node.sh"), "a.yaml"],
        env=kept | words | given, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[:3] == expected, done.stderr
