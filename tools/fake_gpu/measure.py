"""Launches and host waits of a training step and of a step of decoding, by kind of layer.

Needs a fake GPU: a process in which `install()` was called first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from megatron_mm import platform
from megatron_mm.benchmark.models import SHAPES, make_batch, make_run, make_samples
from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel import groups
from megatron_mm.train.sft import SupervisedFineTuning
from tools.fake_gpu.counts import PARAMETERS, Counts
from tools.fake_gpu.layers import label_layers
from tools.fake_gpu.process import Gpu

PATTERN = "GEGEGE*E L J"  # a block of Qwen3-Next, and a look
PROMPTS, COMPLETIONS = 4, 2
SHORT, LONG = 2, 4  # tokens of the two rollouts whose difference is two steps


def measured_run(pattern: str = PATTERN, experts: int = 32, topk: int = 10) -> RunConfig:
    """Returns a run in bf16 of the preset `tiny` with these layers and experts. Launches do not
    depend on widths, but on the number of experts of a rank where each has its own product."""
    run = make_run("tiny")
    run.model.hybrid_layer_pattern = pattern
    language = run.model.language
    language.num_experts, language.moe_router_topk = experts, min(topk, experts)
    run.training.bf16 = True
    run.backend.decoding_cuda_graph = False  # the launches of layers, not one of all
    return run


@dataclass
class Measured:
    """What one microbatch, its update and one step of decoding launch and wait for.

    Attributes:
        layers: how many layers have each label.
        parameters: tensors of the model.
        training: forward and backward pass of one microbatch.
        norm, update: of the gradients and the parameters, after it.
        decoding: one step of all rows.
    """

    layers: Counter[str]
    parameters: int
    training: Counts
    norm: Counts
    update: Counts
    decoding: Counter[tuple[str, str]]  # ("launches" or "waits", label)
    decoding_sites: Counter[tuple[str, str]]  # (why, site) of the waits of one step


def measure(gpu: Gpu, run: RunConfig, job: groups.Groups) -> Measured:
    """Measures a run on one rank."""
    engine = Engine.create(run, job)
    layers = label_layers(gpu, engine.chunks)
    batch = make_batch(run, make_samples(run, SHAPES["tiny"], seed=0))
    for _ in range(2):  # the second is not the first: the optimizer has its state
        with gpu.counting() as training:
            engine.forward_backward([batch], SupervisedFineTuning())
        with gpu.counting() as norm:
            size = engine.gradient_norm()
        with gpu.counting() as update:
            engine.update(size)
    steps = _decoding(gpu, engine)
    decoding = Counter({("launches", k): n for k, n in steps.launches.by("label").items()})
    decoding.update({("waits", k): n for k, n in steps.waits.by("label").items()})
    return Measured(
        layers=layers,
        parameters=sum(len(list(chunk.parameters())) for chunk in engine.chunks),
        training=training,
        norm=norm,
        update=update,
        decoding=decoding,
        decoding_sites=steps.waits.by("what", "site"),
    )


def _decoding(gpu: Gpu, engine: Engine) -> Counts:
    """The counts of one step: the difference of two rollouts, over its steps. So nothing here knows
    how completions are generated."""
    shape = replace(SHAPES["tiny"], samples=PROMPTS, text_only=0.25)
    samples = make_samples(engine.run, shape, seed=1)
    found = []
    for tokens in (SHORT, LONG):
        with gpu.counting() as counts:
            generate(
                engine,
                Prompts(samples.__getitem__, range(PROMPTS)),
                Sampling((), tokens),
                num_generations=COMPLETIONS,
                max_num_seqs=PROMPTS * COMPLETIONS,
                pad_id=0,
            )
        found.append(counts)
    steps = found[1].less(found[0])
    for events in (steps.launches, steps.waits):
        for event in list(events):
            events[event] = events[event] / (LONG - SHORT)  # type: ignore[assignment]
    return steps


def alone(run: RunConfig) -> groups.Groups:
    """Starts a job of one rank."""
    torch.set_num_threads(1)
    platform.install()
    groups.start(run.parallel)
    return groups.build(run.parallel)


def table(found: Measured) -> str:
    """Returns the counts a layer of each kind, as a table in Markdown."""
    lines = [
        "| Layer | Training: launches forward | backward | host waits "
        "| Decoding: launches a step | host waits |",
        "|---|---|---|---|---|---|",
    ]
    launches = found.training.launches.by("label", "backward")
    waits = found.training.waits.by("label")
    others = ["other", PARAMETERS]
    for label in [*found.layers, *others]:
        count = found.layers.get(label, 1)
        cells = [
            *(launches[label, False], launches[label, True], waits[label]),
            *(found.decoding["launches", label], found.decoding["waits", label]),
        ]
        name = label if label in others else f"`{label}`"
        lines.append(f"| {name} | " + " | ".join(_number(x / count) for x in cells) + " |")
    for name, counts in (("gradient norm", found.norm), ("update", found.update)):
        total = counts.launches.total()
        lines.append(f"| {name} | {total} | | {counts.waits.total()} | | |")
    return "\n".join(lines)


def _number(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")
