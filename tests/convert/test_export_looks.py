"""The export of a model that glimpses computes what we compute, forces the same slots, and says
what we say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from megatron_mm.benchmark.hf_weights import randomise
from megatron_mm.checkpoint import sharded
from megatron_mm.config import MemoryConfig, ParallelConfig, RunConfig
from megatron_mm.config.layers.queries import query_settings
from megatron_mm.convert import hf_model, parity, to_hf
from megatron_mm.convert.parity_inputs import compare_inputs
from megatron_mm.convert.remote.processing_megatron_mm import MegatronMMProcessor
from megatron_mm.data.looks import LookTokens, first_place_token
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import (
    LOOK,
    LOOK_CONTEXT,
    LOOK_TOKENS,
    SPECIAL_TOKENS,
    load_tokenizer,
)
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import CheckpointError, ConvertError, DataError
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel import groups
from support.batches import SMALL_MODELS, small_run
from support.folders import assert_same, planned, read_all, to_checkpoint, to_folder
from support.hf_tokenizers import byte_level_tokenizer

NEW_TOKENS = 64
NEVER = -1
WORDS = 10  # tokens that the model chooses among, so that a query is drawn now and then
SIZES = [(16, 16), (48, 16), (16, 33), (70, 40)]  # pixels; tiles are 16 wide
TWO_MEMORIES = {
    "vision_memory": "thumbnail",
    "memories": {"detail": MemoryConfig("pyramid", 16)},
    "look_memories": ["vision", "detail", "detail"],
}
PYRAMID = {"vision_memory": "pyramid"}
# Glimpses alone, few of them; and two beside a look, at a memory of their own. Last stands the
# first output that glimpse 0 changes.
RUNS = {
    "glimpses": ("GE Q *E V", PYRAMID, "qwen3_next", 3, "logits"),
    "glimpses and looks": ("GE L Q *E J Q GE V *E V", TWO_MEMORIES, "qwen3_5_moe", 32, "layer 3"),
    "words": ("Q V GE *E", PYRAMID, "qwen3_next", 32, "layer 0"),
}


def spoken(name: str) -> bool:
    """Whether words say where it looks."""
    return name == "words"


def save_tokenizer(folder: Path) -> None:
    tokenizer = byte_level_tokenizer(["user assistant what stands in cell"], 270)
    more = {"additional_special_tokens": [*LOOK_TOKENS]}
    tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)
    tokenizer.pad_token = SPECIAL_TOKENS["pad_id"]
    tokenizer.save_pretrained(folder)


def rows(folder: Path, name: str) -> list[dict]:
    """Eight conversations: without an image, with one, with two; in some an answer has looked."""
    look, again = LOOK, LOOK
    if spoken(name):
        look = f"<look_y_8><look_x_24><look_s_2>{LOOK}"
        again = f"<look_y_30><look_x_1><look_s_0>{LOOK}"
    g = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = g.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    chats = [
        (["what stands in cell 3?"], []),
        (["<image>what is it?"], [0]),
        (["<image>and here?", f"cell 1{look} is{again} 6", "sure?"], [1]),
        (["look at this: <image> what stands there?"], [2]),
        (["<image>", "no", "why?"], [3]),
        (["<image>and<image>are they the same?"], [1, 2]),
        (["<image>?", f"{look}", "then <image>: which is larger?"], [3, 0]),
        (["a b c d e f g h"], []),
    ]
    roles = ("user", "assistant", "user")
    return [
        {
            "messages": [
                {"role": role, "content": text} for role, text in zip(roles, texts, strict=False)
            ],
            "images": [f"{number}.png" for number in images],
        }
        for texts, images in chats
    ]


def looking_run(name: str, tokenizer: Path) -> RunConfig:
    pattern, fusion, family, most, _ = RUNS[name]
    run = small_run(pattern, **fusion)
    run.model.language = SMALL_MODELS[family]().language
    run.model.language.vocab_size = 352
    run.data.tokenizer_model = str(tokenizer)
    run.data.max_num_tiles, run.data.seq_length = 4, 512
    query_settings(run.model).max_queries = most
    query_settings(run.model).query_place = "tokens" if spoken(name) else "hidden"
    return run


@torch.no_grad()
def draw_weights(model, looks: LookTokens) -> None:
    """No parameter at its default, and few tokens to choose among, a query one of them."""
    randomise(model, seed=5)
    query_id = looks.query_id
    kept = torch.tensor([*range(65, 65 + WORDS), query_id])
    if looks.words is not None:  # so few that some queries stand behind the words of a place
        kept = torch.tensor([*looks.words.spell((0.3, 0.7, 0.4)), query_id])
    for name, param in model.named_parameters():
        if name.endswith("min_scale"):
            param.fill_(0.3)  # some queries ask for less, some for more
        elif name == "output_layer.weight":
            whole = torch.zeros_like(param)
            whole[kept] = param[kept]
            whole[query_id] *= 3.0
            param.copy_(whole)


@pytest.fixture(scope="module", params=RUNS)
def exported(request, tmp_path_factory):
    """(run, engine, folder of its tokenizer, rows, checkpoint `mega` and export `hf`, its name)"""
    root = tmp_path_factory.mktemp("looks")
    for name in ("tokenizer", "rows"):
        (root / name).mkdir()
    save_tokenizer(root / "tokenizer")
    rows(root / "rows", request.param)  # writes the images
    run = looking_run(request.param, root / "tokenizer")
    groups.start(ParallelConfig())
    engine = Engine.create(run, groups.build(run.parallel))
    draw_weights(engine.chunks[0], LookTokens.of(run, load_tokenizer(root / "tokenizer")))
    sharded.save(engine, {}, root / "mega", 7)
    to_folder(root / "mega", root / "hf")
    yield run, engine, root, request.param
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, attn_implementation="eager"
    ).eval()


def inputs_of(root: Path, chats: list[dict]):
    """Prompts that a user's processor makes of conversations."""
    processor = AutoProcessor.from_pretrained(root / "hf", trust_remote_code=True)
    how = {"add_generation_prompt": True}
    texts = [processor.apply_chat_template(row["messages"], **how) for row in chats]
    images = [Image.open(root / "rows" / name) for row in chats for name in row["images"]]
    return processor(images=images or None, text=texts)


