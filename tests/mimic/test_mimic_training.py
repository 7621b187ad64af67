"""Mimic learning in the loop: weight 0, layouts, resuming, controls, bad input.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mm.config import RunConfig, validate
from megatron_mm.data.files.rows import Rows as RowsOf
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.earl.skill_map import SkillMap, save_skill_map
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.mimic.expert_map import ExpertMap
from megatron_mm.mimic.record import record
from megatron_mm.mimic.recorded import Recorded, TeacherSizes, place_of, write_routes
from megatron_mm.mimic.rounds import Rows
from megatron_mm.mimic.teaching import Teaching
from megatron_mm.mimic.text import answer_starts, row_digest, supervised, token_digest
from megatron_mm.train.sft import SupervisedFineTuning, open_rows
from support.trainers import LAYOUTS, LOSS_TOLERANCE, digits_run, new_trainer, parameters
from support.weights import random_engine, randomise_engine

EXPERTS, DEPTH, TOP, ANSWERS, STEPS = 5, 3, 3, 4, 3
TAUGHT = dict(mimic_route_coeff=0.4, mimic_kd_coeff=0.5)


@pytest.fixture(scope="module")
def side_files(scenes, tmp_path_factory) -> dict[str, str]:
    """Routes of a teacher whose opinions hang on the token alone, and a map to the runs' two layers
    of 8 experts."""
    folder = tmp_path_factory.mktemp("teacher")
    run = digits_run(scenes)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    rows, builder = RowsOf(scenes / "mix.jsonl"), SampleBuilder(run, tokenizer)
    generator, words = torch.Generator().manual_seed(0), tokenizer.vocab_size
    routers = torch.rand(words, DEPTH, EXPERTS, generator=generator).mul(6).softmax(2)
    nexts = torch.rand(words, words, generator=generator).mul(9).log_softmax(1)
    held = {}
    for n in range(len(rows)):
        sample = builder.training(rows[n], rows.where(n), rows.folder)
        here = sample.tokens_T[supervised(sample)]
        p, likely = routers[here].topk(TOP, 2), nexts[here].topk(ANSWERS, 1)
        held[place_of(rows.where(n))] = Recorded(
            row_digest(rows[n], rows.where(n)),
            token_digest(sample),
            answer_starts(sample, tokenizer),
            p.indices.to(torch.int16),
            p.values.half(),
            likely.indices.int(),
            likely.values,
        )
    teacher = TeacherSizes("teacher", DEPTH, EXPERTS, words)
    write_routes(folder / "routes.st", teacher, [0, 1, 2], held, "")
    a = torch.rand(2, EXPERTS, 8, generator=generator).mul(5).softmax(2)
    ExpertMap("teacher", {0: 1, 1: 2}, {0: a[0], 1: a[1]}).save(folder / "map.st")
    skills = {"ocr": [[2], [5]], "spatial": [[3], []], "multihop": [[4], [3]]}
    save_skill_map(SkillMap(2, 8, 2, skills), folder / "skills.json")
    return {name: str(folder / name) for name in ("routes.st", "map.st", "skills.json")}


def mimic_run(scenes, side_files, **settings) -> RunConfig:
    defaults = dict(
        mimic_routes=side_files["routes.st"],
        mimic_map=side_files["map.st"],
        global_batch_size=8,
        valid_data=None,
    )
    return digits_run(scenes, **(defaults | settings))


def trainer_of(run: RunConfig):
    validate(run, torch.distributed.get_world_size())
    trainer = new_trainer(run)
    if not run.checkpoint.load:
        randomise_engine(trainer.engine)
    return trainer


def on_rank_steps(run: RunConfig, steps: int, folder: Path | None = None) -> dict:
    """The numbers of each step and the parameters at the end; saved, if there is a folder."""
    trainer = trainer_of(run)
    metrics = [trainer.step() for _ in range(steps)]
    if folder is not None:
        trainer.run.checkpoint.save = str(folder)
        trainer.save()
        trainer.saver.finish()
    left_out = ("time", "tokens", "learning_rate")
    found = [{k: v for k, v in m.items() if not any(w in k for w in left_out)} for m in metrics]
    trainer.source.close()
    return {"steps": found, "parameters": parameters(trainer)}


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.fixture(scope="module")
def one_rank(ranks, scenes, side_files):
    return {
        packing: ranks(
            1, on_rank_steps, mimic_run(scenes, side_files, packing=packing, **TAUGHT), STEPS
        )[0]
        for packing in (False, True)
    }


@pytest.fixture(scope="module")
def plain(ranks, scenes):
    return ranks(1, on_rank_steps, digits_run(scenes, global_batch_size=8, valid_data=None), STEPS)[
        0
    ]


# ---- weights ----


def test_without_a_coefficient_it_is_plain_fine_tuning(ranks, scenes, side_files, plain, one_rank):
    """To the bit, though routers are compared with the teacher's."""
    measured = ranks(1, on_rank_steps, mimic_run(scenes, side_files), STEPS)[0]
    assert same(plain["parameters"], measured["parameters"])
    for ours, theirs in zip(measured["steps"], plain["steps"], strict=True):
        assert ours.pop("moe/mimic_kl") > 0.1
        assert ours == theirs
    assert not same(plain["parameters"], one_rank[False]["parameters"])
    first, taught = plain["steps"][0], one_rank[False]["steps"][0]
    assert first["train/lm_loss"] == taught["train/lm_loss"]  # both are no part of the main loss
    assert taught["moe/router_loss"] > 0.1 and taught["train/kd_loss"] > 0.1


