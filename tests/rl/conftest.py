"""A skill map of the model that the tests of reinforcement learning train."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def skill_map(tmp_path_factory) -> str:
    # Not above: it imports megatron-core, before which tests/conftest.py installs.
    from support.grpo_runs import write_skill_map

    return str(write_skill_map(tmp_path_factory.mktemp("map") / "map.json"))