# 10 s of CPU time: 64 tokens of 8 prompts, by two programs.
@pytest.mark.slow
def test_greedy_tokens(exported):
    """Eight prompts of different lengths and images in one padded batch, as a user would."""
    run, engine, root, name = exported
    tokenizer = load_tokenizer(root / "tokenizer")
    builder, looks = SampleBuilder(run, tokenizer), LookTokens.of(run, tokenizer)
    chats = rows(root / "rows", name)
    samples = [builder.prompt(row, "row", root / "rows") for row in chats]
    ours = generate(
        engine,
        Prompts(lambda i: samples[i], range(len(samples))),
        Sampling((NEVER,), NEW_TOKENS, 0.0, looks=looks),
        max_num_seqs=8,
        pad_id=tokenizer.pad_id,
    )
    inputs = inputs_of(root, chats)
    for sample, ids, mask in zip(
        samples, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        assert ids[mask.bool()].tolist() == sample.tokens_T.tolist()
    hf, begin = load(root / "hf"), inputs["input_ids"].shape[1]
    how = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    found = hf.generate(**inputs, **how)[:, begin:]
    asks, said = 0, []
    for sample, row, (mine,) in zip(samples, found, ours, strict=True):
        drawn = looks.drawn(row, len(sample.queries))
        assert row[drawn].tolist() == mine.tokens_G.tolist()
        assert (row[~drawn] == looks.slot_id).all()
        asks += int((row[drawn] == looks.query_id).sum())
        stream = torch.cat((sample.tokens_T, row))
        said += looks.targets(stream, looks.find(stream).tolist(), [])
        assert len(sample.queries) + int((~drawn).sum()) / looks.slots <= looks.most
    assert not spoken(name) or len({*said}) >= 3  # of the prompts two, and one of an answer
    # Fewer words to choose among make fewer answers.
    answers = len({tuple(row) for row in found.tolist()})
    assert asks >= 16 and answers >= (4 if spoken(name) else 6)
    for layer in hf.avm.queries.values():  # what glimpses find changes what is said
        layer.linear_proj.weight.data.zero_()
    blind = hf.generate(**inputs, **how)[:, begin:]
    changed = (blind != found).any(1).tolist()
    assert any(changed) and not any(
        c for c, row in zip(changed, chats, strict=True) if not row["images"]
    )


def test_every_layer(exported):
    run, engine, root, name = exported
    checkpoint, source = to_hf.open_checkpoint(root / "mega"), planned(root / "hf")[0]
    theirs = hf_model.load_transformers(root / "hf", trust_remote_code=True)
    ours = parity.mcore_model(checkpoint, engine.groups)
    plain = RunConfig(model=run.model)
    cases = parity.built_in_cases(plain, source.image_token_id, source.look_ids)
    both = min(6, query_settings(run.model).max_queries // 2 * 2)
    assert [len(case.sample.queries) for case in cases] == [0, 3, 3, both]
    found = list(parity.compare_outputs(checkpoint, ours, theirs, plain, cases))
    assert max(f.size for f in found) <= parity.TOLERANCE, found
    with torch.no_grad():  # a glimpse that sees something else is noticed behind its V
        theirs.avm.queries["0"].linear_kv.weight.mul_(1.01)
    found = list(parity.compare_outputs(checkpoint, ours, theirs, plain, cases[1:]))
    first = next(f for f in found if f.size > parity.TOLERANCE)
    assert first.where == RUNS[name][-1]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_round_trip(exported, tmp_path, dtype):
    """Read again, it is the same model with the same glimpses, and the same tensors."""
    run, _, root, name = exported
    to_folder(root / "mega", tmp_path / "first", dtype=dtype)
    source, plan, _ = planned(tmp_path / "first")
    assert not plan.new and source.model.fusion == run.model.fusion
    assert source.model.hybrid_layer_pattern == run.model.hybrid_layer_pattern
    assert source.model.layers == run.model.layers
    tokenizer = load_tokenizer(root / "tokenizer")
    first = (first_place_token(tokenizer),) if spoken(name) else ()
    assert source.look_ids == (tokenizer.look_id, tokenizer.look_context_id, *first)
    to_checkpoint(tmp_path / "first", tmp_path / "again")
    to_folder(tmp_path / "again", tmp_path / "hf")
    tensors = read_all(tmp_path / "hf")
    assert_same(tensors, read_all(tmp_path / "first"))
    names = {name for name in tensors if name.startswith("avm.queries.0.")}
    assert len(names) == 11 and "avm.queries.0.min_scale" in names


def test_inputs_are_those_of_training(exported):
    """Conversations whose answers looked, by the export's own template and processor."""
    _, _, root, _ = exported
    source, checkpoint = planned(root / "hf")[0], to_hf.open_checkpoint(root / "mega")
    (said,) = compare_inputs(source, checkpoint, trust_remote_code=False)
    assert "bitwise identical, 17 conversations" in said


def test_a_processor_that_forgets_slots_is_noticed(exported, monkeypatch):
    _, _, root, _ = exported
    source, checkpoint = planned(root / "hf")[0], to_hf.open_checkpoint(root / "mega")
    read = MegatronMMProcessor.from_pretrained

    def without_looks(*args, **kwargs):
        processor = read(*args, **kwargs)
        processor.looks = None
        return processor

    monkeypatch.setattr(MegatronMMProcessor, "from_pretrained", without_looks)
    with pytest.raises(ConvertError, match="looks at 1 images: token"):
        compare_inputs(source, checkpoint, trust_remote_code=False)


def test_history_whose_look_says_no_place_is_read_alike(exported):
    """It may be the model's own; the model then looks at the whole image, here and there."""
    run, _, root, _ = exported
    chat = [("user", "<image>"), ("assistant", f"cell 3{LOOK} is 6"), ("user", "so?")]
    row = {"messages": [{"role": r, "content": c} for r, c in chat], "images": ["0.png"]}
    builder = SampleBuilder(run, load_tokenizer(root / "tokenizer"))
    ids = inputs_of(root, [row])["input_ids"][0].tolist()
    assert ids == builder.prompt(row, "row", root / "rows").tokens_T.tolist()


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([f"<image>{LOOK}"], "no assistant's has <look>"),
        (["<image>", LOOK_CONTEXT, "so?"], "1 tokens <LOOK_CONTEXT>, the template has 0"),
        (["a", LOOK, "<image>so?"], "no image stands before the first <look>"),
        (["<image>", LOOK * 40, "so?"], "a prompt has 40 <look>; allowed: "),
    ],
)
def test_the_processor_refuses_what_training_refuses(exported, messages, said):
    run, _, root, _ = exported
    roles = ("user", "assistant", "user")
    chat = [{"role": r, "content": text} for r, text in zip(roles, messages, strict=False)]
    row = {"messages": chat, "images": ["0.png"]}
    with pytest.raises(ValueError, match=said):
        inputs_of(root, [row])
    builder = SampleBuilder(run, load_tokenizer(root / "tokenizer"))
    with pytest.raises(DataError):
        builder.prompt(row, "row", root / "rows")


