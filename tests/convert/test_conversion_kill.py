"""SIGKILL at any moment of a conversion: nothing looks finished that is not, and the next run
makes what an undisturbed one makes, bitwise.

`KILLS=300 python -m pytest tests/convert/test_conversion_kill.py -s` kills before every single
change of what is on disk and 300 times more; the default is what fits into a test run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from megatron_mm.checkpoint.lock import NAME as LOCK
from megatron_mm.convert import to_hf
from megatron_mm.errors import CheckpointError
from support.folders import save_fused
from support.forked_tools import Tools

pytestmark = pytest.mark.kills

KILLS = int(os.environ.get("KILLS", "8"))
LAST = 8  # changes at the end of a run, in which it becomes a result: all of them are tried


@pytest.fixture(scope="module")
def tools():
    made = Tools()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "hf"
    save_fused(folder)
    return folder


@pytest.fixture(scope="module")
def mega(hf, tools):
    folder = hf.parent / "mega"
    assert tools.run("hf_to_megatron", "--hf", hf, "--out", folder)[0] == 0
    return folder


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder and what is in it, without the identity that each save draws
    anew and the checksums of files that carry it, which `checkpoint_is_there` checks, and without
    the lock of a process that was killed."""
    identities = {json.loads(run.read_text())["identity"] for run in folder.rglob("run.json")}
    return {
        path.relative_to(folder).as_posix(): _digest(path, identities)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def _digest(path: Path, identities: set[str]) -> str:
    held = path.read_bytes()
    if path.name == "run.json":
        held = json.dumps(json.loads(held) | {"checksums": 0, "checksum": 0}).encode()
    for identity in identities:
        held = held.replace(identity.encode(), bytes(len(identity)))
    return hashlib.sha256(held).hexdigest()


def checkpoint_is_there(target: Path) -> bool:
    """Loads it as a user would."""
    try:
        to_hf.open_checkpoint(target)
    except CheckpointError:
        return False
    return True


def kill_often(tools: Tools, tool: str, args: list, target: Path, is_there) -> Counter:
    """Kill, look, start again on top of what is left."""
    command = (tool, *args, "--out", target)
    status, changes = tools.run(*command)
    assert status == 0
    whole = content(target)
    chance = random.Random(f"{tool} {KILLS}")
    early, late = range(1, changes - LAST), range(changes - LAST, changes + 1)
    some = early if len(early) <= KILLS else chance.sample(early, KILLS // 2)
    kills = [dict(die_at=change) for change in (*some, *late)]
    kills += [dict(kill_after=chance.uniform(0, 0.4)) for _ in range(KILLS // 2)]
    seen = Counter()
    for kill in kills:
        for path in target.parent.iterdir():
            shutil.rmtree(path)
        status, _ = tools.run(*command, **kill)
        if is_there(target):
            seen["finished"] += 1
            assert content(target) == whole, kill
            continue
        assert status == -9, kill
        seen["partial" if any(target.parent.iterdir()) else "nothing"] += 1
        assert tools.run(*command)[0] == 0, f"does not start again after {kill}"
        assert is_there(target) and content(target) == whole, kill
        assert list(target.parent.iterdir()) == [target], "leftovers"
        assert not (target / LOCK).exists(), "the lock of a run that has ended"
    print(f"{tool}: {len(kills)} kills, {changes} changes: {dict(seen)}")
    return seen


def test_hf_to_megatron(tools, hf, tmp_path):
    seen = kill_often(tools, "hf_to_megatron", ["--hf", hf], tmp_path / "made", checkpoint_is_there)
    assert seen["partial"] >= LAST // 2 and seen["finished"], "the kills missed"


def test_megatron_to_hf(tools, mega, tmp_path):
    """A folder of Hugging Face's has no mark of being whole, so it must not be there before."""
    seen = kill_often(
        tools, "megatron_to_hf", ["--checkpoint", mega], tmp_path / "made", Path.exists
    )
    assert seen["partial"] >= LAST // 2 and seen["finished"], "the kills missed"
