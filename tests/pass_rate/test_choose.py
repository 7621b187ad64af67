"""Rows and pairs chosen from rated rows, without a model."""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from pathlib import Path

import pytest

from megatron_mm.data.files.rows import Rows
from megatron_mm.pass_rate.pairs import pair_up
from megatron_mm.preference.forms import rows_of_sides
from support.rated_runs import rated_row, read_rows, write_rows
from support.tools import load_tool

YES, NO = True, False


def run(capsys, *flags: object) -> tuple[int, str, str]:
    """Returns the exit code of tools/pass_rate.py, and what it wrote."""
    status = load_tool("pass_rate").main([str(flag) for flag in flags])
    return status, *capsys.readouterr()


@pytest.fixture
def rated(tmp_path) -> Path:
    """Accuracies of 0, 1/4, 1/2, 3/4, 1 and none."""
    rows = [rated_row([YES] * n + [NO] * (4 - n), skill=f"s{n}") for n in range(5)]
    return write_rows(tmp_path / "rated.jsonl", [*rows, rated_row([None] * 4)])


def skills(path: Path) -> list[str]:
    return [row["skill"] for row in read_rows(path)]


@pytest.mark.parametrize(
    ("between", "kept"),
    [((0.2, 0.8), "123"), ((0.25, 0.5), "12"), ((0, 0), "0"), ((0, 1), "01234"), ((0.5, 0.5), "2")],
)
def test_a_range_is_kept_with_its_ends(rated, tmp_path, capsys, between, kept):
    out = tmp_path / "kept.jsonl"
    status, said, _ = run(capsys, "keep", "--data", rated, "--out", out, "--between", *between)
    assert status == 0 and f"{len(kept)} of 6 rows" in said and "1 without a verdict" in said
    assert skills(out) == [f"s{n}" for n in kept]
    assert read_rows(out) == [row for row in read_rows(rated) if row.get("skill") in skills(out)]


def test_tiers_go_from_easy_to_hard_and_are_phases(rated, tmp_path, capsys):
    flags = ("--data", rated, "--out", tmp_path / "tier.jsonl", "--edges", 0.3, 0.75)
    status, said, _ = run(capsys, "tiers", *flags)
    found = {n: skills(tmp_path / f"tier_{n}.jsonl") for n in (1, 2, 3)}
    assert status == 0 and found == {1: ["s3", "s4"], 2: ["s2"], 3: ["s0", "s1"]}
    assert f"- path: {tmp_path}/tier_2.jsonl\n  samples: 1" in said and "1 rows without" in said
    assert said.count("samples:") == said.count("- path:") - 1  # the last is repeated
    assert not said.splitlines()[-1].startswith("  samples:")
    # An empty tier is no file.
    flags = ("--data", rated, "--out", tmp_path / "half.jsonl", "--edges", 0.1, 0.2)
    assert run(capsys, "tiers", *flags)[0] == 0
    assert not (tmp_path / "half_2.jsonl").exists() and skills(tmp_path / "half_3.jsonl") == ["s0"]


def test_pairs_are_right_and_wrong_answers_of_one_row(tmp_path, capsys):
    more = {"images": ["x.png"], "tools": [{"name": "t"}], "spans": [{"text": "Its"}], "level": 3}
    rows = [
        rated_row([YES, NO, NO, YES], **more),
        rated_row([YES, YES]),
        rated_row([NO, None]),
        rated_row([NO, YES, NO], finished=[False, True, True]),
        rated_row([YES, NO, YES, NO], completions=["a", "a ", "a", "a"]),
    ]
    data, out = write_rows(tmp_path / "rated.jsonl", rows), tmp_path / "pairs.jsonl"
    flags = ("--data", data, "--out", out, "--columns", "level")
    status, said, _ = run(capsys, "pairs", *flags)
    found = read_rows(out)
    assert status == 0 and "6 pairs of 3 of 5 rows" in said and "1 unfinished" in said
    assert [(row["chosen"], row["rejected"]) for row in found] == [
        ("a", "b"), ("d", "c"), ("a", "c"), ("d", "b"), ("b", "c"), ("a", "a "),
    ]  # fmt: skip
    first = found[0]
    assert first["prompt"] == [{"role": "user", "content": "Which?"}]
    assert {*first} == {
        *("prompt", "chosen", "rejected", "images", "tools", "ground_truth", "level"),
    }
    pairs = Rows(out)
    for index in range(len(pairs)):
        better, worse = rows_of_sides(pairs[index], pairs.where(index))
        assert better["messages"][-1] != worse["messages"][-1]


