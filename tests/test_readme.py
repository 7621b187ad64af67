"""The README names every file and every command it shows exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in done.stdout.splitlines()]


def test_every_source_file_is_in_the_map():
    folders = ("megatron_mm", "tools", "examples")
    names = [
        path.name for path in tracked() if path.parts[0] in folders and path.name != "__init__.py"
    ]
    missing = sorted({name for name in names if name not in README})
    assert len(names) > 50 and not missing


def test_every_file_in_the_map_exists():
    known = {path.name for path in tracked()} | {path.as_posix() for path in tracked()}
    listed = README.split("## Where everything is")[1].split("## Licence")[0]
    named = re.findall(r"`([\w./-]+\.(?:py|sh|yaml|j2|toml|txt))`", listed)
    missing = [n for n in named if n not in known and f"examples/{n}" not in known]
    assert len(named) > 60 and not missing


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`?make ([a-z-]+)", README))
    assert targets and all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_every_flag_exists():
    from megatron_mm.config import make_parser

    known = make_parser().format_help()
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", README)) - {"--nproc-per-node"}
    flags -= {"--cpp_ext", "--cuda_ext", "--no-build-isolation"}  # of pip
    # of tools/benchmark.py
    flags -= {"--against", "--json", "--samples", "--data", "--routing"}
    # of tools/plan.py
    flags -= {"--world-size", "--gpu", "--images", "--supervised", "--chart"}
    flags -= {"--seeds"}  # of tools/arms.py
    # of tools/discover_experts.py
    flags -= {"--data", "--labeller", "--cluster-size", "--min-lift", "--selectivity"}
    # of the converting tools
    flags -= {"--hf", "--hf-vision", "--out", "--dry-run", "--dtype", "--checkpoint", "--assets"}
    unknown = [flag for flag in flags if flag not in known]
    assert len(flags) > 8 and not unknown
