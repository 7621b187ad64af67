"""Families by name: what is refused, what old files mean, and Qwen3.5-MoE against transformers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from megatron_mm.config import (
    ConfigError,
    FusionConfig,
    ModelConfig,
    from_dict,
    from_transformers_dict,
    load,
    preset,
    to_dict,
    to_transformers_dict,
    validate,
    vision_preset,
)
from megatron_mm.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES
from megatron_mm.config.hf import in_transformers_words
from megatron_mm.config.tree import leaves
from megatron_mm.model.families.qwen3_5_moe.hf_config import TEXT, WORDS

IMAGE_TOKEN = 5
# text_config of the published config.json of Qwen3.5-35B-A3B; those of 397B-A17B that differ.
PUBLISHED = {
    "model_type": "qwen3_5_moe_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 0.001,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "shared_expert_intermediate_size": 512,
    "vocab_size": 248320,
}
LARGER = {
    "hidden_size": 4096,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15,
    "linear_num_value_heads": 64,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 60,
    "shared_expert_intermediate_size": 1024,
}


@pytest.fixture(scope="module")
def classes():
    from transformers import InternVLConfig, Qwen3_5MoeTextConfig

    return InternVLConfig, Qwen3_5MoeTextConfig


def fused() -> ModelConfig:
    return dataclasses.replace(preset("qwen3.5-35b-a3b"), vision=vision_preset("internvit-300m"))


@pytest.mark.parametrize(("section", "kind"), [("language", "qwen3_next"), ("vision", "internvit")])
def test_files_without_a_type_mean_the_first_family(section, kind):
    """Checkpoints and YAML of before have none."""
    tree = to_dict(preset("tiny"))
    assert tree[section].pop("type") == kind
    assert from_dict(ModelConfig, tree) == preset("tiny")


def test_the_type_decides_which_keys_there_are():
    tree = {"language": {"type": "qwen3_5_moe", "mrope_section": [8, 12, 12]}}
    model = from_dict(ModelConfig, tree)
    assert (model.language.num_experts, model.language.mrope_section) == (256, [8, 12, 12])
    with pytest.raises(ConfigError, match="unknown key in model.language: mrope_section"):
        load(None, ["--preset", "tiny", "--mrope-section", "2", "2", "2"])


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("language", "unknown language family gpt; allowed: qwen3_5_moe, qwen3_next"),
        ("vision", "unknown vision family gpt; allowed: internvit"),
    ],
)
def test_an_unknown_family_is_named_with_those_there_are(section, words):
    with pytest.raises(ConfigError) as error:
        from_dict(ModelConfig, {section: {"type": "gpt"}})
    assert str(error.value) == words


@pytest.mark.parametrize("lacking", ["settings", "rows", "to_hf"])
@pytest.mark.parametrize(
    ("registry", "name"), [(LANGUAGE_FAMILIES, "qwen3_next"), (VISION_FAMILIES, "internvit")]
)
def test_a_family_that_lacks_a_part_is_named_with_the_part(monkeypatch, registry, name, lacking):
    parts = {f.name: getattr(registry[name], f.name) for f in dataclasses.fields(registry[name])}
    del parts[lacking]
    monkeypatch.setitem(registry._parts, "mine", SimpleNamespace(**parts))
    section = registry.what.split()[0]
    with pytest.raises(ConfigError) as error:
        from_dict(ModelConfig, {section: {"type": "mine"}})
    message = str(error.value)
    assert message.startswith(f"{registry.what} mine has no `{lacking}`; it needs title, settings,")
    assert "\n" not in message


def test_a_family_whose_module_is_not_there(monkeypatch):
    family = dataclasses.replace(LANGUAGE_FAMILIES["qwen3_next"], rows="nowhere.ROWS")
    with pytest.raises(ConfigError, match="Qwen3-Next's rows nowhere.ROWS cannot be imported"):
        family.hf_rows()


def test_a_family_of_ones_own_by_dotted_path(tmp_path, monkeypatch):
    """Not registered anywhere: the path of its declaration is its type."""
    (tmp_path / "my_family.py").write_text(
        "from dataclasses import dataclass, replace\n"
        "from megatron_mm.config.families import LANGUAGE_FAMILIES\n"
        "from megatron_mm.model.families.qwen3_next.settings import Qwen3NextSettings\n"
        "@dataclass\n"
        "class Settings(Qwen3NextSettings):\n"
        "    type: str = 'my_family.MINE'\n"
        "    extra: int = 3\n"
        "MINE = replace(LANGUAGE_FAMILIES['qwen3_next'], title='Mine', settings=Settings)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = from_dict(ModelConfig, {"language": {"type": "my_family.MINE", "extra": 4}})
    assert model.language.extra == 4 and from_dict(ModelConfig, to_dict(model)) == model


@pytest.mark.parametrize("registry", [LANGUAGE_FAMILIES, VISION_FAMILIES])
def test_every_setting_of_a_family_is_explained(registry):
    for _, family in registry.items():
        silent = [leaf.name for leaf in leaves(family.settings) if not leaf.explanation]
        assert not silent
        numbers = [leaf for leaf in leaves(family.settings) if leaf.hint in (int, float)]
        assert numbers and all(leaf.bounds is not None for leaf in numbers)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["11", "11", "11"], "mrope_section is [11, 11, 11]; allowed: 3 numbers that sum to 32"),
        (["16", "16"], "mrope_section is [16, 16]; allowed: 3 numbers"),
        (["34", "-1", "-1"], "mrope_section is [34, -1, -1]; allowed: 3 numbers"),
        (["a"], "--mrope-section is ['a']; allowed: a list of int"),
    ],
)
def test_sections_share_the_rotary_features(flags, words):
    with pytest.raises(ConfigError) as error:
        validate(load(None, ["--preset", "qwen3.5-35b-a3b", "--mrope-section", *flags]))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "published"),
    [("qwen3.5-35b-a3b", PUBLISHED), ("qwen3.5-397b-a17b", PUBLISHED | LARGER)],
)
def test_published_files_are_the_presets(name, published):
    """A published folder holds the text model beside a vision tower, which is another model."""
    whole = {
        "model_type": "qwen3_5_moe",
        "image_token_id": 248056,
        "text_config": published,
        "vision_config": {"model_type": "qwen3_5_moe", "depth": 27},
        "tie_word_embeddings": False,
    }
    assert from_transformers_dict(in_transformers_words(whole)) == preset(name)
    assert from_transformers_dict(published) == preset(name)
    with pytest.raises(ConfigError, match="has no text_config"):
        in_transformers_words({"model_type": "qwen3_5_moe"})


def test_35b_against_the_class_defaults(classes):
    """The class holds the published values but for these two fields."""
    ours = classes[1](**to_transformers_dict(preset("qwen3.5-35b-a3b"))).to_dict()
    default = classes[1]().to_dict()
    differs = {key: ours[key] for key in ours if ours[key] != default[key]}
    assert differs == {
        "max_position_embeddings": 262144,
        "rope_parameters": PUBLISHED["rope_parameters"],
    }


def test_the_table_holds_the_defaults_of_the_class(classes):
    config = classes[1]()
    for key, _, default in TEXT:
        assert getattr(config, key) == default, key
    for key, value in WORDS.fixed.items():
        assert getattr(config, key) == value, key
    read = from_transformers_dict({"model_type": "qwen3_5_moe_text"})
    ours = classes[1](**to_transformers_dict(read)).to_dict()
    sections = {
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }  # said nowhere in the class
    default = classes[1]().to_dict()
    default["rope_parameters"] |= sections
    assert ours == default


def test_everything_written_is_a_field_of_the_class(classes):
    words = to_transformers_dict(fused(), IMAGE_TOKEN)
    config = classes[0](**words)
    assert type(config.text_config) is classes[1]
    declared = {field.name for field in dataclasses.fields(classes[1])} | {"model_type"}
    assert set(words["text_config"]) <= declared
    for key, value in words["text_config"].items():
        found = getattr(config.text_config, key)
        assert (list(found) if isinstance(value, list) else found) == value, key


def test_round_trip(classes):
    model = fused()
    words = to_transformers_dict(model, IMAGE_TOKEN)
    expected = dataclasses.replace(model, fusion=FusionConfig(pixel_shuffle_factor=2))
    assert from_transformers_dict(words) == expected
    assert from_transformers_dict(classes[0](**words).to_dict()) == expected
    assert from_transformers_dict(classes[0](**words).to_diff_dict()) == expected


def test_every_setting_survives_or_is_named_as_lost():
    base = to_transformers_dict(preset("qwen3.5-35b-a3b"))
    for field in dataclasses.fields(preset("qwen3.5-35b-a3b").language):
        if field.name == "type":
            continue
        model = preset("qwen3.5-35b-a3b")
        value = getattr(model.language, field.name)
        changed = not value if isinstance(value, bool) else value * 2 if value != "fp32" else "fp64"
        setattr(model.language, field.name, changed)
        assert (to_transformers_dict(model) == base) == (field.name == "moe_router_dtype")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attn_output_gate", False, "attn_output_gate is False; allowed: True"),
        ("mlp_only_layers", [0], "mlp_only_layers is [0]; allowed: []"),
        ("rope_parameters", {"mrope_interleaved": False}, "rope mrope_interleaved is False"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope rope_type is 'yarn'"),
        ("model_type", "qwen3_5_text", "allowed: 'qwen3_next', 'qwen3_5_moe_text'"),
    ],
)
def test_models_that_our_layers_cannot_compute(key, value, words):
    config = {"model_type": "internvl", "text_config": {**PUBLISHED, key: value}}
    with pytest.raises(ConfigError) as error:
        from_transformers_dict(config)
    assert words in str(error.value)