@pytest.mark.parametrize("kind", ["routes", "skills"])
def test_after_the_annealing_it_is_plain_fine_tuning(
    ranks, scenes, side_files, plain, tmp_path, kind
):
    """The coefficient follows from the step: a run that ends its annealing with the first step
    takes the later ones as plain fine-tuning takes them from there."""
    settings = dict(mimic_route_coeff=0.4)
    if kind == "skills":
        settings = dict(mimic_routes=None, mimic_map=None, skill_map=side_files["skills.json"])
        settings |= dict(on_missing_cluster="skip", mimic_skill_coeff=0.4)
    run = mimic_run(scenes, side_files, mimic_anneal_share=1 / 12, **settings)
    begun = ranks(1, on_rank_steps, run, 1, tmp_path)[0]
    whole = ranks(1, on_rank_steps, run, STEPS)[0]
    run.checkpoint.load = str(tmp_path)
    assert [step.get("moe/router_loss", 0.0) > 0 for step in whole["steps"]] == [True, False, False]
    rest = digits_run(scenes, global_batch_size=8, valid_data=None)
    rest.checkpoint.load = str(tmp_path)
    ended = ranks(1, on_rank_steps, rest, STEPS - 1)[0]
    assert same(ended["parameters"], whole["parameters"])
    assert not same(ended["parameters"], plain["parameters"])
    assert begun["steps"][0] == whole["steps"][0]


def test_a_resumed_run_goes_on_to_the_bit(ranks, scenes, side_files, tmp_path):
    run = mimic_run(scenes, side_files, train_iters=6, **TAUGHT)
    whole = ranks(1, on_rank_steps, run, 4)[0]
    begun = ranks(1, on_rank_steps, run, 2, tmp_path)[0]
    run.checkpoint.load = str(tmp_path)
    ended = ranks(1, on_rank_steps, run, 2)[0]
    assert begun["steps"] + ended["steps"] == whole["steps"]
    assert same(ended["parameters"], whole["parameters"])
    # The third step's coefficient is a third of the first's; q stays, so the term fell with it.
    parts = [step["moe/router_loss"] for step in whole["steps"][:3]]
    assert parts[0] > parts[1] > parts[2] > 0.2 * parts[0]


# ---- layouts ----

CASES = [(layout, False) for layout in ("TP2", "PP2", "CP2", "EP2", "DP2", "PP2xVPP2")]
CASES += [("DP2", True), ("PP2", True)]


