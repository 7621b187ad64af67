"""Runs of a small model on the digit scenes, and what tests read from their trainers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from megatron_mm.config import MemoryConfig, RunConfig, preset
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.config.settings import DataPhase
from megatron_mm.config.tree import leaves, value_at
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.sample import Sample, SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.train.trainer import Trainer
from support.batches import values_of
from support.weights import move_looks_off_zero

TP2 = dict(tensor_model_parallel_size=2)
TP3 = dict(tensor_model_parallel_size=3)
PP2 = dict(pipeline_model_parallel_size=2)
CP2 = dict(context_parallel_size=2)
VPP2 = dict(virtual_pipeline_model_parallel_size=2)
EP2 = dict(expert_model_parallel_size=2)
# Number of ranks and settings. The ranks that remain are data parallel; the distributed optimizer
# is on by default.
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
    "PP2, encoder beside": (2, PP2 | dict(vision_parallel="replica")),
}
# Sizes that 3 ranks divide, and a prime vocabulary, which no number of ranks does.
PRIME = dict(
    vocab_size=389,
    num_attention_heads=6,
    num_query_groups=3,
    linear_num_key_heads=3,
    linear_num_value_heads=6,
    moe_ffn_hidden_size=48,
    moe_shared_expert_intermediate_size=48,
    vision_ffn_hidden_size=96,
    clvr_num_attention_heads=6,
)
# Relative, over four steps with three updates in between. Adam turns a gradient into a step
# of about lr whatever its size, so rounding in tiny gradients moves parameters by up to lr
# and losses drift apart: 4e-7 was measured at this lr. A layout that forgets to update one module
# is off by ten times the tolerance at least, as tests/train/test_loop.py asserts.
LOSS_TOLERANCE = 1e-5
# On two stages, a refinement crosses the boundary and waits for its J.
PATTERN = "GE L *E J"


def digits_run(scenes: Path, rows: Path | None = None, **settings) -> RunConfig:
    """Returns a run of the tiny preset with fewer layers.

    Args:
        rows: the training rows; default the scenes' mixed questions.
        settings: any settings of a run; their names are unique.
    """
    run = RunConfig(model=preset("tiny"))
    run.model.hybrid_layer_pattern = PATTERN
    run.data.train_data = [DataPhase(str(rows or scenes / "mix.jsonl"))]
    run.data.valid_data = str(scenes / "valid.jsonl")
    run.data.tokenizer_model = str(scenes / "tokenizer.model")
    run.data.extra_columns = ["scene", "other_images"]
    run.data.seq_length, run.data.max_num_tiles = 128, 9
    run.optimizer.lr = 1e-3
    run.training.seed = 1
    run.training.train_iters = 12
    run.training.micro_batch_size, run.training.global_batch_size = 2, 4
    run.logging.wandb_mode, run.logging.tensorboard = "disabled", False
    paths = {leaf.name: leaf.path for leaf in leaves(RunConfig)}
    for name, value in settings.items():
        setattr(value_at(run, paths[name][:-1]), name, value)
    return run


def with_two_memories(run: RunConfig) -> RunConfig:
    """The run with two looks: the first at the tiles, the second at the thumbnail."""
    run.model.hybrid_layer_pattern = "GE L *E L J J"
    run.model.fusion.memories = {"overview": MemoryConfig("thumbnail", 24)}
    run.model.fusion.look_memories = ["vision", "overview"]
    return run


def with_glimpses(run: RunConfig, pattern: str = "GE Q *E V", place: str = "hidden") -> RunConfig:
    """The run with glimpses at the pyramid, for the tokenizer of `look_scenes`.

    Args:
        place: who says where they look.
    """
    run.model.hybrid_layer_pattern, run.model.fusion.vision_memory = pattern, "pyramid"
    run.model.language.vocab_size = 512
    run.model.__post_init__()
    query_settings(run.model).query_place = place
    return run


def new_trainer(run: RunConfig) -> Trainer:
    """Returns a trainer in a job that has built no groups yet."""
    return Trainer(run, groups.build(run.parallel))


def batch_hash(batch: Microbatch, without: tuple[str, ...] = ()) -> str:
    """Returns the sha256 of a microbatch's fields, but for those in `without`."""
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
    """Returns copies of this rank's parameters by name."""
    return {name: p.detach().clone() for name, p, _ in layouts(*trainer.engine.modules)}


def peek(trainer) -> list:
    """Returns the microbatches of the next step, which the trainer will read again."""
    position = trainer.loader.consumed_samples
    batches = trainer.loader.next_batch()
    trainer.loader.consumed_samples = position
    return batches


def prompts_of(run: RunConfig, path) -> list[Sample]:
    """Returns the prompts of a file's rows."""
    builder = SampleBuilder(run, load_tokenizer(run.data.tokenizer_model))
    rows = Rows(path)
    return [builder.prompt(rows[i], rows.where(i), rows.folder) for i in range(len(rows))]


def on_rank_change(*runs) -> list[dict[str, bool]]:
    """Returns for each run which parameters two steps change, by name."""
    made = groups.build(runs[0].parallel)
    found = []
    for run in runs:
        trainer = Trainer(run, made)
        move_looks_off_zero(trainer.engine)
        before = parameters(trainer)
        trainer.step()
        trainer.step()
        after = parameters(trainer)
        found.append({name: not torch.equal(after[name], before[name]) for name in after})
    return found
