"""Commands under the fake GPU, started as a user would."""

from __future__ import annotations

import re
import sys

import pytest

from megatron_mm.config import dump_yaml
from support.launches import ROOT, TORCHRUN, launch
from support.trainers import digits_run

pytestmark = pytest.mark.launches

PRETENDED = [sys.executable, "-m", "tools.fake_gpu"]


def test_a_script_runs_and_the_report_follows(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "x = torch.ones(2, device='cuda')\n"
        "print(sys.argv[1:], (x + x).tolist(), torch.cuda.is_available())\n"
    )
    done = launch(PRETENDED, script, "--its", "own")
    assert done.stdout == "['--its', 'own'] [2.0, 2.0] True\n"
    assert "2 kernels launched, 1 host waits" in done.stderr
    assert re.search(r"1  tolist  other  \S*script.py:3", done.stderr)


def test_without_a_command_it_says_how(tmp_path):
    done = launch(PRETENDED)
    assert done.returncode == 2
    assert "usage: python -m tools.fake_gpu (-m MODULE | SCRIPT)" in done.stdout


def test_the_pages_example_runs():
    page = (ROOT / "tools/fake_gpu/README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    done = launch([sys.executable, "-c", example])
    assert done.returncode == 0, done.stderr


def test_two_ranks_of_torchrun_train_and_save_behind_their_back(scenes, tmp_path):
    run = digits_run(scenes, train_iters=2, pipeline_model_parallel_size=2, valid_data=None)
    run.logging.output_dir = str(tmp_path / "out")
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(run))
    command = [*TORCHRUN[:-2], "-m", "tools.fake_gpu", "-m", "megatron_mm.train"]
    flags = ["--config", config, "--save", tmp_path / "saved", "--async-save"]
    done = launch(command, *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "saved" / "latest").read_text() == "iter_0000002\n"
    (launched,) = re.findall(r"^(\d+) kernels launched", done.stderr, re.MULTILINE)  # by rank 0
    assert int(launched) > 1000
