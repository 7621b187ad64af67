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
from examples.mimic.arms import ARMS, PARTS, STARTS
from examples.mimic.measure import SHARES

# An arm beside the one that would expose it: KD's gain is not mimicry's.
AGAINST = (
    ("kd", "sft"),
    ("mimic", "kd"),
    ("mimic", "permuted"),
    ("mimic", "another_row"),
    ("mimic", "held"),
)
# Arms that learn from the teacher's own routes, or only measure how far they are from them.
OWN_ROUTES = ("kd", "mimic", "held")
FIGURES = ("flips", "information", "alike", "alike by chance", "kl", "kl at the end")

AtShares = Mapping[int, Scores]


def read_run(run: Path) -> tuple[AtShares, dict[str, float | None]] | None:
    """Returns the scores of a run by the share of its steps and its figures; None if it is not
    measured.

    The figures: kl is the divergence of the student's routers from the mapped teacher's, over the
    first half of the steps and over the last twentieth; loss that of the answers in training, over
    the twentieth before each share.
    """
    if not (run / "points.json").exists():
        return None
    held = json.loads((run / "points.json").read_text())
    scores: dict[int, Scores] = {SHARES[-1]: read_scores(run / "answers.jsonl")}
    for share in SHARES[:-1]:
        found = held["points"][str(share)]["scores"]
        scores[share] = {k: {int(i): s for i, s in of.items()} for k, of in found.items()}
    figures = {name: held[name] for name in ("information", "alike", "alike by chance")}
    figures["flips"] = mean(point["flips"] for point in held["points"].values())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(step["iteration"] for step in steps)
    for name, after, to in (("kl", 0, last / 2), ("kl at the end", last - last / PARTS, last)):
        own = run.name in OWN_ROUTES
        figures[name] = _over(steps, "moe/mimic_kl", after, to) if own else None
    for share in SHARES:
        end = last * share / 100
        figures[f"loss at {share} %"] = _over(steps, "train/lm_loss", end - last / PARTS, end)
    return scores, figures


def _over(steps: Sequence[Mapping[str, Any]], name: str, after: float, to: float) -> float | None:
    return mean(step.get(name) for step in steps if after < step["iteration"] <= to)


def summary(out: Path) -> dict[str, Any]:
    """Summarises the finished runs, and names what is missing."""
    seeds = sorted(out.glob("seed*"), key=lambda path: int(path.name.removeprefix("seed")))
    found: dict[str, Any] = {"seeds": [seed.name for seed in seeds], "missing": []}
    teacher = out / "teacher" / "answers.jsonl"
    found["teacher"] = accuracy(read_scores(teacher)) if teacher.exists() else None
    for start, arms in STARTS.items():
        runs: dict[str, dict[str, Any]] = {name: {} for name in ARMS}
        for seed in seeds:
            for name in arms:
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
    row["alike by seed"] = [figures["alike"] for _, figures in runs.values()]
    for figure in (*FIGURES, *(f"loss at {share} %" for share in SHARES)):
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
        row[f"loss at {share} % over seeds"] = _figure_over_seeds(both, f"loss at {share} %")
    row["alike over seeds"] = _figure_over_seeds(both, "alike")
    return row


def _figure_over_seeds(both: Sequence[Sequence[Any]], name: str) -> Any:
    pairs = [(a[name], b[name]) for (_, a), (_, b) in zip(*both, strict=True)]
    return over_seeds([a - b for a, b in pairs if a is not None and b is not None])


def markdown(found: Mapping[str, Any]) -> str:
    """Formats a summary as Markdown tables."""
    shares = [f"{share} %" for share in SHARES]
    teacher = found["teacher"]
    lines: list[str] = [] if teacher is None else [f"Teacher: {teacher:.3f}", ""]
    for start in STARTS:
        rows = found[start]
        lines += [f"Student: {start}. Accuracy at shares of the steps:", ""]
        lines += _table(rows, shares, shares)
        lines += ["", "What its routers do:", "", *_table(rows, FIGURES, FIGURES)]
        lines += ["", "Training loss before each share:", ""]
        lines += _table(rows, shares, [f"loss at {share}" for share in shares])
        heads = ["difference", "seeds", "interval", *shares, "alike"]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in found[f"{start} against"]:
            name = f"`{row['arm']}` over `{row['other']}`"
            for over, end in (("questions", ""), ("seeds", " over seeds")):
                gaps = [row[f"{share}{end}"] for share in shares]
                gaps.append(row["alike over seeds"] if end else None)
                cells = [name, str(row["seeds"]), over, *map(_shown, gaps)]
                lines.append(f"| {' | '.join(cells)} |")
            losses = [row[f"loss at {share} over seeds"] for share in shares]
            cells = [name, str(row["seeds"]), "loss, seeds", *map(_shown, losses), ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if found["missing"]:
        first = ", ".join(found["missing"][:6])
        lines.append(f"Missing: {len(found['missing'])} runs, such as {first}")
    return "\n".join(lines)


def _shown(gap: Any) -> str:
    return "" if gap is None else shown(tuple(gap))


def _table(
    rows: Sequence[Mapping[str, Any]], heads: Sequence[str], names: Sequence[str]
) -> list[str]:
    lines = [f"| arm | seeds | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for row in rows:
        cells = [f"`{row['arm']}`", str(row["seeds"])]
        cells += ["" if row[name] is None else f"{row[name]:.3f}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
