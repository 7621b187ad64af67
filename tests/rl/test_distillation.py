"""On-policy distillation in the loop: each token its own teacher, on every layout; nothing moves
where the teacher is the student; resuming with a reference that moves.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.errors import CheckpointError, DataError
from megatron_mm.rl.reference import teacher_set
from support.distil_runs import (
    DOMAINS,
    distil_run,
    domain_of,
    on_rank_teacher,
    on_rank_teachers,
    write_domains,
)
from support.fingerprints import parameter_hash
from support.grpo_runs import (
    assert_same_steps,
    grpo_run,
    on_rank_cut,
    on_rank_resume,
    on_rank_steps,
    step_of,
    trainer_of,
)
from support.trainers import LAYOUTS, PP2

FACTORS = dict(zip(DOMAINS, (1.05, 0.9), strict=True))


@pytest.fixture(scope="module")
def rows(scenes, tmp_path_factory):
    return write_domains(scenes, tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def student(ranks, scenes, tmp_path_factory):
    """A checkpoint of the weights that every run here begins with."""
    folder = tmp_path_factory.mktemp("student")
    ranks(1, on_rank_teacher, grpo_run(scenes), folder, 1.0)
    return folder


@pytest.fixture(scope="module")
def teachers(ranks, scenes, tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in FACTORS}
    for name, folder in folders.items():
        ranks(1, on_rank_teacher, grpo_run(scenes), folder, FACTORS[name])
    return folders


# ---- whose teacher ----


@pytest.fixture(scope="module")
def of_one_rank(ranks, scenes, rows, teachers):
    return ranks(1, on_rank_teachers, distil_run(scenes, rows, teachers), teachers)[0]


def test_every_token_has_its_own_teachers_number(of_one_rank):
    """To the bit: a teacher answers for the microbatches that are trained on."""
    assert len(of_one_rank) == 32
    seen = {one["domain"] for one in of_one_rank}
    assert seen == {*DOMAINS}
    for one in of_one_rank:
        other = next(name for name in DOMAINS if name != one["domain"])
        assert one["batch"] == one["domain"] and len(one["measured"])
        assert torch.equal(one["measured"], one[one["domain"]])
        assert (one["measured"] - one[other]).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["DP2", "EP2", "PP2", "PP2xVPP2", "TP2", "CP2"])
def test_so_it_is_on_every_layout(ranks, scenes, rows, teachers, of_one_rank, layout):
    """With replicas the rows of a step are dealt out, and bins are others. Log-probabilities are up
    to 10 and were computed in another order of fp32 sums."""
    size, sizes = LAYOUTS[layout]
    found = ranks(size, on_rank_teachers, distil_run(scenes, rows, teachers, **sizes), teachers)
    readers = [of for of in found if of]
    assert len(readers) == (2 if layout in ("DP2", "EP2") else 1)
    assert len({one["count"] for of in readers for one in of}) == 1
    expected = {one["place"]: one for one in of_one_rank}
    every = [one for of in readers for one in of]
    assert sorted(one["place"] for one in every) == sorted(expected)
    for one in every:
        same = expected[one["place"]]
        assert one["domain"] == same["domain"] == one["batch"]
        torch.testing.assert_close(one["measured"], same["measured"], rtol=0, atol=3e-5)
        torch.testing.assert_close(one["measured"], one[one["domain"]], rtol=0, atol=3e-5)


# ---- what is learnt ----


def on_rank_moves(run: RunConfig, steps: int) -> tuple[list[dict], bool]:
    """Returns the metrics of steps, and whether any bit of any weight has changed."""
    trainer = trainer_of(run)
    before = parameter_hash(trainer.engine)
    try:
        found = [step_of(trainer) for _ in range(steps)]
    finally:
        trainer.source.close()
    return found, parameter_hash(trainer.engine) != before


@pytest.mark.parametrize("layout", ["one rank", "TP2", "CP2", "PP2", "EP2", "DP2"])
def test_a_student_that_is_its_own_teacher_changes_no_bit(ranks, scenes, rows, student, layout):
    """Two names for one teacher; one completion of a prompt, since there is no group."""
    size, sizes = LAYOUTS[layout]
    own = dict.fromkeys(DOMAINS, student)
    settings = dict(num_generations=1, rollout_batch_size=32, lr=1e-2)
    run = distil_run(scenes, rows, own, **settings, **sizes)
    for steps, moved in ranks(size, on_rank_moves, run, 4):
        assert not moved
        for step in steps:
            assert step["train/grad_norm"] == 0 and step["train/policy_loss"] == 0
        for name in ("", "/read", "/reason"):
            assert steps[0][f"teacher/kl{name}"] == steps[2][f"teacher/kl{name}"] == 0
        assert "reward" not in steps[0]


def test_another_teacher_does(ranks, scenes, rows, teachers):
    """The divergence of all is the mean of both teachers' by tokens."""
    ((steps, moved),) = ranks(1, on_rank_moves, distil_run(scenes, rows, teachers), 1)
    assert moved and steps[0]["train/grad_norm"] > 1e-3
    parts = sorted(steps[0][f"teacher/kl/{name}"] for name in DOMAINS)
    assert parts[0] < steps[0]["teacher/kl"] < parts[1]


