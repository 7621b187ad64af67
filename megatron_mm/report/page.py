"""Writes the report of a run: `report.html`, readable offline and on paper.

Reads `metrics.jsonl`, `results.json` and `evaluation.json` of a run directory, after reinforcement
learning `completions.jsonl` and `experts_before.json`, also skill maps, and `pruning.json` of it
and of the folders inside. Every part is optional: a run without looks, experts, images or a
finished evaluation gets a shorter page.
"""

from __future__ import annotations

import argparse
import base64
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm import cli
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.layers.queries import window
from megatron_mm.config.memories import VISION
from megatron_mm.errors import DataError
from megatron_mm.outputs import whole_file
from megatron_mm.pictures.boxes import read_box
from megatron_mm.pictures.process import PictureProcess
from megatron_mm.report.charts import (
    curves,
    experts,
    histories,
    losses,
    percent,
    series,
    skill_chart,
)
from megatron_mm.report.charts_rl import rl_charts
from megatron_mm.report.metrics_log import (
    BEFORE_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    format_duration,
    read_metrics,
)
from megatron_mm.report.page_experts import (
    PRUNING_FILE,
    discovery,
    pruning_records,
    prunings,
    read_json,
    skill_maps,
)
from megatron_mm.report.page_rl import hacked_steps, last_groups, last_rows

logger = logging.getLogger(__name__)

TEMPLATE = "page.html.j2"
# Limits that keep the page readable.
MAX_SCENES, MAX_LOOK_EXAMPLES, MAX_TOKENS = 24, 6, 12
MAX_WINDOWS = 12  # looks of an answer that are drawn on its scene
MAX_IMAGE_SIDE = 640  # pixels of an inlined image


def write_report(run_dir: str | os.PathLike) -> Path:
    """Writes `report.html` into `run_dir` and returns its path.

    Raises:
        FileNotFoundError: the directory has no results of a run, no map and no pruning.
        ValueError: a file is not JSON.
    """
    run = Path(run_dir)
    records = read_metrics(run / METRICS_FILE)
    results = read_json(run / RESULTS_FILE)
    evaluation = read_json(run / EVALUATION_FILE)
    found = [discovery(name, skill_map) for name, skill_map in skill_maps(run)]
    pruned = prunings(pruning_records(run))
    if not (records or results or evaluation or found or pruned):
        raise FileNotFoundError(
            f"{run}: no {METRICS_FILE}, {RESULTS_FILE}, {EVALUATION_FILE}, {PRUNING_FILE} or skill "
            "map here"
        )

    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rl = rl_charts(records)
    before = read_json(run / BEFORE_FILE) if rl else {}
    skills = _skills(results)
    with PictureProcess() as decoder:
        scenes = [_scene(run, example, decoder) for example in evaluation.get("examples") or []]
    page = environment.get_template(TEMPLATE).render(
        name=run.resolve().name,
        tiles=_tiles(results, records, skills),
        skills=skills,
        skill_columns=_columns(results),
        skill_chart=skill_chart(skills),
        layout=_layout(results),
        stages=_stages(results),
        layer_names={kind.letter: kind.title for _, kind in LAYERS.items()},
        curves=curves(records),
        histories=histories(records, skills),
        scenes=_spread(scenes, MAX_SCENES),
        looks=_spread(_telling(scenes), MAX_LOOK_EXAMPLES),
        experts=experts(evaluation.get("experts") or {}, before.get("experts")),
        discoveries=found,
        prunings=pruned,
        rl=rl,
        hacked=hacked_steps(records),
        groups=last_groups(last_rows(run / TABLE_FILE)) if rl else [],
    )
    path = run / "report.html"
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def report_or_warn(folder: Path) -> list[Path]:
    """Writes the report as the last thing of a command and returns its path. A failure is a
    warning, since everything else is on disk; the list is then empty."""
    try:
        return [write_report(folder)]
    except Exception as error:
        again = f"python -m megatron_mm.report.page {folder}"
        logger.warning("no report: %s; try again with %s", error, again)
        return []


