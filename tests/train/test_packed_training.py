"""Packs on real ranks: the same steps under any layout, resumed under another, with workers."""

from __future__ import annotations

import json

import pytest

from megatron_mm.config import dump_yaml
from megatron_mm.report.metrics_log import read_metrics
from support.launches import ALONE, TORCHRUN, launch
from support.trainers import LOSS_TOLERANCE, PP2, digits_run, new_trainer


def packed_run(scenes, **settings):
    """Two packs of up to 256 tokens a step, some twelve samples."""
    return digits_run(scenes, packing=True, **settings)


def on_rank_steps(run, steps: int, save: bool = False) -> dict:
    """`steps` steps, then one that is abandoned: what was read, lost and left as the state."""
    trainer = new_trainer(run)
    first, read = trainer.iteration, []
    next_batch = trainer.loader.next_batch

    def noted():
        batches = next_batch()
        read.append([name for batch in batches for name in batch.samples])
        return batches

    trainer.loader.next_batch = noted
    metrics = [trainer.step() for _ in range(steps)]
    before = trainer.loader.state_dict()
    trainer.request_stop()
    assert trainer.step() is None and trainer.iteration == first + steps
    assert trainer.loader.state_dict() == before  # what it read will be read again
    if save:
        trainer.save()
    return {
        "reader": trainer.groups.is_reader,
        "names": read[:steps],
        "losses": [step["train/lm_loss"] for step in metrics],
        "consumed": [step["train/consumed_samples"] for step in metrics],
        "state": before,
    }


def job(found: list[dict]) -> list[list[str]]:
    """For each step, the samples of all replicas."""
    readers = [rank["names"] for rank in found if rank["reader"]]
    return [sorted(sum(parts, [])) for parts in zip(*readers, strict=True)]


@pytest.mark.parametrize(("size", "sizes"), [(1, {}), (2, PP2)], ids=["one rank", "PP2"])
def test_two_replicas_train_the_same_packs_and_fewer_go_on(ranks, scenes, tmp_path, size, sizes):
    whole = ranks(1, on_rank_steps, packed_run(scenes), 4)
    run = packed_run(scenes, save=str(tmp_path / "saved"))
    begun = ranks(2, on_rank_steps, run, 2, True)
    saved = json.loads((tmp_path / "saved" / "iter_0000002" / "run.json").read_text())["loader"]
    assert saved == begun[0]["state"] == begun[1]["state"] and saved["held"]
    run = packed_run(scenes, load=str(tmp_path / "saved"), **sizes)
    ended = ranks(size, on_rank_steps, run, 2)
    assert job(begun) + job(ended) == job(whole)
    assert all(min(len(names) for names in rank["names"]) > 2 for rank in begun)
    for rank in [*begun, *ended]:
        part = slice(0, 2) if rank in begun else slice(2, 4)
        assert rank["losses"] == pytest.approx(whole[0]["losses"][part], rel=LOSS_TOLERANCE)
        assert rank["consumed"] == whole[0]["consumed"][part]


@pytest.mark.launches
def test_a_launch_with_workers_is_one_without(scenes, tmp_path):
    """Two replicas, each with a worker of its own reader's, beside one process without."""
    settings = dict(valid_data=None, train_iters=3)
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(packed_run(scenes, **settings)))
    records = {}
    for name, command, workers in (("two", TORCHRUN, 1), ("one", ALONE, 0)):
        out = tmp_path / name
        done = launch(command, "--config", config, "--output-dir", out, "--num-workers", workers)
        assert done.returncode == 0, done.stderr
        records[name] = read_metrics(out / "metrics.jsonl")
    assert len(records["two"]) == 3
    for two, one in zip(records["two"], records["one"], strict=True):
        assert two["train/lm_loss"] == pytest.approx(one["train/lm_loss"], rel=LOSS_TOLERANCE)
        for exact in ("train/tokens", "train/consumed_samples", "train/skipped_samples"):
            assert two[exact] == one[exact]
