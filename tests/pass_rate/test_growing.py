"""A file of lines that grows round by round, whatever ends its command."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from megatron_mm.errors import DataError
from megatron_mm.pass_rate.output import Growing, NewFiles


def test_a_full_disk_costs_the_round_only(tmp_path, monkeypatch):
    """Also where the command ends between any two of the steps of a write."""
    path, replace = tmp_path / "out.jsonl", os.fsync
    file = Growing(path, "key")
    file.append(["one"], 1, {"right": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception, match=r"out\.jsonl\.partial: No space left on device"):
        file.append(["two"], 1, {"right": 1})
    file.close()
    monkeypatch.setattr(os, "fsync", replace)
    file = Growing(path, "key")
    assert (file.tally.rows, file.tally.sums) == (1, {"right": 1})
    file.append(["deux"], 1, {"right": 0})
    shutil.copy(tmp_path / "out.jsonl.progress", tmp_path / "kept")
    file.finish()
    file.close()
    assert path.read_text() == "one\ndeux\n"
    # Killed before the progress was removed: the file is finished.
    (tmp_path / "kept").rename(tmp_path / "out.jsonl.progress")
    file = Growing(path, "key")
    assert file.done and file.tally.rows == 2
    file.finish()
    file.close()
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl"] and path.read_text() == "one\ndeux\n"


def test_a_round_without_lines_behind_a_half_written_one(tmp_path):
    """It notes where the file ends now, not where it ended before it was cut."""
    path = tmp_path / "out.jsonl"
    file = Growing(path, "key")
    file.append(["one"], 1, {}, ["tags"])
    file.close()
    with (tmp_path / "out.jsonl.partial").open("a") as partial:
        partial.write("half a line")
    for rows in (1, 2):
        file = Growing(path, "key")
        assert (file.tally.rows, file.tally.columns) == (rows, ["tags"])
        file.append([], 1, {})
        file.close()
    assert (tmp_path / "out.jsonl.partial").read_text() == "one\n"


def test_a_name_that_no_file_can_have_is_a_data_error(tmp_path):
    path = tmp_path / ("x" * 300 + ".jsonl")
    for make in (lambda: Growing(path, "key"), lambda: NewFiles([path])):
        with pytest.raises(DataError, match="cannot write .*: File name too long"):
            make()
