"""There and back is bitwise identical, on every layout, for every way of writing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from megatron_mm.benchmark.hf_weights import transformers_model
from megatron_mm.checkpoint import sharded, storage
from megatron_mm.config import ParallelConfig, RunConfig
from megatron_mm.convert import to_hf, to_megatron
from megatron_mm.engine.engine import Engine
from megatron_mm.model.multimodal import build
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from support.folders import (
    SHARD,
    SIX_B,
    TEXT_CLASSES,
    assert_same,
    base_model,
    one_rank_job,
    planned,
    read_all,
    save_fused,
    save_released_fused,
    save_released_vision,
    save_text,
    through_training,
    to_checkpoint,
    to_folder,
    weights,
)

TP, PP, EP, VPP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_tensor_parallel_size",
)


def layout(tp: int, pp: int, ep: int, **more) -> tuple[int, dict]:
    """(ranks, sizes); with experts over ranks, expert-tensor parallelism is off."""
    sizes = {TP: tp, PP: pp, EP: ep, **more}
    if ep > 1:
        sizes[ETP] = 1
    return pp * max(tp, ep), sizes


LAYOUTS = {
    f"TP{tp}xPP{pp}xEP{ep}": layout(tp, pp, ep)
    for tp, pp, ep in ((1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2), (2, 2, 2))
} | {
    "TP3": layout(3, 1, 1),
    "TP4": layout(4, 1, 1),
    "TP2 experts too": layout(2, 1, 1, **{ETP: 2}),
    "PP2xVPP2": layout(1, 2, 1, **{VPP: 2}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = [
    (name, stacked, tied) for name in DTYPES for stacked in (False, True) for tied in (False, True)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(folder, its tensors) of a kind, for layouts with 3 tensor-parallel ranks or others."""
    made: dict[tuple, tuple[Path, dict]] = {}  # dtype, experts stacked, tied; for TP3

    def get(kind: tuple[str, bool, bool], tp: int) -> tuple[Path, dict]:
        key = kind, tp == 3
        if key not in made:
            dtype, stacked, tied = kind
            folder = tmp_path_factory.mktemp("hf")
            model = base_model(tp, tied=tied)
            save_fused(folder, model, stacked=stacked, dtype=DTYPES[dtype])
            made[key] = folder, read_all(folder)
        return made[key]

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_through_training_on(ranks, source, tmp_path, name):
    """Converted by all ranks, loaded and saved by the training code, converted back by them:
    both dtypes, both ways of writing experts, untied and tied."""
    size, parallel = LAYOUTS[name]
    tp, jobs = parallel[TP], []
    pairs = (("fp32", False), ("bf16", True))
    for dtype, tied in pairs:
        folders = [source((dtype, stacked, tied), tp)[0] for stacked in (False, True)]
        jobs.append((*folders, tmp_path / f"{dtype}{tied}", dtype == "bf16"))
    ranks(size, through_training, parallel, jobs)
    for kind in KINDS:
        dtype, stacked, tied = kind
        if (dtype, tied) not in pairs:
            continue
        folder, expected = source(kind, tp)
        out = tmp_path / f"{dtype}{tied}" / f"hf{stacked}"
        assert_same(read_all(out), expected)
        theirs, ours = (json.loads((f / "config.json").read_text()) for f in (folder, out))
        assert ours["tie_word_embeddings"] == theirs["tie_word_embeddings"] == tied
        assert (out / "model.safetensors.index.json").exists()


def test_every_tensor_was_off_its_default(source):
    for kind in KINDS:
        for name, tensor in source(kind, 1)[1].items():
            assert len(tensor.unique()) > min(8, tensor.numel() // 2), name


@pytest.fixture
def job():
    with one_rank_job():
        yield


@pytest.mark.parametrize("family", TEXT_CLASSES)
def test_transformers_loads_what_is_written(job, tmp_path, family):
    hf = save_fused(tmp_path / "in", base_model(family=family))
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    for stacked in (False, True):
        out = tmp_path / f"out{stacked}"
        to_folder(tmp_path / "mega", out, stacked=stacked)
        loaded, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        assert_same(loaded.state_dict(), hf.state_dict())
        assert settings(loaded.config.to_dict()) == settings(hf.config.to_dict())
        assert type(loaded.model.language_model) is type(hf.model.language_model)


def settings(config: dict) -> dict:
    """All that a config says but in which precision it was loaded, and from where."""
    return {
        key: settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("dtype", "_name_or_path", "architectures")
    }


def test_text_only_with_what_is_carried(job, tmp_path):
    expected = save_text(tmp_path / "in")
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    to_folder(tmp_path / "mega", tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), expected)
    assert sum(name.startswith("mtp.") for name in expected) == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def load_for_training(folder: Path, out: Path) -> dict:
    source = to_checkpoint(folder, out)
    run = RunConfig(model=source.model)
    return sharded.load(Engine.create(run, groups.build(run.parallel)), out, finetune=True)


