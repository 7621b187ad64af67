"""Fused linear cross entropy on ranks that share the vocabulary and the positions, and whole steps
whose logits are computed in many blocks."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.model.layers import cross_entropy
from megatron_mm.model.layers.cross_entropy import blocks
from megatron_mm.model.layers.output import OutputLayer
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import normal
from support.grpo_runs import assert_same_steps, grpo_run, on_rank_steps
from support.invariance import compare, invariance_run
from support.layouts import parallel_config, step_gradients

K, H, VOCABULARY = 11, 16, 77  # 39 tokens a rank on two, 26 on three, with padding
LAYOUTS = {
    "TP2": (2, dict(tp=2)),
    "TP3": (3, dict(tp=3)),
    "CP2": (2, dict(cp=2)),
    "TP2xCP2": (4, dict(tp=2, cp=2)),
}
ASKED = {"logprob": (1, 0), "entropy": (0, 1), "both": (1, 1)}


@contextmanager
def blocks_of(tokens: int):
    """Inside, blocks are this wide, whatever the positions."""
    kept = cross_entropy.BLOCK_BYTES, cross_entropy.WIDTH_MULTIPLE
    cross_entropy.BLOCK_BYTES, cross_entropy.WIDTH_MULTIPLE = 0, tokens
    try:
        yield
    finally:
        cross_entropy.BLOCK_BYTES, cross_entropy.WIDTH_MULTIPLE = kept  # the rank lives on


def given() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(K, H, generator=generator)
    weight = torch.randn(VOCABULARY, H, generator=generator)
    labels = torch.randint(0, VOCABULARY, (K,), generator=generator)
    return hidden, weight, labels, torch.linspace(-1, 2, K)


def on_rank(sizes: dict, asked, temperature: float, first_holds: int, width: int):
    """Returns this rank's context-parallel and tensor-parallel number, its log-probabilities and
    entropies, and gradients. The first context-parallel rank holds the first positions."""
    pg = groups.build(parallel_config(**sizes)).pg
    hidden, weight, labels, weights = given()
    layer = OutputLayer(H, VOCABULARY, dtype=torch.float32, init=normal(1.0), tp=pg.tp)
    layout = layer.weight.param_layout
    layer.weight.data.fill_(7.0)  # padding, which must not count
    layout.held(layer.weight.data).copy_(weight[layout.block])
    if pg.cp.size() > 1:
        mine = slice(first_holds) if pg.cp.rank() == 0 else slice(first_holds, None)
        hidden, labels, weights = hidden[mine], labels[mine], weights[mine]
    hidden.requires_grad_()
    with blocks_of(width):
        predictions = layer(hidden.unsqueeze(1))
        logprobs, entropies = predictions.logprobs_and_entropy(labels, temperature)
        (weights * (asked[0] * logprobs + asked[1] * entropies.square())).sum().backward()
    assert len({tuple(x) for x in _everywhere(logprobs, pg.tp)}) <= 1  # all ranks say the same
    dist.all_reduce(hidden.grad, group=pg.tp)
    dist.all_reduce(layer.weight.grad, group=pg.cp)
    parts = logprobs.detach(), entropies.detach(), hidden.grad, layout.held(layer.weight.grad)
    padding = layer.weight.grad[layout.held_shape[0] :]
    return pg.cp.rank(), pg.tp.rank(), parts, not padding.any()


def _everywhere(values: torch.Tensor, group) -> list[list[float]]:
    found = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(found, values.detach(), group=group)
    return [one.tolist() for one in found]


@pytest.mark.parametrize("width", [8, 128], ids=["blocks", "one block"])
@pytest.mark.parametrize(
    ("asked", "temperature"), [("logprob", 1.0), ("entropy", 0.5), ("both", 3.0)]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_the_softmax_of_the_whole_vocabulary(ranks, name, asked, temperature, width):
    size, sizes = LAYOUTS[name]
    hidden, weight, labels, weights = given()
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    there = torch.distributions.Categorical(logits=hidden @ weight.t() / temperature)
    logprobs, entropies = there.log_prob(labels), there.entropy()
    one, two = ASKED[asked]
    (weights * (one * logprobs + two * entropies.square())).sum().backward()
    first_holds = K if asked == "both" else 4  # then the second rank holds no position
    found = ranks(size, on_rank, sizes, ASKED[asked], temperature, first_holds, width)
    assert all(clean for *_, clean in found)
    by_place = {(cp, tp): parts for cp, tp, parts, _ in found}
    cps, tps = ({place[n] for place in by_place} for n in (0, 1))
    ours = [torch.cat([by_place[cp, 0][n] for cp in sorted(cps)]) for n in range(3)]
    ours.append(torch.cat([by_place[0, tp][3] for tp in sorted(tps)]))
    wanted = logprobs, entropies, hidden.grad, weight.grad
    for mine, theirs in zip(ours, wanted, strict=True):
        # A few roundings of fp32, 6e-8 each, of logits of up to 25.
        assert (mine - theirs.detach()).norm() <= 3e-6 * theirs.detach().norm()


def on_rank_step(run: RunConfig, parallel, width: int, multiple: int | None = None):
    with blocks_of(width):
        return step_gradients(run, parallel, None, multiple)


@pytest.mark.parametrize(
    "sizes", [{}, dict(tp=2), dict(cp=2), dict(pp=2, vpp=2), dict(tp=2, pp=2)], ids=str
)
def test_a_step_in_blocks(ranks, sizes):
    """Loss and every gradient are those of one rank with one block."""
    run, parallel = invariance_run(), parallel_config(**sizes)
    assert run.model.language.vocab_size > 3 * 8
    run.parallel = parallel
    multiple = token_multiple(run)
    expected = ranks(1, step_gradients, invariance_run(), parallel_config(), None, multiple)[0]
    size = max(1, sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1))
    compare(ranks(size, on_rank_step, invariance_run(), parallel, 8, multiple)[0], expected)


def on_rank_rl(run: RunConfig, width: int) -> list[dict]:
    with blocks_of(width):
        assert len(blocks(1, run.model.language.vocab_size)) > 3
        return on_rank_steps(run, 2)


@pytest.mark.parametrize("sizes", [{}, dict(tensor_model_parallel_size=2)], ids=str)
def test_reinforcement_learning_in_blocks(ranks, scenes, sizes):
    """Two steps of a rollout: log-probabilities before and in training, entropies, ratios."""
    run = grpo_run(scenes, temperature=0.7, **sizes)
    size = 2 if sizes else 1
    whole, cut = ranks(size, on_rank_steps, run, 2)[0], ranks(size, on_rank_rl, run, 64)[0]
    assert [step["table"] for step in whole] == [step["table"] for step in cut]
    # fp32 sums in another order; the largest difference seen is 1e-6.
    assert_same_steps(whole, cut, 1e-5)
