"""A microbatch against its samples: labels, boundaries, images, memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mm.config import MemoryConfig
from megatron_mm.data.batch import BatchMemory
from megatron_mm.data.collate import collate
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.errors import DataError
from support.batches import values_of


def build(run, tokenizer, path):
    builder = SampleBuilder(run, tokenizer)
    rows = Rows(path)
    samples = [builder.training(rows[i], rows.where(i), rows.folder) for i in range(len(rows))]
    return builder, samples


def batch(builder, samples, pad_multiple=1):
    return collate(
        samples,
        settings=builder.settings,
        pad_id=builder.tokenizer.pad_id,
        pad_multiple=pad_multiple,
    )


@pytest.fixture
def three(write_rows, make_row):
    return write_rows(
        make_row("<image>and<image>?", "1 2", ["wide.png", "small.png"]),
        make_row("text only?", "3"),
        make_row("so <image>?", "4", ["wide.png"]),
    )


def test_tokens_labels_and_boundaries(run, tokenizer, three):
    builder, samples = build(run, tokenizer, three)
    made = batch(builder, samples, pad_multiple=16)
    total = sum(len(s.tokens_T) for s in samples)
    assert total % 16 and len(made.tokens_T) == -(-total // 16) * 16
    assert made.num_real_tokens == total
    assert made.samples == [f"{three}:{n}" for n in (1, 2, 3)]
    bounds = made.cu_seqlens.tolist()
    assert len(bounds) == 5 and bounds[0] == 0 and bounds[3:] == [total, len(made.tokens_T)]
    for sample, start, end in zip(samples, bounds, bounds[1:], strict=False):
        assert torch.equal(made.tokens_T[start:end], sample.tokens_T)
        assert torch.equal(made.labels_T[start : end - 1], made.tokens_T[start + 1 : end])
        assert torch.equal(made.position_ids_T[start:end], torch.arange(end - start))
        assert made.loss_mask_T[end - 1] == 0
    learned = made.labels_T[made.loss_mask_T.bool()].tolist()
    assert tokenizer.decode(learned) == "1 2<|im_end|>3<|im_end|>4<|im_end|>"
    assert (made.tokens_T[total:] == tokenizer.pad_id).all()
    assert made.loss_mask_T[total:].sum() == 0 and made.position_ids_T[total] == 0
    assert made.skill_T is None


def test_skills_stand_at_their_positions_and_padding_has_none(run, tokenizer, three):
    builder, samples = build(run, tokenizer, three)
    samples[1].skill_T = torch.arange(len(samples[1].tokens_T))
    made = collate(samples, settings=builder.settings, pad_id=0, pad_multiple=16, labelled=True)
    start, end = made.cu_seqlens[1:3].tolist()
    assert made.skill_T.dtype == torch.int64 and made.skill_T.shape == made.tokens_T.shape
    assert made.skill_T[start:end].tolist() == list(range(end - start))
    assert (made.skill_T[:start] == -1).all() and (made.skill_T[end:] == -1).all()
    nothing = collate([], settings=builder.settings, pad_id=0, pad_multiple=4, labelled=True)
    assert nothing.skill_T.tolist() == [-1] * 4


def test_a_full_multiple_has_no_tail(run, tokenizer, three):
    builder, samples = build(run, tokenizer, three)
    made = batch(builder, samples[:1], pad_multiple=len(samples[0].tokens_T))
    assert made.cu_seqlens.tolist() == [0, len(samples[0].tokens_T)]


@pytest.mark.parametrize(
    ("stream", "memory", "tiles", "stream_tiles", "memory_tiles"),
    [
        # wide.png is tiles 0, 1 and thumbnail 2; small.png is a single tile.
        ("all", "none", 7, [0, 1, 2, 3, 4, 5, 6], []),
        ("all", "tiles", 7, [0, 1, 2, 3, 4, 5, 6], [0, 1, 3, 4, 5]),
        ("thumbnail", "tiles", 7, [2, 3, 6], [0, 1, 3, 4, 5]),
        ("thumbnail", "none", 3, [0, 1, 2], []),
        ("tiles", "thumbnail", 7, [0, 1, 3, 4, 5], [2, 3, 6]),
        ("thumbnail", "thumbnail", 3, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_tiles_of_stream_and_memory(
    run, tokenizer, three, stream, memory, tiles, stream_tiles, memory_tiles
):
    run.model.fusion.image_stream, run.model.fusion.vision_memory = stream, memory
    builder, samples = build(run, tokenizer, three)
    made = batch(builder, samples)
    assert made.pixels_NCHW.shape == (tiles, 3, 8, 8)
    pixels = [torch.from_numpy(i.tiles).permute(0, 3, 1, 2) for s in samples for i in s.images]
    assert torch.equal(made.pixels_NCHW, torch.cat(pixels))
    assert made.stream_tiles.tolist() == stream_tiles
    assert list(made.memories) == ([] if memory == "none" else ["vision"])
    held = made.memories.get("vision", BatchMemory.build())
    assert held.tiles.tolist() == memory_tiles
    # 4 stream tokens a tile, exactly where the context tokens stand.
    context = (made.tokens_T == tokenizer.image_context_id).nonzero().flatten()
    assert torch.equal(made.stream_positions, context)
    assert len(context) == 4 * len(stream_tiles)
    assert held.coordinates_M2.shape == held.visible_M2.shape
    assert len(held.visible_M2) == 16 * len(memory_tiles)


def test_looks_may_be_given_other_images(run, tokenizer, write_rows, make_row):
    """The stream, the text and the coordinates stay; every tile of the memory is the other's."""
    run.model.fusion.image_stream, run.model.fusion.vision_memory = "thumbnail", "tiles"
    one = make_row("so <image>?", "4", ["wide.png"])
    rows = [one | {"others": [name]} for name in ("small.png", "wide.png", "other.png")]
    run.data.extra_columns = ["others"]
    path = write_rows(*rows)
    pixels = np.random.default_rng(9).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path.parent / "other.png")
    builder, (_, twice, _) = build(run, tokenizer, path)
    own = batch(builder, [twice])
    run.data.memory_images = "others"
    builder = SampleBuilder(run, tokenizer)
    rows = Rows(path)
    sizes = "1 images in 'others' for 1 in 'images'; memory_images needs as many, of the same grids"
    with pytest.raises(DataError, match=f"rows.jsonl:1: {sizes}"):
        builder.training(rows[0], rows.where(0), rows.folder)
    with pytest.raises(DataError, match="rows.jsonl:1: 0 images in 'others' for 1 in 'images'"):
        builder.training(one, rows.where(0), rows.folder)
    same = batch(builder, [builder.training(rows[1], rows.where(1), rows.folder)])
    assert torch.equal(same.tokens_T, own.tokens_T)
    for name in ("stream_tiles", "memories.vision.tiles"):
        tiles = [made.pixels_NCHW[values_of(made)[name]] for made in (same, own)]
        assert len(tiles[0]) and torch.equal(*tiles)
    made = batch(builder, [builder.training(rows[2], rows.where(2), rows.folder)])
    halves = torch.from_numpy(np.stack((pixels[:, :8], pixels[:, 8:]))).permute(0, 3, 1, 2)
    assert torch.equal(made.pixels_NCHW[made.memories["vision"].tiles], halves)
    assert torch.equal(made.pixels_NCHW[made.stream_tiles], own.pixels_NCHW[own.stream_tiles])
    of_same, of_own = (made.memories["vision"].coordinates_M2 for made in (same, own))
    assert torch.equal(of_same, of_own)
    assert builder.measure(rows[1], rows.where(1), rows.folder).tiles == len(same.pixels_NCHW) == 3


