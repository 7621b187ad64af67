"""A slice of mm-80b at its true widths: where the milliseconds of a step go, beside the plan."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_mm.benchmark.gpu.environment import planned_gpu
from megatron_mm.benchmark.gpu.plan import planned, slice_run
from megatron_mm.benchmark.gpu.timing import kernels, medians, waits
from megatron_mm.benchmark.gpu.visit import Row, Skip, Visit
from megatron_mm.benchmark.mock import balanced, mock_like
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.perf.assumed import planned_batch
from megatron_mm.perf.hardware import Assumptions
from megatron_mm.perf.pieces import FIRST, LAST
from megatron_mm.train.sft import SupervisedFineTuning

WORDS = {FIRST: "ViT, projector, embedding", LAST: "output layer and loss"}


@dataclass
class Slice:
    """The slice's engine after some steps, and a batch of it with balanced routes.

    Attributes:
        before: bytes that were allocated on the GPU before it was built.
    """

    engine: Engine
    batch: Microbatch
    before: int

    def passes(self, objective: SupervisedFineTuning | None = None) -> None:
        """Forward and backward pass of the batch."""
        self.engine.forward_backward([self.batch], objective or SupervisedFineTuning())

    def step(self) -> None:
        """A whole step."""
        self.passes()
        self.update()

    def update(self) -> None:
        """Its second half."""
        self.engine.update(self.engine.gradient_norm())


def built(visit: Visit) -> Slice:
    """The slice, made once for all checks, after two steps."""

    def make() -> Slice:
        run, before = slice_run(visit.dry), torch.cuda.memory_allocated()
        engine = Engine.create(run, visit.groups)
        batch = mock_like(planned_batch(run), run.model.language.vocab_size - 1, seed=0)
        batch = balanced(batch, engine.chunks[0].moe_layers, run.model)
        made = Slice(engine, batch, before)
        for _ in range(2):
            made.step()
        return made

    return visit.keep("slice", make)


class Timeline:
    """Marks on the device's time, in the order in which layers begin or end."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(self, name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((name, event))

    def mark_gradient(self, tensor: torch.Tensor, name: str) -> None:
        """Marks the moment at which the gradient of a tensor is complete."""
        tensor.register_hook(lambda _: self.mark(name))

    def gaps(self) -> dict[str, list[float]]:
        """Milliseconds between each mark and the next, by the name of the first."""
        torch.cuda.synchronize()
        found: dict[str, list[float]] = defaultdict(list)
        for (name, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            found[name].append(begin.elapsed_time(end))
        return dict(found)


class _Marked(SupervisedFineTuning):
    """The loss, which marks its end: the backward pass begins there."""

    def __init__(self, timeline: Timeline):
        super().__init__()
        self.timeline = timeline

    def loss(self, *args):
        found = super().loss(*args)
        self.timeline.mark(f"{LAST} backward")
        return found


@contextmanager
def _marking(engine: Engine, timeline: Timeline) -> Iterator[None]:
    """Marks the timeline as the stage's layers begin, forward and backward.

    A layer that opens a pair leaves the hidden state as it is, so its backward pass begins with
    the gradient of its own output.
    """
    (model,) = engine.chunks
    letters = iter(model.letters)

    def begins(_, args) -> None:
        timeline.mark_gradient(args[0].hidden_T1H, f"{FIRST} backward")
        timeline.mark(f"{next(letters)} forward")

    def ends(layer, hidden: torch.Tensor) -> None:
        if LAYERS[layer.kind].pair != "opens":
            timeline.mark_gradient(hidden, f"{layer.kind} backward")
        timeline.mark(f"{next(letters, LAST)} forward")

    hooks = [model.language.register_forward_pre_hook(begins)]
    for letter in LAYERS.of_pair("opens"):
        for module in getattr(model.language, LAYERS[letter].key).values():
            name = f"{letter} backward"
            hooks.append(
                module.register_forward_hook(
                    lambda _, __, out, name=name: timeline.mark_gradient(out, name)
                )
            )
    model.watch = ends
    try:
        yield
    finally:
        model.watch = None
        for hook in hooks:
            hook.remove()


def by_kind(visit: Visit, found: Slice) -> dict[str, float]:
    """Median milliseconds of one layer of each kind, forward and backward, and of what stands
    before and after the layers."""
    every: dict[str, list[float]] = defaultdict(list)
    for _ in range(visit.size(5, 1)):
        timeline = Timeline()
        with _marking(found.engine, timeline):
            timeline.mark(f"{FIRST} forward")
            found.passes(_Marked(timeline))
            timeline.mark("end")
        for name, times in timeline.gaps().items():
            every[name] += times
    return {name: statistics.median(times) for name, times in every.items()}


def check(visit: Visit, row: Row) -> None:
    """Times passes, update and kinds of layers; counts waits and kernels; compares with the
    plan, last: the measurements are worth having without it."""
    found = built(visit)
    sides = {"passes": found.passes, "update": found.update}
    times = medians(sides, visit.size(5, 1), warmup=visit.size(1, 0))
    row.note(passes_ms=round(times["passes"], 2), update_ms=round(times["update"], 2))
    kinds = by_kind(visit, found)
    row.note(kinds=_beside(kinds, {}))
    where = waits(found.passes, visit.fake)
    row.note(waits=sum(where.values()), waits_at=dict(where.most_common(20)))
    seen = kernels(found.passes, visit.fake)
    row.note(
        kernels=seen.count,
        launches=seen.launches,
        waits_profiled=seen.waits,
        busy_ms=round(seen.busy, 2),
        top=seen.top,
    )
    gpu = planned_gpu(torch.cuda.get_device_name(0))
    plan = planned(visit)[gpu.name]
    passes = 1e3 * sum(plan["whole"])
    row.note(
        planned_passes_ms=round(passes, 2),
        planned_update_ms=round(1e3 * plan["update"], 2),
        planned_terms_ms={name: round(1e3 * t, 2) for name, t in plan["terms"].items()},
        planned_for=gpu.name,
        kinds=_beside(kinds, plan["parts"]),
    )
    row.text.append(f"passes {times['passes']:.1f} ms, planned {passes:.1f}")
    row.text.append(f"update {times['update']:.1f} ms")
    row.text.append(f"{row.figures['waits']} waits, {seen.count} kernels, busy {seen.busy:.1f} ms")


def _beside(
    kinds: dict[str, float], parts: dict[str, list[float]]
) -> dict[str, dict[str, list[float]]]:
    """By kind and direction: milliseconds found, and those planned where the plan has the part."""
    planned = {name.split()[0]: seconds for name, seconds in parts.items()}
    table: dict[str, dict[str, list[float]]] = {}
    for letter in (FIRST, *LAYERS, LAST):
        title = WORDS.get(letter) or LAYERS[letter].title
        for place, direction in enumerate(("forward", "backward")):
            name = f"{letter} {direction}"
            if name in kinds:
                both = [kinds[name]]
                both += [1e3 * planned[letter][place]] if letter in planned else []
                table.setdefault(title, {})[direction] = [round(ms, 3) for ms in both]
    return table


def check_memory(visit: Visit, row: Row) -> None:
    """Compares the peak of a step with the plan's. A plan leaves a share of the memory to CUDA and
    fragmentation, so a run that it says to fit may need that much more."""
    if visit.dry:
        raise Skip("a fake GPU has no memory to measure")
    found = built(visit)
    torch.cuda.reset_peak_memory_stats()
    found.step()
    peak = torch.cuda.max_memory_allocated() - found.before
    reserved = torch.cuda.max_memory_reserved()
    row.note(peak_bytes=peak, reserved_bytes=reserved)
    expected = planned(visit)["peak_bytes"]
    row.note(planned_bytes=expected)
    row.at_most("peak over the planned", peak / expected, 1 / (1 - Assumptions().reserved))
    row.text.append(f"{peak / 1e9:.1f} GB, planned {expected / 1e9:.1f}")
