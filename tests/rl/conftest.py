"""A skill map of the model that the tests of reinforcement learning train."""

from __future__ import annotations

import pytest

from support.grpo_runs import write_skill_map


@pytest.fixture(scope="module")
def skill_map(tmp_path_factory) -> str:
    return str(write_skill_map(tmp_path_factory.mktemp("map") / "map.json"))