def accuracy_table(results: dict[str, Any]) -> str:
    """Returns the skills of `results.json` as an aligned plain-text table."""
    rows = [_columns(results)]
    rows += [tuple(skill["cells"]) for skill in _skills(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _columns(results: dict[str, Any]) -> tuple[str, ...]:
    """The heads of a table of `_skills`."""
    skills = (results.get("skills") or {}).values()
    has_loss = any("lm_loss" in found for found in skills)
    return ("skill", "accuracy", "chance", "n", *(("loss",) if has_loss else ()))


def _skills(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows, has_loss = [], "loss" in _columns(results)
    for name, found in (results.get("skills") or {}).items():
        accuracy, chance, n, loss = (found.get(k) for k in ("accuracy", "chance", "n", "lm_loss"))
        cells = [name, percent(accuracy), percent(chance), "–" if n is None else f"{n:,}"]
        if has_loss:
            cells.append("–" if loss is None else f"{loss:.3f}")
        rows.append({"name": name, "accuracy": accuracy, "chance": chance, "cells": cells})
    return rows


def _tiles(results: dict, records: list[dict], skills: list[dict]) -> list[tuple[str, str, str]]:
    """Headline numbers as (value, label, note)."""
    tiles = []
    scored = [skill["accuracy"] for skill in skills if skill["accuracy"] is not None]
    if scored:
        chances = [skill["chance"] for skill in skills if skill["chance"] is not None]
        note = f"chance {percent(sum(chances) / len(chances))}" if chances else ""
        label = "mean accuracy over skills" if len(scored) > 1 else "accuracy"
        tiles.append((percent(sum(scored) / len(scored)), label, note))
    for key in losses(records)[:1]:
        _, values = series(records, key)
        if len(values):
            tiles.append((f"{values[-1]:.3g}", "last training loss", f"first {values[0]:.3g}"))
    rewards = [r["reward"] for r in records if r.get("reward") is not None]
    if rewards:
        tiles.append((f"{rewards[-1]:.3g}", "last reward", f"first {rewards[0]:.3g}"))
    step = results.get("iteration") or (records[-1]["iteration"] if records else None)
    if step is not None:
        samples = next(
            (
                r["train/consumed_samples"]
                for r in reversed(records)
                if "train/consumed_samples" in r
            ),
            0,
        )
        unit = "prompts" if rewards else "samples"
        tiles.append((f"{step:,}", "steps", f"{int(samples):,} {unit}" if samples else ""))
    if results.get("parameters"):
        tiles.append((_short(results["parameters"]), "parameters", ""))
    if results.get("seconds") is not None:
        tiles.append((format_duration(results["seconds"]), "wall time", ""))
    return tiles


def _short(count: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(int(count))


def _layout(results: dict) -> list[tuple[str, Any]]:
    """Parallel sizes by name; unset ones (None) are left out."""
    sizes = (results.get("layout") or {}).items()
    return [(key.replace("_model_", " ").replace("_", " "), v) for key, v in sizes if v is not None]


def _stages(results: dict) -> list[list[str]]:
    """Returns the layer letters of each pipeline stage."""
    return [stage.split() for stage in results.get("stages") or []]


def _spread(items: list[dict], limit: int) -> list[dict]:
    """Returns at most `limit` items, taken from the skills in turn, grouped by skill."""
    turns: dict[str, int] = {}
    order = []
    for index, item in enumerate(items):
        turn = turns[item["key"]] = turns.get(item["key"], -1) + 1
        order.append((turn, index))
    first_seen = {key: place for place, key in enumerate(turns)}
    chosen = sorted(index for _, index in sorted(order)[:limit])
    return sorted((items[index] for index in chosen), key=lambda item: first_seen[item["key"]])


def _telling(scenes: list[dict]) -> list[dict]:
    """Returns scenes with looks; right answers in several steps come first."""

    def length(scene: dict) -> int:
        return max(len(look["frames"]) + look["more"] for look in scene["looks"])

    seen = [scene for scene in scenes if scene["looks"]]
    return sorted(seen, key=lambda scene: (scene["verdict"] != "right", -length(scene)))


# --- scenes -------------------------------------------------------------------------------


def _data_uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _scene(run: Path, example: dict, decoder: PictureProcess) -> dict[str, Any]:
    """Prepares an evaluated question. Its image path may be relative to the run or to the working
    directory."""
    from PIL import Image

    scene = {key: example.get(key) for key in ("key", "question", "prediction", "truth")}
    score = float(example.get("score") or 0)
    scene["verdict"] = "right" if score >= 1 else "partly right" if score > 0 else "wrong"
    scene |= {"image": None, "aspect": "1", "missing": None, "looks": [], "windows": []}
    if not example.get("image"):
        return scene
    path = next((p for p in (run / example["image"], Path(example["image"])) if p.exists()), None)
    if path is None:
        return scene | {"missing": example["image"]}
    try:
        box = None if example.get("box") is None else read_box(example["box"], str(path))
        width, height = decoder.size(path, str(path), box=box)
        shrink = min(1.0, MAX_IMAGE_SIDE / max(width, height))
        small = max(1, round(width * shrink)), max(1, round(height * shrink))
        (pixels,) = decoder.scaled(path, str(path), [small], box=box)
    except (DataError, OSError):
        return scene | {"missing": example["image"]}
    image = Image.fromarray(pixels)
    scene |= {"image": _data_uri(image), "aspect": f"{image.width} / {image.height}"}
    scene["windows"] = _windows(example.get("looked") or [])
    scene["looks"] = [shown for look in example.get("looks") or [] if (shown := _look(look))]
    return scene


def _windows(looked: list[list[list[float]]]) -> list[dict[str, Any]]:
    """Prepares what was asked to be seen: a rectangle in percent of the image for every query and
    glimpse, with the query's number."""
    found = []
    for number, places in enumerate(looked[:MAX_WINDOWS], start=1):
        for left, top, right, bottom in map(window, places):
            sides = {"left": left, "top": top, "width": right - left, "height": bottom - top}
            percents = {side: round(100 * share, 2) for side, share in sides.items()}
            found.append({"number": number, **percents})
    return found


def _look(look: dict) -> dict[str, Any] | None:
    """Prepares the attention of a look: a translucent overlay per generated token."""
    rows, columns = look["grid"]
    frames = []
    for token, weights in zip(look["tokens"], look["weights"], strict=False):
        if weights is None or len(weights) != rows * columns:
            continue
        grid = np.nan_to_num(np.asarray(weights, dtype=float).reshape(rows, columns))
        peak = max(float(grid.max()), 1e-12)
        frames.append({"token": token, "peak": percent(peak), "image": _heat(grid / peak)})
    if not frames:
        return None
    shown = frames[:MAX_TOKENS]
    memory = look.get("memory", VISION)
    at = "" if memory == VISION else f" at {memory}"
    title = f"look {look['pair']}{at}, layer {look['layer']}"
    return {"title": title, "frames": shown, "more": len(frames) - len(shown)}


def _heat(strength: np.ndarray) -> str:
    """Overlay of one pixel per patch: dark where attention is low, clear and warm where high."""
    from PIL import Image

    warm = np.array([255, 160, 20]) * np.sqrt(strength)[..., None]
    night = np.array([16, 20, 40]) * (1 - np.sqrt(strength))[..., None]
    alpha = 0.62 - 0.15 * strength[..., None]
    pixels = np.concatenate([warm + night, 255 * alpha], axis=-1)
    return _data_uri(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8), "RGBA"))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if the report cannot be written."""
    cli.setup_logging(cli.rank())
    parser = argparse.ArgumentParser(description="Write report.html for a run directory.")
    parser.add_argument("run_dir", type=Path)
    try:
        cli.say(write_report(parser.parse_args(argv).run_dir))
    except (OSError, ValueError) as error:
        return cli.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
