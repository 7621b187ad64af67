"""Aligned fine-tuning in the loop: the term by hand, layouts, resuming, labels, bad input.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_mm.config import RunConfig, validate
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from megatron_mm.errors import ConfigError, DataError, RLError
from megatron_mm.model.layers.moe import Router
from megatron_mm.train.sft import Supervised, SupervisedFineTuning, open_rows
from support.trainers import LAYOUTS, LOSS_TOLERANCE, digits_run, new_trainer, parameters
from support.weights import randomise_engine

SKILLS = ("transcribe", "ocr", "count", "spatial", "arithmetic", "multihop")
COEFFICIENT = 0.4
STEPS = 3


def skill_map() -> SkillMap:
    """A map of the runs' two layers of 8 experts; `ocr` has none in the second layer."""
    skills = {skill: [[2 + n], [(5 - n)]] for n, skill in enumerate(SKILLS)}
    skills["ocr"][1] = []
    return SkillMap(2, 8, 2, skills, common=[[0, 1], [6, 7]])


@pytest.fixture(scope="module")
def map_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("map") / "map.json"
    save_skill_map(skill_map(), path)
    return str(path)


def aligned_run(scenes, map_file, **settings) -> RunConfig:
    defaults = dict(skill_map=map_file, router_align_coeff=COEFFICIENT, global_batch_size=8,
                    valid_data=None)  # fmt: skip
    return digits_run(scenes, **(defaults | settings))


def trainer_of(run: RunConfig):
    """A trainer whose routers prefer some experts, unless weights are loaded."""
    validate(run, torch.distributed.get_world_size())
    trainer = new_trainer(run)
    if not run.checkpoint.load:
        randomise_engine(trainer.engine)
    return trainer


def on_rank_steps(run: RunConfig, steps: int, folder: Path | None = None) -> dict:
    """The numbers of each step, the state that remains; saved, if there is a folder."""
    trainer = trainer_of(run)
    metrics = [trainer.step() for _ in range(steps)]
    if folder is not None:
        trainer.run.checkpoint.save = str(folder)
        trainer.save()
        trainer.saver.finish()
    left_out = ("time", "tokens", "learning_rate")
    found = {
        "steps": [{k: v for k, v in m.items() if not any(w in k for w in left_out)}
                  for m in metrics],
        "mass": trainer.loader.state_dict().get("skill_mass"),
        "parameters": parameters(trainer),
    }  # fmt: skip
    trainer.source.close()
    return found


# ---- the equation ----


def _noting(router: Router, seen: list, hidden: torch.Tensor) -> torch.Tensor:
    logits = type(router).gating(router, hidden)
    seen.append((router.layer_number - 1, logits.detach().flatten(0, 1)))
    return logits


def by_hand(steps: list[tuple[list, list]]) -> list[tuple[float, float]]:
    """The term and the mean mass of each step, position by position.

    Args:
        steps: of each (its microbatches, (layer, logits) in the order of the passes).
    """
    mapped = skill_map()
    clusters = [*mapped.skills.values(), mapped.common]
    running: Counter = Counter()
    found = []
    for batches, seen in steps:
        for skill in running:
            running[skill] *= 0.95
        for batch in batches:
            running.update(s for s in batch.skill_T.tolist() if s >= 0)
        mean = sum(running.values()) / len(running)
        sums, pairs, masses = [0.0, 0.0], [0, 0], []
        passes = iter(seen)
        for batch in batches:
            for layer, logits in (next(passes), next(passes)):
                for t in range(batch.num_real_tokens):
                    s = int(batch.skill_T[t])
                    cluster = clusters[s][layer]
                    if not cluster:
                        continue
                    e = logits[t].double().exp()
                    mass = float(e[cluster].sum() / e.sum())
                    b = 1.0 if s < 0 else min(20.0, mean / running[s])
                    sums[s < 0] -= b * math.log(mass)
                    pairs[s < 0] += 1
                    masses += [mass] if s >= 0 else []
        term = COEFFICIENT * (sums[0] / pairs[0] + sums[1] / pairs[1])
        found.append((term, sum(masses) / len(masses)))
    return found


def on_rank_by_hand(run: RunConfig) -> tuple[list, list]:
    trainer = trainer_of(run)
    seen: list = []
    for module in trainer.engine.chunks[0].modules():
        if isinstance(module, Router):
            module.gating = partial(_noting, module, seen)
    forward, steps, metrics = trainer.engine.forward_backward, [], []

    def noted(batches, objective):
        steps.append((batches, seen))
        return forward(batches, objective)

    trainer.engine.forward_backward = noted
    for _ in range(STEPS):
        metrics.append(trainer.step())
        steps[-1] = steps[-1][0], [*seen]
        seen.clear()
    trainer.source.close()
    numbers = [(m["moe/router_loss"], m["moe/cluster_mass"]) for m in metrics]
    return numbers, by_hand(steps)


