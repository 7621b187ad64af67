"""A skill map by hand: two layers of eight experts, of which a token takes two."""

from __future__ import annotations

from megatron_mm.earl.skill_map import SkillMap

SKILLS = {"ocr": [[3], [2]], "spatial": [[1, 5], [7, 0]], "count": [[6], [6]]}
COMMON = [[0, 4], [3, 4]]
# For each expert, in each of the two layers.
KNOCK_OUT = {
    "ocr": [[0, 0, 0.1, 9, 0, 0, 0.3, 0], [0, 0, 9, 0, 0, 0.2, 0, 0]],
    "spatial": [[0, 0.5, 0.1, 0.2, 0, 0.4, -0.3, 0], [0.2, 0.1, 0, 0, 0, 0.05, 0, 0.3]],
    "count": [[0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0]],
}


def the_map(info: dict | None = None, common: list | None = COMMON, **skills) -> SkillMap:
    return SkillMap(
        2, 8, 2, skills or SKILLS, {"knock_out": KNOCK_OUT} if info is None else info, common
    )
