"""Weights far from those of a new model, where a mistake could hide."""

from __future__ import annotations

import zlib

import torch

from megatron_mm.config import RunConfig
from megatron_mm.engine.engine import Engine
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts


def randomise_engine(engine: Engine) -> None:
    """Gives every matrix, and the scale of a second hop, random values, the same on every layout.

    A new model mostly repeats a function of its last token. At this scale every part of it, the
    look too, changes the answers, and they depend on the image.
    """
    for name, param, layout in layouts(*engine.modules):
        if param.dim() > 1 or name.endswith(".delegate.scale"):
            seed = zlib.crc32(name.encode())
            whole = torch.randn(layout.global_shape, generator=torch.Generator().manual_seed(seed))
            scale = 1.0 if name == "embedding.weight" else layout.global_shape[-1] ** -0.5
            layout.held(param.data).copy_(whole[layout.block] * scale)
    engine.optimizer.reload_model_params()


def random_engine(run: RunConfig) -> Engine:
    """Returns an engine of random weights that is not in training mode."""
    engine = Engine.create(run, groups.build(run.parallel))
    randomise_engine(engine)
    engine.training(False)
    return engine


def move_looks_off_zero(engine: Engine) -> None:
    """Moves every out-projection of a look or a glimpse away from zero, and with it what else of a
    glimpse starts there, by the same values on every layout.

    While it is zero the look adds nothing, and a memory without gradient passes every test of
    gradients.
    """
    for name, param, layout in layouts(*engine.modules):
        if _starts_at_zero(name):
            whole = torch.randn(layout.global_shape, generator=torch.Generator().manual_seed(3))
            layout.held(param.data).copy_(whole[layout.block] * 0.2)
    engine.optimizer.reload_model_params()


def looks_off_zero(model: torch.nn.Module) -> torch.nn.Module:
    """Does the same to a model on one rank, with other values for each look, and returns it."""
    generator = torch.Generator().manual_seed(3)
    for name, param in model.named_parameters():
        if _starts_at_zero(name):
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.2)
    return model


def _starts_at_zero(name: str) -> bool:
    ends = ("linear_proj.weight", "linear_place.weight", ".content")
    return (".looks." in name or ".queries." in name) and name.endswith(ends)
