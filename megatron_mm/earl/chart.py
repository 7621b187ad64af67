"""The picture of a skill map: which experts of which layer each skill prefers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import log2

import torch

REACH = 2.0  # colours end at 2 ** -REACH and 2 ** REACH times the base rate
MAX_MARKS = 4096  # dots in a panel: more would hide the colours


def draw(
    lift_LES: torch.Tensor,
    skills: Sequence[str],
    clusters: Mapping[str, Sequence[Sequence[int]]],
    warning: str | None,
) -> bytes:
    """Returns a PNG with a panel for each skill: layers by experts, coloured by log2 of the lift, a
    dot in each expert of the skill's cluster."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, experts, _ = lift_LES.shape
    height = 0.75 + min(4.0, 0.22 * layers)
    figure = Figure(figsize=(7.5, 0.6 + height * len(skills)), layout="constrained")
    panels = figure.subplots(len(skills), 1, sharex=True, squeeze=False)[:, 0]
    for panel, skill, lift_LE in zip(panels, skills, lift_LES.unbind(2), strict=True):
        image = panel.imshow(
            lift_LE.clamp(min=2.0**-8).log2(),
            cmap="RdBu_r",
            vmin=-REACH,
            vmax=REACH,
            aspect="auto",
            interpolation="none",
        )
        dots = [(e, layer) for layer, inside in enumerate(clusters.get(skill, ())) for e in inside]
        if layers * experts <= MAX_MARKS and dots:
            panel.scatter(*zip(*dots, strict=True), s=9, color="black")
        panel.set_title(skill.replace("$", r"\$"), loc="left", fontsize=10)
        panel.set_ylabel("layer", fontsize=9)
        panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        panel.tick_params(labelsize=8)
    panels[-1].set_xlabel("expert", fontsize=9)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
    marks = (0.25, 0.5, 1, 2, 4)
    bar.set_ticks([log2(mark) for mark in marks], labels=[f"{mark:g}x" for mark in marks])
    bar.set_label("chosen, against the base rate at the same tokens", fontsize=9)
    if warning is not None:
        figure.suptitle(
            "not to be relied on: no better than chance", fontsize=10, color="firebrick"
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
