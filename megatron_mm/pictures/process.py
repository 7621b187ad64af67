"""Images decoded in a process of its own, with limits of memory and time that the kernel keeps.

A file that would take too much, or that ends the process, costs an error that names it: nothing in
an image reaches the memory of the trainer but pixels of a size that was asked for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.errors import DataError, DecoderError
from megatron_mm.pictures.boxes import Box
from megatron_mm.pictures.serve import SECONDS, read, write

# Larger images are rejected before decoding: a small compressed file can claim gigapixels.
MAX_PIXELS = 2**26
MAX_BYTES = 2**29  # of a file; the largest image needs 2**28 uncompressed

ROOT = Path(__file__).parents[2]


class PictureProcess:
    """A process that decodes images. It starts with the first one, and again after one that ended
    it. It ends with this object.

    Args:
        seconds: on the processor, for one image.
    """

    def __init__(self, seconds: int = SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize | None = None

    def __enter__(self) -> PictureProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; the next image would start another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def size(
        self,
        image: Path | bytes,
        name: str,
        max_pixels: int = MAX_PIXELS,
        box: Box | None = None,
    ) -> tuple[int, int]:
        """Returns (width, height) in pixels as a viewer shows the image, without decoding it.

        Args:
            image: a file or its bytes.
            name: names the image in messages.
            max_pixels: of the whole image.
            box: the part of the shown image that is meant; None: all of it.

        Raises:
            DataError: the image cannot be used, as far as its header shows; does not name the row.
            DecoderError: the process cannot work, for a reason that is not the image's.
        """
        found, _ = self._ask(image, name, None, max_pixels, box, 0)
        width, height = found["size"]
        return width, height

    def scaled(
        self,
        image: Path | bytes,
        name: str,
        sizes: Sequence[tuple[int, int] | None],
        max_pixels: int = MAX_PIXELS,
        box: Box | None = None,
    ) -> list[np.ndarray]:
        """Decodes an image as a viewer shows it, crops it to its box, and stretches it by bicubic
        interpolation to each (width, height) of `sizes`; None: its own size.

        Args:
            max_pixels, box: as for `size`.

        Returns:
            uint8 [H, W, 3] for each size, read-only.

        Raises:
            DataError, DecoderError: as `size`, also for pixels that cannot be decoded.
        """
        most = 3 * sum(max_pixels if size is None else size[0] * size[1] for size in sizes)
        found, body = self._ask(image, name, sizes, max_pixels, box, most)
        arrays, at = [], 0
        for width, height in found["sizes"]:
            part = np.frombuffer(body, np.uint8, 3 * width * height, at)
            arrays.append(part.reshape(height, width, 3))
            at += part.nbytes
        return arrays

    def _ask(
        self,
        image: Path | bytes,
        name: str,
        sizes: Sequence[tuple[int, int] | None] | None,
        max_pixels: int,
        box: Box | None,
        largest: int,
    ) -> tuple[dict[str, Any], bytes]:
        length = len(image) if isinstance(image, bytes) else image.stat().st_size
        if length > MAX_BYTES:
            raise DataError(f"{name} has {length} bytes, the limit is {MAX_BYTES}; shrink the file")
        held = image if isinstance(image, bytes) else b""
        path = None if isinstance(image, bytes) else os.path.abspath(image)
        head: dict[str, Any] = {"path": path, "name": name, "sizes": sizes, "box": box}
        head |= {"max_pixels": max_pixels, "seconds": self._seconds}
        process = self._started()
        try:
            write(process.stdin, head, held)
            found, body = read(process.stdout, largest)
        except (EOFError, OSError):
            raise self._ended(name) from None
        if "error" in found:
            raise DataError(found["error"])
        return found, body

    def _started(self) -> Any:
        if self._process is not None:
            return self._process
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megatron_mm.pictures.serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries print what stands in a file
            env=os.environ | {"PYTHONPATH": path},
        )
        self._process, self._end = process, weakref.finalize(self, _close, process)
        assert process.stdout is not None
        try:
            read(process.stdout, 0)
        except EOFError:
            raise self._ended("no image") from None
        return process

    def _ended(self, name: str) -> DataError | DecoderError:
        """Ends the process, and returns the error for the image that it was at."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:  # it wrote nonsense
            process.kill()
            code = -signal.SIGABRT
        self.close()
        if code == -signal.SIGXCPU:
            return DataError(
                f"{name} takes more than {self._seconds} s to decode; replace the file"
            )
        if name == "no image" or code in (0, 1, -signal.SIGKILL):
            return DecoderError(
                f"the process that decodes images ended with status {code} at {name}; "
                "is there memory left? `python -m megatron_mm.pictures.serve` must start here"
            )
        return DataError(f"{name} ended its decoder with status {code}; replace the file")


def _close(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what it has not read
                pipe.close()
