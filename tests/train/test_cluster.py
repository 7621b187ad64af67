"""Two nodes for real: two agents with one rendezvous, which die, come back, or never come."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_mm.config import RunConfig, dump_yaml, preset
from megatron_mm.config.settings import DataPhase
from megatron_mm.report.metrics_log import read_metrics
from support.launches import free_port

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
PATIENCE = 240  # seconds; a launch takes about 8 on two idle cores
STEPS = 60


@pytest.fixture
def config(tmp_path, scenes) -> Path:
    run = RunConfig(model=preset("tiny"))
    run.model.hybrid_layer_pattern = "GE L *E J"
    run.data.train_data = [DataPhase(str(scenes / "mix.jsonl"))]
    run.data.tokenizer_model = str(scenes / "tokenizer.model")
    run.data.extra_columns = ["scene", "other_images"]
    run.data.seq_length, run.data.max_num_tiles = 128, 9
    run.training.train_iters = STEPS
    run.training.micro_batch_size, run.training.global_batch_size = 2, 4
    run.checkpoint.save, run.checkpoint.save_interval = str(tmp_path / "saved"), 2
    run.checkpoint.keep_last_checkpoints = 2
    run.logging.output_dir = str(tmp_path / "out")
    run.logging.wandb_mode, run.logging.tensorboard = "disabled", False
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run))
    return path


class Nodes:
    """Agents as examples/launch/node.sh starts them on the nodes of a job."""

    def __init__(self, folder: Path, config: Path, **variables: object):
        self.folder, self.config, self.agents = folder, config, []
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        words = {
            "NNODES": 2,
            "NPROC_PER_NODE": 1,
            "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
            "RDZV_CONF": "keep_alive_interval=1,keep_alive_max_attempt=2",
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": 1,
            "SKIP_DOCTOR": 1,
            "PYTHONUNBUFFERED": 1,
        } | variables
        # The first agent holds the rendezvous, whoever comes first.
        self.env = kept | {k: str(v) for k, v in words.items() if v is not None}

    def start(self, *flags: str) -> subprocess.Popen:
        number = len(self.agents)
        address = {"NODE_ADDR": f"127.0.0.{min(number, 1) + 1}"}
        log = (self.folder / f"node{number}.log").open("w")
        command = ["bash", str(LAUNCH / "node.sh"), str(self.config), *flags]
        agent = subprocess.Popen(
            command, env=self.env | address, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        self.agents.append(agent)
        return agent

    def said(self, node: int) -> str:
        return (self.folder / f"node{node}.log").read_text()

    def left(self) -> list[str]:
        """Processes of this job that still run: each has the config on its command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended while we looked
                continue
            if str(self.config) in line:
                found.append(f"{folder.name} {line}")
        return found

    def stop(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.terminate()
        for agent in self.agents:
            agent.wait(timeout=PATIENCE)


@pytest.fixture
def nodes(tmp_path, config):
    made: list[Nodes] = []

    def make(**variables: object) -> Nodes:
        made.append(Nodes(tmp_path, config, **variables))
        return made[-1]

    yield make
    for job in made:
        job.stop()


def wait_until(what, description: str, job: Nodes) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, f"{description}: {[job.said(n) for n in (0, 1)]}"
        time.sleep(0.05)


def saved(folder: Path) -> int:
    latest = folder / "saved" / "latest"
    return int(latest.read_text().strip().removeprefix("iter_")) if latest.exists() else 0


def rank_of(agent: subprocess.Popen) -> int:
    """The process of the agent's one rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return int(children[0])


@pytest.mark.launches
@pytest.mark.kills
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_node_dies_and_comes_back_and_the_job_goes_on(nodes, tmp_path):
    job = nodes(MAX_RESTARTS=2)
    first, second = job.start(), job.start()
    wait_until(lambda: saved(tmp_path) >= 4, "no checkpoint", job)
    orphan = rank_of(second)
    second.kill()
    wait_until(lambda: not alive(orphan), "the rank of a killed agent lives on", job)
    before = saved(tmp_path)
    assert before < STEPS, "it had ended before the node died"
    job.start()
    assert [agent.wait(timeout=PATIENCE) for agent in job.agents] == [0, -9, 0], job.said(0)
    assert first.returncode == 0 and saved(tmp_path) == STEPS
    steps = [int(n) for log in range(3) for n in re.findall(r"^step (\d+)/", job.said(log), re.M)]
    assert steps.count(1) == 1 and max(steps) == STEPS  # it did not begin again
    iterations = [record["iteration"] for record in read_metrics(tmp_path / "out/metrics.jsonl")]
    assert iterations == list(range(1, STEPS + 1))
    assert not job.left()


@pytest.mark.launches
@pytest.mark.kills
def test_a_node_is_told_to_stop_and_the_others_wait_for_it(nodes, tmp_path):
    """As where one pod of many is moved: the run is saved and not called done."""
    job = nodes(MAX_RESTARTS=1)
    first, second = job.start(), job.start()
    wait_until(lambda: saved(tmp_path) >= 4, "no checkpoint", job)
    second.terminate()
    assert second.wait(timeout=PATIENCE) == 1 and "stopped by signal" in job.said(1)
    before = saved(tmp_path)
    assert before < STEPS, "it had ended before the node was told"
    assert first.poll() is None
    assert job.start().wait(timeout=PATIENCE) == 0, job.said(2)
    assert first.wait(timeout=PATIENCE) == 0, job.said(0)
    iterations = [record["iteration"] for record in read_metrics(tmp_path / "out/metrics.jsonl")]
    assert iterations == list(range(1, STEPS + 1)) and saved(tmp_path) == STEPS
    steps = [int(n) for log in range(3) for n in re.findall(r"^step (\d+)/", job.said(log), re.M)]
    assert sorted(steps) == iterations  # none was lost
    assert not job.left()


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.launches
@pytest.mark.kills
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_that_fails_for_good_leaves_nothing(nodes, tmp_path):
    job = nodes(MAX_RESTARTS=0)
    agents = [job.start(), job.start()]
    wait_until(lambda: saved(tmp_path) >= 2, "no checkpoint", job)
    os.kill(rank_of(agents[1]), signal.SIGKILL)
    assert [agent.wait(timeout=PATIENCE) for agent in agents] == [1, 1]
    said = [line for line in job.said(1).splitlines() if line.startswith("error: ")]
    assert said == [
        f"error: rank {said[0].split()[2]} on this node ended first, with exit code signal 9; "
        "it has said why"
    ]
    assert "error: rank" in job.said(0)
    assert not job.left()


@pytest.mark.launches
def test_a_rendezvous_that_never_completes(nodes):
    job = nodes(RDZV_TIMEOUT=3)
    begin = time.monotonic()
    assert job.start().wait(timeout=PATIENCE) == 1
    assert time.monotonic() - begin < 60  # 3 s and the start of Python, on a busy machine
    (line,) = job.said(0).splitlines()
    assert line.startswith("error: rendezvous 'mm' at 127.0.0.1:") and "--nnodes" in line
    assert "not all of 2 nodes came in time" in line and not job.left()


@pytest.mark.launches
def test_nodes_with_different_settings_do_not_start(nodes):
    job = nodes(SKIP_DOCTOR=None)
    agents = [job.start(), job.start("--lr", "0.5")]
    assert [agent.wait(timeout=PATIENCE) for agent in agents] == [1, 1]
    said = job.said(0) + job.said(1)
    (line,) = [x for x in said.splitlines() if "differs" in x]
    host = socket.gethostname()
    found = re.fullmatch(
        rf"error: setting optimizer\.lr differs: rank 1 on {host} has ([\d.e-]+), rank 0 on {host} "
        rf"has ([\d.e-]+); give every node the same",
        line,
    )
    assert found and {float(value) for value in found.groups()} == {1e-4, 0.5}
    assert "step 1/" not in said and not job.left()


def namespaces() -> bool:
    """Whether this machine lets us make network namespaces."""
    if os.geteuid() or sys.platform != "linux":
        return False
    name = f"mm-probe-{os.getpid()}"
    try:
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    except FileNotFoundError:
        return False
    if done.returncode == 0:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return done.returncode == 0


@pytest.fixture
def network():
    """Two hosts with a cable between them: {address: network namespace}."""
    made = {f"10.231.77.{n}": f"mm-{os.getpid()}-{n}" for n in (1, 2)}
    wires = [f"mm{os.getpid() % 10**6}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
    for (address, name), wire in zip(made.items(), wires, strict=True):
        ip("netns", "add", name)
        ip("link", "set", wire, "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", wire)
        ip("-n", name, "link", "set", wire, "name", "mm0")
        ip("-n", name, "link", "set", "mm0", "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield made
    for name in made.values():
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.launches
@pytest.mark.skipif(not namespaces(), reason="needs root and network namespaces")
def test_two_hosts_of_a_network(network, config, tmp_path):
    """multi_node.sh, the doctor included, where nothing but the cable joins the nodes."""
    ssh = tmp_path / "ssh"
    cases = "\n".join(
        f'{a}) exec ip netns exec {n} env NODE_ADDR={a} GLOO_SOCKET_IFNAME=mm0 bash -c "$2" ;;'
        for a, n in network.items()
    )
    ssh.write_text(f'#!/usr/bin/env bash\ncase "$1" in\n{cases}\nesac\n')
    ssh.chmod(0o755)
    env = os.environ | {
        "NODES": " ".join(network),
        "SSH": str(ssh),
        "NPROC_PER_NODE": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "RES_OPTIONS": "timeout:1 attempts:1",  # there is no name server
    }
    command = ["bash", str(LAUNCH / "multi_node.sh"), str(config), "--train-iters", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "same everywhere" in done.stdout and "all-to-all" in done.stdout
    assert saved(tmp_path) == 2
    assert not Nodes(tmp_path, config).left()


@pytest.fixture
def elsewhere(tmp_path, scenes, config) -> Path:
    """A user's folder with a config whose paths are all relative to it."""
    folder = tmp_path / "user's folder"
    folder.mkdir()
    tree = yaml.safe_load(config.read_text())
    tree["data"]["train_data"][0]["path"] = "scenes/mix.jsonl"
    tree["checkpoint"]["save"], tree["logging"]["output_dir"] = "saved", "out"
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
    (folder / "scenes").symlink_to(scenes)
    # Another checkout, whose code must not run.
    (folder / "megatron_mm").mkdir()
    (folder / "megatron_mm/__init__.py").write_text("raise SystemExit('the wrong checkout')")
    (folder / "my_plugin.py").write_text("")
    return folder


RELATIVE = ("mine.yaml", "--tokenizer-model", "scenes/tokenizer.model", "--train-iters", "2")


def environment_of(**variables: object) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    words = {"NPROC_PER_NODE": 1, "PYTHON": sys.executable, "OMP_NUM_THREADS": 1} | variables
    return kept | {k: str(v) for k, v in words.items()}


@pytest.mark.launches
@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh"])
def test_relative_paths_are_those_of_the_users_folder(script, elsewhere, tmp_path):
    """Config, flags, paths in the config, plug-ins; for the doctor and the trainer."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/usr/bin/env bash\ncd /\nexec bash -c "$2"\n')  # as at a fresh login
    ssh.chmod(0o755)
    variables = {"NODES": "127.0.0.1", "PORT": free_port(), "SSH": str(ssh)}
    if script == "single_node.sh":
        variables = {}
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *RELATIVE, "--plugins", "my_plugin"],
        cwd=elsewhere, env=environment_of(**variables),
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "same everywhere" in done.stdout
    assert saved(elsewhere) == 2 and (elsewhere / "out" / "metrics.jsonl").is_file()
