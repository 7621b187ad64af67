"""The READMEs of rl/ and earl/: they name every file, and the labeller they show works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_mm.earl.spans import Label

ROOMS = Path(__file__).parents[2] / "megatron_mm"


@pytest.mark.parametrize("room", ["rl", "earl"])
def test_every_file_of_the_room_is_named_and_no_other(room):
    readme = (ROOMS / room / "README.md").read_text(encoding="utf-8")
    listed = readme.split("## Files")[1].split("\n\n")[1]
    files = {path.relative_to(ROOMS / room).as_posix() for path in (ROOMS / room).rglob("*.py")}
    files = {name for name in files if not name.endswith("__init__.py")}
    assert set(re.findall(r"`([\w/]+\.py)`", listed)) == files


def test_the_labeller_that_is_shown_finds_numbers():
    readme = (ROOMS / "earl" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    exec(code, names)
    found = names["numbers"]({"ground_truth": "7 12"}, "it is 12, not 3", "rows:1", skill="ocr")
    assert found == [Label(6, 8, "ocr", True), Label(14, 15, "ocr", False)]
