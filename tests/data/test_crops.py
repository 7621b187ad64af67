"""Images with a box: what is shown is the crop, and nothing in a row costs more than that."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.images import ImageFile, choose_grid, cut_tiles, image_size, load_image
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.loading.reader import Place, Reader
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.errors import DataError
from megatron_mm.evaluation.examples import _example
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.preference.pairs import build_pair, pair_size

WIDTH, HEIGHT = 50, 30
# Two of one size, so of one grid, in different places; one between pixels; all of it.
BOXES = {
    "left": ([0, 0, 0.2, 0.4], (0, 0, 10, 12)),
    "right": ([0.8, 0.6, 1, 1], (40, 18, 50, 30)),
    "between pixels": ([0.11, 0.35, 0.49, 0.65], (5, 10, 25, 20)),
    "all": ([0, 0, 1, 1], (0, 0, 50, 30)),
}


def photo(orientation: int = 1) -> bytes:
    """Noise that is seen as WIDTH x HEIGHT, stored as its EXIF orientation says."""
    size = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    pixels = np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    exif, buffer = Image.Exif(), BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def crop(data: bytes, pixels: tuple[int, int, int, int]) -> Image.Image:
    """The part of a photo as PIL alone shows it."""
    return ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB").crop(pixels)


def as_bytes(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path):
    """write(row, ...) -> path of a file with these rows; photo.png, each NAME.png of `BOXES` as
    PIL crops it, and turned.png, which is stored on its side, lie beside it."""
    data = photo()
    (tmp_path / "photo.png").write_bytes(data)
    (tmp_path / "turned.png").write_bytes(photo(6))
    for name, (_, pixels) in BOXES.items():
        (tmp_path / f"{name}.png").write_bytes(as_bytes(crop(data, pixels)))

    def written(*rows, suffix="jsonl"):
        path = tmp_path / f"rows.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return written


def rows_of(path):
    files = open_row_files(path, RowGroupCache())
    for number in range(len(files)):
        file, index = files.locate(number)
        yield file[index], file.where(index), file.folder


def built(run, tokenizer, path):
    """The samples of a file; each has the size that was measured."""
    builder, samples = SampleBuilder(run, tokenizer), []
    for row in rows_of(path):
        samples.append(builder.training(*row))
        tiles = sum(len(image.tiles) for image in samples[-1].images)
        assert builder.measure(*row) == (len(samples[-1].tokens_T), tiles)
    return samples


def same(one, other):
    assert torch.equal(one.tokens_T, other.tokens_T)
    assert len(one.images) == len(other.images) > 0
    for a, b in zip(one.images, other.images, strict=True):
        assert a.grid == b.grid and a.start == b.start and a.stream == b.stream
        assert np.array_equal(a.tiles, b.tiles)


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_what_is_shown_is_the_crop_of_pil(run, tokenizer, name, orientation):
    """The crop is of what a viewer shows, not of what is stored. Its size is known before it is
    decoded."""
    box, pixels = BOXES[name]
    data = photo(orientation)
    image, expected = ImageFile("image 1", held=data, box=tuple(box)), crop(data, pixels)
    assert image_size(image, "r:1") == expected.size
    assert np.array_equal(np.asarray(load_image(image, "r:1")), np.asarray(expected))
    row = {"messages": [{"role": "user", "content": "<image>?"}]}
    row |= {"images": [{"bytes": data, "box": box}]}
    (found,) = SampleBuilder(run, tokenizer).prompt(row, "r:1", ".").images
    limits = {"max_num_tiles": run.data.max_num_tiles, "use_thumbnail": True}
    grid = choose_grid(*expected.size, image_size=8, **limits)
    assert found.grid == grid and np.array_equal(found.tiles, cut_tiles(expected, grid, 8))


def test_limits_hold_for_the_whole_image(tmp_path):
    data = photo()
    for cut in (data, data[:200]):  # decoding the second would fail otherwise
        image = ImageFile("image 1", held=cut, box=(0.0, 0.0, 0.1, 0.1))
        for read in (image_size, load_image):
            with pytest.raises(DataError, match="r:1: image 1 has 50x30 = 1500 pixels, the limit"):
                read(image, "r:1", max_pixels=1499)


# ---- rows ----


FORMS = {
    "path": ("jsonl", "parquet"),
    "alone": ("jsonl", "parquet"),
    "null bytes": ("jsonl", "parquet"),
    "bytes": ("parquet",),
    "bytes and path": ("parquet",),
}


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize(("form", "suffix"), [(f, s) for f, every in FORMS.items() for s in every])
def test_every_form_of_an_image_may_have_a_box(
    run, tokenizer, write, make_row, tmp_path, name, form, suffix
):
    data = (tmp_path / "photo.png").read_bytes()
    image = {
        "path": {"path": "photo.png"},
        "alone": {"path": "photo.png"},
        "null bytes": {"path": "photo.png", "bytes": None, "resized_height": None},
        "bytes": {"bytes": data},
        "bytes and path": {"bytes": data, "path": "elsewhere.png"},
    }[form] | {"box": [float(x) for x in BOXES[name][0]]}
    row = make_row("<image>?")
    del row["images"]
    (expected,) = built(run, tokenizer, write(row | {"images": [f"{name}.png"]}))
    path = write(
        row | ({"image": image} if form == "alone" else {"images": [image]}), suffix=suffix
    )
    (found,) = built(run, tokenizer, path)
    same(found, expected)


def test_a_column_of_boxes_has_none_for_whole_images(run, tokenizer, write, make_row):
    images = [{"path": "photo.png", "box": box} for box in (None, [0.0, 0.0, 0.2, 0.4])]
    rows = [make_row("<image>?", images=[image]) for image in images]
    found = built(run, tokenizer, write(*rows, suffix="parquet"))
    names = ("photo.png", "left.png")
    expected = built(run, tokenizer, write(*(make_row("<image>?", images=[n]) for n in names)))
    for one, other in zip(found, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_crops_of_one_photo_are_told_apart(run, tokenizer, write, make_row, cache_bytes):
    """Also by what is remembered of a file: sizes and tiles."""
    names = ["left", "right", "between pixels", "left", "photo"]
    crops = [{"path": "photo.png", "box": BOXES[name][0]} for name in names[:4]] + ["photo.png"]
    question = "<image>" * len(names)
    order = [names, names[::-1]]
    plain = [make_row(question, images=[f"{name}.png" for name in some]) for some in order]
    boxed = [make_row(question, images=some) for some in (crops, crops[::-1])]
    expected = built(run, tokenizer, write(*plain))
    builder = SampleBuilder(run, tokenizer, cache_bytes)
    for row, other in zip(rows_of(write(*boxed)), expected, strict=True):
        same(builder.training(*row), other)
    left, right = expected[0].images[:2]
    assert left.grid == right.grid and not np.array_equal(left.tiles, right.tiles)


def test_a_budget_and_packing_count_the_crop(run, tokenizer, write, make_row):
    """The whole photo is two tiles and a thumbnail, or 12 tokens; the crop is one tile."""
    run.data.max_num_tiles = 2
    small = {"path": "photo.png", "box": [0.0, 0.0, 0.2, 1 / 3]}
    whole, two = make_row("<image>?", images=["photo.png"]), [small, small]
    crops = make_row("<image><image>?", images=two)
    samples = built(run, tokenizer, write(whole, crops))
    assert [[len(i.tiles) for i in s.images] for s in samples] == [[3], [1, 1]]
    run.data.max_image_tokens = 8
    samples = built(run, tokenizer, write(whole, crops))
    assert [[len(i.tiles) for i in s.images] for s in samples] == [[1], [1, 1]]
    run.data.max_image_tokens = None
    rows = [whole, crops, make_row("How many?")] * 16
    path = write(*rows)
    lengths = [len(sample.tokens_T) for sample in built(run, tokenizer, path)]
    run.data.train_data[0].path, run.data.packing = str(path), True
    for pack in TrainLoader(
        run, tokenizer, data_parallel_rank=0, data_parallel_size=1
    ).next_batch():
        numbers = [int(name.rpartition(":")[2]) - 1 for name in pack.samples]
        assert pack.cu_seqlens.diff().tolist()[: len(numbers)] == [lengths[n] for n in numbers]
        tiles = sum(len(rows[n]["images"]) + (n % 3 == 0) * 2 for n in numbers)
        assert len(pack.pixels_NCHW) == tiles


def test_prompts_and_evaluation_show_the_crop(run, tokenizer, write, make_row):
    """The photo is turned as it is shown."""
    run.training.objective = "grpo"
    box, pixels = BOXES["right"]
    boxed = make_row("<image>?", images=[{"path": "turned.png", "box": box}], ground_truth="3")
    path = write(boxed, make_row("<image>?", images=["upright.png"], ground_truth="3"))
    data = (path.parent / "turned.png").read_bytes()
    (path.parent / "upright.png").write_bytes(as_bytes(crop(data, pixels)))
    reader = Reader(run, tokenizer, [open_row_files(path, RowGroupCache())])
    asked, expected = reader.prompts([Place(0, 0), Place(0, 1)])
    same(asked.sample, expected.sample)
    item = EvalSet(path, run, tokenizer)[0]
    same(item.sample, expected.sample)
    answer = {"key": "ocr", "prediction": "3", "truth": "3", "score": 1}
    shown = _example(answer, item, path.parent / "report")
    assert (shown["image"], shown["box"]) == ("../turned.png", tuple(box))


def test_both_sides_of_a_pair_show_the_crop(run, tokenizer, write, make_row):
    image = {"path": "photo.png", "box": BOXES["right"][0]}
    pair = {"prompt": make_row("<image>?")["messages"][:1], "chosen": "3", "rejected": "4"}
    ours, theirs = pair | {"images": [image]}, pair | {"images": ["right.png"]}
    builder, pairs = SampleBuilder(run, tokenizer), []
    for args in rows_of(write(ours | {"rejected_images": [image]}, theirs)):
        pairs.append(build_pair(builder, *args))
        tokens = sum(len(side.tokens_T) for side in pairs[-1])
        tiles = sum(len(image.tiles) for image in pairs[-1].chosen.images)
        assert pair_size(builder, *args) == (tokens, tiles)
    for one, other in zip(*pairs, strict=True):
        same(one, other)
    other = {"path": "photo.png", "box": BOXES["left"][0]}
    for args in rows_of(write(*(ours | {"rejected_images": [i]} for i in (other, "photo.png")))):
        with pytest.raises(DataError, match="1 'rejected_images' are not the 1 'images'"):
            build_pair(builder, *args)


def test_images_of_a_memory_may_have_a_box(run, tokenizer, write, make_row):
    run.data.memory_images, run.model.fusion.vision_memory = "others", "tiles"
    box = {"path": "photo.png", "box": BOXES["right"][0]}
    row = make_row("<image>?", images=["left.png"])
    struct = {"path": "right.png", "bytes": None, "box": None}
    rows = [row | {"others": [image]} for image in ("right.png", box, struct)]
    expected, *samples = built(run, tokenizer, write(*rows))
    for sample in samples:
        same(sample, expected)
    with pytest.raises(DataError, match=r"rows.jsonl:1: 1 images in 'others' .* of the same grids"):
        built(run, tokenizer, write(row | {"others": ["photo.png"]}))
    with pytest.raises(DataError, match=r"rows.jsonl:1: image 1 has the box \[2\]; allowed: 4"):
        built(run, tokenizer, write(row | {"others": [box | {"box": [2]}]}))
