"""A file is written whole or stays as it was."""

from __future__ import annotations

import pytest

from megatron_mm.outputs import whole_file


def test_a_file_gets_its_name_at_the_end(tmp_path):
    path = tmp_path / "new" / "map.json"
    with whole_file(path) as partial:
        partial.write_text("first")
        assert partial.parent == path.parent and not path.exists()
    assert path.read_text() == "first"
    with whole_file(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and [*path.parent.iterdir()] == [path]


def test_a_failed_block_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "map.json"
    path.write_text("first")
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), whole_file(tmp_path / "file" / "map.json"):
        raise AssertionError("there is no folder to write to")
