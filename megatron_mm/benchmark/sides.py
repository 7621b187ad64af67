"""Training step of each side: forward, backward, clipping, AdamW."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megatron_mm.benchmark.hf_weights import copy_weights, randomise  # noqa: F401 - for rl.py too
from megatron_mm.benchmark.measure import timed
from megatron_mm.benchmark.models import image_token
from megatron_mm.config import RunConfig, to_transformers_dict, without_clvr
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.images import normalise
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.optimizer import decays
from megatron_mm.parallel.groups import Groups
from megatron_mm.train.sft import SupervisedFineTuning

LAYOUTS = ("padded", "one by one")  # all samples padded to a rectangle, or each alone
EXPERTS = ("eager", "grouped_mm")  # not batched_mm, which copies the weights for every token


class HasEngine(Protocol):
    engine: Engine


class Ours:
    """Engine, driven as in the training loop."""

    def __init__(self, run: RunConfig, groups: Groups):
        self.engine = Engine.create(run, groups)
        self.objective = SupervisedFineTuning()

    def step(self, batches: list[Microbatch]) -> float:
        found = self.engine.forward_backward(batches, self.objective)
        self.engine.update(self.engine.gradient_norm())
        total, count = sum(metrics.pair("train/lm_loss") for metrics in found).tolist()
        return total / count


class Theirs:
    """transformers' model under torch's AdamW, in the way that is fastest on this machine.

    A batch is computed either as a rectangle, padded on the right with an attention mask, or one
    sample at a time without padding, with accumulated gradients.
    """

    def __init__(self, run: RunConfig):
        settings = run.optimizer
        self.scale = run.data.image_mean, run.data.image_std
        base = replace(run.model, hybrid_layer_pattern=without_clvr(run.model.hybrid_layer_pattern))
        keywords = to_transformers_dict(base, image_token_id=image_token(run))
        keywords.pop("model_type")
        torch.manual_seed(run.training.seed)
        self.model = InternVLForConditionalGeneration._from_config(InternVLConfig(**keywords))
        self.model.train()
        self.clip = settings.clip_grad
        self.padded = True
        groups: dict[bool, list] = {True: [], False: []}
        for name, param in self.model.named_parameters():
            named = name.replace("cls_token", "class_token").replace("_embeddings", "")
            groups[decays(named.replace("position", "positions"), param)].append(param)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": settings.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            fused=True,  # as transformers' Trainer does
        )

    def choose(self, batch: Microbatch) -> dict[str, float]:
        """Tries every way on a batch and keeps the fastest. Returns processor seconds of each, the
        better of two."""
        seconds = {}
        for way in product(LAYOUTS, EXPERTS):
            self.use(", ".join(way))
            calls = self.prepare(batch)
            runs = [timed(partial(self._gradients, calls)).cpu for _ in range(3)]
            seconds[self.way] = min(runs[1:])
        self.optimizer.zero_grad(set_to_none=True)
        self.use(min(seconds, key=seconds.__getitem__))
        return {way: round(value, 4) for way, value in seconds.items()}

    def use(self, way: str) -> None:
        layout, experts = way.split(", ")
        self.way, self.padded = way, layout == "padded"
        self.model.model.language_model.set_experts_implementation(experts)

    def prepare(self, batch: Microbatch) -> list[dict[str, Any]]:
        """Returns the arguments of each forward pass. Collation is not timed on either side."""
        starts = batch.cu_seqlens.tolist()
        rows = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        count = int(batch.loss_mask_T.sum())
        groups = [rows] if self.padded else [[row] for row in rows]
        return [self._rectangle(batch, group, count) for group in groups]

    def _rectangle(self, batch: Microbatch, rows: list[slice], count: int) -> dict[str, Any]:
        width = max(row.stop - row.start for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for index, row in enumerate(rows):
            length = row.stop - row.start
            ids[index, :length] = batch.tokens_T[row]
            mask[index, :length] = 1
            supervised = batch.loss_mask_T[row] > 0
            labels[index, 1:length] = torch.where(supervised, batch.labels_T[row], -100)[:-1]
        made: dict[str, Any] = {"input_ids": ids, "labels": labels, "num_items_in_batch": count}
        if len(rows) > 1:
            made["attention_mask"] = mask
        positions = batch.stream_positions.view(len(batch.stream_tiles), -1)[:, 0]
        inside = (positions >= rows[0].start) & (positions < rows[-1].stop)
        if inside.any():
            shown = batch.pixels_NCHW[batch.stream_tiles[inside]]
            made["pixel_values"] = normalise(shown, *self.scale)
        return made

    def _gradients(self, calls: list[dict[str, Any]]) -> float:
        total = 0.0
        for call in calls:
            loss = self.model(**call, use_cache=False).loss
            loss.backward()
            total += float(loss.detach())
        return total

    def step(self, calls: list[dict[str, Any]]) -> float:
        loss = self._gradients(calls)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def same_weights(ours: HasEngine, theirs: Theirs) -> None:
    copy_weights(theirs.model, ours.engine.chunks[0])
    ours.engine.optimizer.reload_model_params()
