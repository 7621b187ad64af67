"""Discovery of a model's experts: probe, map, picture, and the causal test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_mm.config import experts_needed, to_dict
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.assign import cluster_sizes
from megatron_mm.earl.chart import draw
from megatron_mm.earl.count_probe import count_probe
from megatron_mm.earl.knock_out import Progress, digest, measure_losses, stamps
from megatron_mm.earl.knock_out_map import discover_by_knock_out
from megatron_mm.earl.make_map import Discovery, causal_test, discover_by_lift, measure
from megatron_mm.earl.probe import OpenProbe, Probe, open_probe
from megatron_mm.earl.random_map import draw_map
from megatron_mm.earl.removals import Removal, removals
from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.errors import DataError, RLError
from megatron_mm.evaluation.evaluate import Results, evaluate


@dataclass(frozen=True)
class ByLift:
    """Clusters of the experts that a skill's tokens choose more often than others at the same
    token: at most `cluster_size` in a layer, each with a lift of `min_lift` at least."""

    cluster_size: int = 2
    min_lift: float = 1.1


@dataclass(frozen=True)
class ByKnockOut:
    """Exclusive clusters of the experts without which a skill is read worse.

    Attributes:
        cluster_size, common_size: see `assign.cluster_sizes`.
        passes: see `removals.removals`.
    """

    cluster_size: int | None = None
    common_size: int | None = None
    passes: int | None = None


@dataclass(frozen=True)
class AtRandom:
    """Exclusive clusters drawn by the probe's seed.

    Attributes:
        cluster_size, common_size: see `assign.cluster_sizes`.
    """

    cluster_size: int | None = None
    common_size: int | None = None


def probe_and_discover(
    engine: Engine,
    tokenizer: Tokenizer,
    probe: Probe,
    out: Path,
    method: ByLift | ByKnockOut | AtRandom | SkillMap,
    *,
    checkpoint: Path | None = None,
    selectivity: bool = False,
) -> tuple[Discovery, dict | None]:
    """Probes the model and makes its skill map. Rank 0 writes the map to `out`, and its picture
    beside it. Every rank of the job calls it.

    Args:
        method: how clusters are found. A map: its clusters are measured, no others are looked for.
        checkpoint: the folder of the weights, which the map names. With it the sums of a knock-out
            are kept beside `out`.
        selectivity: whether to run the causal test on `valid_data`, whose figures the map keeps.
    Returns:
        the map with its figures, and the causal test if asked for; the same on every rank.
    Raises:
        DataError: on every rank, for a bad row, a probe that finds nothing, or a file that cannot
            be read or written.
        RLError: for clusters that there cannot be, or that cannot be forbidden.
    """
    opened = open_probe(engine, tokenizer, probe)
    info = asdict(probe) | {"samples": len(opened.plan.rows)}
    info |= {} if checkpoint is None else {"checkpoint": str(checkpoint)}
    sums, planned = None, []
    if isinstance(method, ByKnockOut):
        planned = _planned(engine, opened, probe, method)
        progress = _progress(engine, opened, out, checkpoint, (probe, planned))
        sums = measure_losses(engine, tokenizer, opened, planned, progress)
    counted = count_probe(engine, tokenizer, opened)

    def make() -> Discovery:
        counts, skills = (counted.halves, counted.shuffled), opened.plan.skills
        k = engine.run.model.language.moe_router_topk
        if isinstance(method, SkillMap):
            return measure(*counts, skills, method, info)
        if isinstance(method, ByLift):
            return discover_by_lift(*counts, skills, moe_router_topk=k, info=info, **asdict(method))
        if isinstance(method, AtRandom):
            given = asdict(method) | {"seed": probe.seed, "info": info}
            return draw_map(counted, skills, moe_router_topk=k, **given)
        assert sums is not None  # on rank 0
        return discover_by_knock_out(
            sums,
            planned,
            counted,
            skills,
            moe_router_topk=k,
            cluster_size=method.cluster_size,
            common_size=method.common_size,
            info=info,
        )

    result = _on_rank_0(engine, make)
    _write(engine, result, out)
    if not selectivity:
        return result, None
    causal = forbid_clusters(engine, tokenizer, result.skill_map)
    skill_map = replace(result.skill_map, info=result.skill_map.info | {"causal_test": causal})
    result = replace(result, skill_map=skill_map)
    _write(engine, result, out)
    return result, causal


def _planned(engine: Engine, opened: OpenProbe, probe: Probe, method: ByKnockOut) -> list[Removal]:
    """Returns the removals to measure, once it is clear that their result can be used.

    Raises:
        DataError: on every rank, for clusters or passes that there cannot be.
    """
    language, planned, error = engine.run.model.language, [], None
    experts, k = language.num_experts, language.moe_router_topk
    spans = [span for _, found in opened.plan.rows.values() for span in found]
    skills = {span.skills[0] for span in spans if span.right}
    try:
        if skills:
            cluster_sizes(experts, k, len(skills), method.cluster_size, method.common_size)
        layers = engine.config.num_layers
        needed = experts_needed(engine.run.model)
        planned = removals(layers, experts, needed, method.passes, probe.seed)
    except RLError as problem:
        error = str(problem)
    raise_together(engine.groups, error)
    return planned


def _progress(
    engine: Engine, opened: OpenProbe, out: Path, checkpoint: Path | None, settings: tuple
) -> Progress:
    if checkpoint is None or dist.get_rank() != 0:
        return Progress(None, "")
    run = to_dict(replace(engine.run, data=replace(engine.run.data, valid_data=None)))
    same = {name: run[name] for name in ("model", "data", "backend")}
    key = digest(
        stamps(str(checkpoint)),
        stamps(settings[0].data),
        settings,
        sorted(same.items()),
        run["training"]["bf16"],
        opened.plan,
        opened.together,
    )
    return Progress(out.with_suffix(".knock-out.pt"), key)


def _on_rank_0(engine: Engine, make: Callable[[], Discovery]) -> Discovery:
    """Returns what `make` returns on rank 0, on every rank.

    Raises:
        DataError: on every rank, for an RLError.
    """
    found: list[Discovery | None] = [None]
    error = None
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except RLError as problem:
            error = str(problem)
    raise_together(engine.groups, error)
    dist.broadcast_object_list(found, src=0, group=engine.groups.world)
    (result,) = found
    assert result is not None  # there was no error
    return result


def _write(engine: Engine, found: Discovery, out: Path) -> None:
    error = None
    if dist.get_rank() == 0:
        try:
            save_skill_map(found.skill_map, out)
            out.with_suffix(".png").write_bytes(draw(found))
        except OSError as problem:
            error = f"cannot write {out}: {problem.strerror}"
    raise_together(engine.groups, error)


def forbid_clusters(engine: Engine, tokenizer: Tokenizer, skill_map: SkillMap) -> dict:
    """Runs the causal test: each skill's accuracy on the run's `valid_data`, with all experts and
    with each skill's cluster forbidden (`make_map.causal_test`). Every rank calls it.

    Raises:
        RLError: if a cluster is too large to be forbidden.
        DataError: if a row is bad, or none is of a skill in the map.
    """
    member_SLE, k = skill_map.membership(), experts_needed(engine.run.model)
    experts, largest = skill_map.num_experts, int(member_SLE.sum(2).max())
    if experts - largest < k:
        raise RLError(
            f"a cluster of {largest} of {experts} experts cannot be forbidden, a token needs {k}; "
            f"discover with --cluster-size {experts - k} or less"
        )
    accuracy = _by_skill(evaluate(engine, tokenizer)[0])
    if not accuracy.keys() & skill_map.skills.keys():
        raise DataError(
            f"{engine.run.data.valid_data}: no row is of one of the map's "
            f"{len(skill_map.skills)} skills ({', '.join(skill_map.skills)}), the rows' are "
            f"{', '.join(accuracy)}; ask questions whose 'skill' is in the map"
        )
    without = {}
    for skill, member_LE in zip(skill_map.names, member_SLE, strict=True):
        if skill in accuracy:
            with engine.forbidding({i: mask for i, mask in enumerate(member_LE) if mask.any()}):
                without[skill] = _by_skill(evaluate(engine, tokenizer)[0])
    return causal_test(accuracy, without)


def _by_skill(results: Results) -> dict[str, float]:
    """Returns the accuracy of each skill over all its forms."""
    sums: dict[str, tuple[float, float]] = {}
    for key, found in results.items():
        skill = key.partition("/")[0]
        right, count = sums.get(skill, (0.0, 0.0))
        sums[skill] = right + found["accuracy"] * found["n"], count + found["n"]
    return {skill: right / count for skill, (right, count) in sums.items()}
