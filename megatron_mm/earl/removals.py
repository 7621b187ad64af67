"""Which experts are removed in which pass of a knock-out, and each expert's effect from the passes.

Shapes: L layers, E experts, P passes, S skills (or any other figures of a pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch

from megatron_mm.errors import RLError

Removal = tuple[int, tuple[int, ...]]  # a layer and the experts of it that are forbidden
SHARE = 8  # a random set holds one in so many experts of its layer
PENALTIES = 33  # that the regression chooses from


def removals(layers: int, experts: int, k: int, passes: int | None, seed: int) -> list[Removal]:
    """Plans the passes of a knock-out.

    Args:
        k: experts that a token needs (`config.experts_needed`).
        passes: None: each expert in turn, L x E passes. A number: as many passes, in which random
            sets of a layer's experts are removed, as many sets in each layer. A set holds an eighth
            of the layer's experts, and each expert is in about as many sets as any other.
    Raises:
        RLError: if k experts would not remain, or the passes are too few or too many.
    """
    if experts <= k:
        raise RLError(
            f"{experts} experts of which a token needs {k}: none can be removed; a knock-out needs "
            f"{k + 1} or more"
        )
    if passes is None:
        return [(layer, (expert,)) for layer in range(layers) for expert in range(experts)]
    size = min(max(1, experts // SHARE), experts - k)
    parts = ceil(experts / size)
    if not layers * parts <= passes < layers * experts:
        raise RLError(
            f"--passes is {passes}; {layers} layers of {experts} experts need {layers * parts} so "
            f"that each expert is removed once, and {layers * experts} remove each on its own: "
            "leave --passes out for these"
        )
    generator = torch.Generator().manual_seed(seed)
    planned: list[Removal] = []
    for layer in range(layers):
        sets: list[Removal] = []
        while len(sets) < passes // layers:
            order = torch.randperm(experts, generator=generator)
            sets += [(layer, tuple(part.tolist())) for part in order.tensor_split(parts)]
        planned += sets[: passes // layers]
    return planned


def effects(
    rise_PS: torch.Tensor, planned: Sequence[Removal], layers: int, experts: int
) -> torch.Tensor:
    """Returns fp64 [S, L, E]: the effect of removing each expert.

    An expert that was removed on its own has what that pass showed. Effects of sets are taken as
    sums of their experts' effects. In each layer these are found by ridge regression towards the
    layer's mean effect (Hoerl and Kennard 1970), with the penalty of the least generalised
    cross-validation error (Golub, Heath and Wahba 1979), one for all skills.

    Args:
        rise_PS: how far each pass raised the loss of each skill.
    """
    rise_PS = rise_PS.double()
    found_SLE = torch.zeros(rise_PS.shape[1], layers, experts, dtype=torch.float64)
    for layer in range(layers):
        here = [p for p, (other, _) in enumerate(planned) if other == layer]
        inside_PE = torch.zeros(len(here), experts, dtype=torch.float64)
        for row, p in enumerate(here):
            inside_PE[row, list(planned[p][1])] = 1
        if all(len(planned[p][1]) == 1 for p in here):
            found_SLE[:, layer] = rise_PS[here].T @ inside_PE
        else:
            found_SLE[:, layer] = _ridge(inside_PE, rise_PS[here]).T
    return found_SLE


def _ridge(inside_PE: torch.Tensor, rise_PS: torch.Tensor) -> torch.Tensor:
    """Returns [E, S]."""
    size_P1 = inside_PE.sum(1, keepdim=True)
    mean_1S = (size_P1 * rise_PS).sum(0, keepdim=True) / size_P1.square().sum()
    rest_PS = rise_PS - size_P1 * mean_1S
    u_PR, scale_R, v_RE = torch.linalg.svd(inside_PE, full_matrices=False)
    along_RS, square_R = u_PR.T @ rest_PS, scale_R.square()
    # Skills count alike, whatever their scale.
    weight_S = 1 / rest_PS.square().sum(0).clamp(min=1e-30)
    outside = (rest_PS.square().sum(0) - along_RS.square().sum(0)).clamp(min=0)
    best, least = square_R.max(), torch.inf
    for penalty in torch.logspace(-4, 2, PENALTIES, dtype=torch.float64) * square_R.max():
        left_R = penalty / (square_R + penalty)
        missed = (left_R.square().unsqueeze(1) * along_RS.square()).sum(0) + outside
        freedom = len(rest_PS) - float((1 - left_R).sum())
        error = float((missed * weight_S).sum()) / freedom**2
        if error < least:
            best, least = penalty, error
    return mean_1S + v_RE.T @ ((scale_R / (square_R + best)).unsqueeze(1) * along_RS)
