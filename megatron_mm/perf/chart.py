"""A picture of a pipeline: one bar a stage, of its time and of its rank's memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mm.errors import ConfigError
from megatron_mm.perf.layout import LayoutPlan
from megatron_mm.perf.predict import room
from megatron_mm.perf.table import describe, encodes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GB = 1e9
FORMATS = (".png", ".svg", ".pdf")


def check_format(path: Path | None) -> None:
    """Raises ConfigError if the suffix of a picture is that of no format."""
    if path is not None and path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--chart {path} ends with {path.suffix or 'no suffix'}; allowed: {', '.join(FORMATS)}"
        )


def draw(plan: LayoutPlan, path: Path) -> None:
    """Draws the picture to a file; its format follows the suffix."""
    figure(plan).savefig(path, dpi=120)


def figure(plan: LayoutPlan) -> Figure:
    """Left: milliseconds of a microbatch on every stage, forward and backward; right: bytes that
    every pipeline rank holds at the peak of a step, of training or of the rollout before it, and
    the room there is."""
    from matplotlib.figure import Figure

    stages, ranks = plan.prediction.stages, plan.ranks
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    time, memory = drawn.subplots(1, 2)
    letters = [rank.layers[chunk] for chunk in range(len(ranks[0].layers)) for rank in ranks]
    names = [f"{n} {text if len(text) < 9 else text[:8] + '..'}" for n, text in enumerate(letters)]
    if encodes(plan.run):
        names[0] += " +ViT"
    below = [0.0] * len(stages)
    for part, label in ((0, "forward"), (1, "backward")):
        heights = [stage[part] * 1e3 for stage in stages]
        time.bar(names, heights, bottom=below, label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    time.set_title("a microbatch on each stage, ms (predicted)")
    below = [0.0] * len(ranks)
    rollouts = any(rank.rollout is not None for rank in ranks)
    beside = "activations or rollout" if rollouts else "activations"
    parts = [(n, [getattr(r.state, n) for r in ranks]) for n in vars(ranks[0].state)]
    for label, sizes in [*parts, (beside, [rank.beside_state for rank in ranks])]:
        heights = [size / GB for size in sizes]
        memory.bar(range(len(ranks)), heights, bottom=below, label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    memory.axhline(room(plan.gpu, plan.assumed) / GB, color="black", linestyle="--", linewidth=1)
    memory.set_title(f"each pipeline rank, GB; dashed: room on a {plan.gpu.name}")
    memory.set_xticks(range(len(ranks)))
    time.tick_params(axis="x", labelrotation=90, labelsize=7)
    for panel in (time, memory):
        panel.legend(fontsize=8)
    drawn.suptitle(f"{plan.world_size} {plan.gpu.name}: {describe(plan.run, plan.world_size)}")
    return drawn
