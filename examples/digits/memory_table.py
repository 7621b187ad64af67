"""The table of `memory_arms.py`: accuracies of memories and arms, and their differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.digits.scores import accuracy, difference, mean, paired, part, read_scores, shown

AGAINST = {  # comparisons between arms of one memory
    "sft_continued": ("sft",),
    "grpo": ("sft", "sft_continued"),
}
NAMES = {"accuracy": "reinforced questions", "others": "other questions"}
ORDER = ("sft", "sft_continued", "grpo")

Runs = Mapping[tuple[str, str], Mapping[str, Path]]  # (memory, arm) -> seed -> folder


def table(out: Path) -> list[dict[str, Any]]:
    """Makes a row for each memory and arm of the finished runs under `out`/memory/seedN/arm."""
    runs: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    for done in sorted(out.glob("*/seed*/*/answers.jsonl")):
        arm, seed, memory = done.parent, done.parents[1].name, done.parents[2].name
        runs[memory, arm.name][seed] = done
    return [_row(runs, memory, arm) for memory, arm in sorted(runs, key=_order)]


def _order(run: tuple[str, str]) -> tuple[bool, str, int]:
    memory, arm = run
    return memory != "clvr", memory, ORDER.index(arm) if arm in ORDER else len(ORDER)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows and their differences as two Markdown tables."""
    lines = ["| memory | arm | seeds | " + " | ".join(NAMES.values()) + " |"]
    lines.append("|---" * (3 + len(NAMES)) + "|")
    for row in rows:
        cells = [row["memory"], f"`{row['arm']}`", str(row["seeds"])]
        cells += ["" if row.get(n) is None else f"{row[n]:.3f}" for n in NAMES]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference | seeds | " + " | ".join(NAMES.values()) + " |"]
    lines.append("|---" * (2 + len(NAMES)) + "|")
    for row in rows:
        for other, found in row["differences"].items():
            cells = [f"{row['memory']} `{row['arm']}` over {other}", str(found["seeds"])]
            cells += [shown(found[n]) if n in found else "" for n in NAMES]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(runs: Runs, memory: str, arm: str) -> dict[str, Any]:
    seeds = runs[memory, arm]
    scores = [read_scores(path) for path in seeds.values()]
    trained = [part(s, True) for s in scores]
    others = [(f"`{other}`", (memory, other)) for other in AGAINST.get(arm, ())]
    others += [(m, (m, arm)) for m, a in sorted(runs) if a == arm and m != memory == "clvr"]
    return {
        "memory": memory,
        "arm": arm,
        "seeds": len(seeds),
        "questions": sum(len(of_key) for of_key in trained[0].values()),
        "accuracy": mean(accuracy(s) for s in trained),
        "others": mean(accuracy(part(s, False)) for s in scores),
        "by_seed": dict(zip(seeds, map(accuracy, trained), strict=True)),
        "by_key": {
            key: float(np.mean([np.mean([*s[key].values()]) for s in scores])) for key in scores[0]
        },
        "differences": {
            name: found
            for name, where in others
            if (found := _differences(seeds, runs.get(where, {}))) is not None
        },
    }


def _differences(ours: Mapping[str, Path], theirs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Returns intervals of the differences by name, over the seeds that both sides have; None
    without any."""
    both = paired(ours, theirs)
    if not both[0]:
        return None
    found: dict[str, Any] = {"seeds": len(both[0])}
    sides = [[read_scores(path) for path in side] for side in both]
    for name, trained in (("accuracy", True), ("others", False)):
        parts = [[part(scores, trained) for scores in side] for side in sides]
        if parts[0][0]:
            found[name] = difference(*parts)
    return found
