"""The table of `arms.py`: accuracy, tokens and FLOPs of every arm, and what looking gains over its
controls."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from examples.digits.records import ANSWERS, Record, basic, read_records, scores_of
from examples.digits.scores import (
    accuracy,
    difference,
    gains,
    mean,
    over_seeds,
    paired,
)
from examples.looking.arms import ARMS

OURS = ("hidden", "boxes_tenth", "boxes", "grpo", "tokens", "tokens_grpo")
# What reinforcement brought to its start, and one way to say a place over the other.
PAIRS = (("grpo", "boxes_tenth"), ("tokens_grpo", "tokens"), ("tokens", "boxes"))
SLOTS = 4  # behind a query
TILE = 4  # stream tokens of a tile
MARKS = 8  # tokens of a prompt beside its text and its image: of turns, and around the image


def read_run(run: Path) -> Record:
    """Reads the record of a run: its scores, its steps, and mean tokens of questions without their
    images and of answers."""
    data = run.parents[1] / "data"
    return basic(run) | {"prompt": _prompt(data), "answer": _tokens(data, run)}


def summary(out: Path) -> dict[str, Any]:
    """Makes the figures of the finished runs under `out`/seedN/arm, and names what is missing."""
    seeds = read_records(out, read_run)
    runs: dict[str, dict[str, Record]] = defaultdict(dict)  # arm -> seed -> record
    for seed, of_seed in seeds.items():
        for arm, record in of_seed.items():
            runs[arm][seed] = record
    wanted = [(seed, arm) for seed in seeds for arm in ARMS]
    others = [arm for arm in ARMS if arm not in OURS]
    pairs = [(ours, other) for ours in OURS for other in others]
    return {
        "arms": [_arm(arm, [*runs[arm].values()]) for arm in ARMS if arm in runs],
        "differences": [
            _against(runs, ours, other)
            for ours, other in (*pairs, *PAIRS)
            if ours in runs and other in runs
        ],
        "missing": [f"{seed}/{arm}/{ANSWERS}" for seed, arm in wanted if arm not in seeds[seed]],
    }


def _arm(arm: str, runs: Sequence[Record]) -> dict[str, Any]:
    scores = [scores_of(run) for run in runs]
    answers = float(np.mean([run["answer"] for run in runs]))
    image = TILE * (25 if arm == "stream" else 1)
    return {
        "arm": arm,
        "seeds": len(runs),
        "accuracy": mean(accuracy(of_run) for of_run in scores),
        **{key: mean(accuracy({key: of_run[key]}) for of_run in scores) for key in scores[0]},
        "image_tokens": image,
        "answer_tokens": answers,
        "flops": flops(arm, runs[0]["prompt"] + image + answers),
    }


@cache
def _prompt(data: Path) -> float:
    """Returns the mean tokens of a question, without its image."""
    encode = _tokenizer(data / "tokenizer.model").encode
    rows = map(json.loads, (data / "valid.jsonl").read_text().splitlines())
    asked = [row["messages"][0]["content"].replace("<image>", "") for row in rows]
    return MARKS + float(np.mean([len(encode(text)) for text in asked]))


def _tokens(data: Path, run: Path) -> float:
    """Returns the mean tokens of an answer, slots among them."""
    encode = _tokenizer(data / "tokenizer.model").encode
    records = [json.loads(line) for line in (run / ANSWERS).read_text().splitlines()]
    spoken = sum(len(encode(record["prediction"])) for record in records)
    slots = SLOTS * sum(len(record.get("looked") or []) for record in records)
    return (spoken + slots) / len(records)


@cache
def _tokenizer(path: Path):
    from megatron_mm.data.tokenizer import load_tokenizer

    return load_tokenizer(path)


def flops(arm: str, tokens: float) -> float:
    """Returns MFLOPs of a forward pass over a question with its image and answer: of the layers and
    the encoder, as the planner's split counts them, keys and values of glimpses among them but not
    their few queries.

    Args:
        tokens: of the sample's stream.
    """
    from megatron_mm.config import load, parse_pattern
    from megatron_mm.config.cost import costs, vision

    chosen = ARMS[arm]
    run = load(str(chosen.config), ["--hybrid-layer-pattern", chosen.pattern, *chosen.flags])
    run.data.seq_length = round(tokens)
    found = costs(run)
    # A memory or a stream of tiles has the encoder see all of them, a thumbnail one.
    looks = run.model.fusion.vision_memory != "none" or arm == "stream"
    tiles = run.data.max_num_tiles if looks else 0
    tiles += arm != "stream"  # the thumbnail
    layers = sum(found.letters[layer.kind] for layer in parse_pattern(chosen.pattern))
    return (layers + vision(run.model, tiles)) / 1e6


def _against(runs: Mapping[str, Mapping[str, Record]], ours: str, other: str) -> dict[str, Any]:
    """Returns what an arm gains over another, over the seeds that both have: intervals over
    questions, and over seeds."""
    both = paired(runs[ours], runs[other])
    found: dict[str, Any] = {"arm": ours, "over": other, "seeds": len(both[0])}
    if not both[0]:
        return found
    sides = [[scores_of(run) for run in side] for side in both]
    found["accuracy"] = difference(*sides)
    found["between seeds"] = over_seeds(gains(*sides))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Formats the figures as two Markdown tables, and names what is missing. A difference has half
    the width of its 95 % interval over questions and, of several seeds, between seeds."""
    rows: Sequence[Mapping[str, Any]] = found["arms"]
    keys = [key for key in (rows[0] if rows else {}) if "/" in key]
    kinds = [key.removesuffix("/steps") for key in keys]
    lines = [f"| arm | seeds | all | {' | '.join(kinds)} | image tokens | answer tokens | MFLOPs |"]
    lines.append("|---" * (6 + len(keys)) + "|")
    for row in rows:
        cells = [f"`{row['arm']}`", str(row["seeds"]), f"{row['accuracy']:.3f}"]
        cells += [f"{row[key]:.3f}" for key in keys]
        cells += [str(row["image_tokens"]), f"{row['answer_tokens']:.1f}", f"{row['flops']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    gaps = {(row["arm"], row["over"]): row for row in found["differences"]}
    ours = [arm for arm in OURS if any(arm == one for one, _ in gaps)]
    lines += ["", f"| over | {' | '.join(f'`{arm}`' for arm in ours)} |"]
    lines.append("|---" * (1 + len(ours)) + "|")
    for other in (arm for arm in ARMS if any(arm == over for _, over in gaps)):
        cells = [_gap(gaps.get((arm, other), {})) for arm in ours]
        lines.append(f"| `{other}` | {' | '.join(cells)} |")
    missing: Sequence[str] = found["missing"]
    if missing:
        lines += ["", f"Missing: {len(missing)} files, {missing[0]} for example."]
    return "\n".join(lines)


def _gap(row: Mapping[str, Any]) -> str:
    """Returns a mean and halves of the widths of its intervals."""
    if "accuracy" not in row:
        return ""
    intervals = [row["accuracy"], *([row["between seeds"]] if row["between seeds"] else [])]
    halves = " / ".join(f"{high - middle:.3f}" for middle, _, high in intervals)
    return f"{row['accuracy'][0]:+.3f} ± {halves}"