def on_rank_descent(run: RunConfig, length: float) -> tuple[float, float]:
    """Returns KL(policy || teacher) over the whole vocabulary, a mean over the positions that a
    step's tokens were sampled from, before and after a step of this length along its gradient."""
    trainer = trainer_of(run)
    engine, source = trainer.engine, trainer.source
    batches, _ = source.next_step(False)
    engine.forward_backward(batches, source.objective)
    source.close()

    def distributions() -> torch.Tensor:
        def finish(predictions, batch, positions):
            return predictions.logits().log_softmax(1)

        return torch.cat(engine.forward(batches, lambda batch: batch.sampled, finish))

    with source.sets.swapping() as put:
        put(teacher_set("teacher"))
        of_teacher = distributions()

    def divergence() -> float:
        policy = distributions()
        return float((policy.exp() * (policy - of_teacher)).sum(1).mean())

    before, learn = divergence(), [p for m in engine.modules for p in m.parameters()]
    norm = sum(float(param.main_grad.norm() ** 2) for param in learn) ** 0.5
    with torch.no_grad():
        for param in learn:
            param.sub_(param.main_grad, alpha=length / norm)
    return before, divergence()


def test_a_step_brings_the_student_nearer_to_its_teacher(ranks, scenes, rows, tmp_path):
    """One teacher, without a name or a column; over all tokens that could have been drawn."""
    ranks(1, on_rank_teacher, grpo_run(scenes), tmp_path, 0.5)
    one = dict(teacher_load=[str(tmp_path)], teacher_key=None, rollout_batch_size=4)
    found = [
        ranks(1, on_rank_descent, distil_run(scenes, rows, {}, **one), length)[0]
        for length in (0.02, -0.02)
    ]
    (before, nearer), (again, farther) = found
    # It moves from 0.214 by -4e-4 and by 7e-4; rounding of fp32 is 1e-7.
    assert before == again and nearer < before - 1e-4 and farther > before + 1e-4


ARM = dict(
    reward_funcs=["support.even.even"],
    routing_replay="R3",
    rollout_is="token",
    rollout_is_mode="mask",
    rollout_is_threshold_low=0.5,
)


@pytest.fixture(scope="module")
def arm_of_one_rank(ranks, scenes, rows, teachers):
    return ranks(1, on_rank_steps, distil_run(scenes, rows, teachers, **ARM), 4)[0]


@pytest.mark.parametrize("layout", ["TP2", "CP2", "PP2", "PP2xVPP2", "EP2", "DP2"])
def test_steps_do_not_depend_on_the_layout(ranks, scenes, rows, teachers, arm_of_one_rank, layout):
    """With rewards, replayed routes and MOPD's mask; bounds as in `test_grpo.py`."""
    size, sizes = LAYOUTS[layout]
    run = distil_run(scenes, rows, teachers, **ARM, **sizes)
    for rank in ranks(size, on_rank_steps, run, 4):
        assert_same_steps(arm_of_one_rank, rank, 2e-3)
        assert_same_steps(arm_of_one_rank[:1], rank[:1], 2e-5)


def test_teachers_and_rewards_both_have_a_say(ranks, scenes, rows, teachers, arm_of_one_rank):
    for settings in (dict(teacher_kl_coef=0.5), dict(reward_funcs=[])):
        run = distil_run(scenes, rows, teachers, **(ARM | settings))
        (step,) = ranks(1, on_rank_steps, run, 1)[0]
        assert step["teacher/kl"] == arm_of_one_rank[0]["teacher/kl"]
        ratio = step["train/grad_norm"] / arm_of_one_rank[0]["train/grad_norm"]
        assert abs(ratio - 1) > 1e-3  # rounding is below 1e-6


# ---- resuming, with a reference that moves ----

