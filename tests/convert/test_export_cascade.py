"""A second hop without looks: its export computes what we compute, and a base folder starts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from megatron_mm.benchmark.hf_weights import IMAGE_TOKEN, randomise
from megatron_mm.checkpoint import sharded
from megatron_mm.config import ConfigError, RunConfig
from megatron_mm.config.layers.cascade import CascadeSettings
from megatron_mm.convert import hf_model, parity, to_hf, to_megatron
from megatron_mm.convert.commands.hf_to_megatron import target_run
from megatron_mm.convert.folder import NOTES, check_folder, open_folder
from megatron_mm.convert.live import load_hf
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError
from megatron_mm.model.blueprint import blueprint
from megatron_mm.parallel import groups
from support.batches import SMALL_MODELS, microbatch
from support.cascades import close_gates, with_cascade
from support.exports import loaded
from support.folders import (
    assert_same,
    base_model,
    one_rank_job,
    read_all,
    save_fused,
    to_checkpoint,
    to_folder,
)
from support.slow_generate import generate

PATTERN, NEW_TOKENS = "GC *C GE", 24
SETTINGS = {
    "qwen3_next": dict(delegate_distinct=True, delegate_topk=3),
    "qwen3_5_moe": dict(delegate_topk=1, delegate_input="stream"),
}


def plain_run(family: str) -> RunConfig:
    return RunConfig(
        model=SMALL_MODELS[family]("GE *E GE", image_stream="all", vision_memory="none")
    )


@pytest.fixture(scope="module")
def job():
    with one_rank_job():
        yield


def saved(run: RunConfig, folder: Path, made: groups.Groups) -> Engine:
    engine = Engine.create(run, made)
    (model,) = engine.chunks
    randomise(model, seed=5)
    close_gates(model)
    sharded.save(engine, {}, folder, 7, {NOTES: {"image_token_id": IMAGE_TOKEN}})
    return engine


@pytest.mark.parametrize("family", SETTINGS)
def test_an_export_computes_the_same_and_comes_back(tmp_path, family):
    with one_rank_job():
        run = with_cascade(plain_run(family), PATTERN, **SETTINGS[family])
        engine = saved(run, tmp_path / "mega", groups.build(run.parallel))
        to_folder(tmp_path / "mega", tmp_path / "hf")
        checkpoint = to_hf.open_checkpoint(tmp_path / "mega")
        ours = parity.mcore_model(checkpoint, engine.groups)
        theirs = hf_model.load_transformers(tmp_path / "hf", trust_remote_code=True)
        cases = parity.built_in_cases(run, IMAGE_TOKEN)
        found = [*parity.compare_outputs(checkpoint, ours, theirs, run, cases)]
        assert len(found) == len(cases) * 4
        assert max(f.size for f in found) <= parity.TOLERANCE, found
        with torch.no_grad():  # a second hop that does something else is noticed at once
            theirs.model.language_model.layers[1].mlp.delegate.scale.mul_(1.5)
        found = [*parity.compare_outputs(checkpoint, ours, theirs, run, cases[:1])]
        assert next(f for f in found if f.size > parity.TOLERANCE).where == "layer 1"
        to_checkpoint(tmp_path / "hf", tmp_path / "again")
        to_folder(tmp_path / "again", tmp_path / "hf again")
        assert_same(read_all(tmp_path / "hf again"), read_all(tmp_path / "hf"))
        model = loaded(tmp_path / "again").run.model
    assert model.hybrid_layer_pattern.replace(" ", "") == PATTERN.replace(" ", "")
    assert model.layers == {"C": CascadeSettings(**SETTINGS[family])}


def test_greedy_tokens_are_ours(tmp_path):
    """With a cache, of one prompt with an image; several sequences share it."""
    with one_rank_job():
        run = with_cascade(plain_run("qwen3_next"), PATTERN)
        engine = saved(run, tmp_path / "mega", groups.build(run.parallel))
        to_folder(tmp_path / "mega", tmp_path / "hf")
        batch = microbatch(run.model, 1, (1,))
        batch.tokens_T[batch.tokens_T == IMAGE_TOKEN] = 1
        batch.tokens_T[batch.stream_positions] = IMAGE_TOKEN
        engine.training(False)
        (ours,) = generate(engine, [batch], stop_id=-1, pad_id=0, max_new_tokens=NEW_TOKENS)
    hf = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, attn_implementation="eager"
    ).eval()
    pixels = batch.pixels_NCHW.float() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    pixels = pixels / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    inputs = {
        "input_ids": batch.tokens_T.unsqueeze(0),
        "attention_mask": torch.ones(1, len(batch.tokens_T), dtype=torch.int64),
        "pixel_values": pixels[batch.stream_tiles],
    }
    how = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    found = hf.generate(**inputs, **how)[:, len(batch.tokens_T) :]
    assert found.tolist() == ours.tolist() and len(ours.unique()) > 5
    how |= {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    several = hf.generate(**inputs, **how)[:, len(batch.tokens_T) :]
    assert several.tolist() == ours.tolist() * 2


# ---- a base folder


def test_a_base_folder_starts_one(job, tmp_path):
    """Converted, and loaded by a run: the same copies, bit for bit."""
    model = base_model()
    pattern = model.hybrid_layer_pattern.replace("E", "C")
    save_fused(tmp_path / "hf", model)
    source = open_folder(tmp_path / "hf")
    flags = ["--hybrid-layer-pattern", pattern, "--delegate-topk", "3"]
    run = target_run(source.model, flags)
    assert run.model.layers == {"C": CascadeSettings(delegate_topk=3)}
    source.model = run.model
    parameters = blueprint(run.model)
    mapping = source.mapping(parameters)
    check_folder(source, mapping)
    assert mapping.new and all(".delegate." in name for name in mapping.new)
    to_megatron.convert(
        source, mapping, parameters, run, tmp_path / "mega", dist.group.WORLD, quiet=True
    )
    engine = loaded(tmp_path / "mega")
    converted = {n: p.detach().clone() for n, p in engine.chunks[0].named_parameters()}
    load_hf(engine, tmp_path / "hf", {"image_token_id": IMAGE_TOKEN})
    for name, param in engine.chunks[0].named_parameters():
        if name.endswith(".delegate.gate.weight"):
            continue  # drawn from the seed, in the precision that it is stored in
        assert torch.equal(param, converted[name]), name
        if ".delegate.router." in name:
            assert torch.equal(param, converted[name.replace("delegate.", "")])


def test_other_letters_are_refused(tmp_path):
    source = base_model()
    with pytest.raises(ConfigError, match="allowed: the same with L, J, Q, V between, and C for E"):
        target_run(source, ["--hybrid-layer-pattern", source.hybrid_layer_pattern + "GC"])


def test_added_looks_never_take_the_weights_of_those_in_the_folder():
    source = base_model()
    layers, source.fusion.vision_memory = source.hybrid_layer_pattern, "tiles"
    source.hybrid_layer_pattern = f"L {layers} J"
    target_run(source, ["--hybrid-layer-pattern", f"L {layers} J L J"])
    with pytest.raises(ConfigError, match="weights to another pair: looks.0 was behind"):
        target_run(source, ["--hybrid-layer-pattern", f"L J L {layers} J"])


@pytest.mark.parametrize(
    ("settings", "vision", "words"),
    [
        ({}, False, "it has letter C (pattern GC *C GE) and no vision model, whose export alone"),
        ({"delegate_random_share": 0.5}, True, "delegate_random_share is 0.5, a control that is"),
    ],
)
def test_what_no_code_computes_is_not_exported(job, tmp_path, settings, vision, words):
    run = with_cascade(plain_run("qwen3_next"), PATTERN, **settings)
    if not vision:
        run.model.vision = None
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    saved(run, tmp_path / "mega", groups.build(run.parallel))
    with pytest.raises(CheckpointError) as error:
        to_hf.convert(
            to_hf.open_checkpoint(tmp_path / "mega"), tmp_path / "hf", dist.group.WORLD, assets=[]
        )
    assert words in str(error.value) and "\n" not in str(error.value)