def test_the_cache_keeps_what_a_query_found(exported):
    """Prompts that are cut between a query and its slots, or among these, and read on token by
    token, say what they say as a whole."""
    _, _, root, name = exported
    inputs = inputs_of(root, rows(root / "rows", name)[2:3])
    ids, hf = inputs["input_ids"], load(root / "hf")
    with torch.no_grad():
        whole = hf(**inputs, use_cache=False).logits
        place = (ids[0] == hf.rule.query_id).nonzero().flatten()[0]
        for cut in (place, place + 1, place + 3):
            images = {name: x for name, x in inputs.items() if name not in ("input_ids",)}
            mask = images.pop("attention_mask")
            first = hf(ids[:, :cut], attention_mask=mask[:, :cut], **images, use_cache=True)
            cache, logits = first.past_key_values, [first.logits]
            for at in range(int(cut), ids.shape[1]):
                step = ids[:, at : at + 1], mask[:, : at + 1]
                found = hf(step[0], attention_mask=step[1], past_key_values=cache)
                logits.append(found.logits)
            # Steps and whole prompts sum in other orders: 1e-6 measured.
            assert ((torch.cat(logits, 1) - whole).norm() / whole.norm()) < 1e-5
        cache.activate_past_recording()
        hf(ids[:, -1:], attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(ValueError, match="a cache of"):
            hf(ids[:, -1:], attention_mask=mask, past_key_values=cache)


def test_beams_take_what_their_queries_found_along(exported):
    _, _, root, name = exported
    chats = rows(root / "rows", name)
    inputs = inputs_of(root, [chats[2], chats[5]])
    hf, begin = load(root / "hf"), inputs["input_ids"].shape[1]
    how = {"max_new_tokens": 14, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    found = hf.generate(**inputs, **how)
    assert (found[:, begin:] == hf.rule.query_id).any() and len(found.unique(dim=0)) > 3
    assert hf.generate(**inputs, **how, use_cache=False).tolist() == found.tolist()


def test_tokens_that_are_not_known(exported, tmp_path):
    """A tokenizer without them, or with others than the checkpoint was made for."""
    _, _, root, _ = exported
    plain = byte_level_tokenizer(["user assistant"], 262)
    plain.save_pretrained(tmp_path / "plain")
    assets = sorted((tmp_path / "plain").glob("*.json"))
    with pytest.raises(CheckpointError, match="which tokens are <look> and <LOOK_CONTEXT>"):
        to_folder(root / "mega", tmp_path / "hf", assets=assets)
    checkpoint = to_hf.open_checkpoint(root / "mega")
    checkpoint.notes["look_ids"] = [5, 6]
    with pytest.raises(CheckpointError, match=r"in the tokenizer, \[5, 6\] in the checkpoint"):
        to_hf.convert(checkpoint, tmp_path / "hf", dist.group.WORLD, quiet=True)