@pytest.mark.parametrize(("layout", "packing"), CASES)
def test_steps_do_not_depend_on_the_layout(ranks, scenes, side_files, one_rank, layout, packing):
    """Losses, both terms and the norms of the gradients of three steps."""
    size, sizes = LAYOUTS[layout]
    run = mimic_run(scenes, side_files, packing=packing, **TAUGHT, **sizes)
    for rank in ranks(size, on_rank_steps, run, STEPS):
        for ours, theirs in zip(rank["steps"], one_rank[packing]["steps"], strict=True):
            assert ours.keys() == theirs.keys()
            for name in theirs.keys() - {"moe/load_balancing_loss"}:  # a mean over replicas
                # A router's gradient is small beside the sums it is made of; see LOSS_TOLERANCE.
                bound = LOSS_TOLERANCE * (10 if "norm" in name else 1)
                assert ours[name] == pytest.approx(theirs[name], rel=bound), name


def test_steps_do_not_depend_on_how_samples_are_packed(ranks, scenes, side_files):
    """Eight samples of a step in one stream, in four and each alone."""
    steps = [
        ranks(1, on_rank_steps, mimic_run(
            scenes, side_files, micro_batch_size=size, moe_aux_loss_coeff=0.0, **TAUGHT), STEPS
        )[0]["steps"]
        for size in (8, 2, 1)
    ]  # fmt: skip
    for other in steps[1:]:
        for ours, theirs in zip(other, steps[0], strict=True):
            for name in ("train/lm_loss", "train/kd_loss", "moe/router_loss", "train/grad_norm"):
                bound = LOSS_TOLERANCE * (10 if "norm" in name else 1)
                assert ours[name] == pytest.approx(theirs[name], rel=bound), name


def test_workers_read_alike(scenes, side_files):
    alone, others = (read(mimic_run(scenes, side_files, num_workers=n, **TAUGHT)) for n in (0, 1))
    for one, other in zip(alone, others, strict=True):
        for layer, (experts, weights) in one.teacher_routes.items():
            assert torch.equal(experts, other.teacher_routes[layer][0])
            assert torch.equal(weights, other.teacher_routes[layer][1]) and weights.any()
        assert torch.equal(one.teacher_answers[1], other.teacher_answers[1])


# ---- what is learnt ----


def test_the_student_comes_nearer_to_its_teacher(ranks, scenes, side_files):
    held = dict(mimic_route_coeff=1.0, mimic_kd_coeff=1.0, mimic_anneal_share=0.0)
    run = mimic_run(scenes, side_files, lr_mult_router=10.0, train_iters=30, **held)
    steps = ranks(1, on_rank_steps, run, 30)[0]["steps"]
    for name in ("moe/mimic_kl", "train/kd_loss"):
        first, last = (sum(step[name] for step in part) for part in (steps[:5], steps[-5:]))
        assert last < 0.9 * first, name  # 0.79 and 0.86 seen


def on_rank_own(run: RunConfig, data: str, folder: Path) -> None:
    """Records the model that `trainer_of` begins with, and writes maps to itself: the identity, and
    one expert further."""
    engine, tokenizer = random_engine(run), load_tokenizer(run.data.tokenizer_model)
    held: dict = {}
    record(engine, tokenizer, Rows([data]), [0, 1], 8, 64, held.__setitem__)
    write_routes(folder / "routes.st", TeacherSizes("self", 2, 8, 384), [0, 1], held, "")
    for name, a in (("same", torch.eye(8)), ("turned", torch.eye(8).roll(1, 1))):
        ExpertMap("self", {0: 0, 1: 1}, {0: a, 1: a}).save(folder / f"{name}.st")


