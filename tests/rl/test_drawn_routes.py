"""Experts that a rollout draws: their noise, their positions, and the router term on them.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.generation.sampling import gumbels
from megatron_mm.model.routing import Choice
from megatron_mm.rl.settings import RLConfig
from support.grpo_runs import (
    TOKENS,
    arm,
    assert_same_steps,
    grpo_run,
    on_rank_reference,
    on_rank_steps,
    trainer_of,
)
from support.trainers import LAYOUTS

TEMPERATURE = 0.7


def on_rank_draws(run: RunConfig) -> dict[str, int]:
    """Counts the positions of a rollout that took in every layer the experts that their noise says,
    or without noise the best ones, and those that the router term teaches."""
    trainer = trainer_of(run)
    source, engine, kept, logits_TLE = trainer.source, trainer.engine, [], {}
    collect, choose = source.collector.collect, Choice.get_replay_topk
    source.collector.collect = lambda: kept.append(collect()) or kept[-1]

    def note(self, logits, *args):
        logits_TLE[self.index] = logits.detach()
        return choose(self, logits, *args)

    size = run.section(RLConfig).num_generations
    counts = dict.fromkeys(("drawn as said", "best", "neither", "first taught", "later taught"), 0)
    batches, _ = source.next_step(False)
    ((scored, _),) = kept
    Choice.get_replay_topk = note
    try:
        for batch in batches:
            # Its routes are replayed, so later layers see what they saw.
            engine.forward([batch], lambda b: b.sampled, lambda *_, **__: None, routes=[{}])
            at = iter(batch.sampled.tolist())
            for member in batch.members:
                group = scored.groups[member // size]
                number = group.number * size + member % size
                for count in range(TOKENS):
                    place = next(at)
                    taught = bool(batch.router.weight_T[place] != 0)
                    counts["later taught" if count else "first taught"] += taught
                    counts[_what(batch, place, logits_TLE, number, count, run)] += 1
    finally:
        Choice.get_replay_topk = choose  # the rank lives on
        source.close()
    return counts


def _what(batch, place: int, logits_TLE: dict, number: int, count: int, run: RunConfig) -> str:
    k, experts = run.model.language.moe_router_topk, run.model.language.num_experts
    row, step, said, best = torch.tensor([number]), torch.tensor([count]), True, True
    for layer, logits in logits_TLE.items():
        places = torch.arange(layer * experts, (layer + 1) * experts)
        noise = TEMPERATURE * gumbels(run.training.seed, row, step, places)[0]
        took = batch.routes[layer][place].tolist()
        said &= took == (logits[place] + noise).topk(k).indices.tolist()
        best &= sorted(took) == sorted(logits[place].topk(k).indices.tolist())
    return "drawn as said" if count and said else "best" if best else "neither"


def test_every_token_but_the_first_draws_with_its_own_noise(ranks, scenes, skill_map):
    run = arm(scenes, skill_map, "drawn", router_temperature=TEMPERATURE)
    counts = ranks(1, on_rank_draws, run)[0]
    completions = 16
    # The first token comes from the prompt's own pass, which all its completions share.
    assert counts["drawn as said"] == completions * (TOKENS - 1)
    assert counts["best"] == completions and counts["neither"] == 0
    assert counts["first taught"] == 0 < counts["later taught"]


@pytest.mark.parametrize("layout", ["one rank", "PP2", "PP2xVPP2"])
def test_blocks_computed_again_meet_the_drawn_experts(ranks, scenes, skill_map, layout):
    size, sizes = LAYOUTS[layout]
    runs = (
        arm(scenes, skill_map, "drawn", recompute_granularity=granularity, **sizes)
        for granularity in (None, "full")
    )
    once, twice = (ranks(size, on_rank_steps, run, 1) for run in runs)
    for kept, again in zip(once, twice, strict=True):
        assert_same_steps(kept, again, 2e-5)


def test_the_reference_takes_the_drawn_experts(ranks, scenes, tmp_path):
    """Equal weights do not differ, however the experts were drawn."""
    drawn = dict(router_temperature=1.0, routing_replay="R3")
    ranks(1, on_rank_reference, grpo_run(scenes), tmp_path / "ref")
    run = grpo_run(scenes, beta=0.1, ref_load=str(tmp_path / "ref"), **drawn)
    assert ranks(1, on_rank_steps, run, 1)[0][0]["kl"] <= 1e-9
