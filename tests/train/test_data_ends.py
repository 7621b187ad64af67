"""When data ends, is bad or changes: nothing that was trained is lost, and nobody is misled."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from megatron_mm.config.settings import DataPhase
from megatron_mm.errors import DataError
from megatron_mm.parallel import groups
from megatron_mm.train import loop
from megatron_mm.train.trainer import Trainer
from support.trainers import LAYOUTS, PP2, digits_run, new_trainer

SAMPLES = 30


def finite_run(scenes: Path, folder: Path, **settings):
    """Packs of 30 samples in all: some three steps of the fifty that are asked for."""
    run = digits_run(scenes, valid_data=None, train_iters=50, packing=True, **settings)
    run.data.train_data = [DataPhase(str(scenes / "mix.jsonl"), SAMPLES)]
    run.checkpoint.save = str(folder / "saved")
    run.logging.output_dir = str(folder / "out")
    return run


def saved(folder: Path) -> dict:
    latest = (folder / "saved" / "latest").read_text().strip()
    return json.loads((folder / "saved" / latest / "run.json").read_text())


def on_rank_train(run) -> tuple[int, str | None]:
    """(iteration at the end, the error that ended it)"""
    made, steps = groups.build(run.parallel), []
    step = Trainer.step

    def counted(trainer):
        metrics = step(trainer)
        steps.append(trainer.iteration)
        return metrics

    Trainer.step = counted
    try:
        loop.train(run, made)
        return steps[-1] if steps else 0, None
    except DataError as error:
        return steps[-1] if steps else 0, str(error)
    finally:
        Trainer.step = step  # the rank lives on


@pytest.mark.parametrize(("size", "sizes"), [(2, {}), (2, PP2)], ids=["DP2", "PP2"])
def test_a_run_whose_packs_are_used_up_ends_well(ranks, scenes, tmp_path, size, sizes):
    run = finite_run(scenes, tmp_path, **sizes)
    ends = ranks(size, on_rank_train, run)
    assert ends == [ends[0]] * size and ends[0][0] > 1 and ends[0][1] is None
    state = saved(tmp_path)
    assert (state["iteration"], state["loader"]["consumed_samples"]) == (ends[0][0], SAMPLES)
    # Queued again, it has its evaluation left.
    run.data.valid_data, run.checkpoint.resume = str(scenes / "valid.jsonl"), True
    run.evaluation.eval_samples, run.evaluation.max_new_tokens = 4, 2
    assert ranks(size, on_rank_train, run) == [(0, None)] * size
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["iteration"] == ends[0][0]
    assert results["layout"]["context_parallel_size"] == 1
    # To start where nothing is left is a mistake, and said.
    run.data.valid_data, run.checkpoint.resume = None, False
    run.checkpoint.load = run.checkpoint.save
    for _, error in ranks(size, on_rank_train, run):
        assert f"the phases' {SAMPLES} samples are used up" in error


@pytest.mark.parametrize("name", ["one rank", "DP2", "PP2"])
def test_what_was_trained_before_a_bad_row_is_saved(ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    lines = (scenes / "mix.jsonl").read_text().splitlines()[:16]
    (tmp_path / "images").symlink_to(scenes / "images")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    run = digits_run(scenes, path, valid_data=None, train_iters=4, **sizes)
    run.checkpoint.save = str(tmp_path / "saved")
    run.logging.output_dir = str(tmp_path / "out")
    order = ranks(1, on_rank_order, digits_run(scenes, path))[0]
    bad = order[9]  # read in the third step, by the second microbatch's replica if there are two
    path.write_text("\n".join(x if i != bad else "{" for i, x in enumerate(lines)) + "\n")
    for iteration, error in ranks(size, on_rank_train, run):
        assert iteration == 2 and error.startswith(f"{path}:{bad + 1}: not valid JSON")
    state = saved(tmp_path)
    assert (state["iteration"], state["loader"]) == (2, {"consumed_samples": 8})
    path.write_text("\n".join(lines) + "\n")
    run.checkpoint.load = run.checkpoint.save
    assert ranks(size, on_rank_train, run) == [(4, None)] * size


def on_rank_order(run) -> list[int]:
    order = new_trainer(run).loader._order
    return [order.row(number)[2] for number in range(16)]


def on_rank_one_cannot_read(run) -> str:
    trainer = new_trainer(run)
    measure = trainer.loader._reader.measure
    if trainer.groups.world.rank() == 1:
        trainer.loader._reader.measure = lambda places: [
            "rows: stale file handle" if place.row == 3 else measure([place])[0] for place in places
        ]
    with pytest.raises(DataError) as caught:
        trainer.step()
    return str(caught.value)


def test_readers_that_see_other_rows_do_not_train_on_other_packs(ranks, scenes, tmp_path):
    run = finite_run(scenes, tmp_path, on_bad_sample="skip")
    for error in ranks(2, on_rank_one_cannot_read, run):
        assert (
            error.startswith("ranks 0 and 1 chose different samples for a step")
            and "\n" not in error
        )


def on_rank_resume(first, second) -> str:
    trainer = Trainer(first, groups.build(first.parallel))
    trainer.step()
    trainer.save()
    trainer.saver.finish()
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        Trainer(second, trainer.groups)
    return heard.getvalue()


def test_a_resume_with_another_order_is_said(ranks, scenes, tmp_path):
    runs = [finite_run(scenes, tmp_path) for _ in range(2)]
    runs[1].checkpoint.load = runs[1].checkpoint.save
    assert "order" not in ranks(1, on_rank_resume, *runs)[0]
    runs[1].training.seed = 2
    (line,) = [x for x in ranks(1, on_rank_resume, *runs)[0].splitlines() if "order" in x]
    assert "warning: the data's order is not the checkpoint's: seed was 1 and is 2" in line


def test_a_run_that_takes_the_place_of_another_says_so(ranks, scenes, tmp_path):
    runs = [finite_run(scenes, tmp_path) for _ in range(2)]
    (line,) = [x for x in ranks(1, on_rank_resume, *runs)[0].splitlines() if "earlier" in x]
    folder = runs[0].checkpoint.save
    assert line.startswith(f"warning: {folder} holds iter_0000001 of an earlier run, which")
    runs[1].checkpoint.load = folder
    assert "earlier" not in ranks(1, on_rank_resume, *runs)[0]
