"""Runs of the trainer on the GPU: supervised with asynchronous saving, resumed; reinforced."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_mm.benchmark.gpu.visit import Row, Visit
from megatron_mm.checkpoint.optimizer_state import collect
from megatron_mm.config import RunConfig, preset, validate
from megatron_mm.config.settings import DataPhase
from megatron_mm.data.tokenizer import train_sentencepiece
from megatron_mm.engine.kernels import choose_kernels
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.rl.settings import RLConfig
from megatron_mm.train.loop import train
from megatron_mm.train.trainer import Trainer

STEPS, CUT = 6, 3  # of the run in one piece; before the one that is resumed
# Mean difference of log-probabilities between rollout and trainer, in fp32 with equal experts: a
# few products of other shapes, each within 1e-6 of a logit of order 1.
LOGPROBS = 1e-4


def write_data(folder: Path) -> None:
    """Writes rows about small random images, and a tokenizer."""
    random, pixels = Random(0), np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True)
    for number in range(24):
        sides = random.choice([(16, 16), (32, 16), (32, 32)])
        image = f"images/{number}.png"
        Image.fromarray(pixels.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(folder / image)
        a, b = random.randrange(50), random.randrange(50)
        images = [image] if number % 4 else []
        question = f"{'<image>' * len(images)}Sum of {a} and {b}?"
        answer = f"{a} plus {b} is {a + b}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": images})
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    texts = [message["content"] for row in rows for message in row["messages"]]
    train_sentencepiece(texts, folder / "tokenizer.model", 384)


def small_run(data: Path, output: Path) -> RunConfig:
    """A run of the preset `tiny` on these rows."""
    run = RunConfig(model=preset("tiny"))
    run.model.hybrid_layer_pattern = "GE L *E J"
    run.data.train_data = [DataPhase(str(data / "rows.jsonl"))]
    run.data.tokenizer_model = str(data / "tokenizer.model")
    run.data.seq_length, run.data.max_num_tiles = 128, 4
    run.optimizer.lr, run.optimizer.lr_decay_style = 1e-3, "constant"
    run.optimizer.lr_warmup_iters = 1
    run.training.micro_batch_size, run.training.global_batch_size = 2, 4
    run.logging.output_dir, run.logging.tensorboard = str(output), False
    run.logging.wandb_mode = "disabled"
    return run


def check(visit: Visit, row: Row) -> None:
    """Trains, resumes, compares; then reinforces."""
    data = visit.folder / "data"
    write_data(data)
    try:
        _check_resume(visit, row, data)
    finally:
        torch.use_deterministic_algorithms(False)
    _check_grpo(visit, row, data)


def _supervised(visit: Visit, data: Path, name: str, steps: int, **checkpoint: Any) -> Trainer:
    run = small_run(data, visit.folder / name)
    run.training.bf16, run.training.train_iters = True, steps
    run.backend.deterministic_mode = True  # resuming is bitwise only then
    for key, value in checkpoint.items():
        setattr(run.checkpoint, key, value)
    validate(run, 1)
    choose_kernels(run)
    return train(run, visit.groups)


def _check_resume(visit: Visit, row: Row, data: Path) -> None:
    """Compares the state of a run in one piece with that of one that was saved while it trained,
    and resumed."""
    folder = str(visit.folder / "checkpoint")
    whole = _state(_supervised(visit, data, "whole", STEPS))
    # One checkpoint is written while the next step runs.
    saving = {"save": folder, "save_interval": CUT - 1, "async_save": True}
    cut = _supervised(visit, data, "cut", CUT, **saving)
    before = _state(cut)
    resumed = _state(_supervised(visit, data, "resumed", STEPS, load=folder))
    if all(torch.equal(before[key], whole[key]) for key in whole):
        row.problems.append(f"steps {CUT + 1} to {STEPS} changed nothing")
    different = [key for key in whole if not torch.equal(whole[key], resumed[key])]
    row.note(tensors=len(whole), different=len(different), first_different=different[:5])
    if different:
        far = max(float((whole[k] - resumed[k]).abs().max()) for k in different)
        row.problems.append(
            f"{len(different)} of {len(whole)} tensors differ after resuming, by up to {far:.2g}, "
            f"{different[0]} first"
        )
    row.text.append(f"resumed after an asynchronous save: {len(whole)} tensors equal bit for bit")


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Parameters, main parameters and moments by name, on the CPU."""
    found = {name: p.detach() for name, p, _ in layouts(*trainer.engine.chunks)}
    for name, kinds in collect(trainer.engine).items():
        found |= {f"{kind}.{name}": value for kind, value in kinds.items()}
    return {name: value.float().cpu().clone() for name, value in found.items()}


def _check_grpo(visit: Visit, row: Row, data: Path) -> None:
    """Takes two steps of GRPO in fp32 with the rollout's experts in the trainer (R3)."""
    run = small_run(data, visit.folder / "grpo")
    run.training.objective, run.training.train_iters = "grpo", 2
    run.training.micro_batch_size, run.training.global_batch_size = 4, 8
    rl = run.section(RLConfig)
    rl.num_generations, rl.max_completion_length = 4, visit.size(32, 6)
    rl.reward_funcs = ["megatron_mm.benchmark.prompts.even"]
    rl.reward_num_workers, rl.routing_replay = 1, "R3"
    validate(run, 1)
    trainer = Trainer(run, visit.groups)
    try:
        steps = [trainer.step() for _ in range(2)]
    finally:
        trainer.source.close()
        trainer.saver.close()
    for number, metrics in enumerate(steps, start=1):
        assert metrics is not None  # nobody stops it
        apart = metrics["train/train_rollout_logprob_abs_diff"]
        row.at_most(f"GRPO step {number}: log-probabilities apart", apart, LOGPROBS)
        norm = metrics["train/grad_norm"]
        row.note({f"GRPO step {number}: gradient norm": norm})
        if not (math.isfinite(norm) and norm > 0):
            row.problems.append(f"GRPO step {number}: gradient norm {norm}")
    row.text.append("GRPO with R3: rollout and trainer agree")