def test_unfinished_sides_are_there_if_wanted(tmp_path, capsys):
    row = rated_row([NO, YES, NO], finished=[False, False, True])
    data = write_rows(tmp_path / "rated.jsonl", [row])
    flags = ("pairs", "--data", data, "--out", tmp_path / "pairs.jsonl")
    status, _, said = run(capsys, *flags)
    assert status == 1 and "0 pairs of 1 rows" in said and "2 are unfinished, see" in said
    assert run(capsys, *flags, "--unfinished")[0] == 0
    assert len(read_rows(tmp_path / "pairs.jsonl")) == 2


@pytest.mark.parametrize(("right", "wrong", "most"), [(2, 20, 15), (20, 2, 15), (6, 6, 15)])
def test_at_most_fifteen_pairs_which_use_every_answer_alike(tmp_path, capsys, right, wrong, most):
    row = rated_row([YES] * right + [NO] * wrong)
    row["completions"] = [f"answer {n}" for n in range(right + wrong)]
    data, out = write_rows(tmp_path / "rated.jsonl", [row]), tmp_path / "pairs.jsonl"
    _, said, _ = run(capsys, "pairs", "--data", data, "--out", out)
    found = [(row["chosen"], row["rejected"]) for row in read_rows(out)]
    assert len({*found}) == len(found) == most and f"{right * wrong - 15} pairs above 15" in said
    for side, others in ((0, right), (1, wrong)):
        uses = Counter(pair[side] for pair in found)
        assert max(uses.values()) <= -(-most // min(others, most)) + 1


@pytest.mark.parametrize(("n", "m"), [*itertools.product((0, 1, 2, 3, 5), repeat=2)])
def test_all_pairs_come_once(n, m):
    found = [*pair_up([f"r{i}" for i in range(n)], [f"w{i}" for i in range(m)])]
    assert len({*found}) == len(found) == n * m
    assert all(r[0] == "r" and w[0] == "w" for r, w in found)


@pytest.mark.parametrize(
    ("wrong", "dropped"),
    [
        ("", "1 empty or with"),
        (" \n ", "1 empty or with"),
        ("see <|im_start|>user", "1 empty or with"),
        ("<IMG_CONTEXT>", "1 empty or with"),
        ("\n\na", "1 repeated"),  # the template drops what begins an answer
    ],
)
def test_what_no_row_may_hold_is_no_side(tmp_path, capsys, wrong, dropped):
    row = rated_row([YES, NO, NO], completions=["a", wrong, "c"])
    data, out = write_rows(tmp_path / "rated.jsonl", [row]), tmp_path / "pairs.jsonl"
    status, said, _ = run(capsys, "pairs", "--data", data, "--out", out)
    assert status == 0 and dropped in said and "1 pairs of 1" in said


def test_prompts_that_make_no_pairs_are_counted(tmp_path, capsys):
    """An answer in two turns is a row of fine-tuning, and its first turn no end of a prompt."""
    two = rated_row([YES, NO])
    two["messages"].insert(1, {"role": "assistant", "content": "Let me see."})
    rows = [rated_row([YES, NO]), two]
    data, out = write_rows(tmp_path / "rated.jsonl", rows), tmp_path / "pairs.jsonl"
    status, said, _ = run(capsys, "pairs", "--data", data, "--out", out)
    assert status == 0 and len(read_rows(out)) == 1
    assert "1 that training could not read (the first: " in said and "rated.jsonl:2: " in said
    write_rows(data, [two])
    status, _, error = run(capsys, "pairs", "--data", data, "--out", tmp_path / "none.jsonl")
    assert status == 1 and "training could not read 1 pairs (the first: " in error


def test_a_mark_that_a_model_wrote_is_text(tmp_path, capsys):
    row = rated_row([YES, NO], completions=["a <image>", "b"])
    data, out = write_rows(tmp_path / "rated.jsonl", [row]), tmp_path / "pairs.jsonl"
    assert run(capsys, "pairs", "--data", data, "--out", out)[0] == 0
    assert read_rows(out)[0]["chosen"] == "a \\<image>"


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 1.5}, "rated.jsonl:2: 'accuracy' is 1.5; allowed: 0 to 1, or null"),
        ({"accuracy": "1"}, "rated.jsonl:2: 'accuracy' is '1'; allowed"),
        ({"right": [True]}, "rated.jsonl:2: 1 values of 'right' for 2 completions"),
        ({"right": [1, 0]}, "rated.jsonl:2: 'right' is no list of true and false"),
        ({"finished": None}, "rated.jsonl:2: 'finished' is no list of true and false"),
        ({"completions": "ab"}, "rated.jsonl:2: 'completions' is no list of texts"),
        (
            {"completions": ["4", "4 \ud83d"]},
            "rated.jsonl:2: 'completions' holds half a surrogate pair",
        ),
    ],
)
@pytest.mark.parametrize("command", ["keep --between 0 1", "tiers --edges 0.5", "pairs"])
def test_a_bad_row_is_one_line(tmp_path, capsys, change, message, command):
    rows = [rated_row([YES, NO]), rated_row([YES, NO]) | change]
    data, out = write_rows(tmp_path / "rated.jsonl", rows), tmp_path / "out.jsonl"
    status, _, said = run(capsys, *command.split(), "--data", data, "--out", out)
    assert status == 1 and message in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rated.jsonl"]


