"""New files of lines: all whole or none, and never whole in memory."""

from __future__ import annotations

import pytest

from megatron_mm.errors import DataError
from megatron_mm.pass_rate.output import NewFiles


def test_lines_are_written_as_they_come(tmp_path):
    first, second, empty = paths = [tmp_path / "new" / name for name in "abc"]
    with NewFiles(paths) as files:
        for n in range(20_000):
            files.add(first if n % 4 else second, f"line {n}")
        # More than a buffer is on disk already, under another name.
        assert (first.parent / "a.partial").stat().st_size > 100_000 and not first.exists()
    assert files.lines == {first: 15_000, second: 5_000, empty: 0}
    assert first.read_text().splitlines()[:2] == ["line 1", "line 2"]
    assert len(second.read_text().splitlines()) == 5_000
    assert sorted(path.name for path in first.parent.iterdir()) == ["a", "b"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="row 2"), NewFiles([tmp_path / "a"]) as files:
        files.add(tmp_path / "a", "line")
        raise DataError("row 2")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(DataError, match="b is there already; remove it, or name another --out"):
        NewFiles([tmp_path / "a", tmp_path / "b"])
    assert (tmp_path / "b").read_text() == "mine"
