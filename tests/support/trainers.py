"""Runs of a small model on the digit scenes, and what tests ask of them on every rank."""

from __future__ import annotations

import hashlib
import zlib
from functools import reduce
from pathlib import Path

import torch

from megatron_mm.config import MemoryConfig, RunConfig, preset
from megatron_mm.config.settings import DataPhase
from megatron_mm.config.tree import leaves
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.trainer import Trainer
from support.batches import values_of

TP2 = dict(tensor_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
CP2 = dict(context_parallel_size=2)
VPP2 = dict(virtual_pipeline_model_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2)
# Ranks and settings. What is left of the ranks is data parallel; the distributed optimizer
# is on by default.
MODULES = ("vision", "projector", "language", "clvr", "router")
LAYOUTS = {
    "one rank": (1, {}),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "EP2": (2, EP2),
    "DP2": (2, {}),
    "CP2": (2, CP2),
    "PP2xVPP2": (2, PP2 | VPP2),
    "TP2xPP2": (4, TP2 | PP2),
    "PP2xVPP2xCP2": (4, PP2 | VPP2 | CP2),
}
# Two stages of it exchange a refinement that waits for its J.
PATTERN = "GE L *E J"


def digits_run(scenes: Path, rows: Path | None = None, **settings) -> RunConfig:
    """The tiny preset with fewer layers.

    Args:
        rows: the training rows; default the scenes' mixed questions.
        settings: any settings of a run; their names are unique.
    """
    run = RunConfig(model=preset("tiny"))
    run.model.hybrid_layer_pattern = PATTERN
    run.data.train_data = [DataPhase(str(rows or scenes / "mix.jsonl"))]
    run.data.valid_data = str(scenes / "valid.jsonl")
    run.data.tokenizer_model = str(scenes / "tokenizer.model")
    run.data.seq_length, run.data.max_num_tiles = 128, 9
    run.optimizer.lr = 1e-3
    run.training.seed = 1
    run.training.train_iters = 12
    run.training.micro_batch_size, run.training.global_batch_size = 2, 4
    run.logging.wandb_mode, run.logging.tensorboard = "disabled", False
    paths = {leaf.name: leaf.path for leaf in leaves(RunConfig)}
    for name, value in settings.items():
        setattr(reduce(getattr, paths[name][:-1], run), name, value)
    return run


def with_two_memories(run: RunConfig) -> RunConfig:
    """The run with two looks: the first at the tiles, the second at the thumbnail."""
    run.model.hybrid_layer_pattern = "GE L *E L J J"
    run.model.fusion.memories = {"overview": MemoryConfig("thumbnail", 24)}
    run.model.fusion.look_memories = ["vision", "overview"]
    return run


def new_trainer(run: RunConfig) -> Trainer:
    """In a job that has built no groups yet."""
    return Trainer(run, groups.build(run.parallel))


def move_looks_off_zero(engine: Engine) -> None:
    """A new look adds nothing until its out-projection is trained; give it a say, alike on
    every layout."""
    for name, param, layout in layouts(*engine.chunks):
        if ".looks." in name and name.endswith("linear_proj.weight"):
            whole = torch.randn(layout.global_shape, generator=torch.Generator().manual_seed(3))
            layout.held(param.data).copy_(whole[layout.block] * 0.2)
    engine.optimizer.reload_model_params()


def batch_hash(batch: Microbatch, without: tuple[str, ...] = ()) -> str:
    digest = hashlib.sha256()
    for name, value in values_of(batch).items():
        if name in without:
            continue
        if isinstance(value, torch.Tensor):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
        else:
            digest.update(f"{name}={value}".encode())
    return digest.hexdigest()


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p, _ in layouts(*trainer.engine.chunks)}


def peek(trainer) -> list:
    position = trainer.loader.consumed_samples
    batches = trainer.loader.next_batch()
    trainer.loader.consumed_samples = position
    return batches


def prompts_of(run: RunConfig, path) -> list[Sample]:
    builder = SampleBuilder(run, load_tokenizer(run.data.tokenizer_model))
    rows = Rows(path)
    return [builder.prompt(rows[i], rows.where(i), rows.folder) for i in range(len(rows))]


def random_engine(run: RunConfig) -> Engine:
    engine = Engine.create(run, groups.build(run.parallel))
    # A new model mostly repeats a function of its last token. At this scale every part of it,
    # the look too, has a say, and the answers depend on the image.
    for name, param, layout in layouts(*engine.chunks):
        if param.dim() > 1:
            seed = zlib.crc32(name.encode())
            whole = torch.randn(layout.global_shape, generator=torch.Generator().manual_seed(seed))
            scale = 1.0 if name == "embedding.weight" else layout.global_shape[-1] ** -0.5
            layout.held(param.data).copy_(whole[layout.block] * scale)
    engine.optimizer.reload_model_params()
    engine.training(False)
    return engine
