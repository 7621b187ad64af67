"""The training loop on real ranks: resuming, layouts, stopping.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from megatron_mm.config import MODULES
from megatron_mm.config.settings import DataPhase, ParallelConfig
from megatron_mm.errors import CheckpointError, DataError
from megatron_mm.evaluation import evaluate as evaluation
from megatron_mm.generation.generate import _Generation
from megatron_mm.parallel import groups
from megatron_mm.report.metrics_log import read_metrics
from megatron_mm.train import loop
from megatron_mm.train.trainer import Trainer
from support.fingerprints import parameter_hash, state_hash
from support.trainers import (
    CP2,
    EP2,
    LAYOUTS,
    LOSS_TOLERANCE,
    PP2,
    TP2,
    VPP2,
    batch_hash,
    digits_run,
    peek,
)
from support.weights import move_looks_off_zero

# ---- stop and resume ----

STEPS = 12
LATEST_OF = "iter_0000002"
CUTS = (1, 2, 3, 4, 7, 10)  # the second phase of the data begins within step 4


def fingerprint(trainer) -> tuple:
    """Everything that decides how the run goes on. Hashes, so equal means bitwise identical."""
    loader = trainer.loader
    position = loader.consumed_samples
    upcoming = [batch_hash(batch) for batch in loader.next_batch()]
    loader.consumed_samples = position
    return trainer.iteration, position, state_hash(trainer.engine), upcoming


def advance(trainer, steps: int, after=lambda trainer: None) -> list[tuple]:
    """Train up to `steps`; a fingerprint after each one."""
    found = []
    while trainer.iteration < steps:
        metrics = trainer.step()
        # The model draws no random numbers, so draw some of every kind: a generator that a
        # resumed run does not restore is then seen.
        random.random(), np.random.random(), torch.rand(1)
        found.append((metrics["train/lm_loss"], metrics["train/grad_norm"], *fingerprint(trainer)))
        after(trainer)
    return found


def on_rank_cut_and_resume(run, folder) -> tuple[list, list, dict]:
    made = groups.build(run.parallel)
    rng_at_start(0)
    whole = advance(Trainer(run, made), STEPS)

    def save(trainer):
        if trainer.iteration in CUTS:
            run.checkpoint.save = str(folder / f"cut{trainer.iteration}")
            trainer.save()

    rng_at_start(0)
    saving = advance(Trainer(run, made), STEPS, after=save)
    resumed = {}
    for cut in CUTS:
        rng_at_start(cut)  # other than at the cut
        run.checkpoint.load = str(folder / f"cut{cut}")
        resumed[cut] = advance(Trainer(run, made), STEPS)
    return whole, saving, resumed


def rng_at_start(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("name", ["one rank", "PP2", "DP2", "PP2, encoder beside"])
def test_a_run_cut_anywhere_goes_on_to_the_bit(ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    run = digits_run(scenes, lr_warmup_iters=3, train_iters=STEPS, **sizes)
    # 6 rows are read more than once before the next phase begins within step 4.
    run.data.train_data.insert(0, DataPhase(str(scenes / "align.jsonl"), 14))
    for whole, saving, resumed in ranks(size, on_rank_cut_and_resume, run, tmp_path):
        assert len({entry[4] for entry in whole}) == STEPS  # each step changed the state
        assert saving == whole, "saving changed the run"
        for cut, rest in resumed.items():
            assert rest == whole[cut:], f"cut after step {cut}"


# ---- layouts ----


def on_rank_losses(*runs) -> list[list[dict]]:
    made = groups.build(runs[0].parallel)
    found = []
    for run in runs:
        trainer = Trainer(run, made)
        move_looks_off_zero(trainer.engine)
        found.append([trainer.step() for _ in range(4)])
    return found


@pytest.fixture(scope="module")
def one_rank_losses(ranks, scenes):
    return ranks(1, on_rank_losses, digits_run(scenes))[0][0]


OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)
MORE_LAYOUTS = LAYOUTS | {
    "DP2 without distributed optimizer": (2, dict(use_distributed_optimizer=False)),
    "EP2 without distributed optimizer": (2, EP2 | dict(use_distributed_optimizer=False)),
    "DP2 overlapped": (2, OVERLAP),
    "PP2 overlapped": (2, PP2 | OVERLAP),
    "PP2xVPP2 overlapped": (2, PP2 | VPP2 | OVERLAP),
    "CP2 overlapped": (2, CP2 | OVERLAP),
    # The balancing loss is not counted again in the repeated pass.
    "one rank, recomputing": (1, dict(recompute_granularity="full")),
}


@pytest.mark.parametrize("name", [name for name in MORE_LAYOUTS if name != "one rank"])
def test_losses_do_not_depend_on_the_layout(ranks, scenes, one_rank_losses, name):
    size, sizes = MORE_LAYOUTS[name]
    found = [metrics for (metrics,) in ranks(size, on_rank_losses, digits_run(scenes, **sizes))]
    for step, expected in enumerate(one_rank_losses):
        for rank in range(size):
            metrics = found[rank][step]
            assert metrics["train/lm_loss"] == pytest.approx(
                expected["train/lm_loss"], rel=LOSS_TOLERANCE
            )
            # Norms amplify more: 1e-5 was measured at the fourth step.
            assert metrics["train/grad_norm"] == pytest.approx(
                expected["train/grad_norm"], rel=1e-4
            )
            for exact in (
                "train/tokens",
                "train/skipped_samples",
                "train/consumed_samples",
                "train/learning_rate",
            ):
                assert metrics[exact] == expected[exact]
        balance = [found[rank][step]["moe/load_balancing_loss"] for rank in range(size)]
        # Counts of tokens per expert enter it: a token on the fence between two experts moves
        # it by about 1 / (layers x experts x tokens).
        assert balance[0] == pytest.approx(expected["moe/load_balancing_loss"], rel=1e-3)


def test_the_tolerance_would_notice_a_module_that_is_not_updated(ranks, scenes, one_rank_losses):
    """Least is the router: the loss of the fourth step is off by 1.6e-4."""
    built = [module for module in MODULES if module != "avm"]  # the run has no glimpses
    runs = [digits_run(scenes, **{f"freeze_{module}": True}) for module in built]
    for module, other in zip(built, ranks(1, on_rank_losses, *runs)[0], strict=True):
        gap = abs(other[3]["train/lm_loss"] / one_rank_losses[3]["train/lm_loss"] - 1)
        assert gap > 10 * LOSS_TOLERANCE, module


# ---- stopping ----


def on_rank_stop(run, folder, asked: int) -> dict:
    """`train` with one rank asked to stop after two steps."""
    run.logging.output_dir, run.checkpoint.save = str(folder / "out"), str(folder / "saved")
    trainers = []
    step = Trainer.step

    def step_then_ask(trainer):
        trainers.append(trainer)
        metrics = step(trainer)
        if trainer.iteration == 2 and trainer.groups.world.rank() == asked:
            trainer.request_stop(15, None)
        return metrics

    Trainer.step = step_then_ask
    try:
        trainer = loop.train(run, groups.build(run.parallel))
    finally:
        Trainer.step = step
    return {
        "iteration": trainer.iteration,
        "position": trainer.loader.consumed_samples,
        "asked": trainer.stop_requested,
        "steps": len(trainers),
        "next": [batch_hash(batch) for batch in peek(trainer)],
        "all": parameter_hash(trainer.engine),
    }


@pytest.mark.parametrize(("name", "asked"), [("PP2", 1), ("DP2", 0), ("DP2", 1)])
def test_one_rank_asked_to_stop_stops_all_after_the_same_step(ranks, scenes, tmp_path, name, asked):
    size, sizes = LAYOUTS[name]
    found = ranks(size, on_rank_stop, digits_run(scenes, **sizes), tmp_path, asked)
    for rank, state in enumerate(found):
        assert state["asked"] == (rank == asked)
        # The third call read a batch, then gave it back.
        assert (state["iteration"], state["position"], state["steps"]) == (2, 8, 3)
    assert (tmp_path / "saved" / "latest").read_text().strip() == "iter_0000002"
    saved = json.loads((tmp_path / "saved" / "iter_0000002" / "run.json").read_text())
    assert (saved["iteration"], saved["loader"]) == (2, {"consumed_samples": 8})
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2]
    assert not (tmp_path / "out" / "results.json").exists()  # a stopped run is not evaluated


def on_rank_stop_in_evaluation(run, folder) -> dict:
    """The second rank is asked to stop while the evaluation after step 2 goes on."""
    run.logging.output_dir, run.checkpoint.save = str(folder / "out"), str(folder / "saved")
    run.evaluation.eval_interval, run.evaluation.eval_batch_size = 2, 4
    seen = []
    step, prefill, forward = Trainer.step, _Generation.prefill, _Generation.step

    def step_and_note(trainer):
        seen.append(trainer)
        return step(trainer)

    def prefill_then_ask(generation):
        seen.append("turn")
        prefill(generation)
        if seen[0].groups.world.rank() == 1:
            seen[0].request_stop()

    def note(generation):
        seen.append("turn")
        forward(generation)

    Trainer.step = step_and_note
    _Generation.prefill, _Generation.step = prefill_then_ask, note
    try:
        trainer = loop.train(run, groups.build(run.parallel))
    finally:
        Trainer.step, _Generation.prefill, _Generation.step = step, prefill, forward
    turns = seen.count("turn")
    return {"iteration": trainer.iteration, "turns": turns, "another": trainer.stopped_by_another}


@pytest.mark.parametrize("steps", [12, 2], ids=["between steps", "at the end"])
def test_a_stop_does_not_wait_for_an_evaluation(ranks, scenes, tmp_path, steps):
    run = digits_run(scenes, train_iters=steps, **PP2)  # 24 questions, 4 at a time: six prefills
    found = ranks(2, on_rank_stop_in_evaluation, run, tmp_path)
    for state, another in zip(found, (True, False), strict=True):
        assert state == {"iteration": 2, "turns": 1, "another": another}
    assert (tmp_path / "saved" / "latest").read_text().strip() == "iter_0000002"
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2]


def on_rank_interval(run, folder) -> int:
    run.checkpoint.save, run.checkpoint.save_interval = str(folder / "saved"), 2
    run.logging.output_dir, run.data.valid_data = str(folder / "out"), None
    return loop.train(run, groups.build(run.parallel)).iteration


def on_rank_save_elsewhere(run, first, second) -> list[int | None]:
    """Trains two steps into a folder; goes on for none from there, into another and into the same.
    Returns the step that each run had saved as it began."""
    made, begun = groups.build(run.parallel), []
    for load, save in ((None, first), (first, second), (first, first), (first / LATEST_OF, first)):
        run.checkpoint.load = load and str(load)
        run.checkpoint.save = str(save)
        begun.append(Trainer(run, made).saved)
        loop.train(run, made)
    return begun


def test_a_run_that_goes_on_from_another_folder_saves_to_its_own(ranks, scenes, tmp_path):
    """Even if it has nothing left to do: whoever resumes from there finds it."""
    run = digits_run(scenes, train_iters=2, output_dir=str(tmp_path / "out"))
    run.data.valid_data = None
    first, second = tmp_path / "first", tmp_path / "second"
    (begun,) = ranks(1, on_rank_save_elsewhere, run, first, second)
    assert begun == [None, None, 2, 2]
    assert (second / LATEST_OF / "run.json").exists()
    assert (second / "latest").read_text() == f"{LATEST_OF}\n"


def test_a_report_needs_no_questions(ranks, scenes, tmp_path):
    run = digits_run(scenes, train_iters=2, report=True, output_dir=str(tmp_path / "out"))
    run.data.valid_data = None
    ranks(1, on_rank_trains, run)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Training</h2>" in page and "<h2>Accuracy by skill</h2>" not in page


def on_rank_trains(run) -> None:
    loop.train(run, groups.build(run.parallel))


def test_saves_every_interval_and_at_the_end(ranks, scenes, tmp_path):
    run = digits_run(scenes, train_iters=3, **TP2)
    assert ranks(2, on_rank_interval, run, tmp_path) == [3, 3]
    saved = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert saved == ["iter_0000002", "iter_0000003", "latest"]


def on_rank_outputs(run) -> str:
    try:
        loop.train(run, groups.build(run.parallel))
    except (DataError, CheckpointError) as problem:
        return str(problem)
    return "no error"


@pytest.mark.parametrize(
    ("setting", "words"),
    [("output_dir", "cannot write the run's output: "), ("save", "cannot save to ")],
)
def test_outputs_that_cannot_be_written_are_one_error_before_the_first_step(
    ranks, scenes, tmp_path, setting, words
):
    (tmp_path / "taken").write_text("a file where a folder should be")
    settings = {"output_dir": str(tmp_path / "out")} | {setting: str(tmp_path / "taken")}
    first, second = ranks(2, on_rank_outputs, digits_run(scenes, **settings))
    assert first == second and first.startswith(words)
    assert str(tmp_path / "taken") in first
    assert read_metrics(tmp_path / "out" / "metrics.jsonl") == []


def on_rank_record(path) -> str:
    made = groups.build(ParallelConfig(pipeline_model_parallel_size=2))
    try:
        evaluation.write_record(made, path, {"a": 1})
    except DataError as problem:
        return str(problem)
    return path.read_text()


def test_a_record_that_cannot_be_written_is_everyones_error(ranks, tmp_path):
    assert ranks(2, on_rank_record, tmp_path / "new" / "a.json") == ['{"a": 1}\n'] * 2
    (tmp_path / "taken").write_text("a file where a folder should be")
    first, second = ranks(2, on_rank_record, tmp_path / "taken" / "a.json")
    assert first == second and first.startswith(f"cannot write {tmp_path / 'taken' / 'a.json'}: ")
