"""What the harness must see: each input does one harm. Not chosen by default."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from random import Random

NAME = "harm, to test the harness"
ALLOWED = (ValueError,)


def make(rng: Random, folder: Path) -> tuple[str, Path]:
    """Returns the harm of this input. A process that begins again begins at the last of them."""
    counter = Path(tempfile.gettempdir()) / f"fuzz-harm-{os.getppid()}"
    number = int(counter.read_text()) if counter.exists() else 0
    counter.write_text(str(number + 1))
    kinds = ("fine", "refused", "traceback", "write", "program", "end", "hang")
    if number == len(kinds) - 1:
        counter.unlink()
    return kinds[number], folder


def read(value: tuple[str, Path]) -> None:
    """Does the harm."""
    kind, folder = value
    match kind:
        case "refused":
            raise ValueError("refused")
        case "traceback":
            raise KeyError("of another kind")
        case "write":
            (folder.parent / "beyond").write_text("x")
        case "program":
            subprocess.run(["true"], check=True)
        case "end":
            os.abort()
        case "hang":
            time.sleep(60)
        case _:
            (folder / "inside").write_text("x")
