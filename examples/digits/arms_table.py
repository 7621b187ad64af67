"""Print the table of `arms.py`: accuracies and experts of arms, and their differences.

    python tools/arms_table.py --before runs/demo --after runs/demo/earl

compares only two runs, and adds the result to results.json of the first.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 2000  # bootstrap samples of the questions, for an interval
TRAINED = "/free"  # the form of the questions that are reinforced
AGAINST = {  # comparisons between arms of one memory
    "sft_continued": ("sft",),
    "grpo": ("sft", "sft_continued"),
    "earl": ("grpo", "earl_shuffled", "earl_scalar"),
    "earl_shuffled": ("grpo",),
    "earl_scalar": ("grpo",),
}
EXPERTS = ("hit_rate", "mutual_information", "selectivity")
NAMES = {
    "accuracy": "reinforced questions",
    "others": "other questions",
    "hit_rate": "hit rate",
    "mutual_information": "information, nats",
    "selectivity": "selectivity",
}
LAST = 10  # rollouts whose router metrics are averaged
ROUTER = ("hit_rate", "hit_rate_shuffled", "mutual_information", "max_violation")

# key of a question's kind -> index of the question -> score
Scores = Mapping[str, Mapping[int, float]]
Interval = tuple[float, float, float]  # mean, low, high


def read_scores(folder: Path) -> Scores:
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for line in (folder / "answers.jsonl").read_text().splitlines():
        record = json.loads(line)
        scores[record["key"]][record["index"]] = record["score"]
    return scores


def part(scores: Scores, trained: bool) -> Scores:
    """Returns only the questions in the reinforced form, or only the others. Runs without that form
    have been trained on all."""
    kinds = [key for key in scores if key.endswith(TRAINED)] or list(scores)
    return {key: found for key, found in scores.items() if (key in kinds) == trained}


def accuracy(scores: Scores) -> float | None:
    """Mean over kinds of questions of their mean score."""
    if not scores:
        return None
    return float(np.mean([np.mean([*of_key.values()]) for of_key in scores.values()]))


def difference(ours: Sequence[Scores], theirs: Sequence[Scores], seed: int = 0) -> Interval:
    """Returns the difference in accuracy and its 95% bootstrap interval.

    The same questions are resampled for both sides and all seeds of training. The interval
    therefore covers the choice of questions, not of seeds, whose differences the table lists.
    """
    asked = [{(key, i) for key in s for i in s[key]} for s in (*ours, *theirs)]
    shared = set.intersection(*asked)
    total = len(set.union(*asked))
    if len(shared) < total:
        raise SystemExit(f"they were asked other questions: {len(shared)} of {total} are shared")
    rng = np.random.default_rng(seed)
    keys = sorted(ours[0])
    gaps = []  # by kind: mean over seeds for each question
    for key in keys:
        order = sorted(ours[0][key])
        per_seed = [
            [a[key][i] - b[key][i] for i in order] for a, b in zip(ours, theirs, strict=True)
        ]
        gaps.append(np.mean(per_seed, 0))
    drawn = [gap[rng.integers(0, len(gap), (RESAMPLES, len(gap)))].mean(1) for gap in gaps]
    low, high = np.percentile(np.mean(drawn, 0), [2.5, 97.5])
    return float(np.mean([gap.mean() for gap in gaps])), float(low), float(high)


def over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    """Returns the paired difference and its 95% interval by Student's t; None below two seeds."""
    from scipy import stats  # slow to import

    gaps = np.subtract(ours, theirs)
    if len(gaps) < 2:
        return None
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
    return float(gaps.mean()), float(gaps.mean() - half), float(gaps.mean() + half)


def read_experts(folder: Path) -> dict[str, float]:
    """Reads what `discover_experts.py --skill-map` measured at the end of a run: the share of
    routes into a skill's cluster, the information between experts and skills given the token in
    nats (mean over layers), and how much more a skill suffers without its cluster than others do
    (means over skills)."""
    path = folder / "experts.json"
    if not path.exists():
        return {}
    info = json.loads(path.read_text())["info"]
    hits = [row["hit"] for row in info["measured"].values() if row["experts"]]
    found = {"hit_rate": np.mean(hits), "mutual_information": np.mean(info["mutual_information"])}
    if "causal_test" in info:
        found["selectivity"] = np.mean([*info["causal_test"]["selectivity"].values()])
    return {name: float(value) for name, value in found.items()}


def table(out: Path) -> list[dict[str, Any]]:
    """Makes a row for each memory and arm of the finished runs under `out`/memory/seedN/arm."""
    runs: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    for done in sorted(out.glob("*/seed*/*/answers.jsonl")):
        arm, seed, memory = done.parent, done.parents[1].name, done.parents[2].name
        runs[memory, arm.name][seed] = arm
    return [_row(runs, memory, arm) for memory, arm in sorted(runs, key=_order)]


