"""Microbatches with what a teacher recorded for them.

Shapes: T positions of the stream, k experts and n tokens recorded at a position.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch

from megatron_mm import platform
from megatron_mm.earl.router_term import TaughtBatch


class TopExperts(NamedTuple):
    """The experts that one of the teacher's routers finds likeliest at each position.

    Attributes:
        experts_Tk: int16.
        weights_Tk: fp16, their probabilities among all experts; 0 where nothing is taught.
    """

    experts_Tk: torch.Tensor
    weights_Tk: torch.Tensor


class TopTokens(NamedTuple):
    """The next tokens that the teacher finds likeliest at each position.

    Attributes:
        tokens_Tn: int32.
        logprobs_Tn: fp32, their log-probabilities among all tokens; 0 where nothing is taught.
    """

    tokens_Tn: torch.Tensor
    logprobs_Tn: torch.Tensor


@dataclass(kw_only=True)
class MimicBatch(TaughtBatch):
    """A microbatch whose supervised positions a teacher has seen.

    Attributes:
        teacher_routes: teacher's layer -> its routes. A rank keeps what its stages need.
        teacher_answers: None: they are not distilled here.
    """

    teacher_routes: dict[int, TopExperts]
    teacher_answers: TopTokens | None = None

    def to(self, device: torch.device | str) -> Self:
        """See `Microbatch.to`."""
        there = super().to(device)
        routes = {
            layer: TopExperts(*(platform.moved(x, device) for x in held))
            for layer, held in self.teacher_routes.items()
        }
        answers = self.teacher_answers
        if answers is not None:
            answers = TopTokens(*(platform.moved(x, device) for x in answers))
        return replace(there, teacher_routes=routes, teacher_answers=answers)

    def keeping(self, layers: Collection[int], answers: bool) -> Self:
        """Returns the microbatch with the routes of some of the teacher's layers, and with or
        without its answers."""
        routes = {layer: held for layer, held in self.teacher_routes.items() if layer in layers}
        return replace(
            self,
            teacher_routes=routes,
            teacher_answers=self.teacher_answers if answers else None,
        )
