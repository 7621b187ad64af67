"""Exports of each origin, before and after training."""

from __future__ import annotations

from pathlib import Path

import pytest

SETTINGS = {"max_num_tiles": 3, "image_mean": [0.5, 0.4, 0.3], "max_image_tokens": 24}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(fused, looks, run)` -> (checkpoint, export, lines of the export), each made once."""
    # Not above: they import megatron-core, before which tests/conftest.py installs.
    from support.exports import converted, exported, save_origin, trained
    from support.folders import one_rank_job

    root, cache = tmp_path_factory.mktemp("exports"), {}

    def make(fused: bool, looks: bool, run: bool) -> tuple[Path, Path, list[str]]:
        key = f"{fused:d}{looks:d}{run:d}"
        if key in cache:
            return cache[key]
        origin = root / f"origin{fused:d}"
        folders = [origin / "language"] if fused else [origin / "language", origin / "vision"]
        if not origin.exists():
            save_origin(origin, fused=fused)
        base = root / f"base{fused:d}{looks:d}"
        if not base.exists():
            converted(folders, base, looks=looks)
        checkpoint = base
        if run:
            checkpoint = trained(base, root / key, folders[0], **SETTINGS)
        lines = exported(checkpoint, root / f"export{key}")
        cache[key] = checkpoint, root / f"export{key}", lines
        return cache[key]

    with one_rank_job():
        yield make
