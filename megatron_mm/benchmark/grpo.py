"""GRPO step of each side: completions, rewards, advantages, gradients, update."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from megatron_mm.benchmark.measure import timed
from megatron_mm.benchmark.prompts import Prompts, even, our_tokenizer, their_tokenizer
from megatron_mm.benchmark.sides import EXPERTS, Theirs
from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel.groups import Groups
from megatron_mm.rl.rollout.experience import Experience
from megatron_mm.rl.settings import RLConfig

PIP = (
    "pip install -c constraints.txt trl==1.16.0 (the extra [bench]); or into another folder with "
    "--target, and that folder in PYTHONPATH"
)


def trl_is_missing(trainer: str) -> str | None:
    """Returns why a trainer of TRL cannot be imported, in one line; None if it can."""
    try:
        getattr(importlib.import_module("trl"), trainer)  # TRL imports it only now
    except (
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: TRL without one of its dependencies
        return f"not installed ({str(error).splitlines()[-1]}): {PIP}"
    return None


def grpo_run(run: RunConfig, prompts: int, group: int, tokens: int, longest: int) -> RunConfig:
    """Turns `run` into a GRPO run whose rollouts serve one step of one microbatch."""
    run.training.objective = "grpo"
    run.training.global_batch_size = run.training.micro_batch_size = prompts * group
    run.data.seq_length = longest + tokens
    rl = run.section(RLConfig)
    rl.num_generations, rl.max_num_seqs = group, prompts * group
    rl.max_completion_length = tokens
    rl.reward_funcs, rl.reward_num_workers = ["megatron_mm.benchmark.prompts.even"], 1
    rl.reward_batch_size = prompts * group
    return run


class OurGRPO:
    """Rollout and update as in the training loop. Close it, because rewards run in a process."""

    def __init__(self, run: RunConfig, groups: Groups, prompts: Prompts):
        self.engine = Engine.create(run, groups)
        self.source = Experience(run, self.engine, our_tokenizer(run), prompts)

    def step(self) -> float:
        """Runs a step. Returns the mean length of a completion."""
        batches, _ = self.source.next_step(False)
        self.engine.forward_backward(batches, self.source.objective)
        self.engine.update(self.engine.gradient_norm())
        return float(torch.cat([batch.lengths_N for batch in batches]).float().mean())

    def close(self) -> None:
        self.source.close()


class TheirGRPO:
    """TRL's trainer with the fused AdamW of `Theirs`.

    Callbacks and logging around a step are left out on both sides. bf16 and gradient checkpointing,
    which costs time, are off.
    """

    def __init__(self, run: RunConfig, theirs: Theirs, prompts: Prompts):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        rl, size = run.section(RLConfig), run.training.global_batch_size
        settings = GRPOConfig(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=size,
            num_generations=rl.num_generations,
            max_completion_length=rl.max_completion_length,
            temperature=rl.temperature,
            top_k=0,
            beta=0.0,
            loss_type="grpo",
            epsilon=0.2,
            max_grad_norm=run.optimizer.clip_grad,
            lr_scheduler_type="constant",
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            max_steps=run.training.train_iters,
        )
        rows = [{"prompt": p.row["messages"][0]["content"]} for p in prompts.prompts]
        self.theirs = theirs
        self.trainer = GRPOTrainer(
            theirs.model,
            even,
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=their_tokenizer(run),
            optimizers=(theirs.optimizer, None),
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.loader = self.trainer.get_train_dataloader()
        self.batches = iter(self.loader)

    def step(self) -> float:
        """Runs a step. Returns the mean length of a completion."""
        model, trainer = self.theirs.model, self.trainer
        model.train()
        trainer.training_step(model, self._next(), None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        self.theirs.optimizer.step()
        model.zero_grad()
        return trainer._metrics["train"]["completions/mean_length"][-1]

    def _next(self) -> list[dict[str, Any]]:
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)

    def choose(self) -> dict[str, float]:
        """Chooses the fastest implementation of experts. Returns processor seconds of a step with
        each, the second of two."""
        seconds = {}
        for experts in EXPERTS:
            self.theirs.model.model.language_model.set_experts_implementation(experts)
            self.step()
            seconds[experts] = round(timed(self.step).cpu, 4)
        fastest = min(seconds, key=seconds.__getitem__)
        self.theirs.model.model.language_model.set_experts_implementation(fastest)
        return seconds
