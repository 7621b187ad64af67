"""The tables of `earl_arms.py`, from the files of its finished runs.

A change is the accuracy after a training less that before, of the same questions. *Gain* is the
change of what was reinforced, *collateral* that of other skills (after reinforcement of all skills,
of the forms that were not reinforced): its mean over kinds, the mean of its size, in which kinds
that gain do not hide others that lose, and the worst kind, whose interval counts that it was
picked. *Own forms* are the other forms of the skill that was reinforced, *steps* those of each seed
until the reward reached `earl_runs.REACHED`. Each figure is a mean over seeds, with half the width
of its 95 % interval over questions, then over seeds. What was measured of experts is compared seed
by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.digits.earl_arms import ONE, RL, SFT, Arm, arms
from examples.digits.earl_runs import of_experts, read_run
from examples.digits.records import Record, read_records, scores_of
from examples.digits.scores import (
    FREE,
    Scores,
    Values,
    accuracy,
    gaps,
    mean,
    over_questions,
    over_seeds,
    worst,
)

AGAINST = {  # comparisons of changes
    "scope": ("grpo", "kl", "experts", "aligned", "shuffled_scope"),
    "experts": ("grpo",),
    "shuffled_scope": ("grpo",),
}

# Comparisons of what was measured of experts, after SFT.
EXPERTS_AGAINST = (("aligned", "plain"), ("aligned", "shuffled"), ("shuffled", "plain"))

Seed = Mapping[str, Record]  # run -> its record
Figure = dict[str, Any]  # value, questions: half a width, seeds: half a width


def figure(per_seed: Sequence[float], values: Values | None = None) -> Figure:
    """Returns a mean over seeds with halves of the widths of its intervals.

    Args:
        values: of each question, mean over seeds; None: there is no interval over questions.
    """
    found: Figure = {"value": mean(per_seed), "questions": None, "seeds": None}
    if values is not None:
        middle, low, _ = over_questions(values)
        found["questions"] = middle - low
    if (interval := over_seeds(per_seed)) is not None:
        found["seeds"] = interval[0] - interval[1]
    return found


def changes(
    after: Sequence[Scores], before: Sequence[Scores], kinds: Callable[[str], bool]
) -> tuple[list[float], Values]:
    """Returns (change of each seed, changes of the questions), of the kinds that count."""
    sides = [[_only(s, kinds) for s in side] for side in (after, before)]
    per_seed = [over_questions(gaps([a], [b]))[0] for a, b in zip(*sides, strict=True)]
    return per_seed, gaps(*sides)


def _only(scores: Scores, kinds: Callable[[str], bool]) -> Scores:
    return {key: of_key for key, of_key in scores.items() if kinds(key)}


def reinforced(where: str) -> Callable[[str], bool]:
    """Returns whether a kind of question is reinforced in runs of `one/` or `all/`."""
    return (lambda key: key == ONE) if where == "one" else (lambda key: key.endswith(FREE))


def of_others(where: str) -> Callable[[str], bool]:
    """Returns whether a kind of question is of another skill or, after reinforcement of all, of a
    form that was not reinforced."""
    if where == "all":
        return lambda key: not key.endswith(FREE)
    return lambda key: _skill(key) != _skill(ONE)


def _own_form(key: str, where: str) -> bool:
    """Whether a kind of question is of what was reinforced, in a form that was not."""
    return not (reinforced(where)(key) or of_others(where)(key))


def _skill(key: str) -> str:
    return key.split("/")[0]


def summary(out: Path) -> dict[str, Any]:
    """Summarises the finished runs of a model's folder, and names what is missing."""
    by_name = read_records(out, read_run)
    seeds = [*by_name.values()]
    found: dict[str, Any] = {"model": out.name, "seeds": [*by_name]}
    found["sft"] = [row for name in SFT if (row := _sft(seeds, name))]
    found["sft against"] = [
        row for pair in EXPERTS_AGAINST if (row := _experts_against(seeds, *pair))
    ]
    for where in ("one", "all"):
        found[where] = [row for name in RL if (row := _rl(seeds, where, name))]
        found[f"{where} against"] = [
            row
            for name, others in AGAINST.items()
            for other in others
            if (row := _against(seeds, where, name, other))
        ]
    return found | {"missing": _missing(by_name)}


