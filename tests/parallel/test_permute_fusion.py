"""A layer of experts whose dispatcher sorts by Transformer Engine's kernels, which torch stands in
for: the switch reaches megatron-core, and the layer computes the same with it.

The kernels themselves need a GPU. Their signatures are those of transformer-engine 2.20.2.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from megatron_mm.config import RunConfig
from megatron_mm.model.backends import choice
from support.invariance import compare, invariance_run
from support.layouts import parallel_config, step_gradients
from support.scopes import scope_experts, with_skills

CALLED: list[str] = []


def fused_permute(inp, routing_map, num_out_tokens=-1):
    raise AssertionError("megatron-core sorts tokens with their probabilities")


def fused_permute_with_probs(inp, probs, routing_map, num_out_tokens=None):
    CALLED.append("permute")
    expert_R, token_R = routing_map.t().nonzero().unbind(1)
    assert len(token_R) == num_out_tokens
    return inp[token_R], probs[token_R, expert_R], token_R


def fused_unpermute(inp, row_id_map, merging_probs=None, restore_shape=None, pad_offsets=None):
    CALLED.append("unpermute")
    assert merging_probs is None and pad_offsets is None
    return inp.new_zeros(restore_shape).index_add(0, row_id_map, inp)


def fused_sort_chunks_by_index(inp, split_sizes, sorted_index):
    parts = inp.split(split_sizes.tolist())
    return torch.cat([parts[i] for i in sorted_index.tolist()])


def fused_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    CALLED.append("sort")
    return tuple(fused_sort_chunks_by_index(x, split_sizes, sorted_index) for x in (inp, probs))


KERNELS = (
    fused_permute,
    fused_permute_with_probs,
    fused_unpermute,
    fused_sort_chunks_by_index,
    fused_sort_chunks_by_index_with_probs,
)


def on_rank_fused(run: RunConfig, *arguments) -> tuple:
    kernels = {kernel.__name__: kernel for kernel in KERNELS}
    version = mock.patch.object(moe_utils, "is_te_min_version", lambda *args, **kwargs: True)
    there = mock.patch.object(choice, "missing_transformer_engine", lambda: None)
    CALLED.clear()
    with mock.patch.multiple(moe_utils, HAVE_TE=True, **kernels), version, there:
        found = step_gradients(run, *arguments)
    return *found, set(CALLED)


@pytest.mark.parametrize("scope", [None, scope_experts])
@pytest.mark.parametrize("sizes", [{"ep": 2}, {"tp": 2, "etp": 2}], ids=str)
def test_gradients_do_not_depend_on_who_sorts(ranks, sizes, scope):
    """Nor does who teaches whom, which travels with the probabilities."""
    arguments = invariance_run(), parallel_config(**sizes), scope, None, with_skills
    *found, called = ranks(2, on_rank_fused, *arguments)[0]
    assert called == {"permute", "unpermute", "sort"}
    compare(found, ranks(2, step_gradients, *arguments)[0])
