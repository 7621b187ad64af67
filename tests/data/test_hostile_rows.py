"""Rows made to harm: each is a bad row, by file and number, and nothing else."""

import zlib

import pytest

from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.loading.reader import Place, Reader
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.errors import DataError
from support.images import SMALL, png, tiff_chain

HOSTILE = {
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
    "too tall to scale": png(1, 2**26, zlib.compress(bytes(2 * 2**26), 1), colour=0),
    "frames": tiff_chain(5000),
    "too many pixels": png(2**13, 2**13 + 1, b""),
    "cut": SMALL["JPEG"][:-200],
    "nothing": b"",
    "text": b"no image",
}


@pytest.mark.parametrize("held", [False, True], ids=["file", "in the row"])
def test_every_failure_is_a_bad_row(run, tokenizer, write_rows, make_row, held):
    """`skip` leaves out what `build` returns as text, and names it."""
    run.data.max_num_tiles = 12
    path = write_rows(*[make_row("<image>?", images=[f"{n}.png"]) for n in range(len(HOSTILE))])
    for number, data in enumerate(HOSTILE.values()):
        (path.parent / f"{number}.png").write_bytes(data)
    files = open_row_files(path, RowGroupCache())
    reader = Reader(run, tokenizer, [files])
    if held:
        rows = files.files[0]
        for number, data in enumerate(HOSTILE.values()):
            with pytest.raises(DataError, match=f"r:{number}: image 1"):
                row = rows[number] | {"images": [data]}
                reader.builder.training(row, f"r:{number}", path.parent)
        return
    places = [Place(0, number) for number in range(len(HOSTILE))]
    for number, found in enumerate(reader.build(places), start=1):
        assert isinstance(found, str) and found.startswith(f"{path}:{number}: image "), found
        assert "\n" not in found
