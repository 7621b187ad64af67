"""A plan as text and as plain values for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_mm.config import RunConfig, dump_yaml
from megatron_mm.config.cost import most_of_an_image
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.mimic.settings import MimicConfig
from megatron_mm.perf.assumed import paired
from megatron_mm.perf.layout import LayoutPlan, most_sequences
from megatron_mm.perf.predict import room, step_flops
from megatron_mm.perf.rollout import reinforced
from megatron_mm.perf.size import model_size

GB = 1e9
NAMES = {
    "products": "products",
    "elementwise": "elementwise",
    "collectives": "exposed collectives",
    "idle": "launches and waits",
    "bubble": "bubble",
    "encoding": "encoding beside the pipeline",
    "encoder_gradients": "the encoder's gradients",
    "gradients": "gradients' exchange",
    "parameters": "parameters' exchange",
    "optimizer": "optimizer",
}


def assumptions(
    plan: LayoutPlan, images: int, supervised: float, micro_batch: bool = True
) -> list[str]:
    """The assumptions of a plan, one line each.

    Args:
        micro_batch: say how many samples it has; False for several plans that differ in it.
    """
    run, gpu, assumed = plan.run, plan.gpu, plan.assumed
    tiles = most_of_an_image(run, max(1, images))
    one, each = ("samples", "") if paired(run) is None else ("pairs", "twice ")
    batch = f"{one} of {each}{run.data.seq_length} tokens"
    if micro_batch:
        batch = f"microbatch: {run.training.micro_batch_size} {batch}"
    if run.model.vision is not None:
        batch += f", {images} images of up to {tiles} tiles in each"
    bf16, step = run.training.bf16, run.training.global_batch_size
    peaks = f"{gpu.fp32_flops / 1e12:.1f} TFLOP/s in fp32, without TF32"
    if bf16:
        peaks = f"{gpu.bf16_flops / 1e12:.0f} dense bf16 TFLOP/s, for products in fp32 {peaks}"
    own = []
    if paired(run) is not None:
        own.append("the reference's forward pass: needs less memory; not in the seconds")
    elif reinforced(run) is None and run.training.objective != "sft":
        own.append(
            f"objective {run.training.objective}: planned as supervised training, its own loss is "
            "not traced"
        )
    earl, mimic = run.section(EARLConfig), run.section(MimicConfig)
    left_out = {
        "router_align_coeff": earl.router_align_coeff,
        "mimic_route_coeff": mimic.mimic_route_coeff,
        "mimic_skill_coeff": mimic.mimic_skill_coeff,
        "mimic_kd_coeff": mimic.mimic_kd_coeff,
    }
    if run.training.objective == "sft" and (given := [name for name, c in left_out.items() if c]):
        own.append(f"what {', '.join(given)} adds to the loss: not in the plan")
    return [
        f"{step} {one} a step, {'bf16' if bf16 else 'fp32'}; {batch}, {supervised:.0%} of the "
        "text supervised; routing balanced",
        "activations, FLOPs, bytes, launches and waits: traced on the model itself; attention "
        "and delta rule as fused kernels keep their inputs, unvalidated until a GPU run; no "
        "torch.compile",
        f"{gpu.name}: {peaks}, {gpu.memory / GB:.0f} GB at {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"NVLink {gpu.nvlink / GB:.0f} GB/s each way among {gpu.domain}, network "
        f"{gpu.network / GB:.0f} GB/s ({gpu.source})",
        f"reached of these peaks: products {assumed.compute:.0%}, memory {assumed.bandwidth:.0%}, "
        f"links {assumed.links:.0%}; the host takes {assumed.launch * 1e6:g} us a launch, "
        f"{assumed.wait * 1e6:g} us more after a wait; {assumed.reserved:.0%} of the memory left "
        "to CUDA and NCCL",
        *own,
        "memory of evaluation: not in the plan",
        "seconds, tokens/s and MFU are predictions: none of them was measured",
    ]


def as_dict(plan: LayoutPlan, notes: Sequence[str]) -> dict[str, Any]:
    """Everything, in bytes, seconds and FLOPs."""
    made, run = plan.prediction, plan.run
    return {
        "assumptions": list(notes),
        "gpu": asdict(plan.gpu),
        "assumed": asdict(plan.assumed),
        "model": model_size(run.model)._asdict(),
        "world_size": plan.world_size,
        "parallel": asdict(run.parallel),
        "microbatches": plan.ranks[0].microbatches,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "room_bytes": room(plan.gpu, plan.assumed),
        "predicted": {
            "step_seconds": made.seconds,
            "bubble": made.schedule.bubble,
            "imbalance": imbalance(plan),
            "encoder_seconds": list(made.encoder),
            "gradient_exchange_seconds": made.gradients,
            "parameter_exchange_seconds": made.parameters,
            "optimizer_seconds": made.update.seconds,
            "step_seconds_by_term": made.by_term,
            "max_num_seqs": _most(plan) if plan.ranks[0].rollout else None,
            "tokens_per_second_per_gpu": made.tokens_per_second_per_gpu,
            "mfu": made.mfu,
        },
        "ranks": [
            {
                "pipeline_rank": place,
                "layers": list(rank.layers),
                "parameters": rank.elements[0],
                "expert_parameters": rank.elements[1],
                "parameter_bytes": rank.state.parameters,
                "gradient_bytes": rank.state.gradients,
                "optimizer_bytes": rank.state.optimizer,
                "activation_bytes": rank.activations,
                "rollout": None if rank.rollout is None else asdict(rank.rollout),
                "reference_host_bytes": rank.reference,
                "model_flops": step_flops(rank),
                "flops": rank.step.flops,
                "seconds_by_term": asdict(made.terms[place]),
                "bytes_outside_products": rank.step.moved,
                "launches": rank.step.launches,
                "waits": rank.step.waits,
                "sent_bytes": _sent(rank.step.sent),
            }
            for place, rank in enumerate(plan.ranks)
        ],
        "stages": [
            {"stage": index, "forward_seconds": forward, "backward_seconds": backward}
            for index, (forward, backward) in enumerate(made.stages)
        ],
        "config": dump_yaml(run),
    }


def imbalance(plan: LayoutPlan) -> float:
    """The busiest pipeline rank's time by the mean: 1 is balanced."""
    busy = plan.prediction.schedule.busy
    return max(busy) * len(busy) / sum(busy)


