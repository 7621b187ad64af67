"""Runs on preference pairs about the digit scenes."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_mm.config import RunConfig, validate
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.preference import objective
from megatron_mm.rl.completion_batch import CompletionBatch
from megatron_mm.train.trainer import Trainer
from support.fingerprints import state_hash
from support.layouts import gather
from support.trainers import digits_run
from support.weights import randomise_engine


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def write_pairs(scenes: Path, path: Path, count: int = 32) -> Path:
    """Writes pairs about the scenes' mixed questions: the right answer, and another row's; some are
    without an image, some of a long prompt."""
    rows = [json.loads(line) for line in (scenes / "mix.jsonl").read_text().splitlines()]
    made = []
    for n, row in enumerate(rows[:count]):
        answer = row["messages"][-1]["content"]
        others = (other["messages"][-1]["content"] for other in rows[n + 1 :] + rows)
        pair = {
            "messages": row["messages"][:-1],
            "chosen": answer,
            "rejected": next(other for other in others if other != answer),
            "images": row["images"],
        }
        if n % 5 == 4:
            pair["messages"] = [said("user", "How many 3" + "?" * n)]
            del pair["images"]
        made.append(pair)
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    if not (path.parent / "images").exists():
        (path.parent / "images").symlink_to(scenes / "images")
    return path


def pairs_run(scenes: Path, rows: Path, **settings) -> RunConfig:
    """Returns a run of four microbatches of two pairs a step, with MPO's losses."""
    defaults = dict(
        objective="dpo",
        loss_type=["mpo"],
        micro_batch_size=2,
        global_batch_size=8,
        train_iters=4,
        valid_data=None,
        # The losses of a step and their slopes, not what Adam makes of rounding.
        lr=1e-5,
    )
    return digits_run(scenes, rows, **(defaults | settings))


def pairs_trainer(run: RunConfig) -> Trainer:
    """Returns a trainer of random weights, or of the checkpoint's, in a job without groups."""
    validate(run, torch.distributed.get_world_size())
    trainer = Trainer(run, groups.build(run.parallel))
    if not run.checkpoint.load:
        randomise_engine(trainer.engine)
    return trainer


def metrics_of(trainer: Trainer) -> dict[str, float]:
    """Takes a step; returns its metrics without its times."""
    return {name: value for name, value in trainer.step().items() if "time" not in name}


def on_rank_steps(run: RunConfig, steps: int) -> list[dict[str, float]]:
    trainer = pairs_trainer(run)
    try:
        return [metrics_of(trainer) for _ in range(steps)]
    finally:
        trainer.source.close()


def on_rank_save(run: RunConfig, folder: Path, steps: int = 0) -> tuple[list[dict], str]:
    """Takes steps and saves; returns their metrics and the hash of the end's state."""
    run.checkpoint.save = str(folder)
    trainer = pairs_trainer(run)
    found = [metrics_of(trainer) for _ in range(steps)]
    trainer.save()
    trainer.saver.finish()
    trainer.source.close()
    return found, state_hash(trainer.engine)


def on_rank_without_sums(run: RunConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Returns what `on_rank_gradients` does where context-parallel ranks do not add up answers."""
    whole = objective.dist
    objective.dist = SimpleNamespace(all_reduce=lambda *args, **kwargs: None)
    try:
        return on_rank_gradients(run)
    finally:
        objective.dist = whole  # the rank lives on


class Balance:
    """No loss but the routers': the main one is flat, and divided by tokens."""

    router_term = None

    def positions(self, batch):
        return batch.sampled

    def loss(self, predictions, batch, positions_K, pg, metrics):
        total = predictions.logprobs(batch.labels_T[positions_K]).sum() * 0
        return total, batch.loss_mask_T[positions_K].sum().int()


def on_rank_balances(run: RunConfig) -> tuple[float, float]:
    """Returns the gradient norms of a step of pairs, and of the same microbatches as mere
    completions of which no more is asked than balance."""
    trainer = pairs_trainer(run)
    batches, _ = trainer.source.next_step(False)
    plain = [
        CompletionBatch(**{f.name: getattr(batch, f.name) for f in fields(CompletionBatch)})
        for batch in batches
    ]
    norms = []
    for some, what in ((batches, trainer.source.objective), (plain, Balance())):
        trainer.engine.forward_backward(some, what)
        norms.append(trainer.engine.gradient_norm())
    trainer.source.close()
    return norms[0], norms[1]


def _passed(trainer: Trainer) -> dict[str, float]:
    """Runs forward and backward over the next step, without an update."""
    batches, _ = trainer.source.next_step(False)
    parts = trainer.engine.forward_backward(batches, trainer.source.objective)
    metrics = trainer._reduced(parts, batches) | trainer.source.metrics
    trainer.source.stepped(metrics)
    return metrics


def _move_away(trainer: Trainer) -> None:
    """Moves the weights away from the reference, by the same amounts on every layout."""
    with torch.no_grad():
        for _, param, _ in layouts(*trainer.engine.modules):
            if param.dim() > 1:
                param.mul_(1.02)


def on_rank_gradients(run: RunConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Returns the metrics of a step at the reference and of one away from it, and on rank 0 the
    whole gradient of the second."""
    run.parallel.use_distributed_optimizer = False  # gradients stay whole on every replica
    trainer = pairs_trainer(run)
    at = _passed(trainer)
    _move_away(trainer)
    away = _passed(trainer)
    blocks = {
        name: (layout.global_shape, layout.block, layout.held(param.main_grad).clone())
        for name, param, layout in layouts(*trainer.engine.modules)
        if param.requires_grad
    }
    trainer.source.close()
    return [at, away], gather(blocks)