def test_a_teacher_that_is_the_student_has_nothing_to_teach(ranks, scenes, plain, tmp_path):
    """Recorded, read again and mapped by the identity: the first step is plain fine-tuning's but
    for the fp16 of the file."""
    data = str(scenes / "mix.jsonl")
    ranks(1, on_rank_own, digits_run(scenes, global_batch_size=8, valid_data=None), data, tmp_path)
    files = {"routes.st": str(tmp_path / "routes.st")}
    norms = {}
    for name in ("same", "turned"):
        run = mimic_run(
            scenes, files | {"map.st": str(tmp_path / f"{name}.st")},
            mimic_route_coeff=1.0, mimic_kd_coeff=1.0,
        )  # fmt: skip
        step = ranks(1, on_rank_steps, run, 1)[0]["steps"][0]
        norms[name] = step["train/grad_norm"]
        # Of the order of the square of fp16's rounding, 5e-4, and of fp32's.
        assert abs(step["train/kd_loss"]) < 1e-5
        assert (abs(step["moe/mimic_kl"]) < 1e-5) == (name == "same")
        assert step["moe/router_loss"] > 0.1  # the entropy of the teacher
    alone = plain["steps"][0]["train/grad_norm"]
    assert norms["same"] == pytest.approx(alone, rel=1e-4)
    assert abs(norms["turned"] / alone - 1) > 1e-3


@pytest.mark.parametrize("control", ["mimic_map_shuffle_seed", "mimic_row_shuffle_seed"])
def test_controls_change_the_target_alone(ranks, scenes, side_files, one_rank, control):
    run = mimic_run(scenes, side_files, **TAUGHT, **{control: 1})
    found = ranks(1, on_rank_steps, run, 1)[0]["steps"][0]
    expected = one_rank[False]["steps"][0]
    for name in ("train/lm_loss", "train/kd_loss"):
        assert found[name] == expected[name]
    assert abs(found["moe/router_loss"] / expected["moe/router_loss"] - 1) > 1e-4


def test_skills_are_earls_term_with_weight_1(ranks, scenes, side_files):
    """Of half the coefficient, annealed: the log mass over labelled tokens, over what the loss is
    divided by; other tokens learn nothing from it."""
    settings = dict(mimic_routes=None, mimic_map=None, skill_map=side_files["skills.json"])
    settings |= dict(on_missing_cluster="skip", mimic_skill_coeff=0.4)
    run = mimic_run(scenes, side_files, **settings)
    ((found, expected),) = ranks(1, on_rank_skill_term, run)
    assert found == pytest.approx(expected, rel=1e-5) and found > 1e-3  # fp32 against fp64
    with_routes = mimic_run(scenes, side_files, **(settings | TAUGHT | dict(
        mimic_routes=side_files["routes.st"], mimic_map=side_files["map.st"])))  # fmt: skip
    both = ranks(1, on_rank_steps, with_routes, 1)[0]["steps"][0]
    alone = ranks(1, on_rank_steps, run, 1)[0]["steps"][0]
    routes = ranks(1, on_rank_steps, mimic_run(scenes, side_files, **TAUGHT), 1)[0]["steps"][0]
    total = alone["moe/router_loss"] + routes["moe/router_loss"]
    assert both["moe/router_loss"] == pytest.approx(total, rel=1e-5)


def on_rank_skill_term(run: RunConfig) -> tuple[float, float]:
    trainer = trainer_of(run)
    seen: list = []
    clusters = SkillMap(2, 8, 2, {"ocr": [[2], [5]], "spatial": [[3], []],
                                  "multihop": [[4], [3]]}).membership()  # fmt: skip
    objective, term = trainer.source.objective, trainer.source.objective.router_term

    def noted(logits, batch, index, positions, metrics):
        seen.append((index, logits.detach().double(), batch))
        return term(logits, batch, index, positions, metrics)

    objective.router_term = noted
    value = trainer.step()["moe/router_loss"]
    trainer.source.close()
    total, count = 0.0, 0
    for index, logits, batch in seen:
        p = logits.softmax(1)
        for t in (batch.skill_T >= 0).nonzero().flatten().tolist():
            cluster = clusters[batch.skill_T[t], index]
            if cluster.any():
                total -= float(p[t, cluster].sum().log())
        count += int(batch.loss_mask_T.sum()) if index == 0 else 0
    return value, 0.4 * total / 2 / count