def _missing(by_name: Mapping[str, Seed]) -> list[str]:
    """Returns the files of all arms that no seed's record was made from."""
    lacking = []
    for run in ("base", *arms()):
        for seed, runs in by_name.items():
            parts = {"answers.jsonl": run in runs}
            if run != "base":
                record = runs.get(run, {"experts": {}, "measures": {}})
                parts |= {f"{part}.json": bool(record[part]) for part in ("experts", "measures")}
            lacking += [f"{seed}/{run}/{name}" for name, there in parts.items() if not there]
    return lacking


def _with(seeds: Sequence[Seed], *runs: str) -> list[Seed]:
    """Returns the seeds in which all these runs are finished."""
    return [seed for seed in seeds if all(run in seed for run in runs)]


def _scores(seeds: Sequence[Seed], run: str) -> list[Scores]:
    return [scores_of(seed[run]) for seed in seeds]


def _experts(seed: Seed, run: str) -> dict[str, float]:
    return of_experts(seed[run], seed.get("sft/plain"))


def _experts_against(seeds: Sequence[Seed], name: str, other: str) -> dict[str, Any] | None:
    """Compares what was measured of the experts of two arms, in the seeds that have both."""
    runs = f"sft/{name}", f"sft/{other}"
    pairs = [[_experts(seed, run) for run in runs] for seed in _with(seeds, *runs)]
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        return None
    row: dict[str, Any] = {"arm": name, "other": other, "seeds": len(pairs)}
    for what in pairs[0][0]:
        if all(what in side for pair in pairs for side in pair):
            row[what] = figure([ours[what] - theirs[what] for ours, theirs in pairs])
    return row


def _measured(seeds: Sequence[Seed], run: str) -> dict[str, Figure]:
    """Returns the figures of the experts that were measured, over the seeds that have them."""
    of_seeds = [_experts(seed, run) for seed in seeds]
    names = dict.fromkeys(name for found in of_seeds for name in found)
    return {n: figure([found[n] for found in of_seeds if n in found]) for n in names}


def _sft(seeds: Sequence[Seed], name: str) -> dict[str, Any] | None:
    if not (done := _with(seeds, f"sft/{name}")):
        return None
    ours = _scores(done, f"sft/{name}")
    row: dict[str, Any] = {"arm": name, "seeds": len(done)}
    parts = {"free": reinforced("all"), "other": lambda key: not key.endswith(FREE)}
    for part, kinds in parts.items():
        row[part] = mean(accuracy(_only(scores, kinds)) for scores in ours)
    row |= _measured(done, f"sft/{name}")
    if name != "plain" and (paired := _with(done, "sft/plain")):
        after, before = (_scores(paired, f"sft/{arm}") for arm in (name, "plain"))
        for part, kinds in parts.items():
            row[f"{part} against plain"] = figure(*changes(after, before, kinds))
    return row


def _rl(seeds: Sequence[Seed], where: str, name: str) -> dict[str, Any] | None:
    arm: Arm = RL[name]
    run = f"{where}/{name}"
    if not (done := _with(seeds, run, arm.start)):
        return None
    after, before = _sides(done, where, name)
    counts = reinforced(where)
    row: dict[str, Any] = {"arm": name, "seeds": len(done)}
    row["gain"] = figure(*changes(after, before, counts))
    per_seed, others = changes(after, before, of_others(where))
    row["collateral"] = figure(per_seed, others)
    pairs = zip(after, before, strict=True)
    row["moved"] = figure([_moved(a, b, of_others(where)) for a, b in pairs])
    if any(_own_form(key, where) for key in after[0]):
        row["own forms"] = figure(*changes(after, before, lambda key: _own_form(key, where)))
    kind, (value, low, _) = worst(others)
    row["worst"] = {"kind": kind, "value": value, "questions": value - low}
    _, every = changes(after, before, lambda key: not counts(key))
    row["by kind"] = {key: float(value.mean()) for key, value in every.items()}
    row["steps"] = [seed[run]["steps"] for seed in done]
    return row | _measured(done, run)


def _moved(after: Scores, before: Scores, kinds: Callable[[str], bool]) -> float:
    """Returns the mean over kinds of the size of their change."""
    _, values = changes([after], [before], kinds)
    return float(mean(abs(float(of_kind.mean())) for of_kind in values.values()) or 0.0)


