"""GPUs are hidden from all tests and what they start, unless `-m` chooses the tests marked gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.launches import environment
from support.markers import MARKERS, chooses

TESTS = Path(__file__).parent
VARIABLE = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("", False),
        ("gpu", True),
        ("gpu and not slow", True),
        ("gpu and slow", True),
        ("ranks or gpu", True),
        ("not slow", False),
        ("not gpu", False),
        ("not (slow or gpu)", False),
        ("slow and not gpu", False),
        ("not ranks and not kills and not launches and not slow", False),
    ],
)
def test_what_chooses_tests_marked_gpu(expression, chosen):
    assert chooses(expression, "gpu") is chosen


def test_every_marker_is_known(pytestconfig):
    declared = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert set(MARKERS) <= declared


def visible() -> str | None:
    return os.environ.get(VARIABLE)


def test_a_test_sees_none():
    assert visible() == ""


def test_a_rank_sees_none(ranks):
    assert ranks(1, visible) == [""]


def test_a_launched_program_sees_none():
    code = f"import os; print(repr(os.environ[{VARIABLE!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "''\n", done.stderr


PROBE = f"""
import os
from pathlib import Path

def pytest_collection_finish(session):
    kind = "worker" if hasattr(session.config, "workerinput") else "main"
    Path(__file__).with_name(kind).write_text(os.environ.get({VARIABLE!r}, "unset"))
"""


@pytest.mark.launches
@pytest.mark.parametrize(
    ("words", "expression", "expected"),
    [("", "gpu", "0,1"), ("--numprocesses 1", "gpu", "0,1"), ("--numprocesses 1", "kills", "")],
)
def test_a_session_and_its_workers(tmp_path, words, expression, expected):
    """On a machine with two GPUs; the file has no test that an expression chooses."""
    (tmp_path / "probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "pytest", *words.split(), "-p", "no:cacheprovider"]
    command += ["-p", "probe", "-m", expression, str(TESTS / "model" / "test_segments.py")]
    path = os.pathsep.join((str(tmp_path), str(TESTS.parent)))
    variables = environment() | {VARIABLE: "0,1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=TESTS.parent, env=variables, capture_output=True, text=True)
    assert done.returncode == 5, done.stdout + done.stderr  # no test was chosen
    (said,) = {f.read_text() for f in tmp_path.iterdir() if f.name in ("main", "worker")}
    assert said == expected
