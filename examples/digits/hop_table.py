"""The table of `hop_arms.py`: accuracies, what they cost, and what cascaded experts gain."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.digits.hop_arms import ARMS, SHARES, share_of
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

# What depth should help with, and what it did not help with yet.
WATCHED = {
    "multihop, at once": ("multihop",),
    "spatial, at once": ("spatial",),
    "count": ("count", "count/steps", "count/free"),
}
OURS = "cascade"


def table(out: Path) -> dict[str, Any]:
    """Makes the figures of the finished runs under `out`/seedN/arm, and names what is missing."""
    runs: dict[str, dict[str, Path]] = defaultdict(dict)
    for done in sorted(out.glob("seed*/*/answers.jsonl")):
        runs[done.parent.name][done.parents[1].name] = done.parent
    seeds = sorted({seed for of_arm in runs.values() for seed in of_arm})
    wanted = [out / seed / arm for seed in seeds for arm in ARMS]
    files = [run / "answers.jsonl" for run in wanted]
    files += [run / SHARES for run in wanted if "C" in ARMS[run.name].pattern]
    return {
        "arms": [_arm(arm, runs[arm]) for arm in ARMS if arm in runs],
        "differences": [_against(runs, arm) for arm in ARMS if arm in runs and arm != OURS]
        if OURS in runs
        else [],
        "missing": [str(path.relative_to(out)) for path in files if not path.exists()],
    }


def _watched(scores: Scores, name: str | None) -> Scores:
    if name is None:
        return scores
    return {key: found for key, found in scores.items() if key in WATCHED[name]}


def _arm(arm: str, runs: Mapping[str, Path]) -> dict[str, Any]:
    scores = [read_scores(run / "answers.jsonl") for run in runs.values()]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for run in runs.values():
        if (run / SHARES).exists():
            for key, share in json.loads((run / SHARES).read_text()).items():
                by_kind[key.split("/")[0]].append(share)
    handed = {skill: mean(found) for skill, found in by_kind.items()}
    trained = mean(share_of(run) for run in runs.values()) if "C" in ARMS[arm].pattern else None
    return {
        "arm": arm,
        "seeds": len(runs),
        "accuracy": mean(accuracy(of_run) for of_run in scores),
        **{n: mean(accuracy(_watched(of_run, n)) for of_run in scores) for n in WATCHED},
        "handed": handed,
        "handed in training": trained,
        "flops": flops(arm, trained),
    }


def flops(arm: str, share: float | None) -> float:
    """Returns the FLOPs of the layers' forward pass over those of the plain arm.

    Args:
        share: of tokens handed over, where there is a second hop.
    """
    from megatron_mm.config import load, parse_pattern
    from megatron_mm.config.cost import costs

    spent = {}
    for name in (arm, "plain"):
        chosen = ARMS[name]
        flags = ["--hybrid-layer-pattern", chosen.pattern]
        flags += ["--pipeline-model-parallel-layout", "none", *chosen.flags]
        run = load(str(chosen.config), flags)
        for letter, settings in run.model.layers.items():
            counted = replace(settings, delegate_planned_share=1.0 if share is None else share)
            run.model.layers[letter] = counted
        of_letter = costs(run).letters
        spent[name] = sum(of_letter[layer.kind] for layer in parse_pattern(chosen.pattern))
    return spent[arm] / spent["plain"]


def _against(runs: Mapping[str, Mapping[str, Path]], arm: str) -> dict[str, Any]:
    """Returns what cascaded experts gain over an arm, over the seeds that both have: intervals over
    questions, and over seeds."""
    both = paired(runs[OURS], runs[arm])
    found: dict[str, Any] = {"over": arm, "seeds": len(both[0])}
    if not both[0]:
        return found
    sides = [[read_scores(run / "answers.jsonl") for run in side] for side in both]
    for name in (None, *WATCHED):
        ours, theirs = ([_watched(scores, name) for scores in side] for side in sides)
        if ours[0]:
            found[name or "accuracy"] = difference(ours, theirs)
            found[f"{name or 'accuracy'} over seeds"] = over_seeds(gains(ours, theirs))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Formats the figures as two Markdown tables, and what is missing."""
    names = ("accuracy", *WATCHED)
    titles = ("all", *WATCHED)
    lines = [f"| arm | seeds | {' | '.join(titles)} | handed over | in answers | FLOPs |"]
    lines.append("|---" * (5 + len(names)) + "|")
    for row in found["arms"]:
        cells = [f"`{row['arm']}`", str(row["seeds"])]
        cells += ["" if row[n] is None else f"{row[n]:.3f}" for n in names]
        trained = row["handed in training"]
        cells.append("" if trained is None else f"{trained:.2f}")
        cells.append(", ".join(f"{skill} {share:.2f}" for skill, share in row["handed"].items()))
        lines.append(f"| {' | '.join([*cells, f'{row["flops"]:.2f}'])} |")
    # Runs of one arm differ far more than the choice of questions does.
    lines += ["", f"| `{OURS}` over | seeds | {' | '.join(titles)} | all, over questions |"]
    lines.append("|---" * (3 + len(names)) + "|")
    for row in found["differences"]:
        cells = [f"`{row['over']}`", str(row["seeds"])]
        cells += [_shown(row.get(f"{n} over seeds")) for n in names]
        cells.append(_shown(row.get("accuracy")))
        lines.append(f"| {' | '.join(cells)} |")
    missing: Sequence[str] = found["missing"]
    if missing:
        lines += ["", f"Missing: {len(missing)} files, {missing[0]} for example."]
    return "\n".join(lines)


def _shown(gap: Any) -> str:
    return "" if gap is None else shown(tuple(gap))
