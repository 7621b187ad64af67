"""Hugging Face folders for conversion, and conversions of them on ranks.

The folders are written by transformers or, where it has no writer, by names that are written down
here a second time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_mm.benchmark.hf_weights import IMAGE_TOKEN, randomise, transformers_model
from megatron_mm.checkpoint import sharded
from megatron_mm.config import ModelConfig, ParallelConfig, RunConfig, to_transformers_dict
from megatron_mm.convert import to_hf, to_megatron
from megatron_mm.convert.folder import NOTES, HFFolder, check_folder, open_folder
from megatron_mm.convert.mapping import ParamMapping, StateMapping
from megatron_mm.engine.engine import Engine
from megatron_mm.model.blueprint import blueprint
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from support.batches import SMALL_MODELS
from support.gathering import at_rank_0

PATTERN = "GE *E GE *E"
SHARD = 150_000  # bytes: some ten files
TEXT_CLASSES = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
}
SIX_B = dict(vision_normalization="RMSNorm", vision_add_qkv_bias=False, vision_qk_layernorm=True)


@contextmanager
def one_rank_job():
    """A job of this process alone, for conversions outside a pool of ranks."""
    groups.start(ParallelConfig())
    try:
        yield
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def base_model(
    tp: int = 1, *, tied: bool = False, family: str = "qwen3_next", **vision
) -> ModelConfig:
    """Returns a family's small model without CLVR; for tp 3, with sizes that 3 ranks divide and a
    vocabulary that they do not."""
    model = SMALL_MODELS[family](PATTERN, image_stream="all", vision_memory="none")
    language = model.language
    language.untie_embeddings_and_output_weights = not tied
    if tp == 3:
        language.vocab_size = 97
        language.num_attention_heads, language.num_query_groups = 6, 2
        language.linear_num_key_heads, language.linear_num_value_heads = 3, 6
        language.hidden_size = language.moe_shared_expert_intermediate_size = 48
        language.moe_ffn_hidden_size = 30
    model.vision = replace(model.vision, **vision)
    return model


def save_fused(
    folder: Path,
    model: ModelConfig | None = None,
    *,
    stacked: bool = False,
    dtype: torch.dtype = torch.float32,
    shard: int = SHARD,
):
    """Saves a random model as transformers does, and returns it."""
    hf = transformers_model(model or base_model()).to(dtype)
    hf.save_pretrained(folder, save_original_format=not stacked, max_shard_size=shard)
    return hf


def save_text(
    folder: Path,
    *,
    mtp: bool = True,
    family: str = "qwen3_next",
    model: ModelConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Saves a text-only model as released, with per-expert tensors and multi-token prediction."""
    model = replace(model or base_model(family=family), vision=None)
    config_class, model_class = (getattr(transformers, n) for n in TEXT_CLASSES[family])
    hf = model_class._from_config(config_class(**to_transformers_dict(model)))
    randomise(hf, 1)
    hf.save_pretrained(folder)
    tensors = read_all(folder)
    if mtp:
        tensors |= {
            "mtp.fc.weight": torch.randn(64, 128),
            "mtp.norm.weight": torch.randn(64).to(torch.bfloat16),
            "mtp.layers.0.mlp.experts.3.up_proj.weight": torch.randn(28, 64),
        }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def released_vision(hf) -> dict[str, torch.Tensor]:
    """Returns the ViT's tensors under the names of its release (modeling_intern_vit.py)."""
    renamed: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in hf.model.vision_tower.state_dict().items():
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.(\w+)", name)
        if found:
            layer, kind, part = found.groups()
            parts.setdefault(f"encoder.layers.{layer}.attn.qkv.{part}", {})[kind] = tensor
            continue
        for old, new in (
            (r"encoder\.layer\.", "encoder.layers."),
            (r"attention\.projection_layer", "attn.proj"),
            (r"attention\.", "attn."),
            (r"layernorm_before", "norm1"),
            (r"layernorm_after", "norm2"),
            (r"lambda_", "ls"),
            (r"cls_token", "class_embedding"),
            (r"position_embeddings", "position_embedding"),
            (r"patch_embeddings\.projection", "patch_embedding"),
        ):
            name = re.sub(old, new, name)
        renamed[name] = tensor
    for name, qkv in parts.items():
        renamed[name] = torch.cat([qkv[kind] for kind in "qkv"])
    return {name: tensor.clone() for name, tensor in renamed.items()}


def released_config(model: ModelConfig) -> dict:
    """Returns the config.json of a ViT's release."""
    vision = model.vision
    return {
        "model_type": "intern_vit_6b",
        "num_hidden_layers": vision.vision_num_layers,
        "hidden_size": vision.vision_hidden_size,
        "intermediate_size": vision.vision_ffn_hidden_size,
        "num_attention_heads": vision.vision_num_attention_heads,
        "qkv_bias": vision.vision_add_qkv_bias,
        "qk_normalization": vision.vision_qk_layernorm,
        "norm_type": {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}[
            vision.vision_normalization
        ],
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "initializer_factor": vision.vision_layer_scale_init,
        "initializer_range": vision.vision_init_method_std,
    }


