"""Write a control beside a skill map of exclusive clusters.

    python -m examples.digits.control_maps --map map.json --shuffled shuffled.json --lift lift.json

--shuffled: in each layer the experts of skills change places at random, by --seed. --lift: the
experts that serve a skill by lift, not by knock-out. A map of lift has overlapping clusters and no
common one, so it is completed: the common experts stay those that tokens without a skill use most,
and the same assignment gives each skill as many experts of its own, by the logarithm of lift, never
below 0, in place of the effect of a knock-out.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path


def by_lift(found):
    """Returns the map `found` with clusters assigned by lift.

    Args:
        found: a SkillMap by knock-out, whose info holds the lift of every expert.
    """
    import torch

    from megatron_mm.earl.assign import assign

    lift_SLE = torch.tensor([found.info["lift"][skill] for skill in found.names])
    # The common experts as scores that put them first.
    used_LE = torch.zeros(found.num_layers, found.num_experts)
    for layer, experts in enumerate(found.common):
        used_LE[layer, experts] = 1
    own, common = found.info["cluster_size"], found.info["common_size"]
    value_SLE = lift_SLE.double().clamp(min=math.exp(-20)).log().clamp(min=0)
    assigned = assign(value_SLE, used_LE, own, common)
    return replace(
        found,
        skills=dict(zip(found.names, assigned.skills, strict=True)),
        common=assigned.common,
        info={"method": "lift, exclusive", "cluster_size": own, "common_size": common},
    )


def main(argv: list[str] | None = None) -> None:
    from megatron_mm.earl.skill_map import load_skill_map, save_skill_map, shuffled

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--map", type=Path, required=True, help="by knock-out")
    parser.add_argument("--shuffled", type=Path, help="file to write")
    parser.add_argument("--lift", type=Path, help="file to write")
    parser.add_argument("--seed", type=int, default=1, help="of the shuffled map")
    args = parser.parse_args(argv)
    held = json.loads(args.map.read_text())
    of_model = (held[key] for key in ("num_layers", "num_experts", "moe_router_topk"))
    found = load_skill_map(args.map, *of_model, exclusive=True)
    if args.shuffled:
        # What was measured of the experts is not true of those in their places.
        other = shuffled(found, args.seed)
        sizes = {key: found.info[key] for key in ("cluster_size", "common_size")}
        other = replace(other, info={"shuffled_with_seed": args.seed} | sizes)
        save_skill_map(other, args.shuffled)
    if args.lift:
        save_skill_map(by_lift(found), args.lift)


if __name__ == "__main__":
    main()