def test_the_term_of_a_step_equals_its_equation(ranks, scenes, map_file):
    found, expected = ranks(1, on_rank_by_hand, aligned_run(scenes, map_file))[0]
    for ours, theirs in zip(found, expected, strict=True):
        # fp32 sums of some 1,000 positions against fp64.
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert ours[0] > 0.1


# ---- layouts ----


@pytest.fixture(scope="module")
def one_rank(ranks, scenes, map_file):
    return {
        packing: ranks(1, on_rank_steps, aligned_run(scenes, map_file, packing=packing), STEPS)[0]
        for packing in (False, True)
    }


CASES = [(layout, False) for layout in ("TP2", "PP2", "CP2", "EP2", "DP2", "PP2xVPP2")]
CASES += [("DP2", True), ("PP2", True)]


@pytest.mark.parametrize(("layout", "packing"), CASES)
def test_steps_do_not_depend_on_the_layout(ranks, scenes, map_file, one_rank, layout, packing):
    """Losses, the term, its mass and the norms of the gradients of three steps; the running mass to
    the bit."""
    size, sizes = LAYOUTS[layout]
    run = aligned_run(scenes, map_file, packing=packing, **sizes)
    expected = one_rank[packing]
    for rank in ranks(size, on_rank_steps, run, STEPS):
        assert rank["mass"] == expected["mass"]
        for ours, theirs in zip(rank["steps"], expected["steps"], strict=True):
            for name in theirs.keys() - {"moe/load_balancing_loss"}:  # a mean over replicas
                # A router's gradient is small beside the sums it is made of; see LOSS_TOLERANCE.
                bound = LOSS_TOLERANCE * (10 if "norm" in name else 1)
                assert ours[name] == pytest.approx(theirs[name], rel=bound), name


def test_the_running_mass_is_that_of_the_labels(one_rank):
    mass = one_rank[False]["mass"]
    assert list(mass) == list(SKILLS) and sum(m > 0 for m in mass.values()) >= 3


# ---- what it changes, and what not ----


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_without_a_coefficient_it_is_plain_fine_tuning(ranks, scenes, map_file, one_rank):
    plain, unweighted = (
        ranks(1, on_rank_steps, aligned_run(scenes, map_file, **settings), STEPS)[0]
        for settings in (
            dict(skill_map=None, router_align_coeff=0.0),
            dict(router_align_coeff=0.0),
        )
    )
    assert same(plain["parameters"], unweighted["parameters"])
    assert plain["steps"] == unweighted["steps"]
    assert not same(plain["parameters"], one_rank[False]["parameters"])
    first, aligned = plain["steps"][0], one_rank[False]["steps"][0]
    assert first["train/lm_loss"] == aligned["train/lm_loss"]  # it is no part of the main loss
    assert abs(first["train/grad_norm"] / aligned["train/grad_norm"] - 1) > 1e-3


def test_the_shuffled_map_is_another(ranks, scenes, map_file, one_rank):
    run = aligned_run(scenes, map_file, skill_map_shuffle_seed=1)
    found = ranks(1, on_rank_steps, run, 1)[0]["steps"][0]
    expected = one_rank[False]["steps"][0]
    assert found["train/lm_loss"] == expected["train/lm_loss"]
    assert abs(found["moe/router_loss"] / expected["moe/router_loss"] - 1) > 1e-3


def test_the_routers_learn_it(ranks, scenes, map_file):
    run = aligned_run(scenes, map_file, train_iters=12, lr_mult_router=10.0)
    steps = ranks(1, on_rank_steps, run, 12)[0]["steps"]
    assert steps[-1]["moe/cluster_mass"] > 1.5 * steps[0]["moe/cluster_mass"]


def test_a_resumed_run_goes_on_to_the_bit(ranks, scenes, map_file, tmp_path):
    run = aligned_run(scenes, map_file, train_iters=4)
    whole = ranks(1, on_rank_steps, run, 4)[0]
    begun = ranks(1, on_rank_steps, run, 2, tmp_path)[0]
    run.checkpoint.load = str(tmp_path)
    ended = ranks(1, on_rank_steps, run, 2)[0]
    assert ended["mass"] == whole["mass"] != begun["mass"]
    assert begun["steps"] + ended["steps"] == whole["steps"]
    assert same(ended["parameters"], whole["parameters"])
    saved = json.loads((tmp_path / "iter_0000002" / "run.json").read_text())
    assert saved["loader"]["skill_mass"] == begun["mass"]


