"""Pass rates by the model: the same on every layout and after any end, and pairs by dropped images.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mm.config import RunConfig
from megatron_mm.config.settings import DataPhase
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.errors import DataError
from megatron_mm.pass_rate.measure import with_files
from megatron_mm.pass_rate.output import Growing
from megatron_mm.pass_rate.rated import check_images_beside, read_rated
from megatron_mm.pass_rate.without_images import without_images
from megatron_mm.preference.pairs import build_pair
from support.grpo_runs import grpo_run, on_rank_steps
from support.rated_runs import on_rank_run, read_rows, write_rows
from support.trainers import LAYOUTS, digits_run

ROWS, EACH = 23, 5  # rows of the file and of a round
EVEN = dict(reward_funcs=["support.even.even"], num_generations=4, max_completion_length=8)


@pytest.fixture
def folder(scenes, tmp_path) -> Path:
    """A folder with the scenes' images and some of their rows."""
    (tmp_path / "images").symlink_to(scenes / "images")
    rows = read_rows(scenes / "mix.jsonl")[:ROWS]
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path


def run_on(scenes, **settings) -> RunConfig:
    sizes = dict(rollout_batch_size=None, global_batch_size=8)
    run = grpo_run(scenes, **(EVEN | sizes | settings))
    run.data.train_data = []
    return run


def rate(ranks, folder, scenes, layout="one rank", out="rated.jsonl", **more):
    """Returns the file, and what every rank says."""
    size, sizes = LAYOUTS[layout]
    given = {k: more.pop(k) for k in ("stop_behind", "most", "key", "data") if k in more}
    data, run = str(folder / given.pop("data", "rows.jsonl")), run_on(scenes, **sizes, **more)
    given = {"stop_behind": None, "most": None, "key": "key"} | given
    said = ranks(size, on_rank_run, run, data, str(folder / out), EACH, *given.values())
    assert len({*said}) == 1
    return folder / out, said[0]


@pytest.fixture(scope="module")
def whole(ranks, scenes, tmp_path_factory) -> Path:
    """The rated rows, measured on one rank without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "images").symlink_to(scenes / "images")
    write_rows(folder / "rows.jsonl", read_rows(scenes / "mix.jsonl")[:ROWS])
    return rate(ranks, folder, scenes)[0]


def test_rows_have_their_pass_rate(whole, scenes):
    rows, found = read_rows(whole.parent / "rows.jsonl"), read_rows(whole)
    assert len(found) == ROWS == len(rows)
    assert sorted(os.listdir(whole.parent)) == ["images", "rated.jsonl", "rows.jsonl"]
    for row, rated in zip(rows, found, strict=True):
        assert {key: rated[key] for key in row} == row
        scores = rated["scores"]["even"]
        assert len(rated["completions"]) == len(rated["finished"]) == len(scores) == 4
        assert rated["right"] == [score >= 0.5 for score in scores]
        assert rated["accuracy"] == sum(rated["right"]) / 4
    assert len({row["accuracy"] for row in found}) > 2
    assert [row.accuracy for row in read_rated(whole)] == [row["accuracy"] for row in found]


@pytest.mark.parametrize("layout", ["TP2", "PP2", "CP2", "DP2", "EP2"])
def test_the_layout_changes_nothing(ranks, scenes, folder, whole, layout):
    out, _ = rate(ranks, folder, scenes, layout)
    assert out.read_bytes() == whole.read_bytes()


def test_completions_are_those_of_a_rollout(ranks, scenes, folder):
    """A row's number in the file and the seed decide, as in training."""
    out, _ = rate(ranks, folder, scenes)
    found = {row["messages"][0]["content"]: row for row in read_rows(out)}
    run = grpo_run(scenes, **EVEN, rollout_batch_size=2, global_batch_size=8)
    # The first two samples of training, whose numbers there are 0 and 1: put them first here.
    table = ranks(1, on_rank_steps, run, 1)[0][0]["table"]
    lines = (scenes / "mix.jsonl").read_text().splitlines()
    asked = [int(row["row"].rpartition(":")[2]) - 1 for row in table[::4]]
    write_rows(folder / "first.jsonl", [json.loads(lines[n]) for n in asked])
    out, _ = rate(ranks, folder, scenes, out="of_first.jsonl", data="first.jsonl")
    said = [text for row in read_rows(out) for text in row["completions"]]
    assert said == [row["completion"] for row in table] and found


