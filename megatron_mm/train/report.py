"""One page about one run: `report.html`, readable offline and on paper.

Reads `metrics.jsonl`, `results.json` and `evaluation.json` of a run directory. Every part is
optional: a run without looks, experts, images or a finished evaluation gets a shorter page.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.train.metrics import METRICS_FILE, format_duration, read_metrics

TEMPLATE = Path(__file__).with_name("report.html.j2")
LAYERS = {
    "V": "vision encoder",
    "G": "gated DeltaNet",
    "*": "attention",
    "E": "mixture of experts",
    "L": "look at the image",
    "J": "inject what was seen",
}
# A page is for reading: past these counts it would only grow.
MAX_SCENES, MAX_LOOK_EXAMPLES, MAX_TOKENS, MAX_EXPERT_LAYERS = 24, 6, 12, 12
MAX_POINTS = 500  # per curve
MAX_IMAGE_SIDE = 640  # pixels of an inlined image

# Charts are drawn in these stand-in colours, which become the page's CSS variables, so that
# one chart serves the light, the dark and the printed page.
INK, MUTED, GRID, ACCENT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
CSS_COLORS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
}
MORE, LESS = (217, 95, 14), (44, 111, 187)  # above and below the mean, as in the legend


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write `report.html` into `run_dir` and return its path."""
    run = Path(run_dir)
    records = read_metrics(run / METRICS_FILE)
    results = _read_json(run / "results.json")
    evaluation = _read_json(run / "evaluation.json")
    if not (records or results or evaluation):
        raise FileNotFoundError(f"{run}: no {METRICS_FILE}, results.json or evaluation.json here")

    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    skills = _skills(results)
    scenes = [_scene(run, example) for example in evaluation.get("examples") or []]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=run.resolve().name,
        tiles=_tiles(results, records, skills),
        skills=skills,
        skill_chart=_skill_chart(skills),
        layout=_layout(results),
        stages=_stages(results),
        layer_names=LAYERS,
        curves=_curves(records),
        histories=_histories(records, skills),
        scenes=_spread(scenes, MAX_SCENES),
        looks=_spread([scene for scene in scenes if scene["looks"]], MAX_LOOK_EXAMPLES),
        experts=_experts(evaluation.get("experts") or {}),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def accuracy_table(results: dict[str, Any]) -> str:
    """The skills of `results.json` as an aligned plain-text table."""
    rows = [("skill", "accuracy", "chance", "n")]
    rows += [tuple(skill["cells"]) for skill in _skills(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def expert_lift(load: Any) -> np.ndarray:
    """log2 of each expert's share of a skill's tokens over its mean share over the skills.

    `load` is [skill, layer, expert]; 0 means that a skill uses an expert like all others do.
    """
    load = np.asarray(load, dtype=float)
    mean = load.mean(axis=0, keepdims=True)
    ratio = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return np.log2(np.maximum(ratio, 2.0**-8))  # an unused expert would be minus infinity


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _skills(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, found in (results.get("skills") or {}).items():
        accuracy, chance, n = (found.get(key) for key in ("accuracy", "chance", "n"))
        cells = [name, _percent(accuracy), _percent(chance), "–" if n is None else f"{n:,}"]
        rows.append({"name": name, "accuracy": accuracy, "chance": chance, "cells": cells})
    return rows


def _tiles(results: dict, records: list[dict], skills: list[dict]) -> list[tuple[str, str, str]]:
    """The headline numbers as (value, label, note)."""
    tiles = []
    scored = [skill["accuracy"] for skill in skills if skill["accuracy"] is not None]
    if scored:
        chances = [skill["chance"] for skill in skills if skill["chance"] is not None]
        note = f"chance {_percent(sum(chances) / len(chances))}" if chances else ""
        label = "mean accuracy over skills" if len(scored) > 1 else "accuracy"
        tiles.append((_percent(sum(scored) / len(scored)), label, note))
    losses = [r["lm loss"] for r in records if r.get("lm loss") is not None]
    if losses:
        tiles.append((f"{losses[-1]:.3g}", "last training loss", f"first {losses[0]:.3g}"))
    step = results.get("iteration") or (records[-1]["iteration"] if records else None)
    if step is not None:
        samples = next(
            (r["consumed samples"] for r in reversed(records) if "consumed samples" in r), 0
        )
        tiles.append((f"{step:,}", "steps", f"{int(samples):,} samples" if samples else ""))
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
    """The parallel sizes in words; what is not set (None) is not shown."""
    sizes = (results.get("layout") or {}).items()
    return [(key.replace("_model_", " ").replace("_", " "), v) for key, v in sizes if v is not None]


def _stages(results: dict) -> list[list[str]]:
    """One list of layer letters per pipeline stage; `[V]` is read as the vision encoder."""
    return [list(re.sub(r"[\s\[\]|]", "", stage)) for stage in results.get("stages") or []]


def _spread(items: list[dict], limit: int) -> list[dict]:
    """At most `limit` items, taken from every skill in turn and shown skill by skill."""
    turns: dict[str, int] = {}
    order = []
    for index, item in enumerate(items):
        turn = turns[item["key"]] = turns.get(item["key"], -1) + 1
        order.append((turn, index))
    first_seen = {key: place for place, key in enumerate(turns)}
    chosen = sorted(index for _, index in sorted(order)[:limit])
    return sorted((items[index] for index in chosen), key=lambda item: first_seen[item["key"]])


# --- charts -------------------------------------------------------------------------------


def _svg(figure: Any, label: str, css_width: int) -> Any:
    """`figure` as inline SVG in the page's own font and colours, without any outside name."""
    from markupsafe import Markup, escape
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text (searchable, in the page's font); the salt makes the ids repeatable and
    # keeps those of different charts apart.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    box = re.search(r'viewBox="[^"]*"', svg).group(0)
    attributes = f'role="img" aria-label="{escape(label)}" style="max-width:{css_width}px"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f'<svg class="chart" {box} {attributes}>', svg, count=1)
    for color, variable in CSS_COLORS.items():
        svg = svg.replace(color, variable)
    return Markup(svg.replace("xlink:href", "href"))


def _axes(width: float, height: float, grid: str = "y") -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, labelsize=9, colors=MUTED)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _skill_chart(skills: list[dict]) -> Any:
    rows = [skill for skill in skills if skill["accuracy"] is not None]
    if not rows:
        return None
    figure, axes = _axes(6.4, 0.55 + 0.34 * len(rows), grid="x")
    places = np.arange(len(rows))
    axes.barh(places, [row["accuracy"] for row in rows], height=0.62, color=ACCENT)
    for place, row in zip(places, rows, strict=True):
        axes.text(
            row["accuracy"] + 0.012, place, row["cells"][1], va="center", fontsize=9, color=INK
        )
        if row["chance"] is not None:
            ends = (place - 0.42, place + 0.42)
            axes.plot([row["chance"]] * 2, ends, color=INK, linewidth=2, solid_capstyle="butt")
    axes.set_yticks(places, [row["name"].replace("$", r"\$") for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    return _svg(figure, "Accuracy by skill beside chance", 760)


def _series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["iteration"], r[key]) for r in records if r.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _curves(records: list[dict]) -> list[dict[str, Any]]:
    titles = {
        "lm loss": "language model loss",
        "load_balancing_loss": "load-balancing loss (1 = even experts)",
        "grad norm": "gradient norm",
        "learning rate": "learning rate",
    }
    curves = []
    for key, title in titles.items():
        steps, values = _series(records, key)
        if len(steps) < 2:
            continue
        figure, axes = _axes(4.8, 2.5)
        # Long runs: one point per bin, so that the page stays small.
        bins = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS))
        steps, values = (np.array([part[b].mean() for b in bins]) for part in (steps, values))
        if key == "learning rate":
            axes.plot(steps, values, color=ACCENT, linewidth=1.8)
        else:
            axes.plot(steps, values, color=ACCENT, linewidth=0.8, alpha=0.35)
            axes.plot(steps, _smooth(values), color=ACCENT, linewidth=1.8)
        if (
            key in ("lm loss", "grad norm")
            and values.min() > 0
            and values.max() > 30 * values.min()
        ):
            axes.set_yscale("log")
        elif key != "load_balancing_loss":
            axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.set_xlabel("step", color=MUTED, fontsize=9)
        curves.append({"title": title, "svg": _svg(figure, title, 560)})
    return curves


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about a thirtieth of the curve, shorter at its ends."""
    reach = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _histories(records: list[dict], skills: list[dict]) -> list[dict[str, Any]]:
    """Accuracy over steps, one small chart per skill on a common scale."""
    chances = {skill["name"]: skill["chance"] for skill in skills}
    keys = dict.fromkeys(k for record in records for k in record if k.startswith("accuracy/"))
    charts = []
    for key in keys:
        name = key.removeprefix("accuracy/")
        steps, values = _series(records, key)
        if not len(steps):
            continue
        figure, axes = _axes(2.5, 1.5)
        if chances.get(name) is not None:
            axes.axhline(chances[name], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(steps, values, color=ACCENT, linewidth=1.8, marker="o", markersize=3)
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axes.set_xlim(0, 1.03 * max(record["iteration"] for record in records))
        axes.locator_params(axis="x", nbins=3)
        svg = _svg(figure, f"Accuracy of {name} over steps", 300)
        charts.append({"name": name, "last": _percent(values[-1]), "svg": svg})
    return charts


def _experts(experts: dict) -> dict[str, Any] | None:
    if not (experts.get("load") and experts.get("layers")):
        return None
    from matplotlib.ticker import MaxNLocator

    keys, layers = experts["keys"], experts["layers"]
    lift = expert_lift(experts["load"])
    # The scale holds nearly all cells: a few extreme ones must not wash out the rest.
    reach = float(np.clip(np.ceil(2 * np.percentile(np.abs(lift), 98)) / 2, 0.5, 4))
    chosen = np.unique(np.linspace(0, len(layers) - 1, MAX_EXPERT_LAYERS).round().astype(int))
    charts = []
    for index in chosen:
        cells = np.clip(lift[:, index] / reach, -1, 1)
        # Clear in the middle, so that the page's own background stands for "as the mean".
        color = np.where(cells[..., None] > 0, MORE, LESS).astype(np.uint8)
        alpha = (255 * np.abs(cells)[..., None]).astype(np.uint8)
        figure, axes = _axes(4.8, 0.75 + 0.24 * len(keys), grid="x")
        axes.grid(False)
        axes.imshow(np.concatenate([color, alpha], axis=-1), aspect="auto", interpolation="none")
        axes.set_yticks(range(len(keys)), [key.replace("$", r"\$") for key in keys], color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("expert", color=MUTED, fontsize=9)
        title = f"layer {layers[index]}"
        charts.append({"title": title, "svg": _svg(figure, f"Experts by skill, {title}", 560)})
    return {"charts": charts, "factor": f"{2**reach:.2g}", "left_out": len(layers) - len(chosen)}


# --- scenes -------------------------------------------------------------------------------


def _data_uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _scene(run: Path, example: dict) -> dict[str, Any]:
    """One evaluated question, ready to show. A path is tried from the run, then from here."""
    from PIL import Image

    scene = {key: example.get(key) for key in ("key", "question", "prediction", "truth")}
    score = float(example.get("score") or 0)
    scene["verdict"] = "right" if score >= 1 else "partly right" if score > 0 else "wrong"
    scene |= {"image": None, "aspect": "1", "missing": None, "looks": []}
    if not example.get("image"):
        return scene
    path = next((p for p in (run / example["image"], Path(example["image"])) if p.exists()), None)
    if path is None:
        return scene | {"missing": example["image"]}
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    scene |= {"image": _data_uri(image), "aspect": f"{image.width} / {image.height}"}
    scene["looks"] = [shown for look in example.get("looks") or [] if (shown := _look(look))]
    return scene


def _look(look: dict) -> dict[str, Any] | None:
    """The attention of one look, one see-through picture per generated token."""
    rows, columns = look["grid"]
    frames = []
    for token, weights in zip(look["tokens"], look["weights"], strict=False):
        if weights is None or len(weights) != rows * columns:
            continue
        grid = np.nan_to_num(np.asarray(weights, dtype=float).reshape(rows, columns))
        peak = max(float(grid.max()), 1e-12)
        frames.append({"token": token, "peak": _percent(peak), "image": _heat(grid / peak)})
    if not frames:
        return None
    shown = frames[:MAX_TOKENS]
    title = f"look {look['pair']}, layer {look['layer']}"
    return {"title": title, "frames": shown, "more": len(frames) - len(shown)}


def _heat(strength: np.ndarray) -> str:
    """Dark where nothing is seen, clearer and warm where much is; one pixel per patch."""
    from PIL import Image

    warm = np.array([255, 160, 20]) * np.sqrt(strength)[..., None]
    night = np.array([16, 20, 40]) * (1 - np.sqrt(strength))[..., None]
    alpha = 0.62 - 0.15 * strength[..., None]
    pixels = np.concatenate([warm + night, 255 * alpha], axis=-1)
    return _data_uri(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8), "RGBA"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write report.html for a run directory.")
    parser.add_argument("run_dir", type=Path)
    try:
        print(write_report(parser.parse_args(argv).run_dir))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