def save_released_vision(folder: Path, model: ModelConfig, hf) -> dict[str, torch.Tensor]:
    """Saves a ViT in the form of its release."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(released_config(model)))
    tensors = released_vision(hf)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def save_released_fused(folder: Path, model: ModelConfig, hf) -> dict[str, torch.Tensor]:
    """Saves a fused model in the form of InternVL's releases, `internvl_chat`."""
    folder.mkdir()
    config = {
        "model_type": "internvl_chat",
        "llm_config": to_transformers_dict(replace(model, vision=None)),
        "vision_config": released_config(model),
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "img_context_token_id": IMAGE_TOKEN,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"vision_model.{name}": t for name, t in released_vision(hf).items()}
    inside = hf.model.multi_modal_projector
    for number, part in ((0, inside.layer_norm), (1, inside.linear_1), (3, inside.linear_2)):
        tensors |= {f"mlp1.{number}.{name}": t for name, t in part.state_dict().items()}
    for name, tensor in hf.model.language_model.state_dict().items():
        expert = re.fullmatch(r"(.*experts)\.(gate_up_proj|down_proj)", name)
        name = f"language_model.model.{name}"
        if expert is None:
            tensors[name] = tensor
            continue
        for number, weight in enumerate(tensor):
            one = f"language_model.model.{expert[1]}.{number}."
            if expert[2] == "down_proj":
                tensors[one + "down_proj.weight"] = weight
            else:
                gate, up = weight.chunk(2)
                tensors |= {one + "gate_proj.weight": gate, one + "up_proj.weight": up}
    tensors["language_model.lm_head.weight"] = hf.lm_head.weight
    tensors = {name: t.detach().clone() for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor of a folder, read by the safetensors package."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts the same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:6]
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(x.flatten().view(torch.uint8) for x in (other, tensor))), name


def planned(folder: Path, vision: Path | None = None) -> tuple[HFFolder, StateMapping, dict]:
    """Returns a folder that was opened and checked, its plan and the parameters of its model."""
    source = open_folder(folder, vision)
    parameters = blueprint(source.model)
    plan = source.mapping(parameters)
    check_folder(source, plan)
    return source, plan, parameters


def to_checkpoint(folder: Path, out: Path, parallel: dict | None = None, dtype=None) -> HFFolder:
    """Converts a Hugging Face folder to a checkpoint; every rank calls it."""
    source, plan, parameters = planned(folder)
    run = RunConfig(model=source.model, parallel=ParallelConfig(**(parallel or {})))
    made = to_megatron.convert(
        source, plan, parameters, run, out, dist.group.WORLD, dtype=dtype, quiet=True
    )
    assert made == out / "iter_0000000"
    return source


def to_folder(checkpoint: Path, out: Path, **how) -> list[str]:
    """Converts a checkpoint to a Hugging Face folder; every rank calls it."""
    opened = to_hf.open_checkpoint(checkpoint)
    return to_hf.convert(opened, out, dist.group.WORLD, shard_bytes=SHARD, quiet=True, **how)


def without_identity(checkpoint: Path, name: str) -> bytes:
    """Returns the content of a file, the identity of its save blanked."""
    identity = json.loads((checkpoint / "run.json").read_text())["identity"].encode()
    content = (checkpoint / name).read_bytes()
    assert identity in content
    return content.replace(identity, b"-" * len(identity))


def through_training(parallel: dict, jobs: Sequence[tuple[Path, Path, Path, bool]]) -> None:
    """Converts folders to checkpoints, loads and saves them in an engine, and converts them back.

    The two folders of a job must give bitwise identical checkpoints, so one goes on for both.

    Args:
        parallel: the engine's layout.
        jobs: (folder, the same with stacked experts, where to work, whether in bf16).
    """
    built = groups.build(ParallelConfig(**parallel))
    for separate, stacked, out, bf16 in jobs:
        source = to_checkpoint(separate, out / "converted", parallel)
        to_checkpoint(stacked, out / "other", parallel)
        one, other = (out / name / "iter_0000000" for name in ("converted", "other"))
        for name in (f"__{dist.get_rank()}_0.distcp", ".metadata"):
            assert without_identity(one, name) == without_identity(other, name)
        run = RunConfig(model=source.model, parallel=ParallelConfig(**parallel))
        run.training.bf16, run.training.seed = bf16, 4321  # other numbers than the folder's
        engine = Engine.create(run, built)
        state = sharded.load(engine, out / "converted", finetune=True)
        assert state["initialized"] == [] and state["ignored"] == []
        sharded.save(engine, {}, out / "saved", 1, {NOTES: state["extra"][NOTES]})
        for how in (False, True):
            to_folder(out / "saved", out / f"hf{how}", stacked=how)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Returns every parameter as a whole tensor on rank 0, {} elsewhere; nothing may be missing."""
    mine = {
        name: (layout.global_shape, layout.block, layout.held(param.detach()))
        for name, param, layout in layouts(*engine.modules)
    }
    result: dict[str, torch.Tensor] = {}
    for name, (shape, block, values) in (e for part in at_rank_0(mine) for e in part.items()):
        result.setdefault(name, torch.full(shape, float("nan")))[block] = values
    assert not any(tensor.isnan().any() for tensor in result.values())
    return result


def shapes_of(links: Iterable[ParamMapping]) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor in the folder."""
    return {name: tuple(shape) for link in links for name, shape in link.hf_tensors()}


def meta(*configs: dict) -> list[list[dict[str, tuple[int, ...]]]]:
    """Returns shapes by name of each config's model: [inside the model, as it is saved]."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("meta_names.py")],
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        [{n: tuple(s) for n, s in found.items()} for found in model]
        for model in json.loads(done.stdout)
    ]
