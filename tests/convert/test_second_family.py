"""Qwen3.5-MoE's text model, there and back: bitwise identical, in every spelling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from megatron_mm.benchmark.hf_weights import randomise, transformers_model
from megatron_mm.config import RunConfig, preset, to_transformers_dict
from megatron_mm.config import vision_preset as vit
from megatron_mm.convert import hf_model, parity, to_hf, to_megatron
from megatron_mm.convert import summary as report
from megatron_mm.convert.mapping import write_links
from megatron_mm.model.blueprint import blueprint
from support.batches import SIZES
from support.folders import (
    assert_same,
    base_model,
    meta,
    planned,
    read_all,
    save_fused,
    save_released_fused,
    save_released_vision,
    save_text,
    shapes_of,
    through_training,
    to_checkpoint,
    to_folder,
)

FAMILY = "qwen3_5_moe"
LAYOUTS = {
    "one rank": (1, dict()),
    "TP3": (3, dict(tp=3)),
    "TP2xPP2xEP2": (4, dict(tp=2, pp=2, ep=2, etp=1)),
    "PP2xVPP2": (2, dict(pp=2, vpp=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_through_training_on(ranks, tmp_path, name):
    """Converted by all ranks, loaded and saved by the training code, converted back by them."""
    world_size, sizes = LAYOUTS[name]
    model = base_model(sizes.get("tp", 1), family=FAMILY)
    jobs, kinds = [], {"fp32": torch.float32, "bf16": torch.bfloat16}
    for dtype, kind in kinds.items():
        folders = [tmp_path / f"{dtype}{stacked}" for stacked in (False, True)]
        for folder, stacked in zip(folders, (False, True), strict=True):
            save_fused(folder, model, stacked=stacked, dtype=kind)
        jobs.append((*folders, tmp_path / f"out{dtype}", dtype == "bf16"))
    ranks(world_size, through_training, {SIZES[name]: size for name, size in sizes.items()}, jobs)
    for dtype in kinds:
        for stacked in (False, True):
            out = tmp_path / f"out{dtype}" / f"hf{stacked}"
            assert_same(read_all(out), read_all(tmp_path / f"{dtype}{stacked}"))
            text = json.loads((out / "config.json").read_text())["text_config"]
            assert text["model_type"] == "qwen3_5_moe_text"
            assert text["rope_parameters"]["mrope_section"] == [3, 1, 2]


def test_text_only_with_what_is_carried(job, tmp_path):
    expected = save_text(tmp_path / "in", family=FAMILY)
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    to_folder(tmp_path / "mega", tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), expected)
    assert sum(name.startswith("mtp.") for name in expected) == 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "Qwen3_5MoeForCausalLM"


def test_the_release_of_internvl_around_it(job, tmp_path):
    model = base_model(family=FAMILY)
    hf = transformers_model(model)
    save_released_fused(tmp_path / "in", model, hf)
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    to_folder(tmp_path / "mega", tmp_path / "out", stacked=True)
    assert_same(read_all(tmp_path / "out"), dict(hf.state_dict()))


def save_published(folder: Path) -> dict[str, torch.Tensor]:
    """A folder as Qwen3.5-MoE is published: the text model with stacked experts, its own vision
    tower and multi-token prediction beside it."""
    text = to_transformers_dict(replace(base_model(family=FAMILY), vision=None))
    tower = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=48, patch_size=4)
    config = Qwen3_5MoeConfig(
        text_config=text,
        vision_config=dict(tower, out_hidden_size=text["hidden_size"], num_position_embeddings=16),
        tie_word_embeddings=False,
        image_token_id=95,
    )
    hf = Qwen3_5MoeForConditionalGeneration._from_config(config)
    randomise(hf, 3)
    hf.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    tensors["mtp.fc.weight"] = torch.randn(64, 128)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def test_a_published_folder(job, tmp_path):
    """Its text model is ours; everything else travels along, bitwise."""
    published = save_published(tmp_path / "in")
    source, plan, _ = planned(tmp_path / "in")
    carried = {n for n in published if n.startswith(("model.visual.", "mtp."))}
    assert set(plan.carried) == carried and len(carried) > 10 and source.model.vision is None
    to_checkpoint(tmp_path / "in", tmp_path / "mega")
    to_folder(tmp_path / "mega", tmp_path / "out", stacked=True)
    expected = {
        name if name in carried else name.replace("model.language_model.", "model."): tensor
        for name, tensor in published.items()
    }
    assert_same(read_all(tmp_path / "out"), expected)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_published_folder_computes_the_same(job, tmp_path):
    """check_parity on it: transformers runs the text model of the folder."""
    save_published(tmp_path / "in")
    source = to_checkpoint(tmp_path / "in", tmp_path / "mega")
    opened = to_hf.open_checkpoint(tmp_path / "mega")
    run = RunConfig(model=source.model)
    hf = hf_model.load_transformers(tmp_path / "in", trust_remote_code=False)
    mcore = parity.mcore_model(opened, job)
    cases = parity.built_in_cases(run, source.image_token_id)
    found = list(parity.compare_outputs(opened, mcore, hf, run, cases))
    assert len(found) == 5 and max(case.size for case in found) <= parity.TOLERANCE


def test_a_fusion_of_a_published_folder_with_internvit(job, tmp_path):
    """The projector is new, as with Qwen3-Next; the rest stands in the two folders."""
    model = base_model(family=FAMILY)
    published = save_published(tmp_path / "text")
    vision = save_released_vision(tmp_path / "vit", model, transformers_model(model))
    source, plan, parameters = planned(tmp_path / "text", tmp_path / "vit")
    assert {name.rsplit(".", 2)[0] for name in plan.new} == {"vision.projector"}
    assert source.model.language == model.language and source.model.vision == model.vision
    run, out = RunConfig(model=source.model), tmp_path / "mega"
    to_megatron.convert(source, plan, parameters, run, out, dist.group.WORLD, quiet=True)
    opened = to_hf.open_checkpoint(out)
    opened.notes["image_token_id"] = 95
    to_hf.convert(opened, tmp_path / "hf", dist.group.WORLD, stacked=True, quiet=True)
    found = read_all(tmp_path / "hf")
    assert_same({name: found[name] for name in published}, published)
    assert len(found) > len(published) + len(vision)


# 20 s of CPU time each: transformers builds both models, on the meta device, in another process.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tensors"), [("qwen3.5-35b-a3b", 693), ("qwen3.5-397b-a17b", 1038)]
)
def test_every_tensor_of_the_published_sizes(name, tensors):
    """By name and shape, from the config alone; fused with InternViT-6B, and alone."""
    text = preset(name)
    model = replace(text, vision=vit("internvit-6b"))
    words = to_transformers_dict(model, image_token_id=248056)
    (inside, saved), (alone, published) = meta(words, to_transformers_dict(text))
    parameters = blueprint(model)
    assert shapes_of(write_links(model, parameters, "stacked")) == inside
    assert shapes_of(write_links(model, parameters, "transformers")) == saved
    mine = {n: p for n, p in parameters.items() if not n.startswith("vision.")}
    assert shapes_of(write_links(text, mine, "text-stacked")) == alone and len(alone) == tensors
    assert shapes_of(report.published(text, mine, separate=False)) == published
