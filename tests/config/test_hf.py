"""Our models as transformers config objects, field by field, and back."""

import dataclasses

import pytest

from megatron_mm.config import (
    ConfigError,
    FusionConfig,
    from_transformers_dict,
    preset,
    to_transformers_dict,
    vision_preset,
    without_clvr,
)
from megatron_mm.model.families.internvit.hf_config import VISION, VISION_FIXED
from megatron_mm.model.families.qwen3_next.hf_config import TEXT, TEXT_FIXED

IMAGE_TOKEN = 5


@pytest.fixture(scope="module")
def classes():
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen3NextConfig

    return InternVLConfig, Qwen3NextConfig, InternVLVisionConfig


def raise_together(config, keywords: dict) -> None:
    """Every keyword is a declared field of the config object and holds what we gave."""
    declared = {field.name for field in dataclasses.fields(config)} | {"model_type"}
    assert set(keywords) <= declared
    for key, value in keywords.items():
        found = getattr(config, key)
        if key in ("text_config", "vision_config"):
            raise_together(found, value)
        else:
            same = list(found) == value if isinstance(value, list) else found == value
            assert same, (key, found, value)


@pytest.mark.parametrize("name", ["tiny", "mm-80b"])
def test_fused_presets_are_what_transformers_reads(classes, name):
    ours = to_transformers_dict(preset(name), IMAGE_TOKEN)
    config = classes[0](**to_transformers_dict(preset(name), IMAGE_TOKEN))
    raise_together(config, ours)
    assert type(config.text_config) is classes[1]
    assert type(config.vision_config) is classes[2]
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is False


def test_text_only_preset_is_what_transformers_reads(classes):
    ours = to_transformers_dict(preset("qwen3-next-80b-a3b"))
    raise_together(classes[1](**ours), ours)


def test_80b_against_the_class_defaults(classes):
    """Published Qwen3-Next-80B-A3B equals the class defaults but for these three fields. The
    fourth, intermediate_size (5120, class: 5632), is of dense layers, which it has none of."""
    ours = classes[1](**to_transformers_dict(preset("qwen3-next-80b-a3b"))).to_dict()
    default = classes[1]().to_dict()
    differs = {key: ours[key] for key in ours if ours[key] != default[key]}
    assert differs == {
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
        },
    }
    assert default["rope_parameters"]["rope_theta"] == 10_000.0


def test_published_80b_file_is_the_preset():
    """The values of the published config.json, in its older spelling of rope and layer types."""
    published = {
        "model_type": "qwen3_next",
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    }
    assert from_transformers_dict(published) == preset("qwen3-next-80b-a3b")


def test_vision_presets_against_the_class(classes):
    """300M differs from the class defaults in the qkv bias only; 6B is wider, and its norms."""
    default = classes[2]().to_dict()

    def differs(name):
        model = dataclasses.replace(preset("mm-80b"), vision=vision_preset(name))
        keywords = to_transformers_dict(model, IMAGE_TOKEN)["vision_config"]
        ours = classes[2](**keywords).to_dict()
        return {key: ours[key] for key in ours if ours[key] != default[key]}

    assert differs("internvit-300m") == {"attention_bias": True}
    assert differs("internvit-6b") == {
        "num_hidden_layers": 45,
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_attention_heads": 25,
        "norm_type": "rms_norm",
        "use_qk_norm": True,
    }


def test_tables_hold_the_defaults_of_the_classes(classes):
    for cls, table, fixed in ((classes[1], TEXT, TEXT_FIXED), (classes[2], VISION, VISION_FIXED)):
        config = cls()
        for key, _, default in table:
            assert getattr(config, key) == default, key
        for key, value in fixed.items():
            assert getattr(config, key) == value, key
    read = from_transformers_dict({"model_type": "qwen3_next"})
    ours = classes[1](**to_transformers_dict(read)).to_dict()
    assert ours == classes[1]().to_dict()


@pytest.mark.parametrize("name", ["tiny", "mm-80b", "qwen3-next-80b-a3b"])
def test_round_trip_keeps_all_but_clvr_and_tiling(classes, name):
    model = preset(name)
    ours = to_transformers_dict(model, IMAGE_TOKEN)
    expected = dataclasses.replace(
        model,
        hybrid_layer_pattern=without_clvr(model.hybrid_layer_pattern),
        fusion=FusionConfig(pixel_shuffle_factor=model.fusion.pixel_shuffle_factor),
    )
    assert from_transformers_dict(ours) == expected
    # What transformers itself writes is the same model.
    cls = classes[1] if model.vision is None else classes[0]
    assert from_transformers_dict(cls(**ours).to_dict()) == expected
    assert from_transformers_dict(cls(**ours).to_diff_dict()) == expected


