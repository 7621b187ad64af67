"""The parameters of a model without the model: names and whole shapes, from its config alone.

The model's own constructors run, on one rank, with tensors that have a shape but no memory;
so there is no second description of a model's parts. 80B parameters take a second.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._C._distributed_c10d import FakeProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_mm.config import ModelConfig, RunConfig, TrainingConfig
from megatron_mm.model.backends.choice import choose
from megatron_mm.model.core_config import language_config
from megatron_mm.model.layers.lora import add_lora
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.parallel.param_layout import ParamLayout, layouts


def blueprint(model: ModelConfig) -> dict[str, ParamLayout]:
    """Global name -> layout of every parameter, as one rank would hold it. Needs no job."""
    return {name: layout for name, (_, layout) in outline(RunConfig(model=model)).items()}


def outline(run: RunConfig) -> dict[str, tuple[torch.dtype, ParamLayout]]:
    """Global name -> (type, layout) of every parameter of a run, its adapters among them. It needs
    no job either: of the run's settings only the model, its precision and LoRA count."""
    run = RunConfig(model=run.model, lora=run.lora, training=TrainingConfig(bf16=run.training.bf16))
    pg = ProcessGroupCollection()
    for field in fields(ProcessGroupCollection):
        setattr(pg, field.name, FakeProcessGroup._create_internal(0, 1))
    # What megatron-core compares with a number as it is built (a range of local experts) is real.
    with FakeTensorMode(allow_non_fake_inputs=True):
        built = MultimodalModel(run, pg, language_config(run), choose(run.backend))
        add_lora(built, run.lora, pg.tp)
    return {name: (param.dtype, layout) for name, param, layout in layouts(built)}
