"""The scripts of examples/launch without their nodes, and what the doctor says of two."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
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


@pytest.mark.launches
@pytest.mark.parametrize(("sent", "heard"), [("USR1", "USR1 requeue 7 "), ("TERM", "")])
def test_slurm_saves_and_queues_again_when_time_is_up(tmp_path, sent, heard):
    """srun hands USR1 on as it is, and TERM as KILL (srun(1), signals). TERM comes from scancel."""
    said = tmp_path / "said"
    show = '[ "$1" = show ] && { [ "$2" = hostnames ] && echo n1 || echo "Command=x"; exit; }'
    for name, text in {
        "scontrol": f'{show}\nprintf "%s " "$@" >> {said}',
        "srun": f"""trap 'printf "USR1 " >> {said}; exit 0' USR1
            trap 'printf "TERM " >> {said}; exit 1' TERM
            touch {said}
            for _ in $(seq 600); do sleep 0.1; done""",
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1",
    }  # fmt: skip
    script = (LAUNCH / "slurm.sbatch").read_text()
    assert re.search(r"^#SBATCH --signal=B:USR1@600$", script, re.M)
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch"), "a.yaml"], env=os.environ | slurm,
        start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not said.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.2)  # from the start of srun to the script's `step=`
        job.send_signal(getattr(signal, f"SIG{sent}"))
        job.wait(timeout=60)
        assert said.read_text() == heard
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(job.pid, signal.SIGKILL)


def test_other_hosts_get_what_was_set_here_and_no_secrets(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/usr/bin/env bash\necho "$1 $2"\n')
    ssh.chmod(0o755)
    given = {"WANDB_ENTITY": "my team", "PYTHONPATH": "/mine", "NCCL_DEBUG": "INFO"}
    hidden = {"WANDB_API_KEY": "secret1", "HF_TOKEN": "secret2"}
    done = subprocess.run(
        ["bash", str(LAUNCH / "multi_node.sh"), "a.yaml", "--lr", "1"],
        env=os.environ | given | hidden | {"NODES": "root@a b", "SSH": str(ssh)},
        capture_output=True, text=True,
    )  # fmt: skip
    first, second = sorted(done.stdout.splitlines(), reverse=True)
    assert done.returncode == 0 and first.startswith("root@a cd ") and second.startswith("b cd ")
    for line in (first, second):
        assert "RDZV_ENDPOINT=a:29500 " in line and line.endswith("node.sh a.yaml --lr 1")
        assert "WANDB_ENTITY=my\\ team" in line and "PYTHONPATH=/mine " in line
        assert "NCCL_DEBUG=INFO" in line and "secret" not in line


STUB = """#!/usr/bin/env bash
case "$*" in
*doctor.py*) echo "doctor $*" >> "$SAID"; {doctor} ;;
*megatron_mm.train*) echo "train $*" >> "$SAID" ;;
*) exit 1 ;;
esac
"""


def stubbed(tmp_path, doctor: str) -> dict[str, str]:
    """Variables with which node.sh starts nothing but a stub, which says what it was told."""
    python = tmp_path / "python"
    python.write_text(STUB.replace("{doctor}", doctor))
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("SKIP_DOCTOR", "NODE_ADDR")}
    return kept | {"PYTHON": str(python), "SAID": str(tmp_path / "said")}


@pytest.mark.parametrize(
    ("address", "endpoint", "host"),
    [
        ("127.0.0.1", "localhost:29500", 1),
        ("localhost", "127.0.0.1:29500", 1),
        ("10.0.0.7", "10.0.0.7:29500", 1),
        ("10.0.0.7", "10.0.0.70:29500", 0),
        ("::1", "[::1]:29500", 1),
        ("10.0.0.7", "no-such-host.invalid:29500", 0),
    ],
)
def test_one_node_knows_that_it_holds_the_rendezvous(tmp_path, address, endpoint, host):
    """By its name or its address, whichever the other one is."""
    words = {"NODE_ADDR": address, "RDZV_ENDPOINT": endpoint, "NNODES": "2"}
    environ = stubbed(tmp_path, "exit 0") | words
    subprocess.run(
        ["bash", str(LAUNCH / "node.sh"), "a.yaml", "--lr", "1"], env=environ, check=True
    )
    checked, trained = (tmp_path / "said").read_text().splitlines()
    assert checked.startswith("doctor ") and trained.startswith("train ")
    for line in (checked, trained):
        assert f",is_host={host} " in line and line.endswith("--config a.yaml --resume --lr 1")


def test_the_agent_gets_no_children_of_the_script(tmp_path):
    """Whoever looks for a rank among them would find a zombie."""
    python = tmp_path / "python"
    look = "read -r all < /proc/$$/task/$$/children || true"
    python.write_text(f'#!/usr/bin/env bash\n{look}\necho "children: $all"\n')
    python.chmod(0o755)
    words = {"PYTHON": str(python), "SKIP_DOCTOR": "1", "NNODES": "2"}
    words |= {"NODE_ADDR": "127.0.0.1", "RDZV_ENDPOINT": "localhost:29500"}
    command = ["bash", str(LAUNCH / "node.sh"), "a.yaml"]
    said = [
        subprocess.run(command, env=os.environ | words, capture_output=True, text=True).stdout
        for _ in range(10)  # a zombie was there now and then
    ]
    assert said == ["children: \n"] * 10


def test_a_signal_during_the_checks_ends_the_node(tmp_path):
    """Also where the script is a container's first process, which no signal ends by itself."""
    environ = stubbed(tmp_path, "exec sleep 60") | {"TMPDIR": str(tmp_path)}
    node = subprocess.Popen(["bash", str(LAUNCH / "node.sh"), "a.yaml"], env=environ)
    end = time.monotonic() + 60
    while not (tmp_path / "said").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)
    node.terminate()
    assert node.wait(timeout=30) == 143
    assert "train" not in (tmp_path / "said").read_text()


def test_nodes_may_name_their_interfaces_otherwise(monkeypatch):
    doctor = importlib.import_module("megatron_mm.doctor.ranks")
    found = []
    for name, loop in (("ens3", "1"), ("eth0", "1"), ("eth0", "0")):
        for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            monkeypatch.setenv(variable, name)
        monkeypatch.setenv("NCCL_P2P_DISABLE", loop)
        found.append(doctor.note(None, "")["same"]["environment"])
    assert found[0] == found[1] != found[2]


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


def test_a_time_that_is_no_number_is_one_line():
    environ = os.environ | {"STOP_TIMEOUT": "10m"}
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), "--nproc-per-node", "1", "x.py"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: STOP_TIMEOUT is '10m'; allowed: whole seconds"
    assert "Traceback" not in done.stderr
