"""A run that loads its weights draws none, and never computes with one that nothing filled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.weight_sets import WeightSets
from megatron_mm.config import RunConfig
from megatron_mm.convert import to_hf
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.weight_set import WeightSet
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import is_adapter
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.rl.reference import REFERENCE, weights_of
from megatron_mm.train.start import tell_frozen
from support.cascades import move_off_zero
from support.trainers import LAYOUTS, PRIME, TP3, digits_run, new_trainer
from support.weights import move_looks_off_zero

BASE = {"hybrid_layer_pattern": "GE *E", "vision_memory": "none"}  # `digits_run`'s without a look
LORA = {"lora_rank": 2, "lora_targets": ["language"]}


class Draws(TorchDispatchMode):
    """Counts the operators that draw random numbers, and the numbers."""

    def __init__(self):
        super().__init__()
        self.calls = self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.calls += 1
            self.numbers += found.numel()
        return found


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param, _ in layouts(*engine.chunks)}


def save_and_export(scenes: Path, out: Path, settings: dict) -> None:
    """A checkpoint in `out/runs`, from which a run resumes, and an export of it in `out/hf`."""
    trainer = new_trainer(digits_run(scenes, save=str(out / "runs"), **settings))
    move_looks_off_zero(trainer.engine)
    trainer.step()
    trainer.save()
    opened = to_hf.open_checkpoint(out / "runs")
    to_hf.convert(opened, out / "hf", dist.group.WORLD, quiet=True)


def drawn_at_start(run) -> tuple[int, int, dict[str, torch.Tensor]]:
    """(calls, numbers drawn, weights) when a trainer has started."""
    draws = Draws()
    with draws:
        trainer = new_trainer(run)
    return draws.calls, draws.numbers, weights(trainer.engine)


@pytest.mark.parametrize("name", ["one rank", "TP2", "PP2xVPP2", "EP2", "DP2"])
def test_a_start_from_weights_draws_no_number(ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    ranks(1, save_and_export, scenes, tmp_path, {})
    runs, hf = str(tmp_path / "runs"), str(tmp_path / "hf")
    ways = {
        "resumed": {"save": runs, "resume": True},
        "loaded": {"load": runs},
        "fine-tuned": {"load": runs, "finetune": True},
        "from hf": {"load_hf": hf},
    }
    seen = {}
    for way, given in ways.items():
        run = digits_run(scenes, **sizes, **given, seed=5)
        for rank, (calls, _, held) in enumerate(ranks(size, drawn_at_start, run)):
            assert calls == 0, way
            seen.setdefault(rank, []).append(held)
    for ways_of_rank in seen.values():
        for held in ways_of_rank[1:]:
            for key, tensor in ways_of_rank[0].items():
                assert torch.equal(held[key], tensor), key
    fresh = ranks(size, drawn_at_start, digits_run(scenes, **sizes, seed=5))
    assert all(calls > 10 for calls, _, _ in fresh)  # the count counts
    assert not any(tensor.isnan().any() for _, _, held in fresh for tensor in held.values())


@pytest.mark.parametrize("start", ["load", "load_hf"])
def test_what_weights_lack_is_drawn_and_nothing_else(ranks, scenes, tmp_path, start):
    """Adapters and a look over a base model: as a new model of the same seed would have them."""
    ranks(1, save_and_export, scenes, tmp_path, BASE)
    given = {"load": str(tmp_path / "runs"), "finetune": True}
    given = {"load_hf": str(tmp_path / "hf")} if start == "load_hf" else given
    run = digits_run(scenes, **given, **LORA, seed=5)
    ((_, numbers, held),) = ranks(1, drawn_at_start, run)
    ((_, all_numbers, fresh),) = ranks(1, drawn_at_start, digits_run(scenes, **LORA, seed=5))
    stored = digits_run(scenes, load=str(tmp_path / "runs"), **BASE)
    ((_, _, base),) = ranks(1, drawn_at_start, stored)
    new = held.keys() - base.keys()
    assert any(is_adapter(name) for name in new) and any(".looks." in name for name in new)
    for name, tensor in held.items():
        assert torch.equal(tensor, fresh[name] if name in new else base[name]), name
    # Adapters' B, norms and the gate are constants: fewer numbers than elements.
    assert 0 < numbers <= sum(held[name].numel() for name in new) < all_numbers


def undrawn(run) -> dict[str, tuple[bool, bool]]:
    """name -> (whether all it holds is NaN, whether all its padding is 0)."""
    engine = Engine.create(run, groups.build(run.parallel), drawn=False)
    found = {}
    for name, param, layout in layouts(*engine.chunks):
        held = layout.held(param.data)
        empty = bool(held.isnan().all())
        held.zero_()
        found[name] = empty, not param.data.any()
    return found


@pytest.mark.parametrize("name", ["one rank", "TP3, padded", "EP2"])
def test_a_parameter_is_nan_until_it_is_loaded(ranks, scenes, name):
    size, sizes = (3, TP3 | PRIME) if name == "TP3, padded" else LAYOUTS[name]
    for found in ranks(size, undrawn, digits_run(scenes, **sizes, micro_batch_size=4)):
        assert len(found) > 30
        assert set(found.values()) == {(True, True)}


def forgotten(run, folder: Path) -> tuple[str, str, bool]:
    """The errors of a load that would leave one parameter open, and of one whose last chunk is in
    no file; whether the weights are as they were."""
    engine = Engine.create(run, groups.build(run.parallel))
    before, errors = weights(engine), []
    shards, storage = sharded.shards, sharded.storage
    empty_shards, read_index = shards.empty_shards, storage.read_index

    def without_one(*arguments, **keywords):
        wanted = empty_shards(*arguments, **keywords)
        wanted.pop("model.final_norm.weight", None)
        return wanted

    def without_a_chunk(*arguments):
        stored, index = read_index(*arguments)
        index.tensors["model.final_norm.weight"].blocks.clear()
        return stored, index

    for module, name, broken in (
        (shards, "empty_shards", without_one),
        (storage, "read_index", without_a_chunk),
    ):
        kept = getattr(module, name)
        setattr(module, name, broken)
        try:
            sharded.load(engine, folder, finetune=True)
            errors.append("no error")
        except CheckpointError as error:
            errors.append(str(error))
        finally:
            setattr(module, name, kept)
    after = weights(engine)
    return *errors, all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["one rank", "PP2"])
def test_a_forgotten_parameter_is_one_error_on_every_rank(ranks, scenes, tmp_path, name):
    size, sizes = LAYOUTS[name]
    ranks(1, save_and_export, scenes, tmp_path, {})
    run = digits_run(scenes, **sizes)
    width = run.model.language.hidden_size
    for open_, partial, unchanged in ranks(size, forgotten, run, tmp_path / "runs"):
        assert unchanged and "\n" not in open_ + partial
        assert "nothing fills final_norm.weight: it is neither stored nor new" in open_
        lacks = f"of model.final_norm.weight, 0 of the {width} numbers are stored"
        assert lacks in partial


def beside_a_reference(run, folder: str) -> tuple[bool, dict[str, torch.Tensor]]:
    """Whether weights are still open when the reference has been read, and the reference's."""
    engine = Engine.create(run, groups.build(run.parallel), drawn=False)
    sets = WeightSets(engine)
    sets.add(REFERENCE, WeightSet.of(weights_of(engine, folder)))
    still = all(tensor.isnan().all() for tensor in weights(engine).values())
    with sets.swapping() as put:
        put(REFERENCE)
        return still, weights(engine)


