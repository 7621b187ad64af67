"""Settings of memories: one description of each, the memory of each look, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mm.checkpoint.compatible import check_model
from megatron_mm.config import (
    ConfigError,
    Manifest,
    Memory,
    MemoryConfig,
    effective_pattern,
    load,
    look_memories,
    memories,
    memories_of_pairs,
    parse_pattern,
    preset,
    read_memories,
    stages,
    to_dict,
    validate,
    wire,
)
from megatron_mm.config.cost import costs
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.errors import CheckpointError
from support.batches import small_run, two_memories

YAML = """
model:
  preset: tiny
  hybrid_layer_pattern: GE L *E L J GE J
  fusion:
    vision_memory: none
    memories:
      overview: {tiles: thumbnail, hidden_size: 24, coordinates: false}
      detail: {images: others}
    look_memories: [detail, overview]
data: {seq_length: 128}
"""
OVERVIEW = Memory("overview", "thumbnail", 24, 4, False, "images")
DETAIL = Memory("detail", "tiles", 24, 4, True, "others")


def read(tmp_path, *changes: tuple[str, str]):
    text = YAML
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "run.yaml").write_text(text)
    return load(str(tmp_path / "run.yaml"))


def test_present_settings_describe_the_memory_vision():
    model = preset("tiny")
    (memory,) = memories(model, "others")
    assert memory == Memory("vision", "tiles", 48, 2, True, "others")
    assert look_memories(model) == (memories(model)[0],) == read_memories(model)
    model.fusion.memory_hidden_size = None
    assert memories(model)[0].width == 24  # a quarter of 96
    model.fusion.vision_memory = "none"
    assert memories(model) == look_memories(model) == ()
    model.fusion.vision_memory, model.vision = "tiles", None
    assert memories(model) == ()


def test_named_memories_from_yaml(tmp_path):
    run = read(tmp_path)
    validate(run)
    assert memories(run.model) == (OVERVIEW, DETAIL)
    assert look_memories(run.model) == (DETAIL, OVERVIEW)
    assert read_memories(run.model) == (OVERVIEW, DETAIL)
    assert to_dict(run)["model"]["fusion"]["memories"]["detail"]["images"] == "others"
    assert effective_pattern(run.model) == "GE L *E L J GE J"


def test_looks_read_the_first_memory_unless_told(tmp_path):
    off = ("detail: {images: others}", "detail: {tiles: none}")
    run = read(tmp_path, ("look_memories: [detail, overview]", "look_memories: []"), off)
    validate(run)
    assert look_memories(run.model) == (OVERVIEW, OVERVIEW)
    run.model.fusion.vision_memory = "tiles"
    assert [memory.name for memory in look_memories(run.model)] == ["vision", "vision"]


def test_without_looks_or_tiles_no_memory_is_read(tmp_path):
    run = read(tmp_path, ("GE L *E L J GE J", "GE *E GE"))
    validate(run)
    assert look_memories(run.model) == read_memories(run.model) == ()
    run = read(tmp_path, ("tiles: thumbnail", "tiles: none"), ("images: others", "tiles: none"))
    validate(run)
    assert effective_pattern(run.model) == "GE*EGE" and look_memories(run.model) == ()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "[detail, overview]",
            "[detail, overveiw]",
            "unknown memory in look_memories: overveiw; did you mean overview",
        ),
        (
            "[detail, overview]",
            "[detail, x]",
            "unknown memory in look_memories: x; allowed: detail, overview",
        ),
        (
            "[detail, overview]",
            "[detail]",
            "look_memories names 1 memories for the 2 L of hybrid_layer_pattern; allowed: one for",
        ),
        (
            "[detail, overview]",
            "[detail, detail]",
            "memories.overview.tiles is 'thumbnail' but no look reads the memory overview; allowed",
        ),
        (
            "vision_memory: none",
            "vision_memory: tiles",
            "vision_memory is 'tiles' but no look reads the memory vision; allowed: none, or the",
        ),
        ("overview: {tiles", "vision: {tiles", "memories holds 'vision'; allowed: a name of"),
        ("overview: {tiles", "over-view: {tiles", "memories holds 'over-view'; allowed: a name of"),
        (
            "hidden_size: 24",
            "hidden_size: 40",
            "hidden_size 96 does not divide by memories.overview.hidden_size 40; allowed: a div",
        ),
        ("hidden_size: 24", "hidden_size: 0", "memories.overview.hidden_size is 0; allowed: more"),
        ("images: others", "images: ''", "memories.detail.images is ''; allowed: a key"),
        ("tiles: thumbnail", "tiles: all", "memories.overview.tiles is 'all'; allowed: none, thu"),
        (
            "seq_length: 128",
            "seq_length: 128, use_thumbnail: false",
            "use_thumbnail is False; allowed: true, because memories.overview.tiles is thumbnail",
        ),
    ],
)
def test_refused(tmp_path, old, new, words):
    with pytest.raises(ConfigError) as error:
        run = read(tmp_path, (old, new))
        run.model.fusion.image_stream = "tiles"
        validate(run)
    assert words in str(error.value)


def test_a_checkpoint_holds_the_memories_but_not_the_key_of_their_images(tmp_path):
    stored = to_dict(read(tmp_path).model)
    check_model(stored, read(tmp_path, ("images: others", "images: images")).model, finetune=False)
    other = read(tmp_path, ("hidden_size: 24", "hidden_size: 48")).model
    with pytest.raises(CheckpointError, match=r"fusion.memories.overview.hidden_size is 24 there"):
        check_model(stored, other, finetune=False)
    check_model(stored, other, finetune=True)


def test_a_text_model_has_no_memories():
    run = load(None, ["--preset", "qwen3-next-80b-a3b", "--seq-length", "128"])
    run.model.fusion.memories = {"detail": MemoryConfig()}
    with pytest.raises(ConfigError, match="memories holds detail; allowed: none, because model.vi"):
        validate(run)


def test_a_memory_travels_to_the_last_look_that_reads_it():
    pattern = "GE L GE L GE J GE L J GE J"
    split = stages(pattern, 5, "GE L| GE L| GE J| GE L J| GE J")
    assert wire(split, ["b", "a", "b"]) == (
        Manifest(memories=("a", "b"), refinements=(("looks", 0),)),
        Manifest(memories=("b",), refinements=(("looks", 0), ("looks", 1))),
        Manifest(memories=("b",), refinements=(("looks", 1),)),
        Manifest(memories=(), refinements=(("looks", 2),)),
    )


def test_every_layer_that_reads_has_its_own_memory(monkeypatch):
    """A numbered layer may read too; then pairs and readers are numbered differently."""
    reader = replace(
        LAYERS["E"], letter="Q", reads_memory=True, module="x.Y", check=lambda run: None
    )
    monkeypatch.setattr(LAYERS, "_parts", LAYERS._parts | {"Q": reader})
    run = small_run("GQ *E L J", **two_memories("detail", "overview"))
    layers = parse_pattern(run.model.hybrid_layer_pattern)
    assert {la.kind: la.reader for la in layers if la.reader is not None} == {"Q": 0, "L": 1}
    assert {p: m.name for p, m in memories_of_pairs(run.model).items()} == {0: "overview"}
    names = [memory.name for memory in look_memories(run.model)]
    boundaries = wire(stages("GQ *E L J", 3, "G|Q*E|LJ"), names)
    assert [m.memories for m in boundaries] == [("detail", "overview"), ("overview",)]
    run.parallel.pipeline_model_parallel_size = 1
    # What a look costs depends on the memory that it reads, not on the first one.
    wide = costs(run).letters["L"]
    run.model.fusion.memories["overview"].hidden_size = 64
    assert costs(run).letters["L"] > wide