def test_memories_of_several_resolutions_and_images(run, tokenizer, write_rows, make_row):
    """Each memory holds its own tiles of the images under its own key; the ViT sees a tile once
    for each key."""
    run.model.fusion.image_stream = "thumbnail"
    run.model.fusion.memories = {
        "overview": MemoryConfig("thumbnail"),
        "detail": MemoryConfig("tiles"),
        "other": MemoryConfig("tiles", images="others"),
    }
    row = make_row("so <image>?", "4", ["wide.png"]) | {"others": ["other.png"]}
    path = write_rows(row, row)
    pixels = np.random.default_rng(9).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path.parent / "other.png")
    builder, samples = build(run, tokenizer, path)
    made = batch(builder, samples)
    assert list(made.memories) == ["overview", "detail", "other"]
    # Of each row: tiles 0 and 1 and thumbnail 2 of its image, then the other's two tiles.
    assert made.stream_tiles.tolist() == [2, 7]
    tiles = {name: held.tiles.tolist() for name, held in made.memories.items()}
    assert tiles == {"overview": [2, 7], "detail": [0, 1, 5, 6], "other": [3, 4, 8, 9]}
    halves = torch.from_numpy(np.stack((pixels[:, :8], pixels[:, 8:]))).permute(0, 3, 1, 2)
    assert torch.equal(made.pixels_NCHW[made.memories["other"].tiles[:2]], halves)
    for held, count in zip(made.memories.values(), (1, 2, 2), strict=True):
        assert held.coordinates_M2.shape == held.visible_M2.shape == (2 * count * 16, 2)
    assert made.memories["overview"].coordinates_M2[0].tolist() == [0.125, 0.125]
    assert made.memories["detail"].coordinates_M2[0].tolist() == [0.125, 0.0625]
    assert builder.measure(row, "rows", path.parent).tiles == 5
    run.model.fusion.memories["other"].images = "absent"
    run.data.extra_columns = ["others"]
    needs = "memories.other.images needs as many, of the same grids"
    with pytest.raises(DataError, match=f"0 images in 'absent' for 1 in 'images'; {needs}"):
        build(run, tokenizer, path)