def test_training_leaves_out_what_is_carried(ranks, tmp_path):
    carried = [name for name in save_text(tmp_path / "in") if name.startswith("mtp.")]
    state = ranks(1, load_for_training, tmp_path / "in", tmp_path / "mega")[0]
    assert sorted(state["ignored"]) == sorted(f"carried.{name}" for name in carried)


@pytest.mark.parametrize("style", ["300M", "6B"])
def test_the_release_of_internvl(job, tmp_path, style):
    """Its names, written down a second time in folders.py, give what transformers' names give."""
    model = base_model(**(SIX_B if style == "6B" else {}))
    hf = transformers_model(model)
    save_released_fused(tmp_path / "in", model, hf)
    source, plan, _ = planned(tmp_path / "in")
    assert not plan.new and source.image_token_id == 95
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    to_folder(tmp_path / "mega", tmp_path / "out", stacked=True)
    assert_same(read_all(tmp_path / "out"), dict(hf.state_dict()))


def test_a_fusion_starts_from_two_folders(job, tmp_path):
    model = base_model()
    hf = transformers_model(model)
    text = save_text(tmp_path / "text", mtp=False)
    vision = save_released_vision(tmp_path / "vit", model, hf)
    source, plan, parameters = planned(tmp_path / "text", tmp_path / "vit")
    assert {name.rsplit(".", 2)[0] for name in plan.new} == {"vision.projector"}
    assert len(plan.new) == 6 and not plan.carried
    run = RunConfig(model=source.model)
    run.training.seed = 5
    out = tmp_path / "mega"
    to_megatron.convert(source, plan, parameters, run, out, dist.group.WORLD, quiet=True)
    opened = to_hf.open_checkpoint(out)
    built = build(run, groups.build(run.parallel).pg)[0]  # the same seed, drawn by training
    for name, param in built.named_parameters():
        if name in plan.new:
            assert torch.equal(opened.reader.read(f"model.{name}"), param), name
    image = {"image_token_id": 95}
    opened.notes.update(image)
    to_hf.convert(opened, tmp_path / "out", dist.group.WORLD, quiet=True)
    found = read_all(tmp_path / "out")
    prefix = "language_model."
    assert_same({n: found[prefix + n] for n in text}, text)
    tower = {n.removeprefix("vision_tower."): t for n, t in found.items() if "vision_tower" in n}
    expected = hf.model.vision_tower.state_dict()
    assert_same(tower, dict(expected))
    assert len(found) == len(text) + len(expected) + 6 and vision


def on_pp4(*folders: Path) -> list[dict[str, torch.Tensor]]:
    """The whole parameters of an engine after each load."""
    _, sizes = layout(1, 4, 1)
    model = to_hf.open_checkpoint(folders[0]).model
    run = RunConfig(model=model, parallel=ParallelConfig(**sizes))
    engine = Engine.create(run, groups.build(run.parallel))
    found = []
    for folder in folders:
        sharded.load(engine, folder, finetune=True)
        found.append(weights(engine))
        for _, param, _ in layouts(*engine.chunks):
            param.data.zero_()
    return found if dist.get_rank() == 0 else []


