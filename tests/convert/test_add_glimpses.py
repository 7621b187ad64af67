"""Glimpses are added to a folder that lacks them: new parameters, and the base to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_mm.config import ConfigError, RunConfig, effective_pattern
from megatron_mm.convert import parity, to_hf, to_megatron
from megatron_mm.convert.commands.hf_to_megatron import target_run
from megatron_mm.convert.folder import HFFolder, check_folder, open_folder
from megatron_mm.convert.mapping import StateMapping
from megatron_mm.errors import ConvertError
from megatron_mm.model.blueprint import blueprint
from support.exports import loaded
from support.folders import read_all

QUERIES = ("--query-grid", "3", "--max-queries", "5")
TO_A_BASE = ("--hybrid-layer-pattern", "GE Q *E V GE *E", "--vision-memory", "pyramid", *QUERIES)
TO_LOOKS = ("--hybrid-layer-pattern", "GE L *E Q GE V J *E")


def widened(folder, *flags: str) -> tuple[HFFolder, StateMapping, RunConfig]:
    """A folder with what the flags add, its mapping and its run."""
    source = open_folder(folder)
    run = target_run(source.model, list(flags))
    source.model = run.model
    return source, source.mapping(blueprint(run.model)), run


def outputs(checkpoint, groups, cases) -> list[torch.Tensor]:
    opened = to_hf.open_checkpoint(checkpoint)
    model = parity.mcore_model(opened, groups)
    run = RunConfig(model=opened.model)
    return [x for case in cases for _, x in parity.mcore_outputs(model, run, case)]


def test_a_base_with_glimpses_is_the_base(made, tmp_path):
    base, _, _ = made(True, False, False)
    source, plan, run = widened(base.parent / "origin1" / "language", *TO_A_BASE)
    check_folder(source, plan)
    assert len(plan.new) == 11 + 2  # of the glimpse and its memory's projection
    assert run.model.layers["Q"].slots == 9 and run.model.layers["Q"].max_queries == 5
    parameters = blueprint(run.model)
    to_megatron.convert(
        source, plan, parameters, run, tmp_path / "mega", dist.group.WORLD, quiet=True
    )
    again = to_hf.open_checkpoint(tmp_path / "mega").model
    assert again.layers == run.model.layers and effective_pattern(again) == TO_A_BASE[1]
    # Cases with queries: what they find is added, and is exactly zero.
    cases = parity.built_in_cases(RunConfig(model=run.model), source.image_token_id, (7, 8))[:-1]
    assert [len(case.sample.queries) for case in cases] == [0, 3, 3]
    one_rank = loaded(base).groups
    found, expected = (outputs(c, one_rank, cases) for c in (tmp_path / "mega", base))
    assert len(found) == 3 * 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_glimpses_are_added_beside_looks(made, tmp_path):
    _, export, _ = made(True, True, True)
    source, plan, run = widened(export, *TO_LOOKS)
    check_folder(source, plan)
    assert len(plan.new) == 11 and all(n.startswith("language.queries.0.") for n in plan.new)
    # The looks that its config declares are not drawn anew, not even if all of them are lost.
    (tmp_path / "config.json").write_text((export / "config.json").read_text())
    kept = {name: t for name, t in read_all(export).items() if not name.startswith("clvr.")}
    save_file(kept, tmp_path / "model.safetensors")
    source, plan, _ = widened(tmp_path, *TO_LOOKS)
    with pytest.raises(ConvertError, match=r"tensors are missing \(first clvr.memory_proj"):
        check_folder(source, plan)


def test_what_may_be_added(made):
    _, export, _ = made(True, True, True)
    with pytest.raises(ConfigError, match="allowed: the same with L, J, Q, V between"):
        widened(export, "--hybrid-layer-pattern", "GE Q *E V")
    with pytest.raises(ConfigError, match="settings of its letters and how images enter"):
        widened(export, "--lr", "1")