# ---- labels ----


def read(run: RunConfig) -> list:
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    loader = open_rows(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    try:
        return loader.next_batch()
    finally:
        loader.close()


def test_the_labelled_positions_predict_the_tokens_of_the_spans(scenes, map_file):
    run = aligned_run(scenes, map_file)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    rows = [json.loads(line) for line in (scenes / "mix.jsonl").read_text().splitlines()]
    several = 0
    for batch in read(run):
        bounds = batch.cu_seqlens.tolist()
        for where, start, end in zip(batch.samples, bounds, bounds[1:], strict=False):
            row = rows[int(where.rpartition(":")[2]) - 1]
            said = []
            for s, skill in enumerate(SKILLS):
                here = (batch.skill_T[start:end] == s).nonzero().flatten() + start
                assert (batch.loss_mask_T[here] == 1).all()
                if len(here):
                    said.append((skill, tokenizer.decode(batch.labels_T[here].tolist()).strip()))
            spans = row["spans"]
            answer = row["messages"][-1]["content"]
            if len(answer.split()) == 1:  # the direct answer
                assert said == [(spans[-1]["skill"], answer)]
                continue
            several += len(said) > 1
            for skill, text in said:
                wanted = [span["text"] for span in spans if span["skill"] == skill]
                assert "".join(text.replace(",", "").split()) == "".join(
                    "".join(wanted).replace(",", "").split()
                )
            assert {skill for skill, _ in said} == {span["skill"] for span in spans}
    assert several


def test_workers_label_alike(scenes, map_file):
    alone, others = (read(aligned_run(scenes, map_file, num_workers=n)) for n in (0, 1))
    for one, other in zip(alone, others, strict=True):
        assert torch.equal(one.skill_T, other.skill_T) and (one.skill_T >= 0).any()


# ---- bad input ----


def test_a_skill_without_a_cluster_is_named_with_its_row(scenes, map_file, tmp_path):
    row = json.loads((scenes / "mix.jsonl").read_text().splitlines()[0])
    row["images"] = []
    row["messages"][0]["content"] = "What do you do?"
    row["spans"] = [{"text": row["messages"][-1]["content"], "skill": "juggling"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    run = aligned_run(scenes, map_file, rows=path)
    with pytest.raises(DataError, match=rf"^{path}:1: skill 'juggling' has no cluster among the 6"):
        read(run)
    run = aligned_run(scenes, map_file, rows=path, on_missing_cluster="skip")
    assert all((batch.skill_T == -1).all() for batch in read(run))


def test_overlapping_clusters_are_refused(scenes, tmp_path):
    old = SkillMap(2, 8, 2, {skill: [[n], [n]] for n, skill in enumerate(SKILLS)})
    save_skill_map(old, tmp_path / "old.json")
    with pytest.raises(RLError, match=r"old.json: format is 'megatron_mm skill map 1', exclusive"):
        read(aligned_run(scenes, str(tmp_path / "old.json")))


def on_rank_refused(run: RunConfig) -> str:
    try:
        new_trainer(run)
    except DataError as error:
        return str(error)
    return ""


def test_every_rank_hears_of_a_map_that_cannot_be_used(ranks, scenes, tmp_path):
    path = str(tmp_path / "none.json")
    for error in ranks(2, on_rank_refused, aligned_run(scenes, path)):
        assert error == f"skill map {path}: No such file or directory"


class Other(SupervisedFineTuning):
    def __init__(self, run):
        pass


def test_an_objective_without_the_term_is_refused(scenes, map_file, monkeypatch):
    run = aligned_run(scenes, map_file)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    loader = open_rows(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    monkeypatch.setattr("megatron_mm.train.sft.part_of", lambda run, name: Other)
    engine = type("Engine", (), {"groups": None})
    with pytest.raises(ConfigError, match="allowed: 0 with Other, whose router_term is None"):
        Supervised(run, engine, tokenizer, loader)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(skill_map=None), "earl.router_align_coeff is 0.4; allowed: left out, or this value"),
        (dict(freeze_router=True), "earl.router_align_coeff is 0.4; allowed: 0 with freeze_router"),
        (
            dict(objective="grpo", reward_funcs=["exact"], max_completion_length=16),
            "earl.router_align_coeff is 0.4; allowed: 0 with objective grpo",
        ),
    ],
)
def test_settings_that_do_not_fit(scenes, map_file, settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(aligned_run(scenes, map_file, **settings), 1)
