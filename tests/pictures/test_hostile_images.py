"""Images made to start a program, to take memory or time, or to end their decoder: each costs one
row, by name, and nothing else."""

import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.images import ImageFile, image_size, load_image
from megatron_mm.errors import DataError, DecoderError
from megatron_mm.pictures.process import PictureProcess
from support.images import SMALL, chunk, png, progressive, tiff_chain

SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
FOREIGN = {
    "eps": SCRIPT,
    "eps in a binary header": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<5I", 30, len(SCRIPT), 0, 0, 0)
    + bytes(6)
    + SCRIPT,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
    "ppm": b"P6 2 2 255\n" + bytes(12),
    "xbm": b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x00};\n",
    "xpm": b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"  c #000000",\n" "};\n',
    "pcx": b"\x0a\x05\x01\x08" + struct.pack("<4H", 0, 0, 7, 7) + bytes(200),
    "icns": b"icns" + struct.pack(">I", 8),
    "fits": b"SIMPLE  =                    T".ljust(2880),
    "dds": b"DDS " + struct.pack("<I", 124) + bytes(200),
    "tga": struct.pack("<3B5B4H2B", 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 2, 24, 0) + bytes(12),
    "a program": b"#!/bin/sh\ntouch ran\n",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_only_formats_of_the_list_are_opened(kind, tmp_path, monkeypatch):
    """A `gs` on the path shows what PIL would start."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.png").write_bytes(FOREIGN[kind])
    for read in (load_image, image_size):
        with pytest.raises(DataError, match=r"rows.jsonl:3: image \S+a.png cannot be decoded"):
            read(tmp_path / "a.png", "rows.jsonl:3")
    assert not ran.exists()


@pytest.mark.parametrize("kind", SMALL)
def test_formats_of_the_list_are_read(kind):
    held = ImageFile("image 1", held=SMALL[kind])
    assert load_image(held, "r:1").size == image_size(held, "r:1") == (24, 16)


def _scaled(data, sizes=((448, 448),), seconds=15):
    with PictureProcess(seconds) as process:
        return process.scaled(data, "image 1", list(sizes))


@pytest.mark.parametrize(
    ("width", "height", "fits"), [(1, 2**26, False), (3, 2**24, True), (2**26, 1, False)]
)
def test_scaling_is_within_the_limit_of_memory(width, height, fits):
    """PIL would take what it needs, for the first 360 GB: its `MemoryError` stopped the job."""
    data = png(width, height, zlib.compress(bytes((1 + width) * height), 1), colour=0)
    assert len(data) < 2**20
    size = (448, 5376) if width < height else (5376, 448)
    if fits:
        assert _scaled(data, [size])[0].shape == (*size[::-1], 3)
        return
    with pytest.raises(DataError, match="image 1 needs more than 3072 MiB to be decoded"):
        _scaled(data, [size])


BEYOND = {
    "png": png(2**13, 2**13 + 1, b""),
    "png, wide": png(2**31 - 1, 1, b""),
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b"," + struct.pack("<4HB", 0, 0, 65535, 65535, 0) + b"\x02\x00;",
    "bmp": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
    "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10)
    + b"\0\0\0\0" + (16382).to_bytes(3, "little") * 2,
    "tiff": tiff_chain(1, 50_000, 50_000),
    "jpeg": SMALL["JPEG"].replace(struct.pack(">HH", 16, 24), struct.pack(">HH", 65500, 65500)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BEYOND)
def test_pixels_are_counted_before_any_work(kind):
    begin = time.process_time()
    with pytest.raises(DataError, match="shrink|cannot be decoded") as caught:
        image_size(ImageFile("image 1", held=BEYOND[kind]), "r:1")
    assert kind == "webp" or "limit" in str(caught.value)
    assert time.process_time() - begin < 1


def test_frames_are_not_counted():
    """PIL counts the frames of a TIFF in quadratic time: 20,000 would take a minute."""
    data = tiff_chain(20_000)
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(DataError, match="r:1: image 1 has more than 1 frame, 1 is allowed"):
        image_size(ImageFile("image 1", held=data), "r:1")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begin < 3


def _comment_bomb():
    """A GIF whose comment PIL joins by appending: quadratic in its length."""
    gif = SMALL["GIF"]
    at = gif.index(b",")
    return gif[:at] + b"!\xfe" + (b"\xff" + bytes(255)) * (2**18 - 2**10) + b"\0" + gif[at:]


SLOW = {
    "gif, a long comment": _comment_bomb,
    "jpeg, many scans": lambda: progressive(4000, 4000, 3000),
    "png, many chunks": lambda: png(8, 8, b"", before=chunk(b"abCd", b""), times=2**22),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_time_on_the_processor_ends_an_image_and_the_next_is_read(kind):
    data = SLOW[kind]()
    assert len(data) < 2**26
    with PictureProcess(seconds=1) as process:
        with pytest.raises(DataError, match="image 1 (takes more than 1 s|cannot be decoded)"):
            process.scaled(data, "image 1", [(448, 448)])
        assert process.size(SMALL["PNG"], "image 2") == (24, 16)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGXCPU])
def test_a_decoder_that_ends_names_the_image(number):
    """The process is sent what a fault in a library would send."""
    with PictureProcess() as process:
        process.size(SMALL["PNG"], "image 1")
        pid = process._process.pid
        os.kill(pid, number)
        with pytest.raises(DataError, match="image 2 (ended its decoder|takes more than)"):
            process.size(SMALL["PNG"], "image 2")
        assert process.size(SMALL["PNG"], "image 3") == (24, 16)
        os.kill(process._process.pid, signal.SIGKILL)  # as the kernel does without memory
        with pytest.raises(DecoderError, match="status -9 at image 4; is there memory left"):
            process.size(SMALL["PNG"], "image 4")
        held = process
    assert held._process is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_cannot_start_is_no_fault_of_a_row(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with PictureProcess() as process, pytest.raises(DecoderError, match="no image"):
        process.size(SMALL["PNG"], "image 1")


def test_the_process_ends_with_its_parent(tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "from megatron_mm.pictures.process import PictureProcess\n"
        "p = PictureProcess(); p.size(pathlib.Path(sys.argv[1]), 'image')\n"
        "print(p._process.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "a.png").write_bytes(SMALL["PNG"])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")], capture_output=True, text=True
    )
    pid = int(done.stdout)
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_large_files_and_pipes_are_not_read(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**29 + 1)
    os.mkfifo(tmp_path / "pipe.png")
    cases = (("large.png", "536870913 bytes, the limit is 536870912"), ("pipe.png", "not exist"))
    for name, what in cases:
        with pytest.raises(DataError, match=f"r:1: .*{what}"):
            load_image(tmp_path / name, "r:1")


def test_pixels_are_those_of_pil():
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    own, small = _scaled(buffer.getvalue(), [None, (16, 8)])
    assert (own == noise).all()
    again = Image.fromarray(noise).resize((16, 8), Image.Resampling.BICUBIC)
    assert (small == np.asarray(again)).all()