def table(plan: LayoutPlan, notes: Sequence[str]) -> str:
    """Several lines: layout, a row for each pipeline rank, traffic, predictions, assumptions."""
    made, run, size = plan.prediction, plan.run, model_size(plan.run.model)
    rows = [("rank", "layers", "params", "state", "activ.", "total", "TFLOP", "busy")]
    for place, rank in enumerate(plan.ranks):
        rows.append(
            (
                str(place),
                " | ".join(_first_and_last(rank.layers, place, len(plan.ranks), run)),
                f"{rank.elements[0] / 1e9:.3f} B",
                f"{rank.state.total / GB:.1f} GB",
                f"{rank.activations / GB:.1f} GB",
                f"{rank.total / GB:.1f} GB",
                f"{rank.step.flops / 1e12:.0f}",
                f"{made.schedule.busy[place]:.2f} s",
            )
        )
    sent = sum((rank.step.sent for rank in plan.ranks), Counter())
    most = {link: max(rank.step.sent[link] for rank in plan.ranks) for link in sent}
    largest = sorted(most.items(), key=lambda item: -item[1])[:8]
    able = room(plan.gpu, plan.assumed)
    counted = max((rank.step for rank in plan.ranks), key=lambda work: work.launches)
    lines = [
        f"{plan.world_size} {plan.gpu.name}: {describe(run, plan.world_size)}, "
        f"{plan.ranks[0].microbatches} microbatches",
        f"{size.total / 1e9:.2f} B parameters, {size.active / 1e9:.2f} B of them active",
        "",
        *_aligned(rows),
        "",
        "sent a step, most of any rank: "
        + ", ".join(f"{link.kind} {link.group} {size / GB:.2f} GB" for link, size in largest),
        f"memory: {plan.peak / GB:.1f} of {able / GB:.1f} GB: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
        f"predicted: step {made.seconds:.2f} s, {made.tokens_per_second_per_gpu:.0f} tokens/s/GPU, "
        f"MFU {made.mfu:.1%}; bubble {made.schedule.bubble:.1%}, busiest rank "
        f"{imbalance(plan):.2f} of the mean",
        *_rollout(plan),
        *_reference(plan),
        "of the step: " + ", ".join(f"{NAMES[n]} {s:.3g} s" for n, s in _terms(plan)),
        f"the host's part: {counted.launches:,} launches, {counted.waits:,} waits a step",
        "assumed:",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines)


