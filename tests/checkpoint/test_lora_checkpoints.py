"""Checkpoints and adapters: on top of a base, resumed, re-sharded, merged, never lost silently."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.merge import merge_adapters
from megatron_mm.config import MODULES, LoraConfig, RunConfig
from megatron_mm.errors import CheckpointError
from megatron_mm.model.layers.lora import is_adapter
from support.batches import microbatch
from support.checkpoint_runs import (
    assert_same,
    create,
    interrupted,
    load_whole,
    refused,
    tiny_run,
    train,
    train_and_save,
    untrained,
    weights,
    whole,
)
from support.launches import free_port
from support.tools import load_tool

TARGETS = ("language", "vision", "projector")
TP2, PP2 = dict(tp=2), dict(pp=2)
ADAPTERS_ONLY = dict(freeze_clvr=True, freeze_router=True)


def lora_run(parallel: dict | None = None, targets=TARGETS, **training) -> RunConfig:
    run = tiny_run(parallel, **training)
    run.lora = LoraConfig(lora_rank=3, lora_alpha=6.0, lora_targets=[*targets])
    return run


@pytest.fixture(scope="module")
def base(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return folder, ranks(1, train_and_save, tiny_run(), folder)[0]


@pytest.mark.parametrize("parallel", [TP2, PP2], ids=str)
def test_a_base_is_loaded_and_adapters_start_as_initialised(ranks, base, parallel):
    folder, stored = base
    run = lora_run(parallel)
    state, tensors = ranks(2, load_whole, run, folder, True)[0]
    run.training.seed += 1
    initial, found, stored = weights(ranks(2, untrained, run)[0]), weights(tensors), weights(stored)
    added = found.keys() - stored.keys()
    assert sorted(state["initialized"]) == sorted(added)
    assert len(added) == 36 and all(map(is_adapter, added))
    for name, tensor in found.items():
        assert torch.equal(tensor, initial[name] if name in added else stored[name]), name


RESUMED = {
    "TP2": (TP2, TARGETS, {}),
    "bf16 DP2 overlapped": (
        dict(overlap_grad_reduce=True, overlap_param_gather=True),
        ("language",),
        dict(bf16=True),
    ),
    "PP2, nothing to train on the last stage": (
        PP2,
        ("projector",),
        {f"freeze_{module}": True for module in MODULES if module != "projector"},
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact_to_the_bit(ranks, tmp_path, name):
    parallel, targets, training = RESUMED[name]
    run = lora_run(parallel, targets, **training)
    for rank, seen in enumerate(ranks(2, interrupted, run, tmp_path)):
        assert seen["loaded"] == seen["saved"], f"rank {rank}"
        assert seen["end again"] == seen["end"], f"rank {rank}"
        assert seen["fresh"] != seen["end weights"]


@torch.no_grad()
def logits(engine) -> torch.Tensor:
    """Logits of one rank, [T, V]."""
    batch = microbatch(engine.run.model, 77)
    everywhere = torch.arange(len(batch.tokens_T))
    (found,) = engine.forward([batch], lambda batch: everywhere, lambda found, **_: found.logits())
    return found


def adapted_from(base_folder: Path, folder: Path) -> dict:
    """Train adapters on a base and save: whole tensors and logits at the end."""
    engine = create(lora_run(**ADAPTERS_ONLY))
    sharded.load(engine, base_folder, finetune=True)
    at_start = logits(engine)
    train(engine, range(3))
    sharded.save(engine, {"consumed_samples": 6}, folder, 3)
    return {"whole": whole(engine), "logits": logits(engine), "at start": at_start}


@pytest.fixture(scope="module")
def adapted(ranks, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    return folder, ranks(1, adapted_from, base[0], folder)[0]


@pytest.mark.parametrize("parallel", [TP2, PP2, dict(ep=2)], ids=str)
def test_another_layout_reads_the_same_tensors(ranks, adapted, parallel):
    folder, saved = adapted
    _, tensors = ranks(2, load_whole, lora_run(parallel, **ADAPTERS_ONLY), folder)[0]
    assert_same(tensors, saved["whole"])
    for name, tensor in tensors.items():
        assert tensor.any() or not is_adapter(name), name  # else equality would say little


def test_training_left_the_base_as_it_was(base, adapted):
    before, after = weights(base[1]), weights(adapted[1]["whole"])
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def merged_logits(folder: Path) -> torch.Tensor:
    """Logits of a run without LoRA that starts from `folder`."""
    engine = create(tiny_run())
    assert sharded.load(engine, folder, finetune=True)["initialized"] == []
    return logits(engine)


def merge_on_this_layout(run: RunConfig, source: Path, target: Path) -> str:
    return str(merge_adapters(create(run), source, target))


# The adapters round B (A x) at each of 18 linears, merging rounds W + B A once: fp32's 6e-8
# grown over the depth of the model. 2e-6 was seen on each layout.
TOLERANCE = 1e-5


def check_merged(ranks, adapted, folder: Path) -> None:
    expected, start = adapted[1]["logits"], adapted[1]["at start"]
    assert (expected - start).norm() > 0.1 * start.norm(), "the adapters add too little to tell"
    found = ranks(1, merged_logits, folder)[0]
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize(("size", "parallel"), [(1, {}), (2, PP2)], ids=["1", "PP2"])
def test_merged_computes_the_same(ranks, adapted, tmp_path, size, parallel):
    made = set(ranks(size, merge_on_this_layout, lora_run(parallel), adapted[0], tmp_path))
    assert made == {str(tmp_path / "iter_0000003")}
    check_merged(ranks, adapted, tmp_path)
    message = refused(ranks, tmp_path, tiny_run(PP2))
    assert "missing (first optimizer." in message and "else use finetune" in message
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    for said in ranks(size, refused_merge, lora_run(parallel), adapted[0], tmp_path):
        assert f"{tmp_path} holds checkpoints already: nothing is overwritten" in said
    after = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    assert before == after


def launched(port: int, flags: list[str]) -> tuple[int, str]:
    """The tool's exit status and output in a job of its own, as torchrun would start it."""
    names = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(), "MASTER_PORT": port}
    dist.destroy_process_group()
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        for name, value in (names | {"MASTER_ADDR": "127.0.0.1"}).items():
            patch.setenv(name, str(value))
        return load_tool("merge_lora").main(flags), out.getvalue()