@pytest.mark.parametrize("layout", ["one rank", "DP2"])
@pytest.mark.parametrize("behind", [5, 15])
def test_a_command_that_was_ended_goes_on(ranks, scenes, folder, layout, behind):
    expected, _ = rate(ranks, folder, scenes, layout, "whole.jsonl")
    out, said = rate(ranks, folder, scenes, layout, stop_behind=behind)
    partial = folder / "rated.jsonl.partial"
    assert said == "stopped" and not out.exists()
    assert len(partial.read_text().splitlines()) == behind
    with partial.open("a") as file:  # a round that was written by half
        file.write('{"messages": [{"role": "user", "cont')
    rate(ranks, folder, scenes, layout)
    assert out.read_bytes() == expected.read_bytes()
    assert not [name for name in os.listdir(folder) if "partial" in name or "progress" in name]


def test_a_reward_is_given_the_columns_of_rounds_before_the_end(ranks, scenes, folder):
    """Only a row of the first round has the one that the reward cannot do without."""
    rows = read_rows(folder / "rows.jsonl")
    rows[1]["tolerance"] = 0.5
    write_rows(folder / "rows.jsonl", rows)
    given = dict(reward_funcs=["support.even.tolerant"], extra_columns=["tolerance"])
    expected, said = rate(ranks, folder, scenes, out="whole.jsonl", **given)
    assert len(read_rows(expected)) == ROWS and "failed" not in said
    for layout in ("one rank", "DP2"):
        rate(ranks, folder, scenes, layout, layout[:3] + ".jsonl", stop_behind=5, **given)
        out, _ = rate(ranks, folder, scenes, layout, layout[:3] + ".jsonl", **given)
        assert out.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("layout", ["one rank", "DP2"])
def test_a_bad_row_does_not_hide_rewards_that_fail(ranks, scenes, folder, layout):
    rows = read_rows(folder / "rows.jsonl")
    rows[1]["images"] = ["gone.png"]
    write_rows(folder / "rows.jsonl", rows)
    given = dict(reward_funcs=["support.even.fails_after"], on_bad_sample="skip")
    _, said = rate(ranks, folder, scenes, layout, **given)
    assert said.startswith("every reward of a step failed") and "the judge is down" in said


def test_rows_that_are_bad_stop_the_command_or_are_counted(ranks, scenes, folder):
    rows = read_rows(folder / "rows.jsonl")
    rows[7]["images"], rows[8]["messages"] = ["gone.png"], "?"
    write_rows(folder / "rows.jsonl", rows)
    for layout in ("one rank", "DP2"):
        _, said = rate(ranks, folder, scenes, layout, out=f"{layout[:3]}.jsonl")
        assert "rows.jsonl:8: " in said and "gone.png" in said and "\n" not in said
    # The first round is written: it goes on there once the row is mended or left out.
    mended = read_rows(folder / "one.jsonl.partial")
    assert len(mended) == EACH
    out, said = rate(ranks, folder, scenes, out="left.jsonl", on_bad_sample="skip")
    found = read_rows(out)
    assert len(found) == ROWS - 2 and ", 2 skipped" in said and found[:EACH] == mended
    # Rows are counted as they stand in the file, so others answer as they did.
    stopped, _ = rate(ranks, folder, scenes, out="cut.jsonl", on_bad_sample="skip", stop_behind=10)
    again, said = rate(ranks, folder, scenes, out="cut.jsonl", on_bad_sample="skip")
    assert again.read_bytes() == out.read_bytes() and ", 2 skipped" in said


def test_a_last_round_that_nothing_can_judge_ends_the_file(ranks, scenes, folder):
    """It has one row, without a truth; whole rounds that fail stop the command."""
    rows = read_rows(folder / "rows.jsonl")[: EACH + 1]
    del rows[-1]["ground_truth"]
    write_rows(folder / "rows.jsonl", rows)
    out, said = rate(ranks, folder, scenes, reward_funcs=["exact"])
    found = read_rows(out)
    assert len(found) == EACH + 1 and "error" not in said
    assert found[-1]["accuracy"] is None and found[-1]["right"] == [None] * 4
    assert all(row["accuracy"] is not None for row in found[:-1])


@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_a_reward_as_high_as_the_threshold_is_right(ranks, scenes, folder, threshold):
    """Rewards are fp32, in which 0.9 is less than it is in fp64."""
    write_rows(folder / "rows.jsonl", read_rows(folder / "rows.jsonl")[:2])
    settings = dict(
        reward_funcs=[f"support.even.constant(value={threshold})"],
        difficulty_threshold=threshold,
    )
    out, _ = rate(ranks, folder, scenes, **settings)
    assert [row["accuracy"] for row in read_rows(out)] == [1.0, 1.0]


