"""A picture of a pipeline: one bar a stage, of its time and of its rank's memory."""

from __future__ import annotations

from pathlib import Path

from megatron_mm.perf.layout import LayoutPlan
from megatron_mm.perf.predict import room
from megatron_mm.perf.table import describe

GB = 1e9


def draw(plan: LayoutPlan, path: Path) -> None:
    """Left: milliseconds of a microbatch on every stage, forward and backward; right: bytes that
    every pipeline rank holds, and the room there is. The format follows the suffix (.png, .svg,
    .pdf).
    """
    from matplotlib.figure import Figure

    stages, ranks = plan.prediction.stages, plan.ranks
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    time, memory = figure.subplots(1, 2)
    letters = [rank.layers[chunk] for chunk in range(len(ranks[0].layers)) for rank in ranks]
    names = [f"{n} {text if len(text) < 9 else text[:8] + '..'}" for n, text in enumerate(letters)]
    names[0] += " +ViT"
    below = [0.0] * len(stages)
    for part, label in ((0, "forward"), (1, "backward")):
        heights = [stage[part] * 1e3 for stage in stages]
        time.bar(names, heights, bottom=below, label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    time.set_title("a microbatch on each stage, ms (predicted)")
    below = [0.0] * len(ranks)
    for label in ("parameters", "gradients", "optimizer", "activations"):
        of = [
            rank.activations if label == "activations" else getattr(rank.state, label)
            for rank in ranks
        ]
        heights = [size / GB for size in of]
        memory.bar(range(len(ranks)), heights, bottom=below, label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    memory.axhline(room(plan.gpu, plan.assumed) / GB, color="black", linestyle="--", linewidth=1)
    memory.set_title(f"each pipeline rank, GB; dashed: room on a {plan.gpu.name}")
    memory.set_xticks(range(len(ranks)))
    time.tick_params(axis="x", labelrotation=90, labelsize=7)
    for panel in (time, memory):
        panel.legend(fontsize=8)
    figure.suptitle(f"{plan.world_size} {plan.gpu.name}: {describe(plan.run, plan.world_size)}")
    figure.savefig(path, dpi=120)