def test_rows_that_are_not_rated_are_one_line(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "?"}]}])
    flags = ("keep", "--data", data, "--out", tmp_path / "out.jsonl", "--between", 0, 1)
    status, _, said = run(capsys, *flags)
    assert status == 1 and "rows.jsonl:1: no 'accuracy'; rate the rows first: tools/pass_" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("keep --out o.jsonl", "keep needs --between"),
        ("keep --out o.jsonl --between 0.8 0.2", "--between is 0.8 0.2; allowed: two numbers"),
        ("keep --out o.jsonl --between 0 1 --most 3", "--most is not for keep; allowed: --data"),
        ("tiers --out o.jsonl --edges 0.5 0.5", "--edges is 0.5 0.5; allowed: numbers above 0"),
        ("tiers --out o.jsonl --edges 0", "--edges is 0; allowed: numbers above 0"),
        ("pairs --out o.jsonl --most 0", "--most is 0; allowed: 1 or more"),
        ("pairs --out o.json", "--out is o.json; allowed: a name that ends in .jsonl"),
        ("pairs --out o.jsonl --lr 1", "--lr is not for pairs, which needs no model"),
        ("measure --out o.jsonl", "measure needs --checkpoint"),
        ("weigh --out o.jsonl", "invalid choice: 'weigh'"),
    ],
)
def test_wrong_flags_are_one_line(rated, capsys, flags, message):
    status, _, said = run(capsys, *flags.split(), "--data", rated)
    assert status == 2 and message in said and said.count("\n") == 1


def test_an_output_that_is_there_and_images_elsewhere_are_one_line(tmp_path, capsys):
    data = write_rows(tmp_path / "rated.jsonl", [rated_row([YES, NO], images=["i.png"])])
    flags = ("pairs", "--data", data, "--out")
    status, _, said = run(capsys, *flags, data)
    assert status == 1 and "rated.jsonl is there already; remove it, or name another" in said
    (tmp_path / "other").mkdir()
    status, _, said = run(capsys, *flags, tmp_path / "other" / "pairs.jsonl")
    assert status == 1 and "rated.jsonl:1: the path of image 'i.png' starts at" in said


def test_a_full_disk_leaves_nothing(rated, tmp_path, capsys, monkeypatch):

    def full(file):
        if "_3" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    flags = ("--data", rated, "--out", tmp_path / "tier.jsonl", "--edges", 0.3, 0.75)
    status, _, said = run(capsys, "tiers", *flags)
    assert status == 1 and "tier_3.jsonl: No space left on device" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rated.jsonl"]