def _terms(plan: LayoutPlan) -> list[tuple[str, float]]:
    """The seconds of the step by term; those of an encoder beside the pipeline where it is one."""
    beside = plan.run.parallel.vision_parallel == "replica"
    found = plan.prediction.by_term.items()
    return [(name, s) for name, s in found if beside or not name.startswith("encod")]


def _rollout(plan: LayoutPlan) -> list[str]:
    """A line on the rollouts of reinforcement learning; none without."""
    found = [rank.rollout for rank in plan.ranks if rank.rollout is not None]
    if not found:
        return []
    worst = max(found, key=lambda rollout: rollout.peak)
    line = (
        f"rollout, most of any rank: {worst.rows} sequences at a time, caches "
        f"{worst.cache / GB:.1f} GB ({worst.cache / worst.rows / 1e6:.1f} MB each), a prefill "
        f"{worst.prefill / GB:.1f} GB, drawing {worst.drawing / GB:.1f} GB; up to "
        f"{_most(plan)} sequences (max_num_seqs) fit; its time is not predicted"
    )
    if worst.host:
        line += f"; reference and teachers: {worst.host / GB:.1f} GB of host memory a rank"
    return [line]


def _reference(plan: LayoutPlan) -> list[str]:
    """A line on the reference of preference pairs; none without."""
    most = max(rank.reference for rank in plan.ranks)
    return [f"reference: {most / GB:.1f} GB of host memory a rank"] if most else []


def _most(plan: LayoutPlan) -> int:
    """The number of sequences that a replica can generate at a time."""
    return most_sequences(plan.ranks, room(plan.gpu, plan.assumed))


def ranking(plans: Sequence[LayoutPlan], considered: int, fitting: int) -> str:
    """A row for each layout of a search."""
    rows = [("", "layout", "microb.", "GB", "bubble", "busiest", "step s", "tokens/s/GPU", "MFU")]
    for number, plan in enumerate(plans, start=1):
        made = plan.prediction
        rows.append(
            (
                str(number),
                describe(plan.run, plan.world_size),
                str(plan.ranks[0].microbatches),
                f"{plan.peak / GB:.1f}",
                f"{made.schedule.bubble:.1%}",
                f"{imbalance(plan):.2f}",
                f"{made.seconds:.2f}",
                f"{made.tokens_per_second_per_gpu:.0f}",
                f"{made.mfu:.1%}",
            )
        )
    head = f"{considered} layouts divide, {fitting} fit roughly; the best, traced in full:"
    return "\n".join((head, "", *_aligned(rows), ""))


def describe(run: RunConfig, world_size: int) -> str:
    """TP2 PP8 EP32 ETP1 DP16, micro batch 1, recompute full."""
    par, train = run.parallel, run.training
    tp, pp, cp = (
        par.tensor_model_parallel_size,
        par.pipeline_model_parallel_size,
        par.context_parallel_size,
    )
    sizes = {"TP": tp, "PP": pp, "VPP": par.virtual_pipeline_model_parallel_size or 1, "CP": cp}
    sizes |= {"EP": par.expert_model_parallel_size, "DP": world_size // (tp * pp * cp)}
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP")]
    if par.vision_parallel == "replica":
        words.append("encoder beside")
    if tp > 1:
        words.append(f"ETP{par.expert_tensor_parallel_size or tp}")
    recompute: str = train.recompute_granularity or "none"
    if recompute == "selective":
        recompute += " " + "+".join(train.recompute_modules)
    return f"{' '.join(words)}, micro batch {train.micro_batch_size}, recompute {recompute}"


def _first_and_last(layers: Sequence[str], place: int, ranks: int, run: RunConfig) -> list[str]:
    words = list(layers)
    if place == 0:
        words[0] = ("ViT+emb " if encodes(run) else "emb ") + words[0]
    if place == ranks - 1:
        words[-1] += " out"
    return words


def encodes(run: RunConfig) -> bool:
    """Whether the first stage encodes images: there are some, and no encoder beside it."""
    return run.model.vision is not None and run.parallel.vision_parallel != "replica"


def _sent(sent: Counter) -> dict[str, int]:
    return {f"{link.kind} {link.group}": size for link, size in sorted(sent.items())}


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