def _order(run: tuple[str, str]) -> tuple[bool, str, int]:
    memory, arm = run
    arms = ("sft", "sft_continued", "grpo", "earl")
    return memory != "clvr", memory, arms.index(arm) if arm in arms else len(arms)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows and their differences as two Markdown tables."""
    lines = ["| memory | arm | seeds | " + " | ".join(NAMES.values()) + " |"]
    lines.append("|---" * (3 + len(NAMES)) + "|")
    for row in rows:
        values = {"accuracy": row["accuracy"], "others": row["others"], **row["experts"]}
        cells = [row["memory"], f"`{row['arm']}`", str(row["seeds"])]
        cells += ["" if values.get(n) is None else f"{values[n]:.3f}" for n in NAMES]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| difference | seeds | " + " | ".join(NAMES.values()) + " |"]
    lines.append("|---" * (2 + len(NAMES)) + "|")
    for row in rows:
        for other, gaps in row["differences"].items():
            cells = [f"{row['memory']} `{row['arm']}` over {other}", str(gaps["seeds"])]
            cells += [_interval(gaps[n]) if n in gaps else "" for n in NAMES]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(gap: Interval) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gap)


Runs = Mapping[tuple[str, str], Mapping[str, Path]]


def _row(runs: Runs, memory: str, arm: str) -> dict[str, Any]:
    seeds = runs[memory, arm]
    scores = [read_scores(folder) for folder in seeds.values()]
    trained = [part(s, True) for s in scores]
    experts = [read_experts(folder) for folder in seeds.values()]
    others = [(f"`{other}`", (memory, other)) for other in AGAINST.get(arm, ())]
    others += [(m, (m, arm)) for m, a in sorted(runs) if a == arm and m != memory == "clvr"]
    return {
        "memory": memory,
        "arm": arm,
        "seeds": len(seeds),
        "questions": sum(len(of_key) for of_key in trained[0].values()),
        "accuracy": _mean(accuracy(s) for s in trained),
        "others": _mean(accuracy(part(s, False)) for s in scores),
        "by_seed": dict(zip(seeds, map(accuracy, trained), strict=True)),
        "by_key": {
            key: float(np.mean([np.mean([*s[key].values()]) for s in scores])) for key in scores[0]
        },
        "experts": {n: _mean(e.get(n) for e in experts) for n in EXPERTS if n in experts[0]},
        "differences": {
            name: gaps
            for name, where in others
            if (gaps := _gaps(seeds, runs.get(where, {}), where[0] == memory)) is not None
        },
    }


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _gaps(
    ours: Mapping[str, Path], theirs: Mapping[str, Path], same_map: bool
) -> dict[str, Any] | None:
    """Returns intervals of the differences by name, over the seeds that both sides have; None
    without any. Experts are compared only if both sides are measured with one map."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    gaps: dict[str, Any] = {"seeds": len(shared)}
    sides = [[read_scores(side[seed]) for seed in shared] for side in (ours, theirs)]
    for name, trained in (("accuracy", True), ("others", False)):
        parts = [[part(scores, trained) for scores in side] for side in sides]
        if parts[0][0]:
            gaps[name] = difference(*parts)
    experts = [[read_experts(side[seed]) for seed in shared] for side in (ours, theirs)]
    for name in EXPERTS if same_map else ():
        if all(name in found for side in experts for found in side):
            gap = over_seeds(*([found[name] for found in side] for side in experts))
            if gap is not None:
                gaps[name] = gap
    return gaps


def router_metrics(folder: Path) -> dict[str, list[float]]:
    """Returns [first rollout, mean of the last ones] of the router metrics of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = {}
    for name in ROUTER:
        values = [r[f"rollout/moe/{name}"] for r in records if f"rollout/moe/{name}" in r]
        if values:
            found[name] = [values[0], float(np.mean(values[-LAST:]))]
    return found


def before_and_after(before: Path, after: Path) -> tuple[str, dict[str, Any]]:
    """Compares two runs on the same questions. Returns (text, entries for results.json)."""
    results = [json.loads((folder / "results.json").read_text()) for folder in (before, after)]
    one, other = (read_scores(folder) for folder in (before, after))
    lines = [f"{'skill':<20}{'before':>8}{'after':>8}{'n':>7}"]
    lines.append("-" * len(lines[0]))
    for key in sorted(one):
        shares = [result["skills"][key]["accuracy"] for result in results]
        lines.append(f"{key:<20}{shares[0]:>8.1%}{shares[1]:>8.1%}{len(one[key]):>7}")
    gaps = {}
    for name, trained in (("reinforced questions", True), ("all others", False)):
        parts = [part(scores, trained) for scores in (other, one)]
        if parts[0]:
            gaps[name] = difference([parts[0]], [parts[1]])
            lines.append(f"{name}: {_interval(gaps[name])} (95 % interval)")
    router = router_metrics(after)
    lines += [f"{name}: {a:.3f} at first, {b:.3f} at last" for name, (a, b) in router.items()]
    found = {
        "sft": results[0]["skills"],
        "earl": results[1]["skills"],
        "difference": gaps,
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
