"""Parquet, verl's rows, several files under one name; and files that are not what they say."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from megatron_mm.config.settings import DataPhase, DataSource
from megatron_mm.data.files.parquet import ParquetRows
from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.loading import shuffle
from megatron_mm.data.loading.curriculum import open_curriculum
from megatron_mm.data.loading.reader import Place, Reader
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.errors import DataError
from megatron_mm.evaluation.questions import EvalSet


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def build_all(run, tokenizer, path):
    source = open_row_files(path, RowGroupCache())
    return Reader(run, tokenizer, [source]).build([Place(0, n) for n in range(len(source))])


def same(a, b):
    assert torch.equal(a.tokens_T, b.tokens_T) and torch.equal(a.loss_mask_T, b.loss_mask_T)
    assert len(a.images) == len(b.images)
    for one, other in zip(a.images, b.images, strict=True):
        assert (one.tiles == other.tiles).all() and one.start == other.start


@pytest.fixture
def three(write_rows, make_row):
    return write_rows(
        make_row("<image>and<image>?", "1 2", ["wide.png", "small.png"]),
        make_row("text only?", "3", skill="ocr"),
        make_row("so <image>?", "4", ["wide.png"]),
    )


@pytest.mark.parametrize("kind", ["paths", "bytes", "structs", "path structs"])
def test_parquet_holds_the_same_samples_as_jsonl(run, tokenizer, three, kind):
    make = {
        "paths": lambda name: name,
        "bytes": lambda name: (three.parent / name).read_bytes(),
        "structs": lambda name: {"bytes": (three.parent / name).read_bytes(), "path": name},
        "path structs": lambda name: {"bytes": None, "path": name},
    }[kind]
    rows = [json.loads(line) for line in three.read_text().splitlines()]
    rows = [row | {"images": [make(name) for name in row["images"]]} for row in rows]
    path = write_parquet(three.parent / "rows.parquet", rows, row_group_size=2)
    assert pq.ParquetFile(path).metadata.num_row_groups == 2
    made = build_all(run, tokenizer, path)
    assert [sample.where for sample in made] == [f"{path}:{n}" for n in (1, 2, 3)]
    for a, b in zip(made, build_all(run, tokenizer, three), strict=True):
        same(a, b)


def test_a_row_is_read_with_its_group_only(tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": f"{n}"}]} for n in range(100)]
    path = write_parquet(tmp_path / "rows.parquet", rows, row_group_size=10)
    cache = RowGroupCache()
    made, read = ParquetRows(path, cache), []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda s, n: read.append(n) or whole(s, n)
    )
    assert [tuple(group)[0] for group in made.row_groups] == [10] * 10
    for index in (57, 50, 99, 3, 58):
        assert made[index]["messages"][0]["content"] == str(index)
    assert read == [5, 9, 0] and min(group.num_bytes for group in made.row_groups) > 0
    cache.limit = 0
    assert made[10]["messages"] and made[57]["messages"] and read == [5, 9, 0, 1, 5]
    again = pickle.loads(pickle.dumps(made))
    assert len(again) == 100 and again[57] == made[57]
    assert len(pickle.dumps(made)) < 1000  # the index, not the rows


@pytest.mark.parametrize(
    ("raised", "what"),
    [
        (pa.ArrowNotImplementedError("chunked array"), "has 100 rows in .*smaller row groups"),
        (pa.ArrowInvalid("page header"), "row group 1 is damaged"),
        (pa.ArrowMemoryError("malloc failed"), None),  # not caused by the row
    ],
)
def test_what_pyarrow_cannot_read(tmp_path, monkeypatch, raised, what):
    rows = [{"messages": [{"role": "user", "content": f"{n}"}]} for n in range(100)]
    made = ParquetRows(write_parquet(tmp_path / "rows.parquet", rows), RowGroupCache())

    def fails(*_):
        raise raised

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fails)
    with pytest.raises(DataError if what else MemoryError, match=what):
        made[3]


def test_sources_that_take_turns_do_not_evict_each_other(tmp_path, monkeypatch):
    """Three sources of row groups that are larger than the windows, in turn: each group is decoded
    once an epoch."""
    monkeypatch.setattr(shuffle, "WINDOW_BYTES", 3000)
    monkeypatch.setattr(shuffle, "CACHE_BYTES", 6000)
    sources = []
    for name in "abc":
        rows = [{"messages": [{"role": "user", "content": f"{n:0>400}"}]} for n in range(60)]
        path = write_parquet(tmp_path / f"{name}.parquet", rows, row_group_size=10)
        sources.append(DataSource(str(path), 1))
    made = open_curriculum([DataPhase(mixture=sources)], seed=1)
    read = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda s, n: read.append(n) or whole(s, n)
    )
    for number in range(180):
        place = made.place(number)
        file, index = made.sources[place.source].locate(place.row)
        assert file[index]["messages"]
    assert len(read) == 18


def test_what_moves_samples_is_in_the_description(tmp_path):
    """And what moves none, the end of the last phase, is not."""
    rows = [{"messages": [{"role": "user", "content": f"{n}"}]} for n in range(40)]

    def described(samples=None, size=10, names=("part2", "part10"), second=None):
        for old in tmp_path.glob("part*"):
            old.unlink()
        for name in names:
            write_parquet(tmp_path / f"{name}.parquet", rows, row_group_size=size)
        phases = [DataPhase(path=str(tmp_path / "part*"), samples=samples)]
        phases += [DataPhase(path=str(tmp_path / "part*"), samples=second)] if second else []
        return open_curriculum(phases, seed=1).description

    plain = described()
    assert described(samples=100) == plain
    assert described(size=20) != plain
    assert described(names=("part02", "part10")) != plain
    assert described(samples=100, second=5) == described(samples=100, second=6)
    assert described(samples=101, second=5) != described(samples=100, second=5)


VERL = {
    "data_source": "geometry",
    "prompt": [{"role": "user", "content": "<image>How many?"}],
    "images": ["small.png"],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 0, "split": "train"},
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_verl_rows(run, tokenizer, write_rows, make_row, suffix):
    jsonl = write_rows(make_row("<image>How many?", "3", ["small.png"]))
    (expected,) = build_all(run, tokenizer, jsonl)

    def write(**more):
        row = VERL | more
        if suffix == "jsonl":
            return write_rows(row)
        row = row | {"images": [{"bytes": (jsonl.parent / "small.png").read_bytes()}]}
        return write_parquet(jsonl.parent / "rows.parquet", [row])

    answer = {"role": "assistant", "content": "3"}
    for path in (write(response="3"), write(prompt=[*VERL["prompt"], answer])):
        (sample,) = build_all(run, tokenizer, path)
        same(sample, expected)
    # The answers of a prompt are read and not learnt.
    earlier = [*VERL["prompt"], answer, {"role": "user", "content": "And?"}]
    (whole,) = build_all(run, tokenizer, write(prompt=[*earlier, answer]))
    (sample,) = build_all(run, tokenizer, write(prompt=earlier, response="3"))
    assert torch.equal(sample.tokens_T, whole.tokens_T)
    assert 0 < sample.loss_mask_T.sum() == whole.loss_mask_T.sum() / 2
    path = write()
    (error,) = build_all(run, tokenizer, path)
    assert error.startswith(f"{path}:1: 0 assistant turns among 1 messages; training needs")
    assert "'response'" in error
    item = EvalSet(path, run, tokenizer)[0]
    assert (item.ground_truth, item.skill, item.key) == ("3", "geometry", "geometry")
    assert item.question == "<image>How many?" and len(item.sample.images) == 1
    number = write(reward_model={"style": "rule", "ground_truth": 42})
    assert EvalSet(number, run, tokenizer)[0].ground_truth == "42"
    nothing = write(reward_model={"style": "rule", "ground_truth": None})
    with pytest.raises(DataError, match=":1: no answer to compare with"):
        EvalSet(nothing, run, tokenizer)[0]
    (error,) = build_all(run, tokenizer, write(response=7))
    assert "'prompt' must be a list of messages and 'response' text" in error


def test_several_files_under_one_name(run, tokenizer, tmp_path, make_row):
    for number, rows in ((2, 3), (1, 2)):
        (tmp_path / f"part{number}.jsonl").write_text(
            "".join(json.dumps(make_row(f"q{n}", "1")) + "\n" for n in range(rows))
        )
    rows = [make_row("p", "1") | {"images": None}]
    write_parquet(tmp_path / "part3.parquet", rows)
    source = open_row_files(tmp_path / "part*", RowGroupCache())
    assert len(source) == 6
    names = [file.where(i).rpartition("/")[2] for file, i in map(source.locate, range(6))]
    assert names == [
        *("part1.jsonl:1", "part1.jsonl:2"),
        *("part2.jsonl:1", "part2.jsonl:2", "part2.jsonl:3"),
        "part3.parquet:1",
    ]
    assert len(EvalSet(tmp_path / "part*.jsonl", run, tokenizer)) == 5
    with pytest.raises(DataError, match=r"none\*.jsonl: 0 files match"):
        open_row_files(tmp_path / "none*.jsonl", RowGroupCache())


def test_files_that_are_no_parquet(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet at all")
    (tmp_path / "nothing.parquet").touch()
    message = [{"role": "user", "content": "q"}]
    whole = write_parquet(tmp_path / "whole.parquet", [{"messages": message}] * 50)
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    schema = pa.table({"messages": [message]}).schema
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    write_parquet(tmp_path / "columns.parquet", [{"text": "a", "label": 1}])
    for name, what in (
        ("text", "cannot be read as parquet"),
        ("nothing", "cannot be read as parquet"),
        ("cut", "cannot be read as parquet"),
        ("empty", "0 rows"),
        ("columns", r"0 of the columns 'messages' and 'prompt' among 2 \(text, label\)"),
        ("absent", "there is no such file"),
    ):
        path = tmp_path / f"{name}.parquet"
        with pytest.raises(DataError, match=what) as caught:
            open_row_files(path, RowGroupCache())
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_damaged_row_group_is_named(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"messages": [{"role": "user", "content": rng.bytes(200).hex()}]} for _ in range(100)]
    path = write_parquet(tmp_path / "rows.parquet", rows, row_group_size=50)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    made = ParquetRows(path, RowGroupCache())
    assert made[49]["messages"]
    with pytest.raises(DataError, match=r"rows.parquet:51: row group 2 is damaged") as caught:
        made[50]
    assert "\n" not in str(caught.value)


def test_bad_images_inside_rows(run, tokenizer, tmp_path, make_row):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    cases = [
        (b"no image", "image 1 (in the row) cannot be decoded"),
        (b"", "image 1 (in the row) has 0 bytes"),
        (buffer.getvalue()[:45], "image 1 (in the row) cannot be decoded"),
    ]
    rows = [make_row("<image>?", "1") | {"images": [image]} for image, _ in cases]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    for (_, what), (number, error) in zip(
        cases, enumerate(build_all(run, tokenizer, path), start=1), strict=True
    ):
        assert error.startswith(f"{path}:{number}: {what}") and "\n" not in error
    neither = [make_row("<image>?", "1") | {"images": [{"bytes": None, "path": None}]}]
    (error,) = build_all(run, tokenizer, write_parquet(tmp_path / "neither.parquet", neither))
    assert "image 1 is of type dict with the keys bytes, path; use a path, bytes or" in error
    outside = [make_row("<image>?", "1") | {"images": ["../small.png"]}]
    (error,) = build_all(run, tokenizer, write_parquet(tmp_path / "outside.parquet", outside))
    assert "'../small.png' leaves the data folder" in error


# ---- many images ----


def two_hundred(write_rows, make_row):
    return write_rows(make_row("<image>" * 200, "1", ["wide.png"] * 200))


@pytest.mark.parametrize(
    ("budget", "tiles"),
    # wide.png alone is 1x2 tiles and a thumbnail: 3. At 4 tokens a tile:
    [(None, 9), (36, 9), (35, 3), (12, 3)],
)
def test_a_budget_lowers_the_tiles_of_all_images_alike(
    run, tokenizer, write_rows, make_row, budget, tiles
):
    run.data.max_image_tokens, run.model.fusion.vision_memory = budget, "tiles"
    source = open_row_files(
        write_rows(make_row("<image>" * 3, "1", ["wide.png"] * 3)), RowGroupCache()
    )
    reader = Reader(run, tokenizer, [source])
    (sample,) = reader.build([Place(0, 0)])
    assert [len(image.tiles) for image in sample.images] == [tiles // 3] * 3
    (size,) = reader.measure([Place(0, 0)])
    assert size == (len(sample.tokens_T), tiles)
    memory = sample.images[0].memories["vision"]
    coordinates = memory.coordinates_M2
    assert len(coordinates) == 16 * len(memory.tiles)


def test_a_budget_counts_what_the_vit_sees_not_only_the_stream(
    run, tokenizer, write_rows, make_row
):
    run.model.fusion.image_stream, run.model.fusion.vision_memory = "thumbnail", "tiles"
    source = open_row_files(
        write_rows(make_row("<image>" * 3, "1", ["wide.png"] * 3)), RowGroupCache()
    )
    for budget, tiles in ((36, 9), (35, 3)):
        run.data.max_image_tokens = budget
        ((_, seen),) = Reader(run, tokenizer, [source]).measure([Place(0, 0)])
        assert seen == tiles


def test_a_budget_counts_other_images_in_the_memory(run, tokenizer, write_rows, make_row):
    run.model.fusion.image_stream, run.model.fusion.vision_memory = "all", "tiles"
    run.data.memory_images = "other"
    images = ["wide.png"] * 3
    row = make_row("<image>" * 3, "1", images, other=images)
    source = open_row_files(write_rows(row), RowGroupCache())
    # Three tiles of each image and two of the one in its place, at 4 tokens each.
    for budget, tiles in ((60, 15), (59, 6)):
        run.data.max_image_tokens = budget
        ((_, seen),) = Reader(run, tokenizer, [source]).measure([Place(0, 0)])
        assert seen == tiles


def test_a_row_of_200_images_is_fitted_or_refused(run, tokenizer, write_rows, make_row):
    run.data.seq_length = 2048
    path = two_hundred(write_rows, make_row)
    row, builder = open_row_files(path, RowGroupCache()).files[0][0], SampleBuilder(run, tokenizer)
    with pytest.raises(DataError, match=r"r:1: 28\d\d tokens, seq_length is 2048"):
        builder.training(row, "r:1", path.parent)
    run.data.max_image_tokens = 900
    sample = SampleBuilder(run, tokenizer).training(row, "r:1", path.parent)
    assert [len(image.tiles) for image in sample.images] == [1] * 200
    run.data.max_image_tokens = 799
    builder = SampleBuilder(run, tokenizer)
    for method in (builder.training, builder.measure):
        with pytest.raises(
            DataError, match="r:1: 200 images need 800 tokens at 1 tile each, max_.* is 799; use"
        ):
            method(row, "r:1", path.parent)
