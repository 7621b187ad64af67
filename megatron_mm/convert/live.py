"""Loads weights from a Hugging Face folder directly into a model, on any layout.

A rank reads only the hf tensors of parameters it holds, and of experts only its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mm.checkpoint.collective import raising_together
from megatron_mm.checkpoint.compatible import check_model, narrows
from megatron_mm.checkpoint.parameters import begin_copies, finish_param_gather, parameters
from megatron_mm.config import to_dict
from megatron_mm.convert.folder import check_folder, open_folder
from megatron_mm.convert.token_notes import differing_token
from megatron_mm.engine.engine import Engine
from megatron_mm.errors import ConvertError
from megatron_mm.model.blueprint import blueprint
from megatron_mm.model.layers.lora import is_adapter
from megatron_mm.parallel.param_layout import ParamLayout, initialize_one


@dataclass(frozen=True)
class Loaded:
    """Result of a load.

    Attributes:
        initialized: parameters that the folder lacks, drawn from the seed or copied.
        ignored: hf tensors that no parameter of the model holds.
        narrowed: parameters of this rank that have fewer digits than their tensors.
        notes: `HFFolder.notes`, to be kept in checkpoints of the run.
    """

    initialized: list[str]
    ignored: list[str]
    narrowed: list[str]
    notes: dict[str, Any]


def load_hf(engine: Engine, folder: Path, tokens: Mapping[str, Any] | None = None) -> Loaded:
    """Overwrites the engine's weights. Every rank calls it.

    Args:
        tokens: `token_notes` of the run's tokenizer.

    Raises:
        CheckpointError: on every rank; the folder is damaged or of another model (before anything
            changes), or reading failed.
    """
    group, doing = engine.groups.world, f"cannot load {folder}"
    with raising_together(group, doing):
        source = open_folder(folder)
        check_model(to_dict(source.model), engine.run.model, finetune=True)
        # CLVR, a second hop and the fusion settings are this run's, the base model the folder's.
        source.model = engine.run.model
        whole = blueprint(engine.run.model)
        mapping = source.mapping(whole)
        check_folder(source, mapping)
        problem = differing_token(source.notes, tokens or {})
        if problem is not None:
            raise ConvertError(problem)
    links = {link.mcore: link for link in mapping.links}
    narrowed: list[str] = []
    finish_param_gather(engine)  # a gather under way would overwrite loaded weights
    with raising_together(group, doing):
        for name, param, layout in parameters(engine):
            if name in links:
                link = links[name]
                if narrows(source.dtype(link), param.dtype):
                    narrowed.append(name)
                fill(param, layout, lambda a, b, k=link: k.to_mcore(source.read, a, b))
            elif is_adapter(name) or name in mapping.new:
                initialize_one(name, param, layout, engine.run.training.seed)
            else:
                raise ConvertError(f"{name} has no tensor there")
    begin_copies(engine, {name for name, *_ in parameters(engine) if name in mapping.new})
    added = mapping.new + sorted(name for name, _, _ in parameters(engine) if is_adapter(name))
    engine.optimizer.reload_model_params()
    return Loaded(added, mapping.carried, narrowed, source.notes)


@torch.no_grad()
def fill(
    param: torch.Tensor, layout: ParamLayout, read: Callable[[int, int], torch.Tensor]
) -> None:
    """Copies this rank's block of a tensor into a parameter.

    Args:
        read: (first, last) -> those rows of the tensor if `rows_drawn_alone` (experts), else the
            whole tensor.
    """
    target = layout.held(param.data)
    if not target.numel():
        return
    if not layout.rows_drawn_alone:
        target.copy_(read(0, layout.global_shape[0])[layout.block])
        return
    rows, *rest = layout.block
    for i in range(rows.start, rows.stop):  # one expert at a time
        target[i - rows.start].copy_(read(i, i + 1)[0][tuple(rest)])
