"""Origins of an exported folder, and their exports: what a user has before and after training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PreTrainedTokenizerFast

from megatron_mm.benchmark.hf_weights import transformers_model
from megatron_mm.checkpoint import folders, sharded
from megatron_mm.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    run_of_checkpoint,
)
from megatron_mm.convert import to_megatron
from megatron_mm.convert.commands.hf_to_megatron import target_run
from megatron_mm.convert.folder import NOTES, check_folder, open_folder
from megatron_mm.data.tokenizer import SPECIAL_TOKENS
from megatron_mm.engine.engine import Engine
from megatron_mm.model.blueprint import blueprint
from megatron_mm.parallel import groups
from support.folders import base_model, save_fused, save_released_vision, save_text, to_folder
from support.hf_tokenizers import byte_level_tokenizer

# Merges of line breaks and spaces are among them, as Qwen's tokenizer has.
TEXTS = ["user\n\n\nassistant\n\nwhat stands  in   cell\n\n\n?", "7 8\n\n", "system\n\n"] * 4
LOOKS = ("--hybrid-layer-pattern", "GE L *E GE J *E", "--vision-memory", "tiles")
# A text model's own: it writes no part of a message that is not text.
TEXT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role + '\n' }}"
    "{{- message.content if message.content is string else '' }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n<think>\n{%- endif -%}"
)


GROUNDING = ["<ref>", "</ref>", "<box>", "</box>", "<video>"]  # vocabulary that is special
NAMED = {
    "start_image_token": SPECIAL_TOKENS["image_start_id"],
    "end_image_token": SPECIAL_TOKENS["image_end_id"],
    "context_image_token": SPECIAL_TOKENS["image_context_id"],
    "video_token": "<video>",
}


def grounding_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with InternVL's vocabulary for grounding."""
    tokenizer = byte_level_tokenizer(TEXTS, 300)
    more = {"additional_special_tokens": GROUNDING}
    tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)
    tokenizer.pad_token = tokenizer.eos_token = SPECIAL_TOKENS["pad_id"]
    return tokenizer


def model_of(tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
    model = base_model()
    model.language.vocab_size = -(-len(tokenizer) // 64) * 64
    return model


def save_origin(folder: Path, *, fused: bool) -> list[Path]:
    """Saves a small model as people publish one: fused, or a text model with a template of its own
    and a ViT in the spelling of its release. Returns its folders."""
    tokenizer = grounding_tokenizer()
    model = model_of(tokenizer)
    main = folder / "language"
    main.mkdir(parents=True)
    if fused:
        save_fused(main, model)
    else:
        save_text(main, mtp=False, model=model)
        save_released_vision(folder / "vision", model, transformers_model(model))
    tokenizer.save_pretrained(main)
    if not fused:
        (main / "chat_template.jinja").write_text(TEXT_TEMPLATE)
    else:
        named = json.loads((main / "tokenizer_config.json").read_text())
        named["extra_special_tokens"] = NAMED
        (main / "tokenizer_config.json").write_text(json.dumps(named))
        config = json.loads((main / "config.json").read_text())
        config["image_token_id"] = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        (main / "config.json").write_text(json.dumps(config))
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    (main / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "top_k": 20}))
    return [main] if fused else [main, folder / "vision"]


def converted(origin: list[Path], out: Path, *, looks: bool) -> Path:
    """Converts an origin to a checkpoint, as tools/hf_to_megatron.py does."""
    source = open_folder(*origin)
    run = target_run(source.model, list(LOOKS) if looks else [])
    source.model = run.model
    parameters = blueprint(run.model)
    plan = source.mapping(parameters)
    check_folder(source, plan)
    to_megatron.convert(source, plan, parameters, run, out, dist.group.WORLD, quiet=True)
    return out


def trained(checkpoint: Path, out: Path, tokenizer: Path, *, bf16: bool = False, **data) -> Path:
    """Loads a converted checkpoint into an engine and saves it, as a run with these data settings
    would after three steps."""
    _, stored = folders.resolve(checkpoint)
    run = replace(
        run_of_checkpoint(stored["config"]),
        data=DataConfig(tokenizer_model=str(tokenizer), **data),
        training=TrainingConfig(bf16=bf16),
        parallel=ParallelConfig(),
    )
    engine = loaded(checkpoint, run)
    sharded.save(engine, {}, out, 3, {NOTES: stored["extra"][NOTES]})
    return out


def loaded(checkpoint: Path, run: RunConfig | None = None) -> Engine:
    """Returns an engine of one rank with a checkpoint's weights."""
    run = run or run_of_checkpoint(folders.resolve(checkpoint)[1]["config"])
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    engine = Engine.create(run, groups.build(run.parallel))
    sharded.load(engine, checkpoint, finetune=True)
    return engine


def exported(checkpoint: Path, out: Path, **how) -> list[str]:
    """Exports a checkpoint; returns the lines that the command says."""
    return to_folder(checkpoint, out, **how)