def test_layouts_of_conversion_do_not_matter(ranks, source, tmp_path):
    """TP2 x EP2 by two ranks, one rank alone: the same tensors, read by PP4 and block by block."""
    folder, _ = source(("fp32", False, False), 1)
    ranks(1, to_checkpoint, folder, tmp_path / "one")
    ranks(2, to_checkpoint, folder, tmp_path / "two", {TP: 2, EP: 2, ETP: 1})
    assert_same(*ranks(4, on_pp4, tmp_path / "one", tmp_path / "two")[0])
    one, two = (to_hf.open_checkpoint(tmp_path / name) for name in ("one", "two"))
    for name in one.parameters:
        assert torch.equal(*(c.reader.read(f"model.{name}") for c in (one, two))), name
    _, index = storage.read_index(
        two.path, json.loads((two.path / "run.json").read_text())["checksums"]
    )
    assert {"__0_0.distcp", "__1_0.distcp"} <= index.needed.keys()


def test_rows_of_one_chunk_read_it_once(job, tmp_path):
    """Experts are asked for one by one, and a chunk holds many."""
    save_fused(tmp_path / "in")
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    reader, reads = to_hf.open_checkpoint(tmp_path / "mega").reader, []
    read = reader._reader.read
    reader._reader.read = lambda *args: reads.append(args[0]) or read(*args)
    names = [key for key in reader._tensors if ".experts." in key]
    assert names
    for key in names:
        count = reader.shape(key)[0]
        rows = [reader.read(key, n, n + 1) for n in range(count)]
        assert count > 4 and torch.equal(torch.cat(rows), reader.read(key))
        # One for all rows, and one for the whole.
        assert reads.count(key) == 2 * len(reader._tensors[key].blocks)


def test_dist_checkpointing_reads_it(job, tmp_path):
    """megatron-core's own reader, with its own (trusting) way of reading the index."""
    save_fused(tmp_path / "in")
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    opened = to_hf.open_checkpoint(tmp_path / "mega")
    state = {}
    for name, entry in opened.parameters.items():
        data = torch.full(entry.global_shape, float("nan"))
        key = f"model.{name}"
        state[key] = ShardedTensor.from_rank_offsets(key, data)
    loaded = dist_checkpointing.load(state, str(opened.path))
    for name in opened.parameters:
        key = f"model.{name}"
        assert torch.equal(loaded[key], opened.reader.read(key)), name


def test_dtypes(job, tmp_path):
    hf = save_fused(tmp_path / "in")
    to_checkpoint(tmp_path / "in", tmp_path / "mega", dtype=torch.bfloat16)
    to_folder(tmp_path / "mega", tmp_path / "out", stacked=True)
    rounded = {n: t.to(torch.bfloat16) for n, t in hf.state_dict().items()}
    assert_same(read_all(tmp_path / "out"), rounded)
    to_folder(tmp_path / "mega", tmp_path / "wide", stacked=True, dtype=torch.float32)
    assert_same(read_all(tmp_path / "wide"), {n: t.float() for n, t in rounded.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_untied_by_training(job, tmp_path):
    """Tied when it came, different now: written untied, and said so."""
    save_fused(tmp_path / "in", base_model(tied=True))
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    opened = to_hf.open_checkpoint(tmp_path / "mega")
    read = opened.reader.read

    def trained(key, first=None, last=None):
        tensor = read(key, first, last)
        return tensor + 1 if key == "model.output_layer.weight" else tensor

    opened.reader.read = trained
    lines = to_hf.convert(opened, tmp_path / "out", dist.group.WORLD, quiet=True)
    assert any("untied" in line for line in lines)
    found = read_all(tmp_path / "out")
    ends = (
        found["language_model.lm_head.weight"],
        found["language_model.model.embed_tokens.weight"],
    )
    assert torch.equal(ends[0], ends[1] + 1)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def test_small_blocks_and_shards(job, tmp_path, monkeypatch):
    """Experts in several blocks, tensors in many files: the seams are nowhere to be seen."""
    monkeypatch.setattr(to_megatron, "CHUNK_BYTES", 30_000)
    save_fused(tmp_path / "in", shard=SHARD)
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    _, index = storage.read_index(
        tmp_path / "mega/iter_0000000",
        json.loads((tmp_path / "mega/iter_0000000/run.json").read_text())["checksums"],
    )
    blocks = index.tensors["model.language.layers.0.moe.inner.experts.gate_up"].blocks
    assert [block.offset[0] for block in blocks] == [0, 2, 4]
    to_folder(tmp_path / "mega", tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), read_all(tmp_path / "in"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
