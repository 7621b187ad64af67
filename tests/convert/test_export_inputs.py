"""An export reads text and images as training did, and check_parity proves it or names the
difference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from megatron_mm.convert import parity_inputs, to_hf
from megatron_mm.convert.export_inputs import TEMPLATE, _template_serves
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.sampling import Sampling
from support.exports import TEXT_TEMPLATE, converted, exported, loaded, save_origin, trained
from support.folders import base_model
from support.tools import load_tool

# InternVL's way: an image is one token, which the processor multiplies.
IMAGE_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<IMG_CONTEXT>' if p.type == 'image' else p.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture
def parity(capsys):
    """`parity(folder, checkpoint)` -> (exit status, what the command says)."""

    def run(folder: Path, checkpoint: Path) -> tuple[int, str]:
        capsys.readouterr()
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        args = ["--hf", folder, "--checkpoint", checkpoint, "--trust-remote-code"]
        status = load_tool("check_parity").main([str(arg) for arg in args])
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        return status, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("fused", "looks", "run"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
    ids=["fused-looks-trained", "fused-plain", "two folders-looks", "two folders-plain-trained"],
)
def test_an_export_of_each_origin_reads_as_training_did(made, parity, fused, looks, run):
    checkpoint, folder, lines = made(fused, looks, run)
    assert lines == []
    status, said = parity(folder, checkpoint)
    assert status == 0, said
    assert "token ids and pixel values are bitwise identical, 15 conversations" in said
    assert "every layer and the logits agree" in said


def change(folder: Path, name: str, **keys) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    for dotted, value in keys.items():
        *inner, last = dotted.split("__")
        part = content
        for key in inner:
            part = part[key]
        part[last] = value
    path.write_text(json.dumps(content))


def replace_in(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def tiling(**keys):
    return lambda folder: change(
        folder, "processor_config.json", **{f"tiles__{key}": value for key, value in keys.items()}
    )


# What is changed by hand, which file the one line names, and what reading alone would find.
SPOILT = {
    "an image's place": (
        lambda f: replace_in(f, TEMPLATE, "{{- '<IMG_CONTEXT>' -}}", "{{- ' <IMG_CONTEXT>' -}}"),
        TEMPLATE,
        "reads texts and parts differently",
    ),
    "marks in text": (
        lambda f: replace_in(f, TEMPLATE, "'<image>', '<IMG_CONTEXT>'", "'<image>', '<image>'"),
        TEMPLATE,
        "reads texts and parts differently",
    ),
    "a line break between turns": (
        lambda f: replace_in(f, TEMPLATE, "not tools else '\\n'", "not tools else ''"),
        TEMPLATE,
        "line breaks: token",
    ),
    "the words before tools": (
        lambda f: replace_in(f, TEMPLATE, "signatures", "descriptions"),
        TEMPLATE,
        "tools: token",
    ),
    "arguments of tools": (
        lambda f: replace_in(
            f, TEMPLATE, "{{- call.arguments -}}", "{{- call.arguments|tojson -}}"
        ),
        TEMPLATE,
        "tools: token",
    ),
    "no template": (lambda f: (f / TEMPLATE).unlink(), TEMPLATE, "text: ValueError"),
    "an older template beside it": (
        lambda f: (f / "chat_template.json").write_text("{}"),
        "chat_template.json is in the folder and in no export",
        None,
    ),
    "an end token": (
        lambda f: change(f, "generation_config.json", eos_token_id=[1]),
        "generation_config.json: eos_token_id is [1], of an export",
        None,
    ),
    "a generation setting": (
        lambda f: change(f, "generation_config.json", max_length=3),
        "generation_config.json: max_length is 3, of an export null",
        None,
    ),
    "no generation config": (
        lambda f: (f / "generation_config.json").unlink(),
        "generation_config.json is missing",
        None,
    ),
    "a token": (
        lambda f: replace_in(f, "tokenizer.json", '"<|im_end|>"', '"<|im_ed|>"'),
        "tokenizer.json",
        "text: ValueError: text becomes 0 tokens",
    ),
    "a higher tiling limit": (tiling(max_num_tiles=4), "processor_config.json", "pixels: token"),
    "a lower tiling limit": (tiling(max_num_tiles=2), "processor_config.json", "pixels: token"),
    "no budget": (tiling(max_image_tokens=None), "processor_config.json", "2 images: token"),
    "no thumbnail": (tiling(use_thumbnail=False), "processor_config.json", "pixels: "),
    "a mean": (tiling(mean=[0.5, 0.4, 0.31]), "processor_config.json", "pixel_values"),
    "no code": (
        lambda f: change(f, "processor_config.json", auto_map={}),
        "processor_config.json: auto_map is {}",
        None,
    ),
    "the dtype": (
        lambda f: change(f, "config.json", dtype="bfloat16"),
        "dtype is 'bfloat16', most elements are float32",
        None,
    ),
    "no dtype": (lambda f: change(f, "config.json", dtype=None), "dtype is None, most", None),
}


def spoiled(made, tmp_path: Path, looks: bool, spoil) -> tuple[Path, Path]:
    """A changed copy of a trained run's export, and its checkpoint."""
    checkpoint, folder, _ = made(True, looks, True)
    shutil.copytree(folder, tmp_path / "hf")
    before = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    spoil(tmp_path / "hf")
    assert before != {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    return tmp_path / "hf", checkpoint


def one_error(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize(
    ("what", "looks"), [(what, number % 2 == 0) for number, what in enumerate(SPOILT)]
)
def test_a_change_by_hand_is_found(made, parity, tmp_path, what, looks):
    spoil, named, _ = SPOILT[what]
    status, said = parity(*spoiled(made, tmp_path, looks, spoil))
    assert status == 1 and named in one_error(said), said


@pytest.mark.parametrize("what", [name for name, (_, _, read) in SPOILT.items() if read])
def test_reading_alone_would_find_it(made, parity, tmp_path, monkeypatch, what):
    """So the conversations are no second look at the same files."""
    monkeypatch.setattr(parity_inputs, "_check_same", lambda *args: None)
    spoil, _, read = SPOILT[what]
    status, said = parity(*spoiled(made, tmp_path, False, spoil))
    assert status == 1 and read in one_error(said), said


def test_an_origin_is_compared_with_what_it_was_converted_from(made, parity, tmp_path):
    """The README's command on a fused folder, which may have no processor."""
    checkpoint, _, _ = made(True, False, False)
    origin = checkpoint.parent / "origin1" / "language"
    status, said = parity(origin, checkpoint)
    assert status == 0 and "are those that it was converted with" in said, said
    shutil.copytree(origin, tmp_path / "hf")
    change(tmp_path / "hf", "generation_config.json", eos_token_id=[1])
    status, said = parity(tmp_path / "hf", checkpoint)
    assert status == 1 and "generation_config.json: eos_token_id is [1]" in one_error(said)


@pytest.mark.parametrize("looks", [True, False], ids=["looks", "plain"])
def test_an_export_comes_back_as_it_was(made, parity, tmp_path, looks):
    """In and out again: the same files, tiling above all."""
    _, folder, _ = made(True, looks, True)
    checkpoint = converted([folder], tmp_path / "mega", looks=False)
    assert exported(checkpoint, tmp_path / "hf") == []
    for path in folder.iterdir():
        if path.suffix in (".py", ".jinja"):
            assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
        elif path.suffix == ".json" and path.name != "model.safetensors.index.json":
            again = json.loads((tmp_path / "hf" / path.name).read_text())
            assert again == json.loads(path.read_text()), path.name
    status, said = parity(tmp_path / "hf", checkpoint)
    assert status == 0 and "15 conversations" in said, said


TEMPLATES = {
    "{% for m in messages %}{{ m.content | trim }}{% endfor %}": False,
    "{% for m in messages %}{{ m.content }}{% endfor %}": False,
    "{% for p in messages[0].content %}image{{ p.text }}{% endfor %}": False,
    TEXT_TEMPLATE: False,
    IMAGE_TEMPLATE: True,
    IMAGE_TEMPLATE.replace("<IMG_CONTEXT>", "<|vision_start|><|image_pad|>"): False,
    IMAGE_TEMPLATE.replace("<IMG_CONTEXT>", "<IMG_CONTEXT><IMG_CONTEXT>"): False,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_serves_if_an_image_is_one_token(template):
    files = {TEMPLATE: template.encode()}
    assert _template_serves(files, base_model()) == TEMPLATES[template]
    assert _template_serves({}, replace(base_model(), vision=None))
    assert not _template_serves({}, base_model())


def test_files_that_came_along_stay_where_they_serve(made, parity, tmp_path):
    """A fused folder with a template for images and a processor comes back as it was."""
    origin = tmp_path / "origin"
    (main,) = save_origin(origin, fused=True)
    kept = {"chat_template.jinja": IMAGE_TEMPLATE, "preprocessor_config.json": '{"max_patches": 7}'}
    for name, content in kept.items():
        (main / name).write_text(content)
    made(True, False, False)  # has started the groups
    checkpoint = converted([main], tmp_path / "mega", looks=False)
    assert exported(checkpoint, tmp_path / "hf") == []
    for name in (*kept, "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (main / name).read_bytes()
    status, said = parity(tmp_path / "hf", checkpoint)
    assert status == 0 and "are those that it was converted with" in said
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"max_patches": 6}')
    status, said = parity(tmp_path / "hf", checkpoint)
    assert (
        status == 1
        and "preprocessor_config.json: max_patches is 6, of an export 7" in one_error(said)
    )


def test_end_tokens_are_those_of_training(made, tmp_path):
    """generate() stops where our answers end: the template's end, the origin's, the setting's."""
    made(True, False, False)
    origin = save_origin(tmp_path / "origin", fused=True)
    base = converted(origin, tmp_path / "base", looks=False)
    checkpoint = trained(base, tmp_path / "run", origin[0], end_tokens=["</box>"])
    exported(checkpoint, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    config = GenerationConfig.from_pretrained(tmp_path / "hf")
    spelled = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    assert sorted(spelled) == sorted(["<|im_end|>", "<|endoftext|>", "</box>"])
    assert config.pad_token_id == tokenizer.pad_token_id and config.top_k == 20


def test_generate_ends_where_our_decoder_ends(made, tmp_path):
    """A token of the greedy answer is made an end: both stop behind it."""
    made(True, True, False)
    origin = save_origin(tmp_path / "origin", fused=True)
    base = converted(origin, tmp_path / "base", looks=True)
    chat = [{"role": "user", "content": "what stands in cell 3?"}]

    def answer(name: str, end_tokens: list[str]) -> tuple[list[int], list[int]]:
        """Our greedy answer of at most 12 tokens, and that of transformers' generate."""
        checkpoint = trained(base, tmp_path / name, origin[0], end_tokens=end_tokens)
        exported(checkpoint, tmp_path / f"hf{name}")
        run = to_hf.open_checkpoint(checkpoint).run
        tokenizer = load_tokenizer(origin[0], run.data.end_tokens)
        sample = SampleBuilder(run, tokenizer).prompt({"messages": chat}, "row", tmp_path)
        engine = loaded(checkpoint)
        engine.training(False)
        ((completion,),) = generate(
            engine,
            Prompts(lambda index: sample, [0]),
            Sampling(tokenizer.end_ids, 12, temperature=0.0),
            max_num_seqs=1,
            pad_id=tokenizer.pad_id,
        )
        folder = tmp_path / f"hf{name}"
        hf = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
        inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=True).apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        found = hf.generate(**inputs, max_new_tokens=12, do_sample=False)
        return completion.tokens_G.tolist(), found[0, inputs["input_ids"].shape[1] :].tolist()

    ours, theirs = answer("free", [])
    assert ours == theirs and len(ours) == 12
    end = next(i for i in ours[3:] if i not in ours[:3] and i < 256)
    tokenizer = AutoTokenizer.from_pretrained(origin[0])
    cut, theirs = answer("cut", [tokenizer.convert_ids_to_tokens(end)])
    assert cut == theirs == ours[: ours.index(end) + 1] and len(cut) < 12
    said = load_tokenizer(origin[0], [tokenizer.convert_ids_to_tokens(end)]).decode_answer(cut)
    assert said == tokenizer.decode(cut[:-1])


def test_the_dtype_is_that_of_most_elements(made, tmp_path):
    made(True, False, False)
    origin = save_origin(tmp_path / "origin", fused=True)
    base = converted(origin, tmp_path / "base", looks=False)
    checkpoint = trained(base, tmp_path / "run", origin[0], bf16=True)
    exported(checkpoint, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_without_a_tokenizer_the_export_says_so(made, tmp_path):
    made(True, True, False)
    origin = save_origin(tmp_path / "origin", fused=True)
    for path in origin[0].glob("token*"):
        path.unlink()
    base = converted(origin, tmp_path / "base", looks=True)
    lines = exported(base, tmp_path / "hf")
    assert lines == ["no tokenizer travelled along: name its folder with --assets"]
