"""The table of `arms.py`: accuracy, tokens and FLOPs of every arm, and what looking gains over its
controls."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from examples.digits.scores import (
    accuracy,
    difference,
    gains,
    mean,
    over_seeds,
    paired,
    read_scores,
    shown,
)
from examples.looking.arms import ARMS

OURS = ("hidden", "boxes_tenth", "boxes", "grpo", "tokens", "tokens_grpo")
CONTROLS = ("blind", "words", "zero", "another", "random")
SLOTS = 4  # behind a query
TILE = 4  # stream tokens of a tile


def summary(out: Path) -> dict[str, Any]:
    """Makes the figures of the finished runs under `out`/seedN/arm, and names what is missing."""
    runs: dict[str, dict[str, Path]] = defaultdict(dict)
    for done in sorted(out.glob("seed*/*/answers.jsonl")):
        runs[done.parent.name][done.parents[1].name] = done.parent
    seeds = sorted({seed for of_arm in runs.values() for seed in of_arm})
    wanted = [out / seed / arm / "answers.jsonl" for seed in seeds for arm in ARMS]
    others = [arm for arm in ARMS if arm not in OURS]
    return {
        "arms": [_arm(out, arm, runs[arm]) for arm in ARMS if arm in runs],
        "differences": [
            _against(runs, ours, other)
            for ours in OURS
            for other in others
            if ours in runs and other in runs
        ],
        "missing": [str(path.relative_to(out)) for path in wanted if not path.exists()],
    }


def _arm(out: Path, arm: str, runs: Mapping[str, Path]) -> dict[str, Any]:
    scores = [read_scores(run / "answers.jsonl") for run in runs.values()]
    keys = sorted(scores[0])
    answers = [_tokens(out, arm, run) for run in runs.values()]
    return {
        "arm": arm,
        "seeds": len(runs),
        "accuracy": mean(accuracy(of_run) for of_run in scores),
        **{key: mean(accuracy({key: of_run[key]}) for of_run in scores) for key in keys},
        "image_tokens": TILE * (25 if arm == "stream" else 1),
        "answer_tokens": mean(answers),
        "flops": flops(arm),
    }


def _tokens(out: Path, arm: str, run: Path) -> float:
    """Returns the mean tokens of an answer, slots among them."""
    encode = _tokenizer(out / "data" / "tokenizer.model").encode
    records = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    spoken = sum(len(encode(record["prediction"])) for record in records)
    return (spoken + sum(SLOTS * len(record.get("looked") or []) for record in records)) / len(
        records
    )


@cache
def _tokenizer(path: Path):
    from megatron_mm.data.tokenizer import load_tokenizer

    return load_tokenizer(path)


def flops(arm: str) -> float:
    """Returns the FLOPs of a forward pass over a full sample with one image, over those of the arm
    that does not look: of the layers and the encoder, as the planner's split counts them."""
    from megatron_mm.config import load, parse_pattern
    from megatron_mm.config.cost import costs, vision

    spent = {}
    for name in (arm, "blind"):
        chosen = ARMS[name]
        run = load(str(chosen.config), ["--hybrid-layer-pattern", chosen.pattern, *chosen.flags])
        found = costs(run)
        # A memory or a stream of tiles has the encoder see all of them, a thumbnail one.
        looks = run.model.fusion.vision_memory != "none" or name == "stream"
        tiles = run.data.max_num_tiles if looks else 0
        tiles += name != "stream"  # the thumbnail
        layers = sum(found.letters[layer.kind] for layer in parse_pattern(chosen.pattern))
        spent[name] = layers + vision(run.model, tiles)
    return spent[arm] / spent["blind"]


def _against(runs: Mapping[str, Mapping[str, Path]], ours: str, other: str) -> dict[str, Any]:
    """Returns what an arm gains over another, over the seeds that both have: intervals over
    questions, and over seeds."""
    both = paired(runs[ours], runs[other])
    found: dict[str, Any] = {"arm": ours, "over": other, "seeds": len(both[0])}
    if not both[0]:
        return found
    sides = [[read_scores(run / "answers.jsonl") for run in side] for side in both]
    found["accuracy"] = difference(*sides)
    found["between seeds"] = over_seeds(gains(*sides))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Formats the figures as two Markdown tables, and what is missing."""
    rows: Sequence[Mapping[str, Any]] = found["arms"]
    keys = [key for key in (rows[0] if rows else {}) if "/" in key]
    lines = [f"| arm | seeds | all | {' | '.join(keys)} | image tokens | answer tokens | FLOPs |"]
    lines.append("|---" * (6 + len(keys)) + "|")
    for row in rows:
        cells = [f"`{row['arm']}`", str(row["seeds"]), f"{row['accuracy']:.3f}"]
        cells += [f"{row[key]:.3f}" for key in keys]
        cells += [str(row["image_tokens"]), f"{row['answer_tokens']:.1f}", f"{row['flops']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| arm | over | seeds | accuracy | between seeds |", "|---|---|---|---|---|"]
    for row in found["differences"]:
        gaps = [
            "" if (gap := row.get(name)) is None else shown(tuple(gap))
            for name in ("accuracy", "between seeds")
        ]
        mark = "**" if row["over"] in CONTROLS else ""
        cells = [f"`{row['arm']}`", f"{mark}`{row['over']}`{mark}", str(row["seeds"]), *gaps]
        lines.append(f"| {' | '.join(cells)} |")
    missing: Sequence[str] = found["missing"]
    if missing:
        lines += ["", f"Missing: {len(missing)} files, {missing[0]} for example."]
    return "\n".join(lines)
