"""Compares two throughput results that measured the same work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mm.config.objectives import OBJECTIVES
from megatron_mm.config.settings import MODULES

# Settings that decide what is computed, on any machine.
SAME = {
    "model": None,  # all of it
    "data": (
        *("seq_length", "packing", "max_pack_tiles"),
        *("max_num_tiles", "max_image_tokens", "use_thumbnail"),
    ),
    "training": (
        *("objective", "global_batch_size", "bf16"),
        *(f"freeze_{module}" for module in MODULES),
    ),
    "backend": ("fp8_format", "fp8_recipe"),
    "lora": None,
}
# The same of the objective's own sections. What only sets how much of something that is computed
# anyway counts is compared by whether it is there, as are files, whose places differ.
OF_OBJECTIVES = (
    *("num_generations", "rollout_batch_size", "num_iterations", "max_completion_length"),
    *("algorithm", "filter_groups", "routing_replay", "loss_type"),
)
WHETHER = (
    *("beta", "ref_load", "teacher_kl_coef", "rollout_is", "entropy_coef"),
    *("skill_map", "router_align_coeff", "router_loss_coeff", "expert_scope"),
    *("mimic_routes", "mimic_map", "mimic_skill_coeff", "mimic_kd_coeff", "dpo_ref_load"),
)


class Different(ValueError):
    """Two results cannot be compared; names both values."""


def read(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        Different: it is not a result of a throughput run.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Different(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or not {"run", "sides", "units", "layout"} <= found.keys():
        raise Different(f"{path} is no result of benchmark.py train or rl with --config and --json")
    return found


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns for each side that both have the speed of B relative to A, in tokens per second and
    per rank. `ratio` is of medians, `range` of the quartiles furthest apart.

    Raises:
        Different: the work, its kind or its unit differs.
    """
    _same_work(a, b)
    sides = [name for name in a["sides"] if name in b["sides"]]
    if not sides:
        raise Different(
            f"sides: A has {'; '.join(a['sides'])}, B has {'; '.join(b['sides'])}; measure one "
            "kind of data and of routing on both (--data, --routing)"
        )
    rl = _generates(a)
    found = {}
    for name in sides:
        first, second = a["sides"][name], b["sides"][name]
        _same_rounds(name, first, second, rl)
        speed = "supervised_tokens_per_second" if rl else "tokens_per_second"
        one, other = first[speed], second[speed]
        ranks = a["layout"]["world_size"] / b["layout"]["world_size"]
        ratio = other["median"] / one["median"]
        found[name] = {
            "speed": speed,
            "a": one["median"],
            "b": other["median"],
            "ratio": ratio,
            "range": [
                other["quartiles"][0] / one["quartiles"][1],
                other["quartiles"][1] / one["quartiles"][0],
            ],
            "ratio_per_rank": ratio * ranks,
            "mfu": [first["mfu"], second["mfu"]],
        }
    return found


def _generates(side: dict[str, Any]) -> bool:
    """Whether the steps of a side are made of rollouts."""
    return OBJECTIVES[side["run"]["training"]["objective"]].generates


def _same_work(a: dict[str, Any], b: dict[str, Any]) -> None:
    _same("unit of a rank", a["units"]["rank"], b["units"]["rank"])
    for name, keys in SAME.items():
        first, second = ({k: x["run"][name].get(k) for k in keys or x["run"][name]} for x in (a, b))
        _same(name, first, second)
    # Both have one objective, as was seen above.
    for name in OBJECTIVES[a["run"]["training"]["objective"]].sections:
        _same(name, *(_computed(side["run"].get(name, {})) for side in (a, b)))


def _computed(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of an objective's section that decide what is computed."""
    values = {key: section.get(key) for key in OF_OBJECTIVES}
    values["teacher_load"] = len(section.get("teacher_load") or ())
    return values | {key: bool(section.get(key)) for key in WHETHER}


def _same(name: str, first: Any, second: Any) -> None:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in [*first, *(k for k in second if k not in first)]:
            _same(f"{name}.{key}", first.get(key), second.get(key))
    elif first != second:
        raise Different(f"different work: {name} is {first!r} in A and {second!r} in B")


def _same_rounds(name: str, first: dict, second: dict, rl: bool) -> None:
    """Compares the work of each round. Samples of a policy depend on its arithmetic, so for
    rollouts only the number of completions counts."""
    counts = ("samples",) if rl else ("samples", "tokens", "supervised", "tiles")
    _same(f"rounds of {name!r}", len(first["work"]), len(second["work"]))
    for number, (one, other) in enumerate(zip(first["work"], second["work"], strict=True), 1):
        for count in counts:
            _same(f"{count} of {name!r}, round {number}", one[count], other[count])


def text(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, side in found.items():
        low, high = side["range"]
        lines.append(
            f"{name}: B / A {side['ratio']:.3f} ({low:.3f} to {high:.3f}), by rank "
            f"{side['ratio_per_rank']:.3f}; {side['speed'].replace('_', ' ')} {side['a']:,.5g} and "
            f"{side['b']:,.5g}, MFU {100 * side['mfu'][0]:.1f} % and {100 * side['mfu'][1]:.1f} %"
        )
    return "\n".join(lines)