def test_rewards_that_fail_are_no_wrong_answers(ranks, scenes, folder):
    funcs = ["support.even.even", "support.even.fails_on_short"]
    settings = dict(reward_funcs=funcs, difficulty_reward="fails_on_short")
    found = read_rows(rate(ranks, folder, scenes, **settings)[0])
    verdicts = Counter(right for row in found for right in row["right"])
    assert verdicts[None] and verdicts[True] and not verdicts[False]
    assert all(row["accuracy"] in (1.0, None) for row in found)
    assert {*found[0]["scores"]} == {"even", "fails_on_short"}
    for layout in ("one rank", "DP2"):
        wrong = dict(reward_funcs=["support.even.nothing"])
        _, said = rate(ranks, folder, scenes, layout, out="none.jsonl", **wrong)
        assert "reward support.even.nothing cannot be imported" in said and "\n" not in said


def test_images_stay_where_their_paths_start(ranks, scenes, folder):
    (folder / "other").mkdir()
    _, said = rate(ranks, folder, scenes, "DP2", out="other/rated.jsonl")
    assert "rows.jsonl:1: the path of image" in said and "write --out beside the data" in said


def test_images_in_the_rows_become_files(ranks, scenes, folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = read_rows(folder / "rows.jsonl")[:6]
    for row in rows:
        row["images"] = [(folder / name).read_bytes() for name in row["images"]]
    keys = ("messages", "images", "ground_truth", "skill")
    table = pa.Table.from_pylist([{key: row[key] for key in keys} for row in rows])
    pq.write_table(table, folder / "held.parquet")
    out, _ = rate(ranks, folder, scenes, "DP2", data="held.parquet")
    plain, _ = rate(ranks, folder, scenes, "DP2", out="plain.jsonl")
    for row, found, other in zip(rows, read_rows(out), read_rows(plain), strict=False):
        assert [(folder / name).read_bytes() for name in found["images"]] == row["images"]
        assert found["completions"] == other["completions"]


def test_a_crop_is_written_with_its_box(tmp_path):
    box, out = [0.0, 0.0, 0.5, 1.0], tmp_path / "rated.jsonl"
    row = {"images": [{"bytes": b"\x89PNG", "box": box}, {"path": "a.png", "box": box}, b"1"]}
    found, files = with_files(row, out)
    (first, kept), (second, other) = files.items()
    assert (kept, other) == (b"\x89PNG", b"1") and first.endswith(".png")
    assert found["images"] == [{"path": first, "box": box}, {"path": "a.png", "box": box}, second]
    check_images_beside(found, "r:1", tmp_path, out)
    with pytest.raises(DataError, match="r:1: the path of image 'a.png' starts at"):
        check_images_beside({"images": row["images"][1:2]}, "r:1", tmp_path / "other", out)


# ---- what is written ----


def test_other_settings_a_second_command_and_an_old_file_are_one_line(ranks, scenes, folder):
    out, _ = rate(ranks, folder, scenes, stop_behind=5)
    for layout in ("one rank", "DP2"):
        _, said = rate(ranks, folder, scenes, layout, key="other")
        assert "rated.jsonl.partial was begun with another checkpoint, other data or" in said
    held = Growing(out, f"key {EACH}")
    try:
        _, said = rate(ranks, folder, scenes, "DP2")
        assert "another process writes" in said and "rated.jsonl.partial; wait for it" in said
    finally:
        held.close()
    (folder / "rated.jsonl.progress").write_text("{")
    assert "rated.jsonl.progress cannot be read" in rate(ranks, folder, scenes)[1]
    (folder / "rated.jsonl.progress").unlink()
    out.write_text("")
    assert "rated.jsonl is there already; remove it, or name" in rate(ranks, folder, scenes)[1]


def test_the_rated_file_is_read_by_training(scenes, folder, whole):
    """No reader takes what was added for something that it should have used."""
    shutil.copy(whole, folder / "rated.jsonl")
    rows, tokenizer = Rows(folder / "rated.jsonl"), load_tokenizer(str(scenes / "tokenizer.model"))
    for settings in ({}, EVEN | dict(objective="grpo")):
        run = digits_run(scenes, folder / "rated.jsonl", **settings)
        run.data.train_data = [DataPhase(str(folder / "rated.jsonl"))]
        sample = SampleBuilder(run, tokenizer).training(rows[0], "r:1", folder)
        assert len(sample.tokens_T)


# ---- pairs by dropped images ----


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
def test_the_rejected_side_begins_as_the_chosen_one(ranks, scenes, folder, whole, layout):
    # A model that has learnt nothing never ends an answer.
    rows = [row | {"finished": [True] * 4} for row in read_rows(whole)]
    write_rows(folder / "rated.jsonl", rows)
    given = dict(data="rated.jsonl", most=2)
    out, said = rate(ranks, folder, scenes, "one rank", "pairs.jsonl", **given)
    other, _ = rate(ranks, folder, scenes, layout, "other.jsonl", **given)
    assert out.read_bytes() == other.read_bytes()
    found, rated = read_rows(out), [*read_rated(folder / "rated.jsonl")]
    right = [text for row in rated for text in row.completions]
    tokenizer = load_tokenizer(str(scenes / "tokenizer.model"))
    assert f"{len(found)} pairs; " in said and len(found) > 5
    builder = SampleBuilder(digits_run(scenes), tokenizer)
    for n, pair in enumerate(found):
        ids = tokenizer.encode(pair["chosen"])
        assert pair["chosen"] in right and pair["chosen"] != pair["rejected"]
        kept = tokenizer.decode(ids[: len(ids) // 2])
        assert pair["rejected"].startswith(kept.strip("\n")) or "\ufffd" in kept
        build_pair(builder, pair, f"pairs.jsonl:{n + 1}", folder)


def test_pairs_go_on_where_they_were_ended(ranks, scenes, folder):
    """Rows that are not rated have their own answers continued; those without images none."""
    rows = read_rows(folder / "rows.jsonl")
    bare = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]}]
    write_rows(folder / "rows.jsonl", [*rows[:12], *bare])
    expected, said = rate(ranks, folder, scenes, "DP2", "whole.jsonl", most=1)
    assert "left out: 1 rows without images" in said
    answers = {row["messages"][-1]["content"] for row in rows[:12]}
    assert {row["chosen"] for row in read_rows(expected)} <= answers
    out, said = rate(ranks, folder, scenes, "DP2", most=1, stop_behind=5)
    assert said == "stopped" and not out.exists()
    rate(ranks, folder, scenes, "DP2", most=1)
    assert out.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("skip", [False, True])
