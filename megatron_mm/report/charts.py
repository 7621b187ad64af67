"""Charts of the report, as inline SVG in the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

LM_LOSS, BALANCE = "train/lm_loss", "moe/load_balancing_loss"
MAX_POINTS = 500  # per curve
MAX_EXPERT_LAYERS = 12  # layers shown

# Charts are drawn in placeholder colours that are replaced by the page's CSS variables, so that one
# chart serves the light, the dark and the printed page.
INK, MUTED, GRID, ACCENT = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
CSS_COLORS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
}
MORE, LESS = (217, 95, 14), (44, 111, 187)  # above and below the mean, as in the legend


def expert_lift(load: Any) -> np.ndarray:
    """Returns log2 of each expert's share of a skill's tokens over its mean share over skills; 0
    means that a skill uses an expert as much as the others do.

    Args:
        load: [skill, layer, expert].
    """
    load = np.asarray(load, dtype=float)
    mean = load.mean(axis=0, keepdims=True)
    ratio = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
    return np.log2(np.maximum(ratio, 2.0**-8))  # not minus infinity for an unused expert


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def inline_svg(figure: Any, label: str, css_width: int) -> Any:
    """Returns `figure` as inline SVG in the page's font and colours, without external names."""
    from markupsafe import Markup, escape
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text (searchable, in the page's font). The salt makes ids reproducible and
    # different between charts.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    found = re.search(r'viewBox="[^"]*"', svg)
    assert found is not None, "matplotlib writes a viewBox"
    box = found.group(0)
    attributes = f'role="img" aria-label="{escape(label)}" style="max-width:{css_width}px"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f'<svg class="chart" {box} {attributes}>', svg, count=1)
    for color, variable in CSS_COLORS.items():
        svg = svg.replace(color, variable)
    return Markup(svg.replace("xlink:href", "href"))


def new_axes(width: float, height: float, grid: Literal["both", "x", "y"] = "y") -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, labelsize=9, colors=MUTED)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def skill_chart(skills: list[dict]) -> Any:
    rows = [skill for skill in skills if skill["accuracy"] is not None]
    if not rows:
        return None
    figure, axes = new_axes(6.4, 0.55 + 0.34 * len(rows), grid="x")
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
    return inline_svg(figure, "Accuracy by skill beside chance", 760)


def series(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["iteration"], r[key]) for r in records if r.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def losses(records: list[dict]) -> list[str]:
    """Returns the names of the training losses in the records; what fine-tuning minimises first.
    Not a policy's, which says nothing."""
    keys = dict.fromkeys(key for record in records for key in record)
    found = [key for key in keys if key.startswith("train/") and key.endswith("_loss")]
    found = [key for key in found if key != "train/policy_loss"]
    return sorted(found, key=lambda key: key != LM_LOSS)


