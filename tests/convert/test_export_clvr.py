"""A folder that carries its own code computes what we compute, and says what we say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from megatron_mm.benchmark.hf_weights import randomise
from megatron_mm.checkpoint import sharded
from megatron_mm.config import MemoryConfig, ParallelConfig, RunConfig
from megatron_mm.convert import hf_model, parity, to_hf
from megatron_mm.convert.folder import travelling
from megatron_mm.data.collate import collate
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tiles import image_settings
from megatron_mm.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from support.batches import SMALL_MODELS, small_run
from support.cascades import close_gates
from support.folders import assert_same, planned, read_all, to_checkpoint, to_folder
from support.hf_tokenizers import byte_level_tokenizer
from support.samples import normalised
from support.slow_generate import generate

# A look between a mixer and its experts, two in flight at once, one injected at once.
PATTERN = "GE L *LE GE J *E J GE LJ"
NEW_TOKENS = 64
SIZES = [(16, 16), (48, 16), (16, 33), (70, 40)]  # pixels; tiles are 16 wide


def make_tokenizer(folder: Path) -> None:
    tokenizer = byte_level_tokenizer(["user assistant what stands in cell"], 270)
    tokenizer.pad_token = SPECIAL_TOKENS["pad_id"]
    tokenizer.save_pretrained(folder)


def prompts(folder: Path) -> list[dict]:
    """Eight rows: no image, one, two; of several tile counts, at the front and later."""
    g = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = g.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    texts = [
        ("what stands in cell 3?", []),
        ("<image>what is it?", [0]),
        ("<image>and here?", [1]),
        ("look at this: <image> what stands there?", [2]),
        ("<image>", [3]),
        ("<image>and<image>are they the same?", [1, 2]),
        ("first <image>, then <image>: which is larger?", [3, 0]),
        ("a b c d e f g h", []),
    ]
    return [
        {
            "messages": [{"role": "user", "content": text}],
            "images": [f"{number}.png" for number in images],
        }
        for text, images in texts
    ]


def clvr_run(folder: Path, fusion: dict, family: str, pattern: str = PATTERN) -> RunConfig:
    run = small_run(pattern, **fusion)
    run.model.language = SMALL_MODELS[family]().language
    run.model.language.vocab_size = 288
    run.data.tokenizer_model = str(folder)
    run.data.max_num_tiles, run.data.seq_length = 4, 512
    return run


TILES = {"image_stream": "thumbnail", "vision_memory": "tiles"}
RUNS = {
    "tiles": (TILES, "qwen3_next"),
    "thumbnail": ({"image_stream": "all", "vision_memory": "thumbnail"}, "qwen3_next"),
    "two memories": (
        {
            "image_stream": "thumbnail",
            "vision_memory": "thumbnail",
            "memories": {"detail": MemoryConfig("tiles", 16, coordinates=False)},
            "look_memories": ["detail", "vision", "detail"],
        },
        "qwen3_next",
    ),
    "qwen3_5_moe": (TILES, "qwen3_5_moe"),
    "second hop": (TILES, "qwen3_next", "GE L *LC GC J *C J GE LJ"),
}


@pytest.fixture(scope="module", params=RUNS)
def exported(request, tmp_path_factory):
    """(run, engine, folder of its tokenizer, rows, checkpoint `mega` and export `hf`)"""
    root = tmp_path_factory.mktemp("clvr")
    for name in ("tokenizer", "rows"):
        (root / name).mkdir()
    make_tokenizer(root / "tokenizer")
    prompts(root / "rows")  # writes the images
    run = clvr_run(root / "tokenizer", *RUNS[request.param])
    groups.start(ParallelConfig())
    engine = Engine.create(run, groups.build(run.parallel))
    (model,) = engine.chunks
    randomise(model, seed=5)
    close_gates(model)
    sharded.save(engine, {}, root / "mega", 7)
    to_folder(root / "mega", root / "hf")
    yield run, engine, root
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager"
    ).eval()


# 10 s of CPU time: 64 tokens of 8 prompts, for ours by running the whole sequence each time.
@pytest.mark.slow
def test_greedy_tokens(exported):
    """Eight prompts of different lengths and images in one padded batch, as a user would."""
    run, engine, root = exported
    rows = prompts(root / "rows")
    tokenizer, settings = load_tokenizer(root / "tokenizer"), image_settings(run)
    builder = SampleBuilder(run, tokenizer)
    samples = [builder.prompt(row, "row", root / "rows") for row in rows]
    batch = collate(samples, settings=settings, pad_id=tokenizer.pad_id)
    engine.training(False)
    (ours,) = generate(
        engine, [batch], stop_id=-1, pad_id=tokenizer.pad_id, max_new_tokens=NEW_TOKENS
    )
    processor = AutoProcessor.from_pretrained(root / "hf", trust_remote_code=True)
    chats = [
        processor.apply_chat_template(row["messages"], add_generation_prompt=True) for row in rows
    ]
    images = [Image.open(root / "rows" / name) for row in rows for name in row["images"]]
    inputs = processor(images=images, text=chats)
    for sample, ids, mask in zip(
        samples, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        assert ids[mask.bool()].tolist() == sample.tokens_T.tolist()
    held = batch.memories.values()
    for mine, theirs in (
        (normalised(batch.pixels_NCHW), "pixel_values"),
        (batch.stream_tiles, "stream_tiles"),
        (torch.cat([memory.tiles for memory in held]), "memory_tiles"),
        (torch.cat([memory.coordinates_M2 for memory in held]), "memory_coordinates"),
    ):
        assert torch.equal(inputs[theirs], mine), theirs
    hf = load(root / "hf")
    begin = inputs["input_ids"].shape[1]
    found = hf.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert found[:, begin:].tolist() == ours.tolist()
    # Not one answer for all, nor one token for ever.
    assert len({tuple(row) for row in ours.tolist()}) >= 6 and len(ours.unique()) > 30
    blind = dict(inputs) | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    other = hf.generate(**blind, max_new_tokens=NEW_TOKENS, do_sample=False)
    changed = (other != found).any(1).tolist()
    assert changed == [bool(row["images"]) for row in rows]


def test_every_layer(exported):
    run, engine, root = exported
    checkpoint = to_hf.open_checkpoint(root / "mega")
    theirs = hf_model.load_transformers(root / "hf", trust_remote_code=True)
    ours = parity.mcore_model(checkpoint, engine.groups)
    image = json.loads((root / "hf" / "config.json").read_text())["image_token_id"]
    cases = parity.built_in_cases(RunConfig(model=run.model), image)
    tokenizer = load_tokenizer(root / "hf")  # what travelled along
    given = (tokenizer, "what stands here?", root / "rows" / "1.png")
    cases.append(parity.given_case(RunConfig(model=run.model), *given))
    found = list(
        parity.compare_outputs(checkpoint, ours, theirs, RunConfig(model=run.model), cases)
    )
    assert len(found) == 4 * 6 and max(f.size for f in found) <= parity.TOLERANCE, found
    with torch.no_grad():  # a look that sees something else is noticed where it is injected
        theirs.clvr.looks["0"].linear_kv.weight.mul_(1.01)
    found = list(
        parity.compare_outputs(checkpoint, ours, theirs, RunConfig(model=run.model), cases[1:])
    )
    first = next(f for f in found if f.size > parity.TOLERANCE)
    assert first.where == "layer 3"


def test_round_trip(exported, tmp_path):
    """Read again, it is the same model with the same looks, and the same tensors."""
    run, _, root = exported
    source, plan, _ = planned(root / "hf")
    assert not plan.new and source.model.fusion == run.model.fusion
    assert source.model.hybrid_layer_pattern == run.model.hybrid_layer_pattern
    assert source.model.layers == run.model.layers
    to_checkpoint(root / "hf", tmp_path / "again")
    to_folder(tmp_path / "again", tmp_path / "hf")
    assert_same(read_all(tmp_path / "hf"), read_all(root / "hf"))
    names = {path.name for path in travelling(root / "hf")}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names


def test_nothing_runs_unasked(exported):
    _, _, root = exported
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(root / "hf", trust_remote_code=False)
