"""YAML files of settings, and flags."""

from __future__ import annotations

from pathlib import Path
from random import Random

import yaml

from megatron_mm.config import ConfigError, RunConfig, load, to_dict, validate
from megatron_mm.config.flags import flag_name
from megatron_mm.config.tree import leaves
from tests.hostile.mutate import NUMBERS, TEXTS, mutated_bytes, mutated_tree

NAME = "settings"
ALLOWED = (ConfigError,)
PIECES = (
    *("&a ", "*a", "!!set ", "!!python/name:os.system ''", "!x ", "<<: *a\n", "? ", "- ", "[", "{"),
    *("2026-01-01", "2026-13-45", "0x" + "f" * 3000, "1:" * 3000, "|\n  a", "---\n", "%YAML 9.9\n"),
    *(".inf", ".nan", "~", "=", "'", '"\\0"', "\t", "!!binary a", "!!timestamp a", "!!int a"),
)


def make(rng: Random, folder: Path) -> tuple[Path, list[str]]:
    """Writes a file; flags come with it."""
    tree = to_dict(RunConfig())
    for name in (*tree,):
        if rng.random() < 0.5:
            del tree[name]
    tree.pop("plugins", None)  # modules of the path are trusted, and so are their names
    if rng.random() < 0.6:
        tree = mutated_tree(rng, tree)
    try:
        text = yaml.safe_dump(tree, allow_unicode=True)
    except (yaml.YAMLError, ValueError, RecursionError):  # 10**400 cannot be written
        text = yaml.safe_dump(to_dict(RunConfig())["training"])
    for _ in range(rng.choice((0, 0, 1, 3))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(PIECES) + text[at:]
    data = text.encode("utf-8", "surrogatepass")
    path = folder / "run.yaml"
    path.write_bytes(mutated_bytes(rng, data) if rng.random() < 0.2 else data)
    flags: list[str] = []
    for leaf in rng.sample(list(leaves(RunConfig)), rng.choice((0, 0, 1, 2))):
        if leaf.name not in ("plugins", "objective"):
            value = rng.choice(NUMBERS if rng.random() < 0.5 else TEXTS)
            flags.append(f"{flag_name(leaf)}={_text(value)}")
    return path, flags


def _text(value: object) -> str:
    try:
        return str(value)
    except ValueError:
        return "9" * 5000


def read(value: tuple[Path, list[str]]) -> None:
    """Loads and checks the run, as the first thing that training does."""
    path, flags = value
    if b"plugins" in path.read_bytes():
        return
    validate(load(str(path), flags), 1)