def test_a_reference_fills_no_weight_of_the_policy(ranks, scenes, tmp_path):
    ranks(1, save_and_export, scenes, tmp_path, {})
    folder = str(tmp_path / "runs")
    ((still, found),) = ranks(1, beside_a_reference, digits_run(scenes), folder)
    ((_, _, loaded),) = ranks(1, drawn_at_start, digits_run(scenes, load=folder))
    assert still
    for name, tensor in loaded.items():
        assert torch.equal(found[name], tensor), name


def test_what_is_frozen_is_said(caplog):
    """Routed experts are no part of a frozen language model, which is worth a line; what the model
    lacks, here looks and glimpses, is not said to learn."""
    run = RunConfig()
    with caplog.at_level("INFO"):
        tell_frozen(run)
        run.training.freeze_language = run.training.freeze_router = True
        tell_frozen(run)
        run.lora.lora_rank = 4
        tell_frozen(run)
    assert caplog.messages == [
        "frozen: language, router; learning: vision, projector, experts",
        "frozen: language, experts, router; learning: vision, projector, adapters of language",
    ]


def on_rank_refused(run: RunConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        new_trainer(run)
    return str(caught.value)


def on_rank_saved(run: RunConfig) -> None:
    trainer = new_trainer(run)
    move_off_zero(trainer.engine)
    trainer.save()


def on_rank_started(run: RunConfig) -> int:
    return new_trainer(run).iteration


@pytest.mark.parametrize("name", ["one rank", "PP2"])
def test_a_frozen_second_hop_that_adds_nothing_is_refused_on_every_rank(
    ranks, scenes, tmp_path, name
):
    """One that has been trained is not."""
    size, sizes = LAYOUTS[name]
    cascaded = {"hybrid_layer_pattern": "GC *C", "vision_memory": "none", **sizes}
    found = ranks(size, on_rank_refused, digits_run(scenes, **cascaded, **LORA))
    assert len(set(found)) == 1
    for said in found:
        assert said.startswith("cannot train: ") and "\n" not in said
        assert "delegate adds nothing (its scale is 0) and is frozen" in said
    ranks(size, on_rank_saved, digits_run(scenes, save=str(tmp_path), **cascaded))
    given = {"load": str(tmp_path), "finetune": True}
    assert (
        ranks(size, on_rank_started, digits_run(scenes, **cascaded, **LORA, **given)) == [0] * size
    )