def test_the_tool_merges_on_two_tensor_parallel_ranks(ranks, adapted, tmp_path):
    port = free_port()
    flags = ["--load", str(adapted[0]), "--save", str(tmp_path), "--tensor-model-parallel-size=2"]
    said = ranks(2, launched, port, flags)
    assert said == [(0, f"merged: {tmp_path}/iter_0000003\n"), (0, "")]
    check_merged(ranks, adapted, tmp_path)
    run = json.loads((tmp_path / "iter_0000003" / "run.json").read_text())
    assert run["layout"]["tp"] == 2 and run["config"]["lora"]["lora_rank"] is None


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        ("--load {base} --save {new}", 2, "{base}/iter_0000002 has no adapters: nothing to merge"),
        ("--load {adapted} --save {adapted}", 2, "would overwrite what is merged"),
        ("--load {adapted}", 2, "save is none; allowed: the folder of a checkpoint"),
        ("--load {new} --save {adapted}", 1, "cannot load {new}: there is no such folder"),
        ("--load {adapted} --save {new} --lr 1", 2, "--lr is not for merging; allowed: --load"),
        (
            "--load {adapted} --save {new} --tensor-model-parallel-size 2",
            2,
            "world_size 1 does not divide by",
        ),
    ],
)
def test_the_tool_refuses_in_one_line(base, adapted, tmp_path, capsys, flags, status, words):
    folders = {"base": base[0], "adapted": adapted[0], "new": tmp_path / "new"}
    assert load_tool("merge_lora").main(flags.format(**folders).split()) == status
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and words.format(**folders) in line
    assert not out and not (tmp_path / "new").exists()


def test_adapters_are_not_dropped_silently(ranks, adapted):
    for finetune in (True, False):
        message = refused(ranks, adapted[0], tiny_run(PP2), finetune=finetune)
        first = "model.language.layers.0.mixer.inner.in_proj.lora.a"
        assert f"36 of them (first {first}) are LoRA's" in message
        assert "merge them first (tools/merge_lora.py)" in message
    message = refused(ranks, adapted[0], lora_run(PP2, ["vision"]), finetune=True)
    assert f"20 of them (first {first}) are LoRA's" in message


@pytest.mark.parametrize(("key", "here"), [("lora_rank", 4), ("lora_alpha", 7.0)])
def test_adapters_of_another_scale(ranks, adapted, key, here):
    run = lora_run(PP2)
    setattr(run.lora, key, here)
    message = refused(ranks, adapted[0], run, finetune=True)
    there = getattr(lora_run().lora, key)
    assert f"it holds other adapters: {key} is {there} there and {here} here" in message


def refused_merge(run: RunConfig, source: Path, target: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        merge_adapters(create(run), source, target)
    return str(caught.value)


def test_there_must_be_adapters_to_merge(ranks, base, tmp_path):
    (message,) = ranks(1, refused_merge, lora_run(), base[0], tmp_path)
    assert message.endswith("it lacks language.layers.0.mixer.inner.in_proj.lora.a")
    assert not [*tmp_path.iterdir()]
