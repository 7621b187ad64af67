"""Commands that use a stored model accept every run that training accepts, on their own layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mm.checkpoint import merge_command
from megatron_mm.config import ConfigError, load, to_dict, validate
from megatron_mm.config.untrained import untrained
from megatron_mm.earl.stored_run import stored_run

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.rglob("*.yaml"))
CONFIGS = [path for path in CONFIGS if "launch" not in path.parts]
# Two stages of two virtual stages each.
VIRTUAL = ["--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "2"]
VIRTUAL += ["--vision-parallel", "stage"]


def name(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_example_can_be_probed(path):
    """By tools/discover_experts.py and its like: on one rank and on virtual stages."""
    stored = to_dict(load(str(path), []))
    for world, layout in ((1, []), (2, VIRTUAL)):
        run = stored_run(stored, layout, world, None)
        assert run.training.objective == "sft" and run.data.train_data == []


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_adapters_of_every_example_can_be_merged(path, tmp_path):
    run = load(str(path), [])
    run.lora.lora_rank = 4
    given = load(None, ["--load", "x", "--save", str(tmp_path / "merged")])
    merged = merge_command.stored_run(Path("x"), to_dict(run), given, 1)
    assert merged.lora.lora_rank == 4


def test_what_does_not_fit_the_layout_is_still_said():
    run = load(None, ["--preset", "tiny", "--expert-model-parallel-size", "3"])
    with pytest.raises(ConfigError, match="num_experts 8 does not divide by"):
        validate(untrained(run, 3), 3)
