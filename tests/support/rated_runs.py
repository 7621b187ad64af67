"""Rated rows made by hand, and the commands of pass rates on the ranks of a layout."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

from megatron_mm.config import RunConfig
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.errors import DataError
from megatron_mm.pass_rate import measure, without_images
from support.weights import random_engine


class Stopped(Exception):
    pass


def on_rank_run(
    run: RunConfig,
    data: str,
    out: str,
    per_round: int,
    stop_behind: int | None = None,
    most: int | None = None,
    key: str = "key",
) -> str:
    """Measures, or with `most` makes pairs by dropped images; returns what is told at the end, or
    the error. Every rank stops once `stop_behind` rows are written."""
    multiprocessing.current_process()._config["daemon"] = False  # for reward workers
    engine, module = random_engine(run), measure if most is None else without_images
    tokenizer, told = load_tokenizer(run.data.tokenizer_model), module.told

    def noted(tally):
        if stop_behind is not None and tally.rows >= stop_behind:
            raise Stopped
        return told(tally)

    module.told = noted
    common = (engine, tokenizer, data, Path(out), key, per_round)
    try:
        if most is None:
            return told(measure.measure(*common))
        return told(without_images.drop_images(*common, most=most, unfinished=True))
    except Stopped:
        return "stopped"
    except DataError as error:
        return str(error)
    finally:
        module.told = told  # the rank lives on


def rated_row(right: Sequence[bool | None], **more) -> dict:
    """Returns a rated row with the answers a, b, c, ..., all finished."""
    known = [r for r in right if r is not None]
    row = {
        "messages": [
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "Its own."},
        ],
        "ground_truth": "a",
        "accuracy": sum(known) / len(known) if known else None,
        "completions": [chr(ord("a") + n) for n in range(len(right))],
        "finished": [True] * len(right),
        "right": [*right],
        "scores": {"exact": [None if r is None else float(r) for r in right]},
    }
    return row | more


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
