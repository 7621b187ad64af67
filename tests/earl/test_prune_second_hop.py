"""Pruning cuts both routers of a layer that hands tokens on."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mm.checkpoint import sharded
from megatron_mm.config import ParallelConfig
from megatron_mm.convert import to_hf
from megatron_mm.earl.prune import Choice, write_pruned
from megatron_mm.parallel import groups
from support.cascades import with_cascade
from support.checkpoint_runs import create, tiny_run
from support.exports import loaded
from support.folders import one_rank_job


def test_the_second_router_keeps_the_rows_of_the_experts_that_stay(tmp_path):
    run, kept = with_cascade(tiny_run()), [[0, 2, 3, 5], [1, 2, 4, 5]]
    with one_rank_job():
        engine = create(run, groups.build(run.parallel))
        sharded.save(engine, {}, tmp_path / "whole", 1)
        before = {n: p.detach().clone() for n, p in engine.chunks[0].named_parameters()}
        checkpoint = to_hf.open_checkpoint(tmp_path / "whole")
        choice, out = Choice(kept, None), tmp_path / "pruned"
        write_pruned(checkpoint, choice, out, ParallelConfig(), {}, dist.group.WORLD, quiet=True)
        after = dict(loaded(out).chunks[0].named_parameters())
    for layer, experts in enumerate(kept):
        inner = f"language.layers.{layer}.moe.inner."
        for end in ("router.weight", "delegate.router.weight", "experts.down"):
            assert torch.equal(after[inner + end], before[inner + end][experts]), end
        for end in ("delegate.gate.weight", "delegate.norm.weight", "delegate.hard"):
            assert torch.equal(after[inner + end], before[inner + end]), end