def test_a_row_that_makes_no_pair_stops_every_rank_or_is_counted(ranks, scenes, folder, skip):
    rows = read_rows(folder / "rows.jsonl")[:6]
    rows[3]["messages"].insert(1, {"role": "assistant", "content": "Let me see."})
    write_rows(folder / "rows.jsonl", rows)
    more = dict(on_bad_sample="skip") if skip else {}
    out, said = rate(ranks, folder, scenes, "DP2", most=1, **more)
    if skip:
        assert len(read_rows(out)) == 5 and ", 1 bad;" in said
    else:
        assert "rows.jsonl:4: " in said and "ends with an answer" in said


@pytest.mark.parametrize("skip", [False, True])
def test_a_column_that_json_cannot_hold_stops_every_rank_or_is_counted(ranks, scenes, folder, skip):
    rows = read_rows(folder / "rows.jsonl")[:6]
    table = pa.Table.from_pylist(
        [{k: row[k] for k in ("messages", "images", "ground_truth")} for row in rows]
    )
    when = [None] * 5 + [datetime(2026, 1, 2)]
    pq.write_table(table.append_column("asked_at", pa.array(when)), folder / "rows.parquet")
    more = dict(on_bad_sample="skip") if skip else {}
    out, said = rate(ranks, folder, scenes, "DP2", data="rows.parquet", **more)
    if skip:
        assert len(read_rows(out)) == 5 and ", 1 skipped" in said
    else:
        assert "rows.parquet:6: 'asked_at' cannot be written as JSON" in said


def test_images_leave_no_trace():
    turns = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "<image>\nWhat is \\<image>?<image>"},
        {"role": "assistant", "content": "It<look_y_3><look_x_4><look_s_0><look>."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]},
    ]
    row = {"messages": turns, "images": ["a", "b", "c"], "other_images": ["d"], "skill": "s"}
    row["looks"] = [{"image": 0, "box": [0, 0, 1, 1]}]
    found = without_images(row, ("images", "other_images"), "r:1")
    assert {*found} == {"messages", "skill"}
    assert [turn["content"] for turn in found["messages"]] == [
        "Look.",
        "What is \\<image>?",
        "It.",
        [{"type": "text", "text": "And?"}],
    ]
    assert row["messages"][1]["content"].startswith("<image>")  # as it was