def curves(records: list[dict]) -> list[dict[str, Any]]:
    titles = {
        key: f"{key.removeprefix('train/').removesuffix('_loss')} loss" for key in losses(records)
    }
    titles |= {LM_LOSS: "language model loss"} if LM_LOSS in titles else {}
    titles |= {
        "valid/lm_loss": "language model loss on held-out answers",
        "rewards/margins": "implicit reward of the better answer over the worse one",
        "rewards/accuracies": "share of pairs whose better answer has the higher one",
        BALANCE: "load-balancing loss (1 = even experts)",
        "moe/cluster_mass": "router's probability of the experts of a token's skill",
        "moe/delegated_share": "share of tokens handed to a second hop of experts",
        "moe/load_violation": "busiest expert over the mean, both hops (0 = even)",
        "train/grad_norm": "gradient norm",
        "train/learning_rate": "learning rate",
    }
    curves = []
    for key, title in titles.items():
        steps, values = series(records, key)
        if len(steps) < 2:
            continue
        figure, axes = new_axes(4.8, 2.5)
        # Long runs: one point per bin, so that the page stays small.
        bins = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS))
        steps, values = (np.array([part[b].mean() for b in bins]) for part in (steps, values))
        if key in ("train/learning_rate", "valid/lm_loss"):
            axes.plot(steps, values, color=ACCENT, linewidth=1.8)
        else:
            axes.plot(steps, values, color=ACCENT, linewidth=0.8, alpha=0.35)
            axes.plot(steps, _smooth(values), color=ACCENT, linewidth=1.8)
        if (
            (key.endswith("_loss") and key != BALANCE or key == "train/grad_norm")
            and values.min() > 0
            and values.max() > 30 * values.min()
        ):
            axes.set_yscale("log")
        elif key != BALANCE and values.min() >= 0:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.set_xlabel("step", color=MUTED, fontsize=9)
        curves.append({"title": title, "svg": inline_svg(figure, title, 560)})
    return curves


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving mean over about a thirtieth of the curve, shorter at its ends."""
    reach = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def histories(records: list[dict], skills: list[dict]) -> list[dict[str, Any]]:
    """Charts of accuracy over steps, one per skill on a common scale."""
    chances = {skill["name"]: skill["chance"] for skill in skills}
    keys = dict.fromkeys(k for record in records for k in record if k.startswith("accuracy/"))
    charts = []
    for key in keys:
        name = key.removeprefix("accuracy/")
        steps, values = series(records, key)
        if not len(steps) or (len(steps) == 1 and name in chances):
            continue  # a single point is in the table of skills
        figure, axes = new_axes(2.5, 1.5)
        if chances.get(name) is not None:
            axes.axhline(chances[name], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(steps, values, color=ACCENT, linewidth=1.8, marker="o", markersize=3)
        axes.set_ylim(-0.04, 1.04)
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axes.set_xlim(0, 1.03 * max(record["iteration"] for record in records))
        axes.locator_params(axis="x", nbins=3)
        chart = {"name": name, "last": percent(values[-1])}
        charts.append(chart | {"svg": inline_svg(figure, f"Accuracy of {name} over steps", 300)})
    return charts


def experts(after: dict, before: dict | None = None) -> dict[str, Any] | None:
    """Charts of experts by skill from `evaluation.json`, each beside that of `before` if skills and
    layers are the same."""
    if not (after.get("load") and after.get("layers")):
        return None
    keys, layers = after["keys"], after["layers"]
    times = {"": after}
    if before and (before.get("keys"), before.get("layers")) == (keys, layers):
        times = {", before": before, ", after": after}
    lifts = {when: expert_lift(found["load"]) for when, found in times.items()}
    # The scale covers 98% of the cells, so that a few extreme ones do not wash out the rest.
    extreme = np.percentile(np.abs([*lifts.values()]), 98)
    reach = float(np.clip(np.ceil(2 * extreme) / 2, 0.5, 4))
    chosen = shown_layers(len(layers))
    charts = [
        experts_chart(lift[:, index] / reach, keys, f"layer {layers[index]}{when}")
        for index in chosen
        for when, lift in lifts.items()
    ]
    left_out = len(layers) - len(chosen)
    return {"charts": charts, "factor": f"{2**reach:.2g}", "left_out": left_out}


def shown_layers(layers: int) -> list[int]:
    """Returns the layers that get a chart, spread over all."""
    return np.unique(np.linspace(0, layers - 1, MAX_EXPERT_LAYERS).round().astype(int)).tolist()


def experts_chart(
    strength: np.ndarray, keys: list[str], title: str, dots: Sequence[tuple[int, int]] = ()
) -> dict[str, Any]:
    """Chart of [skill, expert] values, coloured from -1 to 1.

    Args:
        dots: (expert, row) of cells that are marked.
    """
    from matplotlib.ticker import MaxNLocator

    cells = np.clip(strength, -1, 1)
    # Transparent in the middle, so that the page's background stands for the mean.
    color = np.where(cells[..., None] > 0, MORE, LESS).astype(np.uint8)
    alpha = (255 * np.abs(cells)[..., None]).astype(np.uint8)
    figure, axes = new_axes(4.8, 0.75 + 0.24 * len(keys), grid="x")
    axes.grid(False)
    axes.imshow(np.concatenate([color, alpha], axis=-1), aspect="auto", interpolation="none")
    if dots:
        axes.scatter(*zip(*dots, strict=True), s=14, color=INK)
    axes.set_yticks(range(len(keys)), [key.replace("$", r"\$") for key in keys], color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("expert", color=MUTED, fontsize=9)
    return {"title": title, "svg": inline_svg(figure, f"Experts by skill, {title}", 560)}
