"""Two throughput results side by side, if they measured the same work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mm.config.objectives import OBJECTIVES

# Settings that decide what is computed, wherever it is computed.
SAME = {
    "model": None,  # all of it
    "data": ("seq_length", "packing", "max_num_tiles", "max_image_tokens", "use_thumbnail"),
    "training": (
        *("objective", "global_batch_size", "bf16", "freeze_vision", "freeze_projector"),
        *("freeze_language", "freeze_clvr", "freeze_router"),
    ),
    "backend": ("fp8_format", "fp8_recipe"),
    "lora": None,
}
ROLLOUTS = ("num_generations", "rollout_batch_size", "num_iterations", "max_completion_length")


class Different(ValueError):
    """The two results cannot be compared; one line that names both values."""


def read(path: Path) -> dict[str, Any]:
    """Raises Different if it is no result of a throughput run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Different(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or not {"run", "sides", "units", "layout"} <= found.keys():
        raise Different(f"{path} is no result of benchmark.py train or rl with --config and --json")
    return found


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each side that both have: how many times as fast B is, tokens per second, and by rank.
    `ratio` is of medians; `range` of the quartiles furthest apart.

    Raises:
        Different: the work, its kind or its unit is another.
    """
    _same_work(a, b)
    sides = [name for name in a["sides"] if name in b["sides"]]
    if not sides:
        raise Different(
            f"sides: A has {'; '.join(a['sides'])}, B has {'; '.join(b['sides'])}; measure one "
            "kind of data and of routing on both (--data, --routing)"
        )
    rl = _generates(a)
    found = {}
    for name in sides:
        ours, theirs = a["sides"][name], b["sides"][name]
        _same_rounds(name, ours, theirs, rl)
        speed = "supervised_tokens_per_second" if rl else "tokens_per_second"
        one, other = ours[speed], theirs[speed]
        ranks = a["layout"]["world_size"] / b["layout"]["world_size"]
        ratio = other["median"] / one["median"]
        found[name] = {
            "speed": speed,
            "a": one["median"],
            "b": other["median"],
            "ratio": ratio,
            "range": [
                other["quartiles"][0] / one["quartiles"][1],
                other["quartiles"][1] / one["quartiles"][0],
            ],
            "ratio_per_rank": ratio * ranks,
            "mfu": [ours["mfu"], theirs["mfu"]],
        }
    return found


def _generates(side: dict[str, Any]) -> bool:
    """Whether the steps of a side are made of rollouts."""
    return OBJECTIVES[side["run"]["training"]["objective"]].generates


def _same_work(a: dict[str, Any], b: dict[str, Any]) -> None:
    _same("unit of a rank", a["units"]["rank"], b["units"]["rank"])
    sections = dict(SAME)
    for side in (a, b):
        if _generates(side):
            sections[OBJECTIVES[side["run"]["training"]["objective"]].section] = ROLLOUTS
    for section, keys in sections.items():
        ours, theirs = (
            {k: x["run"][section].get(k) for k in keys or x["run"][section]} for x in (a, b)
        )
        _same(section, ours, theirs)


def _same(name: str, ours: Any, theirs: Any) -> None:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in [*ours, *(k for k in theirs if k not in ours)]:
            _same(f"{name}.{key}", ours.get(key), theirs.get(key))
    elif ours != theirs:
        raise Different(f"different work: {name} is {ours!r} in A and {theirs!r} in B")


def _same_rounds(name: str, ours: dict, theirs: dict, rl: bool) -> None:
    """What was trained on, round by round. What a policy samples depends on its arithmetic, so of
    rollouts only the completions are counted."""
    counts = ("samples",) if rl else ("samples", "tokens", "supervised", "tiles")
    _same(f"rounds of {name!r}", len(ours["work"]), len(theirs["work"]))
    for number, (one, other) in enumerate(zip(ours["work"], theirs["work"], strict=True), 1):
        for count in counts:
            _same(f"{count} of {name!r}, round {number}", one[count], other[count])


def text(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, side in found.items():
        low, high = side["range"]
        lines.append(
            f"{name}: B / A {side['ratio']:.3f} ({low:.3f} to {high:.3f}), by rank "
            f"{side['ratio_per_rank']:.3f}; {side['speed'].replace('_', ' ')} {side['a']:,.5g} and "
            f"{side['b']:,.5g}, MFU {100 * side['mfu'][0]:.1f} % and {100 * side['mfu'][1]:.1f} %"
        )
    return "\n".join(lines)
