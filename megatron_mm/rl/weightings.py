"""Weightings of advantages by how difficult their group was: between the estimator and whatever
normalises over a batch.

A weighting knows of one group at a time, all of whose completions are on one replica, so none needs
another rank. Beside an estimator that divides by the deviation of a group, sqrt(p (1 - p)) for
rewards of 0 and 1, which favours extremes already, a factor of p acts a second time.

Shapes: P groups of this replica, G completions of each.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_mm.cli import one_line
from megatron_mm.errors import RLError
from megatron_mm.plugins import parse_specs
from megatron_mm.rl.algorithms import WEIGHTINGS


@dataclass(frozen=True)
class Judged:
    """The groups of this replica as a weighting sees them.

    Attributes:
        rewards_PG: weighted sum of all rewards; NaN where a completion is left out.
        difficulty_PG: value of `difficulty_reward`; NaN where it does not apply or failed.
        right_PG: bool, whether that reaches `difficulty_threshold`.
        lengths_PG: int64, tokens of each completion.
        advantages_PG: as the estimator gives them.
    """

    rewards_PG: torch.Tensor
    difficulty_PG: torch.Tensor
    right_PG: torch.Tensor
    lengths_PG: torch.Tensor
    advantages_PG: torch.Tensor

    @property
    def pass_rate_P1(self) -> torch.Tensor:
        """fp64 [P, 1]: p, the share of right completions among those judged; NaN without any."""
        judged_P1 = (~self.difficulty_PG.isnan()).sum(1, keepdim=True)
        return self.right_PG.sum(1, keepdim=True).double() / judged_P1


@dataclass(frozen=True)
class Factors:
    """Factors of advantages, and of the coefficient of the KL divergence in the loss: [P, 1] or
    [P, G], or one number for all."""

    advantages_PG: torch.Tensor | float = 1.0
    kl_PG: torch.Tensor | float = 1.0


# What `weighting_of` makes of the setting.
Weighting = Callable[[Judged], Factors]


def observe_r1(judged: Judged, scale: float = 1.8) -> Factors:
    """A x 4 scale p (1 - p): Observe-R1, arXiv 2505.12432, without its bonus for short ones."""
    p_P1 = judged.pass_rate_P1
    return Factors(4 * scale * p_P1 * (1 - p_P1))


def odsw(judged: Judged, stage: str = "medium") -> Factors:
    """VL-Cogito's weights of a stage, arXiv 2507.22607, with c = cos(pi (p - 1/2)): easy is c up to
    p = 1/2 and 1 above, medium is c, hard is 1 up to 1/2 and c above. At p = 0 they are 0, but hard
    is 1/4."""
    p_P1 = judged.pass_rate_P1
    wave_P1 = torch.cos(math.pi * (p_P1 - 0.5))
    shapes = {
        "easy": torch.where(p_P1 > 0.5, 1.0, wave_P1),
        "medium": wave_P1,
        "hard": torch.where(p_P1 > 0.5, wave_P1, 1.0),
    }
    if stage not in shapes:
        raise RLError(f"odsw: stage is {stage!r}; allowed: {', '.join(shapes)}")
    # The cosine of pi / 2 is 6e-17.
    return Factors(torch.where(p_P1 == 0, 0.25 if stage == "hard" else 0.0, shapes[stage]))


def stcr(judged: Judged, base: float = 1.00001) -> Factors:
    """A x (2 - base^-d) of a wrong completion that is d tokens longer than the right ones of its
    group on average: View-R1's length term. By default 1,000 tokens are 1 %."""
    right_PG = judged.right_PG
    count_P1 = right_PG.sum(1, keepdim=True)
    mean_P1 = (judged.lengths_PG * right_PG).sum(1, keepdim=True).double() / count_P1
    longer_PG = judged.lengths_PG - mean_P1  # NaN where none is right
    wrong_PG = ~right_PG & ~judged.difficulty_PG.isnan()
    punished_PG = wrong_PG & (longer_PG > 0)
    return Factors(torch.where(punished_PG, 2 - base ** -longer_PG.clamp(min=0), 1.0))


