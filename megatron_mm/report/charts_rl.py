"""Charts of a reinforcement-learning run, from its metrics. Metrics that the run lacks give no
chart; rollout metrics have points only at steps that began a rollout."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from megatron_mm.report.charts import (
    ACCENT,
    INK,
    MAX_POINTS,
    MUTED,
    inline_svg,
    new_axes,
    percent,
    series,
)
from megatron_mm.report.metrics_log import ROUTER_NORM

ROUTERS = "rollout/moe/"


class Line(NamedTuple):
    """Line of a chart.

    Attributes:
        key: metric.
        label: text in the legend, which a chart of one line lacks.
    """

    key: str
    label: str = ""
    color: str = ACCENT
    dashed: bool = False


POLICY = {
    "KL from the reference (nats a token)": [Line("kl")],
    "divergence from the teachers (nats a token)": [Line("teacher/kl")],
    "entropy (nats a token)": [Line("entropy")],
    "tokens whose ratio is clipped": [
        Line("clip_ratio/region_mean", "all"),
        Line("clip_ratio/low_mean", "too low", MUTED, True),
        Line("clip_ratio/high_mean", "too high", INK, True),
    ],
    "completion length (tokens)": [
        Line("completions/mean_length", "mean"),
        Line("completions/min_length", "shortest", MUTED, True),
        Line("completions/max_length", "longest", INK, True),
    ],
    "completions cut at the longest length": [Line("completions/clipped_ratio")],
    "groups whose rewards are all equal": [Line("frac_reward_zero_std")],
    "rollout and trainer: |difference| of log-probabilities": [
        Line("train/train_rollout_logprob_abs_diff")
    ],
}
SHARES = (
    "tokens whose ratio is clipped",
    "completions cut at the longest length",
    "groups whose rewards are all equal",
)
EXPERTS = {
    "information of experts about skills, given the token (nats)": [
        Line(ROUTERS + "mutual_information")
    ],
    "busiest expert above the mean (0 = even)": [Line(ROUTERS + "max_violation")],
    "the router term of the loss": [Line("moe/router_loss")],
}
GRADIENTS = "gradient norm of each router"


def rl_charts(records: list[dict]) -> dict[str, list[dict[str, Any]]]:
    """Returns charts as {name or title, last, svg}, by section of the page; empty without RL."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    if not {"reward", "teacher/kl"} & {*keys}:
        return {}
    return {
        "rewards": _rewards(records, keys),
        "skills": _by_skill(records, keys),
        "policy": _large(records, POLICY),
        "hits": _hits(records, keys),
        "experts": _large(records, EXPERTS | {GRADIENTS: _routers(keys)}),
    }


def _rewards(records: list[dict], keys: list[str]) -> list[dict[str, Any]]:
    """Charts of the total reward, its deviation within groups, and each reward."""
    chosen = {"reward": "all, weighted", "reward_std": "deviation within a group"}
    chosen |= {
        key: key.removeprefix("rewards/").removesuffix("/mean")
        for key in keys
        if key.startswith("rewards/") and key.endswith("/mean")
    }
    return [
        chart
        for key, name in chosen.items()
        if (chart := _small(records, [Line(key)], name, "Reward"))
    ]


def _by_skill(records: list[dict], keys: list[str]) -> list[dict[str, Any]]:
    names = [key.removeprefix("reward/task/") for key in keys if key.startswith("reward/task/")]
    chosen = [("reward/task", "all skills"), *((f"reward/task/{n}", n) for n in sorted(names))]
    return [
        chart
        for key, name in chosen
        if (chart := _small(records, [Line(key)], name, "Task reward"))
    ]


def _routers(keys: list[str]) -> list[Line]:
    """Lines of all routers. The first and the last layer stand out, because faults of a router
    mostly depend on its depth."""
    layers = sorted(int(k.removeprefix(ROUTER_NORM)) for k in keys if k.startswith(ROUTER_NORM))
    lines = [Line(f"{ROUTER_NORM}{layer}", "", MUTED) for layer in layers]
    for place, color in ((-1, INK), (0, ACCENT)) if layers else ():
        key = f"{ROUTER_NORM}{layers[place]}"
        lines[place] = Line(key, f"layer {layers[place]}", color)
    return lines


def _hits(records: list[dict], keys: list[str]) -> list[dict[str, Any]]:
    """Charts of hit rates beside chance and the hit rate of a shuffled map."""
    prefix = ROUTERS + "hit_rate/"
    names = sorted(key.removeprefix(prefix) for key in keys if key.startswith(prefix))
    charts = []
    for skill, name in (("", "all skills"), *((f"/{name}", name) for name in names)):
        lines = [
            Line(f"{ROUTERS}chance{skill}", "", MUTED, True),
            Line(f"{ROUTERS}hit_rate_shuffled{skill}", "", INK),
            Line(f"{ROUTERS}hit_rate{skill}", "", ACCENT),
        ]
        if chart := _small(records, lines, name, "Hit rate", share=True):
            charts.append(chart)
    return charts


def _large(records: list[dict], titles: dict[str, list[Line]]) -> list[dict[str, Any]]:
    charts = []
    for title, lines in titles.items():
        figure, axes = new_axes(4.8, 2.5)
        drawn = [values for line in lines if len(values := _draw(axes, records, line)) > 1]
        if not drawn:
            continue
        _limit(axes, drawn, records)
        if title in SHARES:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        if labelled := sum(bool(line.label) for line in lines):
            place = "outside upper left"
            figure.legend(loc=place, frameon=False, fontsize=8, labelcolor=MUTED, ncols=labelled)
        axes.set_xlabel("step", color=MUTED, fontsize=9)
        charts.append({"title": title, "svg": inline_svg(figure, title, 560)})
    return charts


def _small(
    records: list[dict], lines: list[Line], name: str, what: str, share: bool = False
) -> dict[str, Any] | None:
    """Draws a small chart; None if its last line, the main one, has no points.

    Args:
        share: whether to show values in percent.
    """
    figure, axes = new_axes(2.5, 1.5)
    drawn = [_draw(axes, records, line) for line in lines]
    values = drawn[-1]
    if not len(values):
        return None
    _limit(axes, drawn, records)
    axes.locator_params(axis="y", nbins=4)
    last = f"{values[-1]:.3g}"
    if share:
        last = percent(values[-1])
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    chart = {"name": name, "last": last}
    return chart | {"svg": inline_svg(figure, f"{what} of {name} over steps", 300)}


def _limit(axes: Any, drawn: list[np.ndarray], records: list[dict]) -> None:
    """Sets the limits: the same steps in all charts, and 0 in each."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate(drawn)
    low, high = min(0.0, values.min()), max(0.0, values.max())
    room = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - (room if low < 0 else 0.0), high + (room if high > 0 or low == 0 else 0.0))
    if low == high == 0:
        axes.set_yticks([0.0])
    axes.set_xlim(0, 1.03 * max(record["iteration"] for record in records))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=3))


def _draw(axes: Any, records: list[dict], line: Line) -> np.ndarray:
    """Draws a line, with one point per bin if there are many. Returns the unbinned values."""
    steps, values = series(records, line.key)
    if not len(steps):
        return values
    bins = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS))
    x, y = (np.array([part[b].mean() for b in bins]) for part in (steps, values))
    style: dict[str, Any] = {"linewidth": 1.6}
    if line.dashed:
        style = {"linewidth": 1.2, "linestyle": (0, (4, 3))}
    if len(x) == 1:
        style |= {"marker": "o", "markersize": 3}
    axes.plot(x, y, color=line.color, label=line.label, **style)
    return values
