"""Who may import whom: rooms only those before them, tests only the package and tests/support."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = (
    *("errors", "outputs", "redirects", "platform", "plugins", "cli", "pictures"),
    *("config", "report", "parallel", "data", "model", "engine", "generation"),
    *("checkpoint", "convert", "evaluation", "earl", "rl", "preference", "pass_rate"),
    *("mimic", "train", "perf", "benchmark", "doctor"),
)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """Yields (importing module, imported name) of a folder, function-level imports included."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((module, name) for name in names)


def test_every_room_has_its_place_in_the_order():
    inside = [path for path in (ROOT / "megatron_mm").iterdir() if path.suffix in ("", ".py")]
    rooms = {path.stem for path in inside if path.stem[0] != "_"}
    assert rooms <= set(ORDER), f"rooms without a place: {sorted(rooms - set(ORDER))}"


def test_no_room_imports_from_one_above_it():
    found = [pair for pair in imports("megatron_mm") if pair[1].startswith("megatron_mm.")]
    place = {name: index for index, name in enumerate(ORDER)}
    upward = [
        f"{importer} imports {imported}"
        for importer, imported in found
        if place.get(room(imported), -1) > place.get(room(importer), -1)
    ]
    assert len(found) > 500 and not upward


def test_tests_share_helpers_and_nothing_of_each_other():
    """Shared helpers stand in tests/support; the package imports nothing from there."""
    found = list(imports("tests"))
    between = [pair for pair in found if pair[1].startswith("test_")]
    back = [pair for pair in imports("megatron_mm") if pair[1].startswith(("support.", "tests."))]
    assert len(found) > 500 and not between and not back