MOVES = dict(beta=0.1, lr=1e-2, train_iters=8, sync_ref_model=True, ref_model_sync_steps=2)


@pytest.mark.parametrize(("size", "sizes"), [(1, {}), (2, PP2), (2, {})])
def test_a_run_goes_on_to_the_bit(ranks, scenes, rows, teachers, student, tmp_path, size, sizes):
    """The moving average among it; and on another layout as nearly as any steps are the same."""
    settings = MOVES | dict(ref_load=str(student)) | sizes
    run = distil_run(scenes, rows, teachers, **settings)
    whole = ranks(size, on_rank_cut, run, tmp_path / "none", False)
    begun = ranks(size, on_rank_cut, run, tmp_path / "cut", True)
    resumed = ranks(size, on_rank_resume, run, tmp_path / "cut")
    for (steps, end), (first, _), (rest, new_end) in zip(whole, begun, resumed, strict=True):
        assert steps == first + rest and end == new_end
    if size > 1:
        return
    other = distil_run(scenes, rows, teachers, **(settings | PP2))
    for steps, _ in ranks(2, on_rank_resume, other, tmp_path / "cut"):
        assert steps[0]["kl"] == pytest.approx(whole[0][0][4]["kl"], rel=2e-3)
    still = distil_run(scenes, rows, teachers, **(settings | dict(sync_ref_model=False)))
    ((fixed, _),) = ranks(1, on_rank_cut, still, tmp_path / "still", False)
    assert fixed[0]["kl"] <= 1e-9 and whole[0][0][4]["kl"] < fixed[4]["kl"] / 2


def test_a_copied_reference_is_the_policy_of_the_rollout(ranks, scenes, student):
    settings = MOVES | dict(ref_load=str(student), ref_model_mixup_alpha=1.0)
    ((steps, _),) = ranks(1, on_rank_moves, grpo_run(scenes, **settings), 6)
    for step, found in enumerate(steps):
        assert found["kl"] <= 1e-9 if step % 2 == 0 else found["kl"] > 1e-6


# ---- bad input ----


def on_rank_error(run: RunConfig) -> str:
    trainer = None
    try:
        trainer = trainer_of(run)
        trainer.step()
    except (CheckpointError, DataError) as error:
        return str(error)
    finally:
        if trainer is not None:
            trainer.source.close()
    return "nothing"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 389}, "it holds another model: language.vocab_size is 389 there and "),
        ({"num_experts": 4}, "it holds another model: language.num_experts is 4 there and 8 here"),
        ({"hybrid_layer_pattern": "GE *E"}, "it holds another model: hybrid_layer_pattern is"),
    ],
)
def test_a_teacher_of_another_model_is_one_line(
    ranks, scenes, rows, teachers, tmp_path, settings, message
):
    other = grpo_run(scenes, **{k: v for k, v in settings.items() if k != "hybrid_layer_pattern"})
    if "hybrid_layer_pattern" in settings:
        other.model.hybrid_layer_pattern = settings["hybrid_layer_pattern"]
    ranks(1, on_rank_teacher, other, tmp_path, 1.0)
    run = distil_run(scenes, rows, teachers | {"reason": tmp_path})
    for said in ranks(2, on_rank_error, run):
        assert said.startswith(f"teacher reason: cannot load {tmp_path}: {message}"), said
        assert "\n" not in said


def test_a_row_whose_teacher_is_unknown_is_named(ranks, scenes, teachers, tmp_path):
    """On every rank, by file and row; or it is left out."""

    def domain(number: int) -> str:
        return "paint" if number % 6 == 3 else domain_of(number)

    rows = write_domains(scenes, tmp_path, domain)
    for sizes in (PP2, {}):
        run = distil_run(scenes, rows, teachers, **sizes)
        for said in ranks(2, on_rank_error, run):
            assert "domains.jsonl:" in said and "\n" not in said
            assert said.endswith(
                "domain is 'paint'; allowed: the name of a teacher of teacher_load, read, reason"
            )
    run = distil_run(scenes, rows, teachers, on_bad_sample="skip", reward_funcs=[])
    (steps,) = ranks(1, on_rank_steps, run, 1)
    assert steps[0]["train/skipped_samples"] > 0


def test_a_folder_without_a_teacher_is_one_line(ranks, scenes, rows, teachers, tmp_path):
    run = distil_run(scenes, rows, teachers | {"read": Path(tmp_path / "nowhere")})
    for said in ranks(2, on_rank_error, run):
        assert said.startswith(f"cannot load {tmp_path / 'nowhere'}: there is no such folder")
        assert "\n" not in said
