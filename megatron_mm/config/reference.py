"""config/README.md: every setting with its flag, type, default and explanation.

python -m megatron_mm.config.reference > megatron_mm/config/README.md
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from megatron_mm.config.families import LANGUAGE_FAMILIES
from megatron_mm.config.flags import default_text, flag_name, names_text
from megatron_mm.config.megatron import ALWAYS, REFUSED
from megatron_mm.config.settings import DataPhase, DataSource, RunConfig
from megatron_mm.config.settings_model import MemoryConfig
from megatron_mm.config.tree import Leaf, expected, leaves

HEAD = """\
# Settings

This room holds every setting of a run and what can be said from settings alone: which layers a
model has, which stage holds them, what they cost. It imports no torch.

A run is a preset, a YAML file and flags, laid on each other in this order (`load.py`). Every row
below is a key of its section in YAML and, except where it says so, a flag in Megatron's spelling.
A bool is `--bf16` or `--no-bf16`; a setting that may be absent takes the word `none`, and so does a
list that may be empty. What happens to
[the other flags of Megatron's](#megatrons-flags-that-are-no-settings) stands at the end.
`base:` in a YAML file names a file that it overrides. A wrong key, type or size is rejected in one
line before anything starts. `model: preset:` or `--preset` names a model to start from:

| preset | model |
|---|---|
{presets}

| file | what it holds |
|---|---|
{files}

**Add a setting**: declare it in its dataclass, with its bounds and its explanation behind it; the
flag, `--help`, the check of its bounds and this page follow.

```python
from dataclasses import dataclass
from typing import Annotated

from megatron_mm.config.fields import Bounds, PositiveInt


@dataclass
class Smoothing:
    smoothing_iters: PositiveInt = 100
    \"\"\"Steps in which labels are smoothed.\"\"\"
    label_smoothing: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    \"\"\"Share of a label's probability that is spread over all tokens.\"\"\"
```

This page is generated: `python -m megatron_mm.config.reference > megatron_mm/config/README.md`.
"""

MEGATRON = """\
## Megatron's flags that are no settings

A launch script of Megatron's may keep the flags of the first table: they name what always holds,
and the log says so. Flags of the second are rejected with the reason beside them, and any other
flag of Megatron's as unknown.

| accepted | because |
|---|---|
{always}

| rejected | because |
|---|---|
{refused}
"""

# Sections in lists and under names of the user's own: keys of files without flags of their own.
IN_FILES = {
    "model.fusion.memories.NAME": MemoryConfig,
    "data.train_data[]": DataPhase,
    "data.train_data[].mixture[]": DataSource,
}


def page() -> str:
    """The whole page as markdown."""
    head = HEAD.replace("{files}", "\n".join(_files()))
    parts = [head.replace("{presets}", "\n".join(_presets()))]
    for section, found in groupby(leaves(RunConfig), key=lambda leaf: leaf.path[:-1]):
        table = "| flag | allowed | default | |\n|---|---|---|---|"
        rows = "\n".join(_row(leaf) for leaf in found)
        parts.append(f"## {'.'.join(section) or 'run'}\n\n{table}\n{rows}\n")
    for name, section in IN_FILES.items():
        table = "| key, in files | allowed | default | |\n|---|---|---|---|"
        rows = "\n".join(_row(leaf, leaf.name) for leaf in leaves(section))
        parts.append(f"## {name}\n\n{table}\n{rows}\n")
    parts.append(MEGATRON.format(always="\n".join(_always()), refused="\n".join(_refused())))
    return "\n".join(parts)


def _presets() -> Iterator[str]:
    made = {n: f for _, family in LANGUAGE_FAMILIES.items() for n, f in family.presets.items()}
    for name in sorted(made):
        yield f"| `{name}` | {' '.join((inspect.getdoc(made[name]) or '').split())} |"


def _always() -> Iterator[str]:
    for flag, always in ALWAYS.items():
        yield f"| `{' '.join((flag, ' or '.join(always.values))).strip()}` | {always.why} |"


def _refused() -> Iterator[str]:
    for flag, why in REFUSED.items():
        yield f"| `{flag}` | {why} |"


def _row(leaf: Leaf, name: str | None = None) -> str:
    allowed = str(leaf.bounds) if leaf.bounds else names_text(leaf) or expected(leaf.hint)
    name = name or flag_name(leaf)
    cells = (f"`{name}`", allowed, f"`{default_text(leaf)}`", leaf.explanation)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _files() -> Iterator[str]:
    """A row for each module of this room: its name and the first sentence of its docstring."""
    room = Path(__file__).parent
    for path in sorted(room.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(text.split("\n\n")[0].split())
        if path.name != "__init__.py":
            yield f"| `{path.relative_to(room).as_posix()}` | {first} |"


if __name__ == "__main__":
    print(page(), end="")