def _sides(seeds: Sequence[Seed], where: str, name: str) -> tuple[list[Scores], list[Scores]]:
    return _scores(seeds, f"{where}/{name}"), _scores(seeds, RL[name].start)


def _against(seeds: Sequence[Seed], where: str, name: str, other: str) -> dict[str, Any] | None:
    """Compares the changes of two arms, in the seeds that have both."""
    runs = (f"{where}/{name}", f"{where}/{other}", RL[name].start, RL[other].start)
    if not (done := _with(seeds, *runs)):
        return None
    counts = reinforced(where)
    row: dict[str, Any] = {"arm": name, "other": other, "seeds": len(done)}
    for part, kinds in (("gain", counts), ("collateral", of_others(where))):
        (ours, of_ours), (theirs, of_theirs) = (
            changes(*_sides(done, where, arm), kinds) for arm in (name, other)
        )
        values = {key: of_ours[key] - of_theirs[key] for key in of_ours}
        row[part] = figure([a - b for a, b in zip(ours, theirs, strict=True)], values)
    return row


Table = Sequence[Mapping[str, Any]]


def markdown(found: Mapping[str, Any]) -> str:
    """Formats a summary as Markdown tables."""
    measured = dict.fromkeys(
        name for part in ("sft", "one", "all") for row in found[part] for name in row
    )
    kept = [name for name in measured if name.startswith("kept")]
    experts = ["hit", "information", "own", "others", "own less others"]
    experts += [*kept, "larger", "longer"]
    sft = ["free", "other", "free against plain", "other against plain", *experts]
    rl = ["gain", "collateral", "moved", "worst", "own forms", "steps"]
    lines = ["After SFT:", "", *_table(found["sft"], ["arm", "seeds", *sft])]
    lines += ["", *_table(found["sft against"], ["arm", "other", "seeds", *experts])]
    for where, title in (("one", f"RL on {ONE} alone"), ("all", "RL on all free questions")):
        lines += ["", f"{title}:", "", *_table(found[where], ["arm", "seeds", *rl])]
        rows = [row for row in found[where] if any(name in row for name in experts)]
        lines += ["", *_table(rows, ["arm", *experts])] if rows else []
        columns = ["arm", "other", "seeds", "gain", "collateral"]
        lines += ["", *_table(found[f"{where} against"], columns)]
    if found["missing"]:
        first = ", ".join(found["missing"][:6])
        lines += ["", f"Missing: {len(found['missing'])} files, such as {first}"]
    return "\n".join(lines)


def tables_of_page(found: Mapping[str, Any]) -> list[str]:
    """Formats what the page of `megatron_mm/earl` shows of a summary: fine-tuning, then of each
    reinforcement that was run the arms, and some beside each other."""
    sft = ["arm", "seeds", "free against plain", "other against plain", "hit", "own", "others"]
    measured = {name for row in found["sft"] for name in row if name.startswith("kept ")}
    kept = sorted(int(name.removeprefix("kept ")) for name in measured)
    sft += [f"kept {count}" for count in kept if count in (kept[-1] // 2, kept[-1])]
    sft += ["larger", "longer"]
    rl = ["arm", "seeds", "gain", "collateral", "worst", "own forms", "steps"]
    tables = [_table(found["sft"], sft)]
    for where in ("one", "all"):
        own = any("own forms" in row for row in found[where])
        columns = [name for name in rl if own or name != "own forms"]
        against = ["arm", "other", "gain", "collateral"]
        if found[where]:
            tables.append(_table(found[where], columns))
            tables.append(_table(found[f"{where} against"], against))
    return ["\n".join(lines) for lines in tables]


def _table(rows: Table, columns: Sequence[str]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(_cell(c, row.get(c)) for c in columns)} |" for row in rows]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    if column == "steps":
        return ", ".join("-" if step is None else f"{step:.0f}" for step in value)
    if not isinstance(value, Mapping):
        return f"`{value}`" if column in ("arm", "other") and isinstance(value, str) else str(value)
    signed = column in ("gain", "collateral", "worst", "own forms") or "against" in column
    text = f"{value['value']:+.3f}" if signed else f"{value['value']:.3f}"
    halves = [value.get(name) for name in ("questions", "seeds")]
    spread = " / ".join(f"{half:.3f}" for half in halves if half is not None)
    text += f" ± {spread}" if spread else ""
    return f"{text} `{value['kind']}`" if "kind" in value else text
