"""Experts in the report: which ones serve which skill (a skill map), and how well a model answers
with some of them (its prunings).

Maps and records may name anything; the template escapes all text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.report.charts import (
    ACCENT,
    MUTED,
    experts_chart,
    inline_svg,
    new_axes,
    percent,
    shown_layers,
)

PRUNING_FILE = "pruning.json"  # beside a pruned checkpoint
MAP_HEAD = "megatron_mm skill map"  # how a map's format begins
COMMON = "common"


def skill_maps(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns (name, content) of every skill map in a folder.

    Raises:
        ValueError: one is not JSON.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        with path.open(encoding="utf-8", errors="replace") as file:
            if MAP_HEAD in file.read(200):
                found.append((path.name, read_json(path)))
    return found


def pruning_records(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of the prunings in a folder and in the folders inside it.

    Raises:
        ValueError: one is not JSON.
    """
    paths = [*folder.glob(PRUNING_FILE), *sorted(folder.glob(f"*/{PRUNING_FILE}"))]
    return [read_json(path) for path in paths]


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file; empty if it is not there.

    Raises:
        ValueError: it is not JSON.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def discovery(name: str, skill_map: dict[str, Any]) -> dict[str, Any]:
    """Prepares a skill map: a chart of clusters and knock-out scores for each layer, a table of
    what removal costs."""
    skills, common, info = skill_map["skills"], skill_map.get("common"), skill_map.get("info") or {}
    layers, experts = skill_map["num_layers"], skill_map["num_experts"]
    rows = {**skills, COMMON: common} if common else skills
    strength_SLE = np.zeros((len(rows), layers, experts))
    scores = info.get("knock_out")
    if scores:
        score_SLE = np.array([scores[skill] for skill in skills], dtype=float)
        largest_S11 = np.abs(score_SLE).max((1, 2), keepdims=True)
        strength_SLE[: len(skills)] = score_SLE / np.maximum(largest_S11, 1e-12)
    chosen = shown_layers(layers)
    charts = []
    for layer in chosen:
        dots = [(e, row) for row, cluster in enumerate(rows.values()) for e in cluster[layer]]
        charts.append(experts_chart(strength_SLE[:, layer], [*rows], f"layer {layer}", dots))
    return {
        "name": name,
        "common": bool(common),
        "coloured": bool(scores),
        "warning": info.get("warning"),
        "removal": _removal(skills, info),
        "charts": charts,
        "left_out": layers - len(chosen),
    }


def _removal(skills: Iterable[str], info: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the table of what a skill and the others lose: right answers' nats without one of the
    skill's experts, accuracy without its cluster. None if neither was measured."""
    nats, test = info.get("own_and_others") or {}, info.get("causal_test") or {}
    heads, rows = ["skill"], [[skill] for skill in skills]
    if nats:
        heads += ["own, nats", "others', nats"]
        for row in rows:
            row += [f"{value:.3f}" for value in nats.get(row[0], ())] or ["–", "–"]
    if test:
        heads += ["accuracy", "without", "own loss", "others' loss"]
        for row in rows:
            row += _losses(row[0], test)
    return {"heads": heads, "rows": rows} if len(heads) > 1 else None


def _losses(skill: str, test: dict[str, Any]) -> list[str]:
    """Returns a skill's accuracy, that without its cluster, its loss, the others' mean loss."""
    without = test["without"].get(skill)
    if without is None:
        return ["–"] * 4
    loss = {other: test["accuracy"][other] - value for other, value in without.items()}
    own = loss.pop(skill)
    others = f"{sum(loss.values()) / len(loss):.3f}" if loss else "–"
    return [percent(test["accuracy"][skill]), percent(without[skill]), f"{own:.3f}", others]


def prunings(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prepares prunings, those of one model for the same skills together: a table and charts of
    accuracy against experts kept."""

    def task(record: dict) -> tuple:
        return record["checkpoint"], record["skills"], record.get("valid_data") or ""

    together = groupby(sorted(records, key=task), task)
    return [_pruning(sorted(found, key=lambda r: r["kept"])) for _, found in together]


def _pruning(records: list[dict[str, Any]]) -> dict[str, Any]:
    first = records[0]
    skills, before = first["skills"], first.get("before") or {}
    own = tuple(f"{skill}/" for skill in skills)  # a kind is skill/form, or a skill
    kinds = sorted(before, key=lambda kind: not f"{kind}/".startswith(own))
    counts = [*(record["kept"] for record in records), first["num_experts"]]
    rows, charts = [], []
    for kind in kinds:
        results = [*(record["after"][kind] for record in records), before[kind]]
        values = [result["accuracy"] for result in results]
        chance = before[kind]["chance"]
        rows.append((kind, f"{before[kind]['n']:,}", percent(chance), *map(percent, values)))
        charts.append(_against_experts(kind, counts, values, chance))
    return {
        "skills": ", ".join(skills),
        "checkpoint": first["checkpoint"],
        "heads": ("kind", "n", "chance", *(f"{count} experts" for count in counts)),
        "rows": rows,
        "charts": charts,
    }


def _against_experts(
    name: str, counts: list[int], values: list[float], chance: float
) -> dict[str, Any]:
    figure, axes = new_axes(2.5, 1.5)
    axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(counts, values, color=ACCENT, linewidth=1.8, marker="o", markersize=3)
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_xlim(0, 1.05 * max(counts))
    axes.locator_params(axis="x", nbins=4, integer=True)
    chart = {"name": name, "last": percent(values[0])}
    return chart | {"svg": inline_svg(figure, f"Accuracy of {name} against experts kept", 300)}
