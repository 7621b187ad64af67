"""Training of experts alone and of experts in scope: what moves, and what may not.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import pytest
import torch

from megatron_mm.config import MODULES, preset
from megatron_mm.earl.skill_map import SkillMap, load_skill_map, save_skill_map
from megatron_mm.engine.optimizer import module_of
from megatron_mm.errors import CheckpointError, DataError
from megatron_mm.parallel.param_layout import layouts
from support.grpo_runs import SKILLS, grpo_run, trainer_of, write_skill_map
from support.trainers import LAYOUTS, digits_run

EXPERTS_ONLY = {f"freeze_{module}": module != "experts" for module in MODULES}


@pytest.fixture(scope="module")
def scope_map(tmp_path_factory):
    """One expert for each skill of the rows, one for a skill that no row has, the last one for
    tokens without a skill."""
    language = preset("tiny").language
    experts, k = language.num_experts, language.moe_router_topk
    order = [[(3 * n + layer) % experts for n in range(experts)] for layer in range(2)]
    skills = {skill: [[place[n]] for place in order] for n, skill in enumerate(SKILLS)}
    first = len(SKILLS)
    skills["unused"] = [[place[first]] for place in order]
    common = [place[first + 1 :] for place in order]
    path = tmp_path_factory.mktemp("maps") / "map.json"
    save_skill_map(SkillMap(2, experts, k, skills, {}, common), path)
    return path


SCOPED = dict(EXPERTS_ONLY, expert_scope=True, weight_decay=10.0, lr=1e-3)


def run_of(scenes, scope_map, **settings):
    """Reinforcement learning; `ocr` and the others are what rows say, whatever is answered."""
    own = dict(SCOPED, skill_map=str(scope_map), span_labels="support.even.thirds")
    return grpo_run(scenes, **(own | settings))


def tuned_run(scenes, scope_map, **settings):
    """Supervised fine-tuning, with the routers' alignment beside it."""
    own = dict(SCOPED, skill_map=str(scope_map), router_align_coeff=0.4, freeze_router=False)
    return digits_run(scenes, global_batch_size=8, valid_data=None, **(own | settings))


def on_rank_moved(run) -> tuple[dict[str, list[bool]], list[dict]]:
    """(name -> which rows of a parameter two steps change, to the bit; the steps' metrics). Rows of
    experts are numbered over all ranks: those elsewhere are False."""
    trainer = trainer_of(run)
    held = {
        name: (param, layout, param.detach().clone())
        for name, param, layout in layouts(*trainer.engine.chunks)
    }
    try:
        metrics = [trainer.step() for _ in range(2)]
    finally:
        trainer.source.close()
    moved = {}
    for name, (param, layout, before) in held.items():
        changed = (param.detach() != before).reshape(len(param), -1).any(1)
        if module_of(name) == "experts":
            whole = torch.zeros(layout.global_shape[0], dtype=torch.bool)
            whole[layout.block[0]] = changed
            changed = whole
        moved[name] = changed.tolist()
    return moved, metrics


def union(answers: list[dict[str, list[bool]]]) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for answer in answers:
        for name, rows in answer.items():
            found[name] = [a or b for a, b in zip(rows, found.get(name, rows), strict=True)]
    return found


def member_of(scope_map) -> torch.Tensor:
    language = preset("tiny").language
    sizes = 2, language.num_experts, language.moe_router_topk
    return load_skill_map(scope_map, *sizes, exclusive=True).membership()


CASES = [(name, {}) for name in ("one rank", "EP2", "TP2", "PP2", "DP2")]
CASES += [("EP2", {"routing_replay": "R3"}), ("one rank", {"bf16": True})]


def assert_only_clusters_move(answers: list, scope_map, learns: set[str]) -> None:
    """Common experts, and those of a skill that no row has, stay as they are to the bit although
    the run decays; so does everything that is frozen."""
    moved = union([answer for answer, _ in answers])
    may_LE = member_of(scope_map)[: len(SKILLS)].any(0)
    layers = sorted({n.split(".experts.")[0] for n in moved if module_of(n) == "experts"})
    assert len(layers) == 2
    for name, rows in moved.items():
        module = module_of(name)
        assert any(rows) == (module in learns), name
        if module == "experts":
            may = may_LE[layers.index(name.split(".experts.")[0])]
            assert not (torch.tensor(rows) & ~may).any(), name
    for _, metrics in answers:
        for name in ("moe/taught_share", "moe/taught_share_first"):
            assert all(0 < step[name] < 0.5 for step in metrics), name


@pytest.mark.parametrize(("layout", "settings"), CASES, ids=str)
def test_only_clusters_of_skills_in_the_rows_move(ranks, scenes, scope_map, layout, settings):
    size, sizes = LAYOUTS[layout]
    answers = ranks(size, on_rank_moved, run_of(scenes, scope_map, **settings, **sizes))
    assert_only_clusters_move(answers, scope_map, {"experts"})


@pytest.mark.parametrize("layout", ["one rank", "EP2", "PP2"])
def test_so_it_is_in_fine_tuning(ranks, scenes, scope_map, layout):
    size, sizes = LAYOUTS[layout]
    answers = ranks(size, on_rank_moved, tuned_run(scenes, scope_map, **sizes))
    assert_only_clusters_move(answers, scope_map, {"experts", "router"})


def test_without_a_scope_they_all_move(ranks, scenes, scope_map):
    """So that the test above can fail."""
    run = run_of(scenes, scope_map, expert_scope=False)
    ((moved, metrics),) = ranks(1, on_rank_moved, run)
    assert all("moe/taught_share" not in step for step in metrics)
    for name, rows in moved.items():
        assert all(rows) if module_of(name) == "experts" else not any(rows), name


def on_rank_refusal(run) -> str:
    with pytest.raises(DataError) as caught:
        trainer_of(run)
    return str(caught.value)


def test_a_map_of_format_1_is_refused(ranks, scenes, tmp_path):
    path = write_skill_map(tmp_path / "map.json")
    expected = (
        f"skill map {path}: format is 'megatron_mm skill map 1', exclusive clusters need "
        "'megatron_mm skill map 2'; make it with --method knock-out or random"
    )
    assert ranks(2, on_rank_refusal, run_of(scenes, path)) == [expected] * 2


def on_rank_save(run) -> None:
    trainer = trainer_of(run)
    trainer.step()
    trainer.save()
    trainer.saver.finish()
    trainer.source.close()


def on_rank_start(run) -> str:
    try:
        trainer_of(run).source.close()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("scoped", [False, True])
def test_moments_of_another_scope_are_refused(ranks, scenes, scope_map, tmp_path, scoped):
    """They would move experts outside the scope for some steps."""
    ranks(1, on_rank_save, run_of(scenes, scope_map, expert_scope=scoped, save=str(tmp_path)))
    (said,) = ranks(1, on_rank_start, run_of(scenes, scope_map, load=str(tmp_path)))
    if scoped:
        assert said == ""
        other = run_of(scenes, scope_map, load=str(tmp_path), skill_map_shuffle_seed=3)
        assert "was saved with the expert scope" in ranks(1, on_rank_start, other)[0]
    else:
        assert "was saved without expert_scope, this run's is" in said and "finetune" in said
    fresh = run_of(scenes, scope_map, load=str(tmp_path), finetune=True)
    assert ranks(1, on_rank_start, fresh) == [""]