def dads(judged: Judged) -> Factors:
    """KL coefficient x (1 - exp(-e p)) where A > 0 and 0 < p < 1: View-R1's, so that rare right
    answers may move the policy far."""
    p_P1 = judged.pass_rate_P1
    mixed_P1 = (p_P1 > 0) & (p_P1 < 1)
    weight_P1 = torch.where(mixed_P1, 1 - torch.exp(-math.e * p_P1), 1.0)
    return Factors(kl_PG=torch.where(judged.advantages_PG > 0, weight_P1, 1.0))


def univg(judged: Judged, form: str = "exp", power: float = 1.0) -> Factors:
    """Policy loss x exp(1 - m), (1.05 - m)^power or -log(0.02 + m), m the mean of the difficulty
    reward over the group, an IoU: UniVG-R1, arXiv 2505.14231."""
    mean_P1 = judged.difficulty_PG.double().nanmean(1, keepdim=True)
    if form not in ("exp", "power", "log"):
        raise RLError(f"univg: form is {form!r}; allowed: exp, power, log")
    if form == "power":
        return Factors((1.05 - mean_P1) ** power)
    return Factors((1 - mean_P1).exp() if form == "exp" else -(0.02 + mean_P1).log())


def weighting_of(entries: Sequence[str]) -> Weighting:
    """Returns the product of the weightings that `advantage_weighting` names. A group of which no
    completion was judged has the factors 1.

    Raises:
        RLError, ConfigError: here, for a part that cannot be imported or does not take its options,
            and when it is called, for factors that are not finite numbers of the groups' shape.
    """
    parts = [(spec, WEIGHTINGS[spec.path]) for spec in parse_specs(entries, WEIGHTINGS)]
    for spec, function in parts:
        try:
            inspect.signature(function).bind(None, **spec.options)
        except (TypeError, ValueError) as error:
            raise RLError(f"advantage weighting {spec.path}: {error}") from None

    def weigh(judged: Judged) -> Factors:
        advantages_PG = torch.ones(judged.rewards_PG.shape, dtype=torch.float64)
        kl_PG = torch.ones_like(advantages_PG)
        for spec, function in parts:
            try:
                factors = function(judged, **spec.options)
            except RLError:
                raise
            except Exception as error:  # of any kind: it may be a user's
                raise RLError(f"advantage weighting {spec.path}: {one_line(error)}") from None
            advantages_PG = advantages_PG * _checked(spec.path, factors.advantages_PG, judged)
            kl_PG = kl_PG * _checked(spec.path, factors.kl_PG, judged)
        return Factors(advantages_PG.float(), kl_PG.float())

    nothing_PG = torch.zeros(2, 2)
    weigh(Judged(nothing_PG, nothing_PG, nothing_PG > 0, nothing_PG.long(), nothing_PG))
    return weigh


def _checked(name: str, factor: torch.Tensor | float, judged: Judged) -> torch.Tensor:
    """Returns the factor, fp64 [P, G], with 1 for groups that were not judged."""
    shape, given = judged.rewards_PG.shape, torch.as_tensor(factor, dtype=torch.float64)
    if given.ndim and given.shape not in (shape, (shape[0], 1)):
        raise RLError(
            f"advantage weighting {name}: factors of the shape {list(given.shape)} for "
            f"{shape[0]} groups of {shape[1]}; give [groups, 1] or [groups, completions]"
        )
    whole_PG = torch.where(judged.pass_rate_P1.isnan(), 1.0, given.expand(shape))
    if not whole_PG.isfinite().all():
        found = whole_PG[~whole_PG.isfinite()]
        raise RLError(
            f"advantage weighting {name}: {len(found)} of {whole_PG.numel()} factors are "
            f"{float(found[0])}; give finite numbers"
        )
    return whole_PG
