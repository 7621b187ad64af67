"""The picture of a skill map: what each expert of each layer is to each skill."""

from __future__ import annotations

import io
from math import log2

from megatron_mm.earl.make_map import Discovery

REACH = 2.0  # colours of lifts end at 2 ** -REACH and 2 ** REACH times the base rate
MAX_MARKS = 4096  # marks in a panel: more would hide the colours


def draw(found: Discovery) -> bytes:
    """Returns a PNG with a panel for each skill: layers by experts, a dot in each expert of the
    skill's cluster and a ring in each common one.

    Colours are log2 of the lift, or how much worse the skill is read without the expert, over the
    skill's largest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    skills, layers, experts = found.score_SLE.shape
    score_SLE, reach = found.score_SLE, 1.0
    if not found.knocked_out:
        score_SLE, reach = score_SLE.clamp(min=2.0**-8).log2(), REACH
    height = 0.75 + min(4.0, 0.22 * layers)
    figure = Figure(figsize=(7.5, 0.6 + height * skills), layout="constrained")
    panels = figure.subplots(skills, 1, sharex=True, squeeze=False)[:, 0]
    for panel, skill, score_LE in zip(panels, found.skills, score_SLE.unbind(0), strict=True):
        image = panel.imshow(
            score_LE,
            cmap="RdBu_r",
            vmin=-reach,
            vmax=reach,
            aspect="auto",
            interpolation="none",
        )
        if layers * experts <= MAX_MARKS:
            _mark(panel, found.skill_map.skills.get(skill, []), s=9, color="black")
            ring = {"facecolors": "none", "edgecolors": "grey", "linewidths": 0.8}
            _mark(panel, found.skill_map.common or [], s=16, **ring)
        panel.set_title(skill.replace("$", r"\$"), loc="left", fontsize=10)
        panel.set_ylabel("layer", fontsize=9)
        panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        panel.tick_params(labelsize=8)
    panels[-1].set_xlabel("expert", fontsize=9)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
    if found.knocked_out:
        bar.set_label("rise of the loss without\nthe expert, over the largest", fontsize=9)
    else:
        marks = (0.25, 0.5, 1, 2, 4)
        bar.set_ticks([log2(mark) for mark in marks], labels=[f"{mark:g}x" for mark in marks])
        bar.set_label("chosen, against the base\nrate at the same tokens", fontsize=9)
    if found.warning is not None:
        figure.suptitle(
            "not to be relied on: no better than chance", fontsize=10, color="firebrick"
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _mark(panel, clusters: list[list[int]], **style) -> None:
    places = [(e, layer) for layer, inside in enumerate(clusters) for e in inside]
    if places:
        panel.scatter(*zip(*places, strict=True), **style)
