"""The table of `arms.py`: accuracies of arms, and their differences question by question.

    python tools/arms_table.py --before runs/demo --after runs/demo/earl

compares two runs alone, and adds what it found to the first one's results.json.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000  # of the questions, for an interval
AGAINST = {  # the differences that are shown
    "grpo": ("sft_continued",),
    "earl": ("grpo", "earl_shuffled", "earl_scalar"),
    "earl_shuffled": ("grpo",),
    "earl_scalar": ("grpo",),
}
LAST = 10  # rollouts whose router metrics are averaged
ROUTER = ("hit_rate", "hit_rate_shuffled", "mutual_information", "max_violation")

# key of a question's kind -> index of the question -> score
Scores = Mapping[str, Mapping[int, float]]


def read_scores(folder: Path) -> Scores:
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for line in (folder / "answers.jsonl").read_text().splitlines():
        record = json.loads(line)
        scores[record["key"]][record["index"]] = record["score"]
    return scores


def accuracy(scores: Scores) -> float:
    """Mean over kinds of questions of their mean scores."""
    return float(np.mean([np.mean([*of_key.values()]) for of_key in scores.values()]))


def difference(ours: list[Scores], theirs: list[Scores], seed: int = 0) -> tuple[float, ...]:
    """(mean, low, high): how much higher our accuracy is, and its 95 % interval.

    The same questions are resampled for both sides and all seeds of training: the interval is
    that of other questions, not of other seeds, whose own differences the table lists.
    """
    rng = np.random.default_rng(seed)
    keys = sorted(ours[0])
    gaps = []  # of each kind: mean over seeds for each question
    for key in keys:
        order = sorted(ours[0][key])
        per_seed = [
            [a[key][i] - b[key][i] for i in order] for a, b in zip(ours, theirs, strict=True)
        ]
        gaps.append(np.mean(per_seed, 0))
    drawn = [gap[rng.integers(0, len(gap), (RESAMPLES, len(gap)))].mean(1) for gap in gaps]
    low, high = np.percentile(np.mean(drawn, 0), [2.5, 97.5])
    return float(np.mean([gap.mean() for gap in gaps])), float(low), float(high)


def router_metrics(folder: Path) -> dict[str, list[float]]:
    """(first rollout, mean of the last) of what a run logged about its routers."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = {}
    for name in ROUTER:
        values = [r[f"rollout/moe/{name}"] for r in records if f"rollout/moe/{name}" in r]
        if values:
            found[name] = [values[0], float(np.mean(values[-LAST:]))]
    return found


def table(out: Path) -> tuple[str, list[dict[str, Any]]]:
    """The table as text, and as rows: of all finished runs under `out`/memory/seedN/arm."""
    runs: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    for done in sorted(out.glob("*/seed*/*/answers.jsonl")):
        arm, seed, memory = done.parent, done.parents[1].name, done.parents[2].name
        runs[memory, arm.name][seed] = arm
    rows = [_row(runs, memory, arm) for memory, arm in runs]
    head = f"{'memory':<15}{'arm':<15}{'seeds':>6}{'questions':>10}{'accuracy':>10}  difference"
    lines = [head, "-" * len(head)]
    for row in rows:
        text = f"{row['memory']:<15}{row['arm']:<15}{row['seeds']:>6}{row['questions']:>10}"
        text += f"{row['accuracy']:>10.3f}"
        for other, (mean, low, high) in row["differences"].items():
            text += f"  {mean:+.3f} [{low:+.3f}, {high:+.3f}] over {other}"
        lines.append(text)
        if row["router"]:
            parts = [f"{k} {a:.3f} -> {b:.3f}" for k, (a, b) in row["router"].items()]
            lines.append(f"{'':<30}{', '.join(parts)}")
    return "\n".join(lines), rows


def _row(runs: Mapping[tuple[str, str], dict[str, Path]], memory: str, arm: str) -> dict[str, Any]:
    seeds = runs[memory, arm]
    scores = {seed: read_scores(folder) for seed, folder in seeds.items()}
    row: dict[str, Any] = {
        "memory": memory,
        "arm": arm,
        "seeds": len(seeds),
        "questions": sum(len(of_key) for of_key in next(iter(scores.values())).values()),
        "accuracy": float(np.mean([accuracy(s) for s in scores.values()])),
        "by_seed": {seed: accuracy(s) for seed, s in scores.items()},
        "by_key": {
            key: float(np.mean([np.mean([*s[key].values()]) for s in scores.values()]))
            for key in next(iter(scores.values()))
        },
        "differences": {},
    }
    for other in AGAINST.get(arm, ()):
        shared = sorted(seeds.keys() & runs.get((memory, other), {}).keys())
        if shared:
            theirs = [read_scores(runs[memory, other][seed]) for seed in shared]
            row["differences"][other] = difference([scores[seed] for seed in shared], theirs)
    routers = [router_metrics(folder) for folder in seeds.values()]
    row["router"] = {
        name: np.mean([found[name] for found in routers], 0).tolist() for name in routers[0]
    }
    return row


def before_and_after(before: Path, after: Path) -> tuple[str, dict[str, Any]]:
    """Accuracies of two runs on the same questions as text, and as keys for results.json."""
    results = [json.loads((folder / "results.json").read_text()) for folder in (before, after)]
    one, other = (read_scores(folder) for folder in (before, after))
    lines = [f"{'skill':<20}{'before':>8}{'after':>8}{'n':>7}"]
    lines.append("-" * len(lines[0]))
    for key in sorted(one):
        shares = [result["skills"][key]["accuracy"] for result in results]
        lines.append(f"{key:<20}{shares[0]:>8.1%}{shares[1]:>8.1%}{len(one[key]):>7}")
    mean, low, high = difference([other], [one])
    lines.append(f"mean difference {mean:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    router = router_metrics(after)
    lines += [f"{name}: {a:.3f} at first, {b:.3f} at last" for name, (a, b) in router.items()]
    found = {
        "sft": results[0]["skills"],
        "earl": results[1]["skills"],
        "difference": [mean, low, high],
        "router": {name: {"before": a, "after": b} for name, (a, b) in router.items()},
    }
    return "\n".join(lines), found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    args = parser.parse_args(argv)
    for folder in (args.before, args.after):
        if not (folder / "answers.jsonl").exists():
            raise SystemExit(f"error: {folder}/answers.jsonl is missing: the run has not ended")
    text, found = before_and_after(args.before, args.after)
    path = args.before / "results.json"
    record = json.loads(path.read_text()) | found
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