# ---- bad input ----


def read(run: RunConfig) -> list:
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    loader = open_rows(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    try:
        return loader.next_batch()
    finally:
        loader.close()


def test_other_rows_are_refused_or_left_out(scenes, side_files, tmp_path):
    lines = (scenes / "mix.jsonl").read_text().splitlines()
    (tmp_path / "images").symlink_to(scenes / "images")
    path = tmp_path / "mix.jsonl"  # of the recorded name
    path.write_text("\n".join([*lines[8:], *lines[:8]]) + "\n")
    run = mimic_run(scenes, side_files, rows=path, mimic_kd_coeff=1.0)
    with pytest.raises(DataError, match=rf"^{path}:\d+: .* holds another text for this row"):
        read(run)
    path.write_text("\n".join([lines[0], *lines[9:], *lines[1:9]]) + "\n")
    run = mimic_run(scenes, side_files, rows=path, on_bad_sample="skip", mimic_kd_coeff=1.0)
    batches = read(run)
    assert any(batch.skipped for batch in batches)
    for batch in batches:
        assert len(batch.samples) < 2 and all("another text" in why for why in batch.skipped)


def on_rank_refused(run: RunConfig) -> str:
    try:
        new_trainer(run)
    except DataError as error:
        return str(error)
    return ""


def test_every_rank_hears_of_a_file_that_cannot_be_used(ranks, scenes, side_files, tmp_path):
    missing = tmp_path / "none.st"
    for name, what in (("mimic_routes", "teacher's routes"), ("mimic_map", "expert map")):
        run = mimic_run(scenes, side_files, **{name: str(missing)})
        for error in ranks(2, on_rank_refused, run):
            assert error == f"{what} {missing}: No such file or directory"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mimic_routes=None), "mimic.mimic_map is .* allowed: left out, .* with mimic_routes"),
        (dict(mimic_map=None, mimic_route_coeff=0.1), "mimic_route_coeff is 0.1; .* mimic_map"),
        (dict(mimic_map=None, mimic_map_shuffle_seed=0), "shuffle_seed is 0; .* with mimic_map"),
        (dict(mimic_routes=None, mimic_map=None, mimic_kd_coeff=1.0), "kd_coeff is 1.0; .*_routes"),
        (dict(mimic_route_coeff=0.1, freeze_router=True), "coeff is 0.1; allowed: 0 with freeze_r"),
        (dict(mimic_skill_coeff=0.1), "mimic_skill_coeff is 0.1; allowed: 0, .* with skill_map"),
        (dict(mimic_skill_coeff=0.1, skill_map="x", router_align_coeff=0.4),
         "mimic_skill_coeff is 0.1; allowed: 0 with earl.router_align_coeff = 0.4"),
        (dict(objective="dpo"), "mimic.mimic_routes is .* with objective dpo, which does not read"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_one_line(scenes, side_files, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        validate(mimic_run(scenes, side_files, **settings), 1)
    assert "\n" not in str(error.value)


class Other(SupervisedFineTuning):
    def __init__(self, run):
        pass


def on_rank_other_objective(run: RunConfig) -> list[str]:
    trainer, said = trainer_of(run), []
    for settings in (dict(mimic_route_coeff=0.1), dict(mimic_map=None, mimic_kd_coeff=1.0)):
        for name, value in settings.items():
            setattr(run.objectives["mimic"], name, value)
        try:
            Teaching(run, trainer.engine, Other(run), trainer.loader)
        except ConfigError as error:
            said.append(str(error))
    trainer.source.close()
    return said


def test_an_objective_without_the_terms_is_named(ranks, scenes, side_files):
    (said,) = ranks(1, on_rank_other_objective, mimic_run(scenes, side_files))
    assert "Other, whose router_term is None; call SupervisedFineTuning.__init__" in said[0]
    assert "mimic_kd_coeff is 1.0; allowed: 0 with Other, whose kd_coeff is 0.0" in said[1]
