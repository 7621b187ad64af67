"""tools/doctor.py on this machine and on spoilt ones; each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mm.doctor.machine import Finding, used

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parents[2]
DOCTOR = ROOT / "tools" / "doctor.py"


def package(folder: Path, name: str, code: str, distribution: str, version: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (info / "METADATA").write_text(text)


def doctor(*folders: Path) -> tuple[int, dict[str, str]]:
    """(exit code, what it says by the name in the first column)."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, DOCTOR], capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    return done.returncode, {line[:20].strip(): line[20:].strip() for line in lines}


@pytest.fixture(scope="module")
def here():
    return doctor()


def test_a_run_can_start_here(here):
    code, said = here
    assert code == 0 and said["a run"].startswith("ok")
    assert said["torch"].startswith(f"ok       {torch.__version__}")
    names = {"python", "gpu", "gloo", "nccl", "megatron-core", "transformer-engine", "fla"}
    names |= {"causal-conv1d", "apex", "flash-attn"}
    names |= {f"-> {part}" for part in ("linear", "attention", "experts", "optimizer")}
    assert names | {"-> gated delta rule"} < set(said)


def test_help_is_help():
    done = subprocess.run([sys.executable, DOCTOR, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "torchrun ... tools/doctor.py" in done.stdout


def test_what_is_missing_comes_with_its_remedy(here):
    _, said = here
    assert "none; runs use the CPU" in said["gpu"]
    if importlib.util.find_spec("transformer_engine") is None:
        assert "not installed" in said["transformer-engine"]
        assert "pip install" in said["transformer-engine"]
    assert "github.com/NVIDIA/apex" in said["apex"] or "ok" in said["apex"]
    assert said["-> optimizer"].endswith("torch's Adam")


def test_a_half_installed_transformer_engine(tmp_path):
    """It stops `import megatron.core` with FileNotFoundError, which upstream does not catch."""
    spoilt = "raise FileNotFoundError('no libtransformer_engine.so')"
    package(tmp_path, "transformer_engine", spoilt, "transformer-engine", "2.20.2")
    code, said = doctor(tmp_path)
    assert code == 1
    assert "does not load (FileNotFoundError: no libtransf" in said["transformer-engine"]
    assert "pip uninstall transformer-engine" in said["transformer-engine"]
    assert said["megatron-core"].startswith("MISSING") and "see transf" in said["megatron-core"]
    assert said["a run"].startswith("MISSING  cannot start: FileNotFoundError")


def test_flash_linear_attention_without_a_gpu_is_to_be_removed(tmp_path):
    package(tmp_path, "fla", "", "flash-linear-attention", "0.6.0")
    code, said = doctor(tmp_path)
    assert said["fla"] == "-        0.6.0 without a GPU: remove it"
    assert code == 0 and said["-> gated delta rule"].endswith("ours in torch")


@pytest.mark.parametrize(
    ("gpu", "fla", "ok", "text"),
    [
        (True, True, True, "FLA's Triton kernel"),
        (True, False, False, "ours in torch, the slower one: install fla"),
        (False, False, True, "ours in torch"),
    ],
)
def test_the_delta_rule_of_a_gpu_without_its_kernel_is_not_fine(gpu, fla, ok, text):
    names = ("transformer-engine", "fla", "apex")
    found = used({name: Finding(name, "", name == "fla" and fla) for name in names}, gpu)
    (line,) = [finding for finding in found if finding.name == "-> gated delta rule"]
    assert line.ok is ok and line.text.startswith(text) and not line.needed


def test_another_megatron_core(tmp_path):
    info = tmp_path / "megatron_core-0.13.1.dist-info"
    info.mkdir()
    text = "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.13.1\n"
    (info / "METADATA").write_text(text)
    code, said = doctor(tmp_path)
    assert code == 1 and "0.13.1, platform.py was written for 0.19.2" in said["megatron-core"]
    assert "pip install megatron-core==0.19.2" in said["megatron-core"]
    assert "needs megatron-core 0.19.2" in said["a run"]


def test_a_broken_torch(tmp_path):
    package(tmp_path, "torch", "raise OSError('libcudart.so.13: no such file')", "torch", "9.9")
    code, said = doctor(tmp_path)
    assert code == 1 and said["torch"].startswith("MISSING  OSError: libcudart.so.13")
    assert said["a run"].startswith("MISSING  cannot start")
