"""Rows of the cascade, made from the answers of the model itself.

    python -m examples.cascade.rows pool --data rl.jsonl --rows 3000 --out pool.jsonl
    python -m examples.cascade.rows rate --checkpoint DIR --data pool.jsonl --out rated.jsonl ...
    python -m examples.cascade.rows swapped --data pairs.jsonl --out swapped.jsonl --seed 1
    python -m examples.cascade.rows chosen --data pairs.jsonl --out chosen.jsonl

`rate` runs tools/pass_rate.py and notes its seconds beside the file: MPO's pairs cost rollouts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.digits.jobs import ROOT
from megatron_mm.outputs import whole_file

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("pool", "rate", "swapped", "chosen"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    args, rest = parser.parse_known_args(argv)
    if args.command == "rate":
        return _rate(args.data, args.out, ["--seed", str(args.seed), *rest])
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    rows = _read(args.data)
    made = {
        "pool": lambda: (row for _, row in zip(range(args.rows), rows, strict=False)),
        "swapped": lambda: swapped(rows, args.seed),
        "chosen": lambda: chosen(rows),
    }[args.command]()
    with whole_file(args.out) as partial, partial.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in made)
    return 0


def swapped(pairs: Iterable[Row], seed: int) -> Iterator[Row]:
    """Yields the pairs with their sides exchanged in one of two, drawn by the seed."""
    draw = random.Random(seed)
    for row in pairs:
        turned = draw.random() < 0.5
        sides = (row["rejected"], row["chosen"]) if turned else (row["chosen"], row["rejected"])
        yield row | {"chosen": sides[0], "rejected": sides[1]}


def chosen(pairs: Iterable[Row]) -> Iterator[Row]:
    """Yields the chosen sides as rows of supervised training, each once."""
    seen = set()
    for row in pairs:
        answer = {"role": "assistant", "content": row["chosen"]}
        made = {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")}
        made["messages"] = [*row["prompt"], answer]
        if (text := json.dumps(made, sort_keys=True)) not in seen:
            seen.add(text)
            yield made


def seconds_file(rated: Path) -> Path:
    """Where `rate` notes its seconds, those of an attempt that was ended too."""
    return rated.with_suffix(".seconds")


def _rate(data: Path, out: Path, flags: Sequence[str]) -> int:
    noted, begin = seconds_file(out), time.monotonic()
    earlier = float(noted.read_text()) if noted.exists() else 0.0
    command = [sys.executable, str(ROOT / "tools" / "pass_rate.py"), "measure"]
    try:
        given = ["--data", str(data), "--out", str(out), *flags]
        return subprocess.run([*command, *given]).returncode
    finally:
        with whole_file(noted) as partial:
            partial.write_text(f"{earlier + time.monotonic() - begin:.1f}\n")


def _read(path: Path) -> Iterator[Row]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


if __name__ == "__main__":
    raise SystemExit(main())
