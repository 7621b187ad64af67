"""The table of the cascade, from the answers of its finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.cascade.arms import ARMS
from examples.digits.scores import (
    Scores,
    accuracy,
    difference,
    gains,
    mean,
    paired,
    part,
    read_scores,
    shown,
)

KINDS = ("spatial/steps", "spatial/free")  # what reinforcement loses, and what it brings
# An idea beside the arm that would expose it.
AGAINST = (
    ("mpo", "base"),
    ("mpo", "chosen"),
    ("mpo", "sigmoid"),
    ("mpo", "swapped"),
    ("mpo_gspo", "gspo"),
    ("opd", "mpo_gspo"),
    ("opd_self", "mpo_gspo"),
    ("opd", "opd_sft"),
)
CHOSEN = "logps/chosen"


def summary(out: Path) -> dict[str, Any]:
    """Summarises the finished runs, and names what is missing."""
    seeds = sorted(out.glob("seed*"), key=lambda path: int(path.name.removeprefix("seed")))
    scores: dict[str, dict[str, Scores]] = {name: {} for name in ARMS}
    for seed in seeds:
        for name in ARMS:
            if (path := seed / name / "answers.jsonl").exists():
                scores[name][seed.name] = read_scores(path)
    return {
        "seeds": [seed.name for seed in seeds],
        "arms": [_arm(name, scores[name], seeds) for name in ARMS if scores[name]],
        "against": [
            row for pair in AGAINST if (row := _against(*pair, scores[pair[0]], scores[pair[1]]))
        ],
        "missing": [
            f"{seed.name}/{name}"
            for seed in seeds
            for name in ARMS
            if seed.name not in scores[name]
        ],
    }


def _arm(name: str, scores: Mapping[str, Scores], seeds: Sequence[Path]) -> dict[str, Any]:
    found = [*scores.values()]
    row: dict[str, Any] = {"arm": name, "seeds": len(found)}
    row["free"] = mean(accuracy(part(each, True)) for each in found)
    row["other"] = mean(accuracy(part(each, False)) for each in found)
    for kind in KINDS:
        row[kind] = mean(accuracy({kind: each[kind]}) for each in found if kind in each)
    moved = [_moved(seed / name) for seed in seeds if seed.name in scores]
    row[CHOSEN] = mean(moved)
    return row


def _moved(run: Path) -> float | None:
    """How far the chosen sides' log-probability went from the first step to the last; None for a
    run without pairs."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    values = [record[CHOSEN] for line in lines if CHOSEN in (record := json.loads(line))]
    return values[-1] - values[0] if values else None


def _against(
    name: str, other: str, ours: Mapping[str, Scores], theirs: Mapping[str, Scores]
) -> dict[str, Any] | None:
    both = paired(ours, theirs)
    if not both[0]:
        return None
    row: dict[str, Any] = {"arm": name, "other": other, "seeds": len(both[0])}
    for column, trained in (("free", True), ("other kinds", False)):
        sides = [[part(scores, trained) for scores in side] for side in both]
        row[column] = difference(*sides)
        row[f"{column} by seed"] = gains(*sides)
    return row


def markdown(found: Mapping[str, Any]) -> str:
    """Formats a summary as two Markdown tables."""
    columns = ("arm", "seeds", "free", "other", *KINDS, CHOSEN)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found["arms"]:
        cells = [f"`{row['arm']}`", str(row["seeds"])]
        cells += ["" if row[name] is None else f"{row[name]:.3f}" for name in columns[2:]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference | seeds | free | other kinds |", "|---|---|---|---|"]
    for row in found["against"]:
        cells = [f"`{row['arm']}` over `{row['other']}`", str(row["seeds"])]
        lines.append(f"| {' | '.join([*cells, shown(row['free']), shown(row['other kinds'])])} |")
    if found["missing"]:
        first = ", ".join(found["missing"][:6])
        lines += ["", f"Missing: {len(found['missing'])} runs, such as {first}"]
    return "\n".join(lines)
