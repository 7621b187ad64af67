"""Rows of the table of names: which tensors in Hugging Face folders make one of megatron-core's.

A row names one of our parameters (as the model names it, with global layer numbers) and, for every
way in which folders spell it, their tensors and the transform between. Braces stand for what
varies: `{layer}`, `{pair}` and `{rest}` are the same on both sides; `{expert}` counts our first
dimension, each index of which is transformed by itself; `{text}`, `{head}`, `{vit}` and
`{projector}` are the prefixes of a spelling.

Sizes come from the model's config: transforms that need one are made by `how(model)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mm.config import ModelConfig
from megatron_mm.model.families.transforms import Transform

How = Callable[[ModelConfig], Transform]


@dataclass(frozen=True)
class Spelling:
    """Naming scheme of a folder.

    Attributes:
        text, head, vit, projector: prefixes of the parts of a model.
        release: the encoder and the projector are named as in the encoder's own release.
        stacked: the experts of a layer are one tensor, not one each.
    """

    text: str = ""
    head: str = ""
    vit: str = ""
    projector: str = ""
    release: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Form:
    """One way of spelling a tensor. `release` and `stacked` say which spellings use it; None:
    all do."""

    names: tuple[str, ...]
    how: How
    release: bool | None = None
    stacked: bool | None = None

    def used_by(self, spelling: Spelling) -> bool:
        return self.release in (None, spelling.release) and self.stacked in (
            None,
            spelling.stacked,
        )


@dataclass(frozen=True)
class Row:
    """One parameter, by its name in the model, and every way in which folders spell it."""

    mcore: str
    forms: tuple[Form, ...]


def same(model: ModelConfig) -> Transform:
    """The tensor as it stands."""
    return Transform()


def row(mcore: str, *names: str, how: How = same) -> Row:
    """A row that all spellings write alike."""
    return Row(mcore, (Form(names, how),))


def layer_row(mcore: str, *names: str, how: How = same) -> Row:
    """A row of a transformers layer; the names are those inside the layer."""
    prefix = "{text}layers.{layer}."
    return row("language.layers.{layer}." + mcore, *(prefix + name for name in names), how=how)


def released_row(mcore: str, transformers: Form | str, release: Form | str) -> Row:
    """A row that transformers and the encoder's release spell otherwise. A name alone is a tensor
    as it stands."""
    if isinstance(transformers, str):
        transformers = Form((transformers,), same, release=False)
    if isinstance(release, str):
        release = Form((release,), same, release=True)
    return Row(mcore, (transformers, release))
