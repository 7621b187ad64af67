"""Compare two runs on the same questions: what was asked for, and what happened to the rest.

    python tools/arms_table.py --before runs/demo --after runs/demo/earl

prints accuracies and differences, and adds them to results.json of the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.digits.scores import gaps, over_questions, part, read_scores, shown, worst

LAST = 10  # rollouts whose router metrics are averaged
ROUTER = ("hit_rate", "hit_rate_shuffled", "mutual_information", "max_violation")


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
    one, other = (read_scores(folder / "answers.jsonl") for folder in (before, after))
    lines = [f"{'skill':<20}{'before':>8}{'after':>8}{'n':>7}"]
    lines.append("-" * len(lines[0]))
    for key in sorted(one):
        shares = [result["skills"][key]["accuracy"] for result in results]
        lines.append(f"{key:<20}{shares[0]:>8.1%}{shares[1]:>8.1%}{len(one[key]):>7}")
    found: dict[str, Any] = {}
    for name, trained in (("reinforced questions", True), ("all others", False)):
        if not part(one, trained):
            continue
        values = gaps([part(other, trained)], [part(one, trained)])
        found[name] = over_questions(values)
        lines.append(f"{name}: {shown(found[name])} (95 % interval)")
        if not trained:
            key, gap = worst(values)
            found["worst of the others"] = {key: gap}
            lines.append(f"worst of the others, {key}: {shown(gap)}")
    router = router_metrics(after)
    lines += [f"{name}: {a:.3f} at first, {b:.3f} at last" for name, (a, b) in router.items()]
    entries = {
        "sft": results[0]["skills"],
        "earl": results[1]["skills"],
        "difference": found,
        "router": {name: {"before": a, "after": b} for name, (a, b) in router.items()},
    }
    return "\n".join(lines), entries


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
