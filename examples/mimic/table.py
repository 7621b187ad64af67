"""The tables of mimic learning, from the files of its finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.digits.scores import (
    Scores,
    accuracy,
    difference,
    gains,
    mean,
    over_seeds,
    paired,
    read_scores,
    shown,
)
from examples.mimic.arms import ARMS, STEPS
from examples.mimic.measure import SHARES

# An arm beside the one that would expose it: KD's gain is not mimicry's.
AGAINST = (
    ("kd", "sft"),
    ("mimic", "kd"),
    ("mimic", "permuted"),
    ("mimic", "another_row"),
    ("mimic", "held"),
)
FIGURES = ("flips", "information", "alike", "moe/mimic_kl")

AtShares = Mapping[int, Scores]


def read_run(run: Path) -> tuple[AtShares, dict[str, float | None]] | None:
    """Returns the scores of a run by the share of its steps and its figures; None if it is not
    measured."""
    if not (run / "points.json").exists():
        return None
    held = json.loads((run / "points.json").read_text())
    scores: dict[int, Scores] = {SHARES[-1]: read_scores(run / "answers.jsonl")}
    for share in SHARES[:-1]:
        found = held["points"][str(share)]["scores"]
        scores[share] = {k: {int(i): s for i, s in of.items()} for k, of in found.items()}
    flips = mean(point["flips"] for point in held["points"].values())
    figures = {"flips": flips, "information": held["information"], "alike": held["alike"]}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    values = [r["moe/mimic_kl"] for line in lines if "moe/mimic_kl" in (r := json.loads(line))]
    return scores, figures | {"moe/mimic_kl": values[-1] if values else None}


def summary(out: Path) -> dict[str, Any]:
    """Summarises the finished runs, and names what is missing."""
    seeds = sorted(out.glob("seed*"), key=lambda path: int(path.name.removeprefix("seed")))
    found: dict[str, Any] = {"seeds": [seed.name for seed in seeds], "missing": []}
    for start in STEPS:
        runs: dict[str, dict[str, Any]] = {name: {} for name in ARMS}
        for seed in seeds:
            for name in ARMS:
                if (read := read_run(seed / start / name)) is None:
                    found["missing"].append(f"{seed.name}/{start}/{name}")
                else:
                    runs[name][seed.name] = read
        found[start] = [_arm(name, runs[name]) for name in ARMS if runs[name]]
        found[f"{start} against"] = [
            row for pair in AGAINST if (row := _against(*pair, runs[pair[0]], runs[pair[1]]))
        ]
    return found


def _arm(name: str, runs: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": name, "seeds": len(runs)}
    for share in SHARES:
        row[f"{share} %"] = mean(accuracy(scores[share]) for scores, _ in runs.values())
    for figure in FIGURES:
        row[figure] = mean(figures[figure] for _, figures in runs.values())
    return row


def _against(
    name: str, other: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, Any] | None:
    both = paired(ours, theirs)
    if not both[0]:
        return None
    row: dict[str, Any] = {"arm": name, "other": other, "seeds": len(both[0])}
    for share in SHARES:
        sides = [[scores[share] for scores, _ in side] for side in both]
        row[f"{share} %"] = difference(*sides)
        row[f"{share} % by seed"] = gains(*sides)
        row[f"{share} % over seeds"] = over_seeds(row[f"{share} % by seed"])
    return row


def markdown(found: Mapping[str, Any]) -> str:
    """Formats a summary as Markdown tables."""
    shares = [f"{share} %" for share in SHARES]
    lines: list[str] = []
    for start in STEPS:
        lines += [f"Student: {start}. Accuracy at shares of the steps:", ""]
        lines += _table(found[start], ["arm", "seeds", *shares, *FIGURES])
        lines += ["", f"| difference | seeds | {' | '.join(shares)} |"]
        lines.append("|---" * (2 + len(shares)) + "|")
        for row in found[f"{start} against"]:
            cells = [f"`{row['arm']}` over `{row['other']}`", str(row["seeds"])]
            lines.append(f"| {' | '.join([*cells, *(shown(row[s]) for s in shares)])} |")
        lines.append("")
    if found["missing"]:
        first = ", ".join(found["missing"][:6])
        lines.append(f"Missing: {len(found['missing'])} runs, such as {first}")
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [f"`{row['arm']}`", str(row["seeds"])]
        cells += ["" if row[name] is None else f"{row[name]:.3f}" for name in columns[2:]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