def test_a_patch_is_visible_from_its_image_to_the_end_of_its_sample(run, tokenizer, three):
    run.model.fusion.image_stream, run.model.fusion.vision_memory = "thumbnail", "tiles"
    builder, samples = build(run, tokenizer, three)
    made = batch(builder, samples, pad_multiple=64)
    ends = (made.tokens_T == tokenizer.image_end_id).nonzero().flatten().tolist()
    bounds = made.cu_seqlens.tolist()
    expected = [[ends[0], bounds[1]]] * 32 + [[ends[1], bounds[1]]] * 16
    expected += [[ends[2], bounds[3]]] * 32
    held = made.memories["vision"]
    assert held.visible_M2.tolist() == expected
    left, right = held.coordinates_M2[:16], held.coordinates_M2[16:32]
    steps = [0.125, 0.375, 0.625, 0.875]
    assert left.tolist() == [[y, x / 2] for y in steps for x in steps]
    assert right.tolist() == [[y, 0.5 + x / 2] for y in steps for x in steps]
    assert held.coordinates_M2[32:48].tolist() == [[y, x] for y in steps for x in steps]


def test_empty_and_text_only_microbatches(run, tokenizer, three):
    run.model.fusion.vision_memory = "tiles"
    builder, samples = build(run, tokenizer, three)
    for made, tokens in (
        (batch(builder, [], 8), 8),
        (batch(builder, samples[1:2]), len(samples[1].tokens_T)),
    ):
        assert len(made.tokens_T) == tokens and made.cu_seqlens.tolist() == [0, tokens]
        assert made.pixels_NCHW.shape == (0, 3, 8, 8)
        held = made.memories["vision"]
        for none in (made.stream_tiles, made.stream_positions, held.tiles):
            assert none.shape == (0,) and none.dtype == torch.int64
        assert held.coordinates_M2.shape == held.visible_M2.shape == (0, 2)
        assert held.visible_M2.dtype == torch.int64
    empty = batch(builder, [], 8)
    assert empty.num_real_tokens == 0 and empty.loss_mask_T.sum() == 0
    assert (empty.tokens_T == tokenizer.pad_id).all()


def test_the_model_and_the_images_must_fit(run, tokenizer, three):
    run.model.vision = None
    builder = SampleBuilder(run, tokenizer)
    rows = Rows(three)
    with pytest.raises(DataError, match="rows.jsonl:1: 2 images but the model has no vision"):
        builder.training(rows[0], rows.where(0), rows.folder)
    text = builder.training(rows[1], rows.where(1), rows.folder)
    assert batch(builder, [text]).pixels_NCHW.shape[0] == 0


def test_settings_are_checked_at_construction(run, tokenizer):
    run.data.use_thumbnail = False
    for name in ("image_stream", "vision_memory"):
        setattr(run.model.fusion, name, "thumbnail")
        with pytest.raises(DataError, match=f"{name} is 'thumbnail' but use_thumbnail is false"):
            SampleBuilder(run, tokenizer)
        setattr(run.model.fusion, name, "tiles")
    run.model.vision.image_size = 10
    with pytest.raises(DataError, match="image_size 10 is not a multiple of patch_size 2 x .* 4"):
        SampleBuilder(run, tokenizer)
    run.model.language.vocab_size = 64
    with pytest.raises(DataError, match="ids but the model's vocab_size is 64; set vocab_size"):
        SampleBuilder(run, tokenizer)


@pytest.mark.parametrize("cache_bytes", [0, 700, 10**6])
def test_a_cache_of_any_size_changes_nothing(run, tokenizer, three, cache_bytes):
    builder = SampleBuilder(run, tokenizer, cache_bytes)
    rows = Rows(three)
    kept = builder.training(rows[2], "r:3", rows.folder)
    start = kept.images[0].start
    for index in (0, 2, 0):
        again = builder.training(rows[index], "r:1", rows.folder)
    fresh = SampleBuilder(run, tokenizer).training(rows[0], "r:1", rows.folder)
    for a, b in zip(again.images, fresh.images, strict=True):
        assert (a.tiles == b.tiles).all() and a.start == b.start
    assert kept.images[0].start == start  # other samples of the same image leave it alone
