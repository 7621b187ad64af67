"""Shapes between stages are worked out: nothing but the tensors themselves crosses a boundary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from megatron_mm.train.sft import SupervisedFineTuning
from support.batches import microbatch
from support.invariance import invariance_run
from support.layouts import parallel_config

LENGTHS = ((1, 0, 2), (0,), (3, 1), (0, 0, 0))  # images of the samples of each microbatch


def on_rank_dtypes(run, forward_only: bool) -> tuple[set, int, set]:
    """Returns the types of what was received from other stages, how often, and the row counts."""
    seen = []
    original = dist.irecv

    def noted(tensor, *args, **kwargs):
        seen.append((tensor.dtype, tuple(tensor.shape)))
        return original(tensor, *args, **kwargs)

    engine = Engine.create(run, groups.build(run.parallel))
    batches = [microbatch(run.model, n, images, pad_multiple=2) for n, images in enumerate(LENGTHS)]
    dist.irecv = dist.distributed_c10d.irecv = noted
    try:
        if forward_only:
            positions = SupervisedFineTuning().positions
            engine.forward(batches, positions, lambda found, **_: found.logits())
        else:
            engine.forward_backward(batches, SupervisedFineTuning())
    finally:
        dist.irecv = dist.distributed_c10d.irecv = original
    return {dtype for dtype, _ in seen}, len(seen), {shape for _, shape in seen}


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("vpp", [None, 2])
def test_one_message_an_exchange(ranks, vpp, forward_only):
    run = invariance_run()
    run.parallel = parallel_config(pp=2, **({"vpp": vpp} if vpp else {}))
    found = ranks(2, on_rank_dtypes, run, forward_only)
    stages, ways = 2 * (vpp or 1), 1 if forward_only else 2
    # Every microbatch crosses every boundary once each way.
    assert sum(count for _, count, _ in found) == ways * (stages - 1) * len(LENGTHS)
    for dtypes, count, shapes in found:
        if count:  # forward only, the first of two stages receives nothing
            assert dtypes == {torch.float32}  # with int64 there would be shapes
            assert len({rows for rows, _, _ in shapes}) > 1  # they do differ
