"""Completions in the report: their rewards, and which parts of them were right.

Rows are those of `completions.jsonl`. Completions may contain anything; the template escapes all
text.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_mm.report.backwards import from_the_end

BETWEEN = " ,;\n"
MAX_GROUPS, MAX_COMPLETIONS = 8, 16  # of the page; of a group


def hacked_steps(records: list[dict]) -> list[int]:
    """Steps at which the hit rate had risen while the task reward had fallen."""
    return [r["iteration"] for r in records if r.get("rollout/moe/reward_hacking") == 1]


def last_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of the last rollouts in completions.jsonl, as many as a page shows. The
    file may have gigabytes and is read from its end.

    Raises:
        ValueError: a line is no row.
    """
    rows: list[dict[str, Any]] = []
    groups: set[tuple[int, Any]] = set()
    for _, row in from_the_end(path):
        if len(groups) >= MAX_GROUPS and row["iteration"] != rows[-1]["iteration"]:
            break  # the last rollout that is shown is whole
        rows.append(row)
        groups.add((row["iteration"], row.get("row")))
    return rows[::-1]


def last_groups(rows: list[dict]) -> list[dict[str, Any]]:
    """Returns the completions of the last rollouts by prompt, newest first. Equal completions of a
    prompt are shown once."""
    found = [[*rows] for _, rows in groupby(rows, lambda row: (row["iteration"], row.get("row")))]
    # The sort is stable, so groups of a rollout keep their order.
    newest = sorted(found, key=lambda group: -group[0]["iteration"])
    return [_group(rows) for rows in newest[:MAX_GROUPS]]


def _group(rows: list[dict]) -> dict[str, Any]:
    first = rows[0]
    names = list(dict.fromkeys(name for row in rows for name in row.get("rewards") or {}))
    truth = first.get("truth")
    shown: list[dict[str, Any]] = []
    for completion in (_completion(row, names) for row in rows):
        same = next((c for c in shown if c | {"times": 1} == completion), None)
        if same:
            same["times"] += 1
        else:
            shown.append(completion)
    return {
        "iteration": first["iteration"],
        "key": first.get("key") or "",
        "question": str(first.get("question") or "").replace("<image>", "").strip(),
        "truth": None if truth is None else str(truth),
        "names": names,
        "completions": shown[:MAX_COMPLETIONS],
        "more": sum(row["times"] for row in shown[MAX_COMPLETIONS:]),
    }


def _completion(row: dict, names: list[str]) -> dict[str, Any]:
    rewards, advantage = row.get("rewards") or {}, row.get("advantage")
    text, right = str(row.get("completion") or ""), row.get("right_spans") or []
    return {
        "parts": _parts(text, row.get("span_places") or [], right),
        "right": sum(map(bool, right)),
        "spans": len(right),
        "finished": row.get("finished", True),
        "rewards": [_number(rewards.get(name)) for name in names],
        "advantage": _number(advantage, signed=True),
        "times": 1,
        "verdict": "right" if (advantage or 0) > 0 else "wrong" if (advantage or 0) < 0 else "",
    }


def _parts(text: str, places: list[list[int]], right: list[bool]) -> list[tuple[str, str]]:
    """Splits the text into (part, verdict): "right", "wrong", or "" outside of spans. A span
    consists of whole tokens; separators at its ends are not marked."""
    parts, end = [], 0
    for (start, stop), correct in zip(places, right, strict=False):
        span = text[start:stop]
        stop -= len(span) - len(span.rstrip(BETWEEN))
        start = min(stop, start + len(span) - len(span.lstrip(BETWEEN)))
        parts += [(text[end:start], ""), (text[start:stop], "right" if correct else "wrong")]
        end = stop
    return [(piece, verdict) for piece, verdict in [*parts, (text[end:], "")] if piece]


def _number(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:+.2f}" if signed else f"{value:.3g}"
