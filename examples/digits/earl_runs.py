"""The record of a finished run of `earl_arms.py`, from which the tables are made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.digits.earl_arms import ONE
from examples.digits.records import Record, basic
from examples.digits.scores import mean
from megatron_mm.report.metrics_log import read_metrics

REACHED = 0.7  # of the reward, for the count of steps
SMOOTHED = 5  # rollouts of which the reward is a mean
LEARNT = 0.5  # least accuracy with all experts of a kind that pruning is judged by


def read_run(run: Path) -> Record:
    """Reads the record of a run; `experts` and `measures` are empty until they are measured."""
    experts, measures = run / "experts.json", run / "measures.json"
    return basic(run) | {
        "steps": steps_to(run),
        "experts": of_removal(json.loads(experts.read_text())["info"]) if experts.exists() else {},
        "measures": json.loads(measures.read_text()) if measures.exists() else {},
    }


def steps_to(run: Path) -> float | None:
    """Returns the step at which the reward of `ONE`, as a mean of the last rollouts, first reaches
    `REACHED`; None if it does not."""
    name = f"reward/task/{ONE}"
    records = [record for record in read_metrics(run / "metrics.jsonl") if name in record]
    rewards = [record[name] for record in records]
    for end in range(SMOOTHED, len(rewards) + 1):
        if fmean(rewards[end - SMOOTHED : end]) >= REACHED:
            return float(records[end - 1]["iteration"])
    return None


def of_removal(info: Mapping[str, Any]) -> dict[str, float]:
    """Returns what a map's measurement found of a run's experts: the share of labelled routes into
    the skill's cluster, the information of experts about skills given the token, and how far a
    skill's accuracy and that of the others fall without its cluster."""
    hits = [row["hit"] for row in info["measured"].values() if row["experts"]]
    causal = info["causal_test"]
    own: list[float] = []
    others: list[float] = []
    for skill, without in causal["without"].items():
        falls = {name: causal["accuracy"][name] - value for name, value in without.items()}
        own.append(falls.pop(skill))
        others += falls.values()
    found = {
        "hit": mean(hits),
        "information": mean(info["mutual_information"]),
        "own": mean(own),
        "others": mean(others),
    }
    return {name: value for name, value in found.items() if value is not None}


def of_experts(run: Record, plain: Record | None) -> dict[str, float]:
    """Returns all that was measured of a run's experts, by name.

    Args:
        plain: the seed's plain run. Few experts are judged by the kinds that it has learnt, or
            else the run itself.
    """
    found = run["experts"] | _few(run["measures"], plain["measures"] if plain else {})
    if {"own", "others"} <= found.keys():
        found["own less others"] = found["own"] - found["others"]
    return found


def _few(held: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, float]:
    """Returns the accuracies with few experts kept and out of distribution."""
    if not held:
        return {}
    learnt = [kind for kind, share in _with_all(plain or held).items() if share >= LEARNT]
    found = {
        f"kept {count}": mean(of_kind[kind] for kind in learnt)
        for count, of_kind in held["kept"].items()
    }
    found |= {name: mean(held["beyond"][name].values()) for name in ("larger", "longer")}
    return {name: value for name, value in found.items() if value is not None}


def _with_all(held: Mapping[str, Any]) -> Mapping[str, float]:
    """Returns the accuracies with all experts."""
    return held["kept"][str(held["num_experts"])]
