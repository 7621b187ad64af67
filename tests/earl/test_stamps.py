"""The stamps of files, by which a resumed measurement notices that its data changed."""

from __future__ import annotations

from megatron_mm.earl.knock_out import stamps


def test_a_file_with_brackets_in_its_name_is_itself(tmp_path):
    path = tmp_path / "rows[v2].jsonl"
    path.write_text("one\n")
    ((name, size, _),) = found = stamps(str(path))
    assert (name, size) == (str(path), 4)
    path.write_text("another\n")
    assert stamps(str(path)) != found


def test_patterns_and_folders(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (tmp_path / name).write_text(name)
    names = [name for name, _, _ in stamps(str(tmp_path / "*.jsonl"))]
    assert names == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert len(stamps(str(tmp_path))) == 3 and stamps(str(tmp_path / "none")) == []
