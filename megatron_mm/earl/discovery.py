"""Discovery of a model's experts: probe, map, picture, and the causal test."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.chart import draw
from megatron_mm.earl.make_map import Discovery, causal_test, discover, measure
from megatron_mm.earl.probe import Probe, count_probe
from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.errors import DataError, RLError
from megatron_mm.evaluation.evaluate import Results, evaluate


def probe_and_discover(
    engine: Engine,
    tokenizer: Tokenizer,
    probe: Probe,
    out: Path,
    *,
    cluster_size: int,
    min_lift: float,
    info: dict[str, Any],
    selectivity: bool = False,
    given: SkillMap | None = None,
) -> tuple[Discovery, dict | None]:
    """Probes the model and makes its skill map. Rank 0 writes the map to `out`, and its picture
    beside it. Every rank of the job calls it.

    Args:
        given: a map whose clusters are measured; no others are looked for.
        info: kept in the map, with the probe's settings and the map's figures.
        selectivity: whether to run the causal test on `valid_data`, whose figures the map keeps.
    Returns:
        the map with its figures, and the causal test if asked for; the same on every rank.
    Raises:
        DataError: on every rank, for a bad row, a probe that finds nothing, or a file that cannot
            be written.
        RLError: for clusters that cannot be forbidden.
    """
    groups = engine.groups
    counted = count_probe(engine, tokenizer, probe)
    found: list[Discovery | None] = [None]
    error = None
    if counted.halves:
        counts = (counted.halves, counted.shuffled, counted.skills)
        info = info | asdict(probe) | {"samples": counted.samples}
        try:
            if given is not None:
                found[0] = measure(*counts, given, info)
            else:
                found[0] = discover(
                    *counts,
                    moe_router_topk=engine.run.model.language.moe_router_topk,
                    cluster_size=cluster_size,
                    min_lift=min_lift,
                    info=info,
                )
        except RLError as problem:
            error = str(problem)
    raise_together(groups, error)
    dist.broadcast_object_list(found, src=0, group=groups.world)
    (result,) = found
    assert result is not None  # rank 0 has the counts, and had no error
    _write(engine, result, out)
    if not selectivity:
        return result, None
    causal = forbid_clusters(engine, tokenizer, result.skill_map)
    skill_map = replace(result.skill_map, info=result.skill_map.info | {"causal_test": causal})
    result = replace(result, skill_map=skill_map)
    _write(engine, result, out)
    return result, causal


def _write(engine: Engine, found: Discovery, out: Path) -> None:
    error = None
    if dist.get_rank() == 0:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_skill_map(found.skill_map, out)
            picture = draw(found.lift_LES, found.skills, found.skill_map.skills, found.warning)
            out.with_suffix(".png").write_bytes(picture)
        except OSError as problem:
            error = f"cannot write {out}: {problem.strerror}"
    raise_together(engine.groups, error)


def forbid_clusters(engine: Engine, tokenizer: Tokenizer, skill_map: SkillMap) -> dict:
    """Runs the causal test: each skill's accuracy on the run's `valid_data`, with all experts and
    with each skill's cluster forbidden (`clusters.causal_test`). Every rank calls it.

    Raises:
        RLError: if a cluster is too large to be forbidden.
        DataError: if a row is bad, or none is of a skill in the map.
    """
    member_SLE, k = skill_map.membership(), skill_map.moe_router_topk
    experts, largest = skill_map.num_experts, int(member_SLE.sum(2).max())
    if experts - largest < k:
        raise RLError(
            f"a cluster of {largest} of {experts} experts cannot be forbidden, a token takes {k}; "
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
