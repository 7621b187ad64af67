"""DPO step of each side: what the reference says, gradients, update.

Both hold the reference as a second set of weights and ask it within the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import torch

from megatron_mm.benchmark.measure import timed
from megatron_mm.benchmark.pairs import Handed, TextPair, end_token, their_rows
from megatron_mm.benchmark.prompts import our_tokenizer, their_tokenizer
from megatron_mm.benchmark.sides import EXPERTS, Theirs
from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel.groups import Groups
from megatron_mm.preference.settings import DPOConfig
from megatron_mm.preference.source import PairSteps
from megatron_mm.rl.completion_batch import CompletionBatch

LAYOUTS = ("padded", "pair by pair")  # all sides padded to a rectangle, or those of one pair
MOVED = 0.5  # standard deviations of a matrix by which the check moves its weights

Calls = list[dict[str, torch.Tensor]]


def dpo_run(run: RunConfig, pairs: int, longest: int) -> RunConfig:
    """Turns `run` into a DPO run whose steps have one microbatch."""
    run.training.objective = "dpo"
    run.training.global_batch_size = run.training.micro_batch_size = pairs
    run.data.seq_length = longest
    return run


class OurDPO:
    """Reference, gradients and update as in the training loop."""

    def __init__(self, run: RunConfig, groups: Groups):
        self.engine = Engine.create(run, groups)
        loader: Any = Handed()
        self.loader = loader
        self.source = PairSteps(run, self.engine, our_tokenizer(run), loader)

    def gradients(self, batch: CompletionBatch) -> float:
        """Computes the gradients of a step. Returns the mean loss of its pairs."""
        self.loader.batch = batch
        batches, _ = self.source.next_step(False)
        found = self.engine.forward_backward(batches, self.source.objective)
        total, count = sum(metrics.pair("train/dpo_loss") for metrics in found).tolist()
        return total / count

    def norm(self) -> float:
        return self.engine.gradient_norm()

    def step(self, batch: CompletionBatch) -> float:
        loss = self.gradients(batch)
        self.engine.update(self.norm())
        return loss


class TheirDPO:
    """TRL's trainer with the fused AdamW of `Theirs`, in the way that is fastest on this machine:
    all sides of a step as a rectangle, or those of one pair, with accumulated gradients.

    Callbacks and logging around a step are left out on both sides. bf16, gradient checkpointing,
    which costs time, and the balancing loss are off.
    """

    def __init__(self, run: RunConfig, theirs: Theirs, pairs: Sequence[TextPair]):
        from datasets import Dataset, disable_progress_bars
        from trl import DPOConfig as TheirConfig
        from trl import DPOTrainer

        disable_progress_bars()
        dpo = run.section(DPOConfig)
        settings = TheirConfig(
            output_dir="unused",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=run.training.global_batch_size,
            beta=dpo.dpo_beta,
            loss_type=dpo.loss_type,
            max_length=None,
            router_aux_loss_coef=0.0,
            max_grad_norm=run.optimizer.clip_grad,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            max_steps=run.training.train_iters,
        )
        self.theirs = theirs
        self.trainer = DPOTrainer(
            theirs.model,
            deepcopy(theirs.model).eval().requires_grad_(False),
            settings,
            train_dataset=Dataset.from_list(their_rows(pairs)),
            processing_class=their_tokenizer(run, end_token(run)),
            optimizers=(theirs.optimizer, None),
        )
        self.rows = list(self.trainer.train_dataset)
        self.padded = True

    def use(self, way: str) -> None:
        layout, experts = way.split(", ")
        self.padded = layout == "padded"
        for model in (self.theirs.model, self.trainer.ref_model):
            model.model.language_model.set_experts_implementation(experts)

    def prepare(self, places: Sequence[int]) -> Calls:
        """Returns the inputs of each pass over some pairs, given by their places. Collation is not
        timed on either side."""
        rows = [self.rows[place] for place in places]
        groups = [rows] if self.padded else [[row] for row in rows]
        return [self.trainer.data_collator(group) for group in groups]

    def choose(self, places: Sequence[int]) -> dict[str, float]:
        """Tries every way on some pairs. Returns processor seconds of each, the better of two."""
        seconds = {}
        for way in map(", ".join, product(LAYOUTS, EXPERTS)):
            self.use(way)
            calls = self.prepare(places)
            runs = [timed(partial(self.gradients, calls)).cpu for _ in range(3)]
            seconds[way] = round(min(runs[1:]), 4)
        return seconds

    def gradients(self, calls: Calls) -> float:
        """Computes the gradients of a step. Returns the mean loss of its pairs."""
        model, trainer = self.theirs.model, self.trainer
        model.zero_grad()
        trainer.current_gradient_accumulation_steps = len(calls)
        return sum(float(trainer.training_step(model, call, None)) for call in calls)

    def norm(self) -> float:
        """Clips the gradients; returns their norm before."""
        parameters, most = self.theirs.model.parameters(), self.trainer.args.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(parameters, most))

    def step(self, calls: Calls) -> float:
        loss = self.gradients(calls)
        self.norm()
        self.theirs.optimizer.step()
        return loss

    @torch.no_grad()
    def move(self, seed: int) -> None:
        """Moves the matrices of the model, not of its reference."""
        g = torch.Generator().manual_seed(seed)
        for weight in self.theirs.model.parameters():
            if weight.dim() > 1:
                noise = torch.empty_like(weight).normal_(0.0, 1.0, generator=g)
                weight.add_(noise, alpha=MOVED * float(weight.std()))
