"""The term of a teacher's routes: by a slow loop, and where it has nothing to teach."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mm.data.batch import Microbatch
from megatron_mm.earl.router_term import RouterTargets, Several, router_term, taught
from megatron_mm.mimic.batch import MimicBatch, TopExperts, TopTokens
from megatron_mm.mimic.targets import RouteTargets, annealed, whole_distribution
from megatron_mm.report.metrics import Metrics

T, ET, ES, K = 7, 5, 4, 2
LAYERS = {0: 3, 2: 1}  # of the student; its layer 1 is left alone


def batch_of(mask: list[int], experts: int = ET, k: int = K, seed: int = 0) -> MimicBatch:
    """A microbatch with random routes where the mask is 1, and one position of padding."""
    generator = torch.Generator().manual_seed(seed)
    count = len(mask)
    routes = {}
    for layer in sorted({*LAYERS.values()}):
        p = torch.rand(count, experts, generator=generator).softmax(1).topk(k, 1)
        held = torch.tensor(mask)[:, None]
        pad = torch.zeros(1, k)
        routes[layer] = TopExperts(
            torch.cat((p.indices * held, pad)).to(torch.int16),
            torch.cat((p.values * held, pad)).half(),
        )
    batch = Microbatch.build(
        torch.arange(count),
        [count],
        loss_mask_T=torch.tensor(mask, dtype=torch.float32),
        pad_multiple=count + 1,
    )
    return MimicBatch(**vars(batch), teacher_routes=routes)


def random_map(seed: int = 1) -> torch.Tensor:
    return torch.rand(ET, ES, generator=torch.Generator().manual_seed(seed)).softmax(1)


def test_the_term_equals_its_equation():
    mask = [0, 1, 1, 0, 1, 1, 0]
    batch, maps = batch_of(mask), {0: random_map(1), 2: random_map(2)}
    batch = taught(batch, RouteTargets(LAYERS, maps, 0.3))
    logits_LTE = torch.randn(3, T + 1, ES, generator=torch.Generator().manual_seed(3))
    found, metrics = 0.0, Metrics()
    for layer in range(3):
        for here in (range(3), range(3, T + 1)):  # in two parts, as two ranks hold them
            logits = logits_LTE[layer, here.start : here.stop]
            term = router_term(logits, batch, layer, here, metrics)
            assert (term is None) == (layer == 1)
            found += 0.0 if term is None else float(term)
    total, divergence = 0.0, 0.0
    for layer, theirs in LAYERS.items():
        held = batch.teacher_routes[theirs]
        for t in (t for t, m in enumerate(mask) if m):
            known = dict(zip(held.experts_Tk[t].tolist(), held.weights_Tk[t].tolist(), strict=True))
            rest = (1 - sum(known.values())) / (ET - K)
            p = [known.get(a, rest) for a in range(ET)]
            q = [sum(p[a] * float(maps[layer][a, b]) for a in range(ET)) for b in range(ES)]
            e = [math.exp(x) for x in logits_LTE[layer, t].tolist()]
            s = [x / sum(e) for x in e]
            total -= sum(q[b] * math.log(s[b]) for b in range(ES))
            divergence += sum(q[b] * math.log(q[b] / s[b]) for b in range(ES))
    assert found == pytest.approx(0.3 * total, rel=1e-6)  # fp32 sums of 8 terms
    value, weight = metrics.pair("moe/mimic_kl").tolist()
    assert weight == 4 * 2 and value == pytest.approx(divergence, rel=1e-5)


def test_a_teacher_that_is_the_student_has_nothing_to_teach():
    """With the identity and all experts recorded: the term is the entropy, its gradient 0."""
    logits = torch.randn(T + 1, ET, generator=torch.Generator().manual_seed(5))
    best = logits.softmax(1).topk(ET, 1)
    exact = TopExperts(best.indices.to(torch.int16), best.values)
    stored = TopExperts(exact.experts_Tk, best.values.half())
    for held, bound in ((exact, 1e-6), (stored, 1e-3)):  # fp32, and fp16 as in the file
        batch = batch_of([1] * T)
        batch.teacher_routes[0] = held
        logits.requires_grad_().grad = None
        batch = taught(batch, RouteTargets({0: 0}, {0: torch.eye(ET)}, 1.0))
        metrics = Metrics()
        term = router_term(logits, batch, 0, range(T + 1), metrics)
        term.backward()
        assert logits.grad.abs().max() <= bound
        entropy = torch.special.entr(logits.detach().softmax(1))[:T].sum()
        assert float(term.detach()) == pytest.approx(float(entropy), rel=bound)
        assert abs(metrics.pair("moe/mimic_kl")[0]) <= bound
    # Another map is another target.
    turned = taught(batch_of([1] * T), RouteTargets({0: 3}, {0: torch.eye(ET).roll(1, 0)}, 1.0))
    logits.grad = None
    router_term(logits, turned, 0, range(T + 1), Metrics()).backward()
    assert logits.grad.abs().max() > 0.05


def test_what_was_not_recorded_is_spread_evenly():
    held = TopExperts(torch.tensor([[3, 0]], dtype=torch.int16), torch.tensor([[0.5, 0.2]]).half())
    expected = torch.tensor([[0.2, 0.1, 0.1, 0.5, 0.1]])
    torch.testing.assert_close(whole_distribution(held, 5), expected, rtol=0, atol=5e-4)  # fp16
    both = TopExperts(torch.tensor([[1, 0]], dtype=torch.int16), torch.tensor([[0.6, 0.3]]).half())
    expected = torch.tensor([[1 / 3, 2 / 3]])
    torch.testing.assert_close(whole_distribution(both, 2), expected, rtol=0, atol=5e-4)


def test_without_weight_it_is_measured_and_teaches_nothing():
    batch = taught(batch_of([1] * T), RouteTargets(LAYERS, {0: random_map(), 2: random_map()}, 0.0))
    metrics = Metrics()
    assert router_term(torch.randn(T + 1, ES), batch, 0, range(T + 1), metrics) is None
    assert metrics.pair("moe/mimic_kl")[1] == T


@pytest.mark.parametrize(
    ("step", "share", "expected"),
    [(0, 0.5, 0.2), (25, 0.5, 0.1), (50, 0.5, 0.0), (80, 0.5, 0.0), (80, 0.0, 0.2), (80, 1, 0.04)],
)
def test_the_coefficient_follows_from_the_step(step, share, expected):
    assert annealed(0.2, step, 100, share) == pytest.approx(expected, abs=1e-12)


def test_both_targets_are_learnt_together():
    """A skill's cluster and a teacher's routes: the sum of both terms."""
    skill_T = torch.tensor([0, -1, 0, 0, -1, 0, -1, -1])
    cluster_SLE = torch.zeros(1, 3, ES, dtype=torch.bool)
    cluster_SLE[0, :, :2] = True
    skills = RouterTargets((skill_T >= 0).float(), cluster_SLE, 0.5)
    routes = RouteTargets(LAYERS, {0: random_map(), 2: random_map()}, 0.3)
    plain = batch_of([1] * T)
    plain.skill_T = skill_T
    logits, here = torch.randn(T + 1, ES), range(T + 1)
    terms = [
        router_term(logits, taught(plain, one), 0, here, Metrics()) for one in (skills, routes)
    ]
    together = taught(taught(plain, skills), routes)
    assert isinstance(together.router, Several)
    assert router_term(logits, together, 0, here, Metrics()) == torch.stack(terms).sum()
    alone = router_term(logits, together, 1, here, Metrics())  # no routes in this layer
    assert alone == router_term(logits, taught(plain, skills), 1, here, Metrics())


def test_all_that_it_needs_moves_with_the_batch():
    plain = batch_of([1] * T)
    plain.teacher_answers = TopTokens(
        torch.zeros(T + 1, 3, dtype=torch.int32), torch.zeros(T + 1, 3)
    )
    moved = taught(plain, RouteTargets(LAYERS, {0: random_map(), 2: random_map()}, 1.0)).to("meta")
    held = [x for top in moved.teacher_routes.values() for x in top]
    held += [*moved.teacher_answers, *moved.router.experts.values()]
    assert len(held) == 2 * 2 + 2 + 2 and all(x.is_meta for x in held)
    kept = plain.keeping({3}, answers=False)
    assert [*kept.teacher_routes] == [3] and kept.teacher_answers is None
