"""Labels for the parts of a model, so that launches and waits are counted by kind of layer."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn

from tools.fake_gpu.process import Gpu


def label_layers(gpu: Gpu, chunks: Iterable[nn.Module]) -> Counter[str]:
    """Labels every layer of a rank's stages (`Engine.chunks`) for what runs from now on. A layer's
    label is the name of its class, the norm and residual around it included. What is labelled
    "other" are the embedding, the output layer, the loss, and code around the model.

    Returns:
        How many layers have each label.
    """
    found: Counter[str] = Counter()
    for chunk in chunks:
        for module, method, label in _layers(chunk):
            found[label] += 1
            setattr(module, method, _labelled(gpu, getattr(module, method), label))
    return found


def _layers(chunk: nn.Module) -> Iterable[tuple[nn.Module, str, str]]:
    """(module, the method that runs it, label)"""
    stack = chunk.language
    for number in stack.layers.values():
        for sublayer in number.values():
            yield sublayer, "forward", type(sublayer.inner).__name__
    for look in getattr(stack, "looks", {}).values():
        yield look, "run", type(look).__name__
    if chunk.vision is not None:
        for layer in chunk.vision.vit.layers:
            yield layer, "forward", type(layer).__name__
        yield chunk.vision.projector, "forward", type(chunk.vision.projector).__name__


def _labelled(gpu: Gpu, function: Callable, label: str) -> Callable:
    @functools.wraps(function)
    def called(*args, **kwargs):
        with gpu.labelled(label):
            return function(*args, **kwargs)

    return called
