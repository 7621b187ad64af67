"""Tiling against cases worked out by hand, and every way an image can be bad."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mm.data.images import (
    TileGrid,
    channels_first,
    choose_grid,
    cut_tiles,
    image_size,
    load_image,
    normalise,
    resolve_image_path,
)
from megatron_mm.data.tiles import patch_centres, select_tiles
from megatron_mm.errors import DataError
from support.images import deep_tiff


@pytest.mark.parametrize(
    ("width", "height", "max_tiles", "rows", "cols"),
    [
        (448, 448, 12, 1, 1),  # 2x2 needs more than 2*448^2 pixels
        (634, 634, 12, 2, 2),  # 401956 > 401408 = half of 2x2 tiles
        (633, 633, 12, 1, 1),  # 400689 is just below
        (951, 951, 12, 3, 3),  # 904401 > 903168 = half of 3x3 tiles
        (951, 951, 8, 2, 2),  # 3x3 is no candidate
        (800, 400, 12, 1, 2),  # 2:1 exactly; 2x4 needs 802816 pixels
        (400, 800, 12, 2, 1),
        (1600, 800, 12, 2, 4),  # 2:1 and large
        (800, 600, 12, 3, 4),  # 4:3 is a candidate of its own
        (800, 600, 11, 2, 3),  # 1.3333: 3/2 is 0.167 away, 5/4 too many, 1/1 is 0.333 away
        (10_000, 10, 12, 1, 12),
        (10, 10_000, 6, 6, 1),
        (1, 1, 12, 1, 1),
    ],
)
def test_grid(width, height, max_tiles, rows, cols):
    plan = choose_grid(width, height, image_size=448, max_num_tiles=max_tiles, use_thumbnail=True)
    assert (plan.rows, plan.cols) == (rows, cols)
    assert plan.thumbnail == (rows * cols > 1)
    assert plan.num_tiles == rows * cols + (rows * cols > 1)
    assert not choose_grid(
        width, height, image_size=448, max_num_tiles=max_tiles, use_thumbnail=False
    ).thumbnail


def test_the_larger_grid_wins_a_tie_between_different_ratios_only_when_it_fills():
    # 1.25 lies halfway between 1/1 and 3/2.
    for width, height, grid in ((10, 8, (1, 1)), (1000, 800, (2, 3))):
        plan = choose_grid(width, height, image_size=448, max_num_tiles=6, use_thumbnail=False)
        assert (plan.rows, plan.cols) == grid


def test_tiles_are_cut_row_by_row_and_the_thumbnail_is_last():
    colours = np.arange(6, dtype=np.uint8) * 40
    picture = colours.reshape(2, 3).repeat(4, axis=0).repeat(4, axis=1)
    image = Image.fromarray(np.stack([picture] * 3, axis=-1))
    tiles = cut_tiles(image, TileGrid(2, 3, True), 4)
    assert tiles.shape == (7, 4, 4, 3) and tiles.dtype == np.uint8
    for tile, colour in zip(tiles[:6], colours, strict=True):
        assert (tile == colour).all()
    whole = np.asarray(image.resize((4, 4), Image.Resampling.BICUBIC))
    assert (tiles[6] == whole).all()


def test_normalise():
    tiles = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    tiles[0, 0, 1] = (255, 0, 51)
    out = normalise(channels_first(tiles), [0.5, 0.5, 0.2], [0.5, 0.25, 0.1])
    assert out.shape == (1, 3, 2, 2) and out.dtype == torch.float32
    torch.testing.assert_close(out[0, :, 0, 1], torch.tensor([1.0, -2.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(out[0, :, 1, 0], torch.tensor([-1.0, -2.0, -2.0]))


def test_every_value_of_a_pixel_is_normalised_in_fp32_in_this_order():
    """The processors of transformers do the same; an export's pixels are compared with theirs."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = (values.astype(np.float32) / np.float32(255) - mean) / std
    pixels = channels_first(values)
    assert pixels.is_contiguous()
    for scale in ((mean.tolist(), std.tolist()), (torch.tensor(mean), torch.tensor(std))):
        found = normalise(pixels, *scale).permute(0, 2, 3, 1).numpy()
        assert found.dtype == np.float32 and np.array_equal(found, expected)


def test_pixels_are_normalised_once():
    pixels = normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match="torch.float32; give them as uint8, not yet normalised"):
        normalise(pixels, [0.5] * 3, [0.5] * 3)


def test_selection():
    plan, single = TileGrid(2, 2, True), TileGrid(1, 1, False)
    wanted = {"none": [], "thumbnail": [4], "tiles": [0, 1, 2, 3], "all": [0, 1, 2, 3, 4]}
    for choice, tiles in wanted.items():
        assert select_tiles(plan, choice) == tiles
        assert select_tiles(single, choice) == ([] if choice == "none" else [0])
    with pytest.raises(DataError, match="2x2 grid without a thumbnail"):
        select_tiles(TileGrid(2, 2, False), "thumbnail")


