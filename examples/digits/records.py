"""Records of finished runs: what a comparison's table reads of each.

A record is read from the run's folder, `out`/seedN/RUN, or from `out`/seedN.json, in which `keep`
has put those of a seed. So seeds, and arms that begin at nothing, can be trained on machines that
share no disk: copy the files of the others beside the folders, and one table shows them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.digits.scores import Scores, read_scores
from megatron_mm.report.metrics_log import read_metrics

Record = Mapping[str, Any]  # as JSON has it
Seeds = Mapping[str, Mapping[str, Record]]  # seed -> run -> its record, seeds in order

ANSWERS = "answers.jsonl"  # a run that has it is finished


def basic(run: Path) -> dict[str, Any]:
    """Reads what every table needs of a run: its scores, as `packed`, and its steps."""
    return {"iterations": _iterations(run), "scores": packed(read_scores(run / ANSWERS))}


def _iterations(run: Path) -> int | None:
    records = read_metrics(run / "metrics.jsonl")
    return max((record.get("iteration", 0) for record in records), default=None)


def packed(scores: Scores) -> dict[str, Any]:
    """Returns the scores of each kind in the order of its questions: a string of 0 and 1, or a list
    where others are among them."""
    found: dict[str, Any] = {}
    for key, of_key in sorted(scores.items()):
        values = [of_key[index] for index in sorted(of_key)]
        plain = set(values) <= {0.0, 1.0}
        found[key] = "".join(str(int(value)) for value in values) if plain else values
    return found


def scores_of(record: Record) -> Scores:
    """Returns the scores of a record, by the number of a question in its kind."""
    return {
        key: {number: float(value) for number, value in enumerate(values)}
        for key, values in record["scores"].items()
    }


def read_records(out: Path, read: Callable[[Path], Record]) -> Seeds:
    """Reads the records of all finished runs of a comparison.

    Args:
        out: the comparison's folder.
        read: a run's folder -> its record.

    Raises:
        SystemExit: a run is there twice, runs were asked different questions, or the same run is
            longer in one of the seeds.
    """
    found: dict[str, dict[str, Record]] = {}
    asked: dict[str, str | None] = {}
    for done in sorted((*out.glob(f"seed*/*/{ANSWERS}"), *out.glob(f"seed*/*/*/{ANSWERS}"))):
        seed, run = done.relative_to(out).parts[0], done.parent
        found.setdefault(seed, {})[run.relative_to(out / seed).as_posix()] = read(run)
        asked["the folder"] = _questions(out)
    for path in sorted(out.glob("seed*.json")):
        kept, there = json.loads(path.read_text()), found.setdefault(path.stem, {})
        if twice := sorted(there.keys() & kept["runs"].keys()):
            raise SystemExit(
                f"error: {path}: {twice[0]} is in the folder {path.stem} as well; remove one"
            )
        there.update(kept["runs"])
        asked[path.name] = kept["questions"]
    _check_alike(out, found, asked)
    return dict(sorted(found.items(), key=lambda item: int(item[0].removeprefix("seed"))))


def _check_alike(out: Path, seeds: Seeds, asked: Mapping[str, str | None]) -> None:
    first = next(iter(asked), "")
    for source, questions in asked.items():
        if questions != asked[first]:
            raise SystemExit(
                f"error: {out}: the runs of {first} and {source} were asked different questions, "
                "or data/valid.jsonl is gone; make their data with the same flags"
            )
    lengths: dict[str, tuple[str, int]] = {}
    for seed, runs in seeds.items():
        for name, record in runs.items():
            if (length := record["iterations"]) is None:
                continue
            other, expected = lengths.setdefault(name, (seed, length))
            if length != expected:
                raise SystemExit(
                    f"error: {out}: {name} has {length} steps in {seed} and {expected} in {other}; "
                    "a table needs seeds of one length"
                )


def _questions(out: Path) -> str | None:
    """Returns a digest of the held-out questions; None if they are gone."""
    path = out / "data" / "valid.jsonl"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def check_not_kept(out: Path, runs: Iterable[Path]) -> None:
    """Checks, before they are made, that none of these runs is kept in a file already.

    Args:
        runs: their folders.

    Raises:
        SystemExit: one of them is.
    """
    asked = {path.relative_to(out).as_posix() for path in runs if path.is_relative_to(out)}
    for path in sorted(out.glob("seed*.json")):
        for name in json.loads(path.read_text())["runs"]:
            if f"{path.stem}/{name}" in asked:
                raise SystemExit(
                    f"error: {path} holds {name}; leave it out of --seeds or --arms, or remove "
                    "the file"
                )


def keep(out: Path, read: Callable[[Path], Record], target: Path) -> None:
    """Writes the records of every seed into a file of `target`, seedN.json.

    Raises:
        SystemExit: as in `read_records`, or `target` is `out`.
    """
    if target.resolve() == out.resolve():
        raise SystemExit(f"error: --keep {target} is the folder of the runs; give another")
    seeds = read_records(out, read)
    files = [json.loads(path.read_text())["questions"] for path in sorted(out.glob("seed*.json"))]
    questions = files[0] if files else _questions(out)  # all the same, as has been checked
    target.mkdir(parents=True, exist_ok=True)
    for seed, runs in seeds.items():
        lines = [f" {json.dumps(name)}: {json.dumps(record)}" for name, record in runs.items()]
        head = f'{{"questions": {json.dumps(questions)}, "runs": {{\n'
        (target / f"{seed}.json").write_text(head + ",\n".join(lines) + "\n}}\n")
