"""Runs of on-policy distillation with two teachers about the digit scenes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.config import RunConfig
from megatron_mm.config.settings import DataPhase
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.rl.completion_batch import CompletionBatch, pack_step
from megatron_mm.rl.logprobs import measure_logprobs, trainer_logprobs
from support.grpo_runs import grpo_run, trainer_of

DOMAINS = ("read", "reason")


def domain_of(number: int) -> str:
    """Returns the domain of a row: two of three are the second, in no order."""
    return DOMAINS[zlib.crc32(str(number).encode()) % 3 > 0]


def write_domains(scenes: Path, folder: Path, domain=domain_of) -> Path:
    """Writes the scenes' mixed questions with a column that names a domain."""
    lines = (scenes / "mix.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"domain": domain(n)} for n, line in enumerate(lines)]
    (folder / "images").symlink_to(scenes / "images")
    path = folder / "domains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def distil_run(scenes: Path, rows: Path, teachers: Mapping[str, Path], **settings) -> RunConfig:
    """Returns a run of two steps a rollout that learns from teachers alone."""
    defaults = dict(
        train_data=[DataPhase(str(rows))],
        teacher_load=[f"{name}={folder}" for name, folder in teachers.items()],
        teacher_key="domain",
        teacher_kl_coef=1.0,
        reward_funcs=[],
        weight_decay=0.0,
    )
    return grpo_run(scenes, **(defaults | settings))


def on_rank_teacher(run: RunConfig, folder: Path, factor: float) -> None:
    """Saves the runs' random weights with every matrix multiplied."""
    run.checkpoint.save = str(folder)
    trainer = trainer_of(run)
    with torch.no_grad():
        for _, param, _ in layouts(*trainer.engine.modules):
            if param.dim() > 1:
                param.mul_(factor)
    trainer.engine.optimizer.reload_model_params()
    trainer.save()
    trainer.saver.finish()
    trainer.source.close()


def on_rank_teachers(run: RunConfig, teachers: Mapping[str, Path]) -> list[dict]:
    """Draws a rollout and measures it; then loads every teacher in turn and lets each answer for
    all microbatches. Returns, on readers, for each completion its "place" (row, number in its
    group), its row's "domain", what was "measured", and what each of the teachers said."""
    trainer = trainer_of(run)
    engine, source = trainer.engine, trainer.source
    try:
        scored, steps = source.collector.collect()
        chosen = [
            [p for p, of in enumerate(steps.of_group) if of == step] for step in range(steps.count)
        ]
        batches: list[CompletionBatch] = list(
            chain.from_iterable(
                pack_step(engine, trainer.tokenizer, scored.groups, some) for some in chosen
            )
        )
        known = measure_logprobs(
            engine, batches, scored.completions, source.rl, steps=2, sets=source.sets
        )
        said = {}
        for name, folder in teachers.items():
            sharded.load(engine, folder, finetune=True)
            said[name] = trainer_logprobs(engine, batches, source.rl.temperature)
        found, size = [], source.rl.num_generations
        if not engine.groups.is_reader:
            return []
        for n, batch in enumerate(batches):
            measured = batch.split(known[n].teacher_T)
            for place, member in enumerate(batch.members):
                group = scored.groups[member // size]
                one = {"place": (group.number, member % size), "measured": measured[place]}
                one["domain"], one["batch"] = group.asked.row["domain"], batch.teacher
                one["count"] = len(batches)
                one |= {name: batch.split(of[n])[place] for name, of in said.items()}
                found.append(one)
        return found
    finally:
        source.close()