def test_patch_centres_are_fractions_of_the_whole_image():
    plan = TileGrid(1, 2, True)
    right = patch_centres(plan, 1, 2)
    expected = [[0.25, 0.625], [0.25, 0.875], [0.75, 0.625], [0.75, 0.875]]
    torch.testing.assert_close(right, torch.tensor(expected))
    thumbnail = patch_centres(plan, 2, 2)
    expected = [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    torch.testing.assert_close(thumbnail, torch.tensor(expected))


def _save(path, size=(64, 64), mode="RGB", cut=None):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])
    return path


def test_bad_images_say_what_and_where(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image at all")
    empty = tmp_path / "empty.png"
    empty.touch()
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(deep)
    cases = [
        (tmp_path / "none.png", "does not exist"),
        (tmp_path, "does not exist"),
        (empty, "0 bytes"),
        (text, "cannot be decoded"),
        (_save(tmp_path / "cut.png", cut=2000), "cannot be decoded"),
        (_save(tmp_path / "cut.jpg", cut=2000), "cannot be decoded"),
        (_save(tmp_path / "wide.tif", mode="F"), "mode F"),
        (deep, "mode I;16"),
    ]
    for path, what in cases:
        with pytest.raises(DataError, match=what) as caught:
            load_image(path, "rows.jsonl:7")
        assert str(caught.value).startswith("rows.jsonl:7: ")
        assert "\n" not in str(caught.value)


def test_pixel_limit_is_checked_before_decoding(tmp_path):
    path = _save(tmp_path / "big.png", (64, 65), cut=200)  # decoding would fail otherwise
    with pytest.raises(DataError, match="64x65 = 4160 pixels, the limit is 4096"):
        load_image(path, "r:1", max_pixels=4096)


def test_every_ordinary_mode_becomes_rgb(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = load_image(_save(tmp_path / f"{mode}.png", mode=mode), "r:1")
        assert image.mode == "RGB" and image.size == (64, 64)


def test_paths_stay_in_the_data_folder(tmp_path):
    assert resolve_image_path(tmp_path, "a/../b.png", "r:1") == tmp_path / "b.png"
    for name in ("../b.png", "a/../../b.png", "/etc/passwd", ".."):
        with pytest.raises(DataError, match="r:1: .*leaves the data folder"):
            resolve_image_path(tmp_path, name, "r:1")
    for name in ("", None, 3):
        with pytest.raises(DataError, match="r:1: "):
            resolve_image_path(tmp_path, name, "r:1")


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width, height, depth, colour, data=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_a_channel_are_refused_and_not_reduced(tmp_path, colour, channels):
    (tmp_path / "deep.png").write_bytes(
        _png(4, 4, 16, colour, 4 * (b"\0" + b"\x12\x34" * 4 * channels))
    )
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=r"r:1: .*more than 8 bits a channel"):
            read(tmp_path / "deep.png", "r:1")


@pytest.mark.parametrize(("channels", "photometric"), [(1, 1), (3, 2), (4, 5)])
def test_so_are_those_of_a_tiff(tmp_path, channels, photometric):
    """PIL opens these as RGB and CMYK, and its decoder's arguments are a tuple."""
    (tmp_path / "deep.tif").write_bytes(deep_tiff(channels, photometric))
    with Image.open(tmp_path / "deep.tif") as opened:
        assert opened.size == (4, 4)
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=r"r:1: .*more than 8 bits a channel"):
            read(tmp_path / "deep.tif", "r:1")


def test_ordinary_16_bit_pixels_are_fine(tmp_path):
    """A BMP of 5-6-5 bits has 16 bits a pixel, not a channel."""
    header = struct.pack("<2sIHHI", b"BM", 14 + 40 + 12 + 8, 0, 0, 14 + 40 + 12)
    header += struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    (tmp_path / "a.bmp").write_bytes(header + masks + struct.pack("<4H", *[0xF800] * 4))
    assert load_image(tmp_path / "a.bmp", "r:1").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("side", "what"), [(9000, "81000000 pixels, the limit is"), (50_000, "")])
def test_a_decompression_bomb_is_not_decoded(tmp_path, side, what):
    """Some 100 bytes that claim gigabytes; PIL itself raises for the larger one."""
    (tmp_path / "bomb.png").write_bytes(_png(side, side, 8, 2))
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=f"r:1: .*(?={what}).*; shrink") as caught:
            read(tmp_path / "bomb.png", "r:1")
        assert "limit" in str(caught.value) and "\n" not in str(caught.value)


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 90)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.mode == "CMYK"
    pixel = np.array(load_image(tmp_path / "a.jpg", "r:1"))[8, 8]
    assert np.abs(pixel.astype(int) - (200, 30, 90)).max() <= 4  # JPEG at quality 95


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_an_image_of_several_frames_is_refused(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 90, 180)]
    path = tmp_path / f"moving.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(
        DataError, match="has more than 1 frame, 1 is allowed; save the frame you mean"
    ):
        load_image(path, "r:1")
    frames[0].save(tmp_path / f"still.{kind}")
    assert load_image(tmp_path / f"still.{kind}", "r:1").size == (8, 8)


def test_the_size_is_read_without_decoding(tmp_path):
    path = _save(tmp_path / "cut.png", (64, 48), cut=200)
    assert image_size(path, "r:1") == (64, 48)
    with pytest.raises(DataError, match="r:1: .*cannot be decoded"):
        load_image(path, "r:1")