def test_every_model_setting_survives_or_is_named_as_lost():
    """Changing any leaf that transformers has a word for must change the dict."""
    lost = {"moe_router_dtype"}
    base = to_transformers_dict(preset("tiny"), IMAGE_TOKEN)
    for part in ("language", "vision"):
        for field in dataclasses.fields(getattr(preset("tiny"), part)):
            if field.name == "type":  # it is the class of the config, not a key of it
                continue
            model = preset("tiny")
            section = getattr(model, part)
            value = getattr(section, field.name)
            changed = {"LayerNorm": "RMSNorm", "fp32": "fp64"}.get(value)
            if changed is None:
                changed = not value if isinstance(value, bool) else value * 2 or 1.0
            setattr(section, field.name, changed)
            same = to_transformers_dict(model, IMAGE_TOKEN) == base
            assert same == (field.name in lost), field.name


def test_layer_types_follow_the_pattern():
    model = preset("tiny")
    text = to_transformers_dict(model, IMAGE_TOKEN)["text_config"]
    linear, full = "linear_attention", "full_attention"
    assert text["layer_types"] == [linear, full, linear, full]
    assert text["num_hidden_layers"] == 4


def test_image_tokens_follow_the_shuffle():
    ours = to_transformers_dict(preset("mm-80b"), IMAGE_TOKEN)
    assert (ours["image_seq_length"], ours["downsample_ratio"]) == (256, 0.5)
    assert to_transformers_dict(preset("tiny"), IMAGE_TOKEN)["image_seq_length"] == 4


def test_tying_is_explicit_and_the_outer_flag_counts():
    model = preset("tiny")
    model.language.untie_embeddings_and_output_weights = False
    ours = to_transformers_dict(model, IMAGE_TOKEN)
    assert ours["tie_word_embeddings"] is ours["text_config"]["tie_word_embeddings"] is True
    ours["tie_word_embeddings"] = False
    assert from_transformers_dict(ours).language.untie_embeddings_and_output_weights
    del ours["tie_word_embeddings"]  # then the class says True
    assert not from_transformers_dict(ours).language.untie_embeddings_and_output_weights


@pytest.mark.parametrize("token", [None, -1, 384])
def test_image_token_must_be_in_the_vocabulary(token):
    with pytest.raises(ConfigError, match=f"image_token_id is {token}; allowed: 0 to 383"):
        to_transformers_dict(preset("tiny"), token)


def test_shuffle_v1_cannot_be_written():
    model = preset("tiny")
    model.fusion.pixel_shuffle_version = "v1"
    with pytest.raises(ConfigError, match="pixel_shuffle_version is v1; allowed: v2"):
        to_transformers_dict(model, IMAGE_TOKEN)


@pytest.mark.parametrize("factor", [3, 5, 6, 7])
def test_a_shuffle_that_transformers_would_refuse_cannot_be_written(factor):
    """Its rest of `side % (1 / factor)` is some 1e-15 and not 0."""
    model = preset("tiny")
    model.vision.image_size = model.vision.patch_size * factor * 4
    model.fusion.pixel_shuffle_factor = factor
    with pytest.raises(ConfigError, match=f"pixel_shuffle_factor is {factor}: .*a power of two"):
        to_transformers_dict(model, IMAGE_TOKEN)
    model.vision.image_size, model.fusion.pixel_shuffle_factor = model.vision.patch_size * 8, 4
    assert to_transformers_dict(model, IMAGE_TOKEN)["image_seq_length"] == 4


def test_of_two_ropes_the_one_that_transformers_takes_counts():
    ours = to_transformers_dict(preset("tiny"), IMAGE_TOKEN)
    ours["text_config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(ConfigError, match="rope_type is 'yarn'"):
        from_transformers_dict(ours)


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        (None, "model_type", "llava", "model_type is 'llava'; allowed: 'internvl'"),
        (None, "downsample_ratio", 0.4, "downsample_ratio is 0.4; allowed: 1, 1/2"),
        (None, "vision_feature_layer", -2, "vision_feature_layer is -2; allowed: -1"),
        ("text_config", "model_type", "qwen2", "text_config.model_type is 'qwen2'"),
        ("text_config", "norm_topk_prob", False, "norm_topk_prob is False; allowed: True"),
        ("text_config", "mlp_only_layers", [0], "mlp_only_layers is [0]; allowed: []"),
        ("text_config", "decoder_sparse_step", 2, "decoder_sparse_step is 2; allowed: 1"),
        ("text_config", "num_hidden_layers", 5, "num_hidden_layers is 5; allowed: 4"),
        ("text_config", "layer_types", ["sliding"] * 4, "'sliding'; allowed: linear_attention"),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}, "rope_type is 'yarn'"),
        ("text_config", "hidden_size", "96", "text_config.hidden_size is '96'; allowed: int"),
        ("vision_config", "norm_type", "batch", "norm_type is 'batch'; allowed: layer_norm"),
        ("vision_config", "image_size", [32, 64], "image_size is [32, 64]; allowed: a square"),
        ("vision_config", "use_mask_token", True, "use_mask_token is True; allowed: False"),
    ],
)
def test_models_that_our_layers_cannot_compute(part, key, value, words):
    ours = to_transformers_dict(preset("tiny"), IMAGE_TOKEN)
    (ours if part is None else ours[part])[key] = value
    with pytest.raises(ConfigError) as error:
        from_transformers_dict(ours)
    assert words in str(error.value)
