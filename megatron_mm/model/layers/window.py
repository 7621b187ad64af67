"""The mathematics of a glimpse: a window of an image, read by Gaussians over its patches.

A query asks for a place (y, x) and a scale s, both in shares of the image, and gets a window of at
least the smallest side that is allowed at the time. Its slots are the cells
of an n x n grid over the window of side s around that place. Slot i reads the patches m with

    g_i  = (y, x) + s o_i                       o_i: centre of cell i, in [-1/2, 1/2]^2
    a_im = -|c_m - g_i|^2 / (2 (beta s / n)^2) - (e_m - log2(s / n))^2 / (2 gamma^2)
           + log pi_image(m) + tau q.k_m / sqrt(D)
    f_i  = sum_m softmax_m(a_im) v_m

c_m is the centre of a patch and e_m the log2 of its side. pi is a softmax over the images that the
query sees, of q.mean(k) / sqrt(D) over the patches of each: with one image it changes nothing. tau
is a number for each head, 0 at the start. As beta goes to 0, a slot reads its nearest patch.

The form is that of a differentiable crop (Jaderberg et al. 2015, "Spatial Transformer Networks",
arXiv:1506.02025; Gregor et al. 2015, "DRAW", arXiv:1502.04623) with content beside place.

Shapes: r rows of a rectangle, s slots, p patches, h heads, D width of a head, I images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """The form of every glimpse of a layer.

    Attributes:
        grid: n, slots along a side.
        spread: beta.
        scale_spread: gamma.
    """

    grid: int
    spread: float
    scale_spread: float

    def offsets(self, device: torch.device) -> torch.Tensor:
        """Centres o_i of the cells, fp32 [n * n, 2], row by row."""
        centre = (torch.arange(self.grid, device=device) + 0.5) / self.grid - 0.5
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        return torch.stack((y.flatten(), x.flatten()), -1)


@dataclass(frozen=True)
class Patches:
    """Patches of a rectangle.

    Attributes:
        key, value: [r, p, h, D].
        places: fp32 [r, p, 3]: y and x of the centre, log2 of the side, in shares of the image.
        image: int64 [r, p], the number of a patch's image among those of its row.
        images: I, at most so many in a row.
        absent: bool [r, p], True for padding; None: there is none.
    """

    key: torch.Tensor
    value: torch.Tensor
    places: torch.Tensor
    image: torch.Tensor
    images: int
    absent: torch.Tensor | None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In fp32, or fp64 if it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def place(asked_N3: torch.Tensor, least: float) -> torch.Tensor:
    """Returns (y, x, s), fp32 [N, 3], from what the layer's linear says: y and x between 0 and 1,
    s between `least` and 1."""
    share_N3 = _wide(asked_N3).sigmoid()
    scale_N1 = torch.exp(math.log(least) * share_N3[:, 2:])
    return torch.cat((share_N3[:, :2], scale_N1), 1)


def with_floor(place_N3: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Returns the places with scales of `floor` (a scalar) at least. While the floor falls, places
    are learnt in ever smaller windows; a scale below it waits, and keeps its own gradient in what
    is not computed through the floor."""
    scale_N1 = torch.maximum(place_N3[:, 2:], _wide(floor).to(place_N3.dtype))
    return torch.cat((place_N3[:, :2], scale_N1), 1)


# Shares of the plastic number, whose multiples fill a square evenly (Roberts 2018, "The
# unreasonable effectiveness of quasirandom sequences").
PLASTIC = (0.7548776662466927, 0.5698402909980532)


def random_place(position_N: torch.Tensor, min_scale: torch.Tensor) -> torch.Tensor:
    """Returns (y, x, s), fp32 [N, 3], that follow from positions alone: places all over the image,
    and the smallest window."""
    share_N2 = torch.stack([(position_N.double() * part) % 1.0 for part in PLASTIC], 1)
    scale_N1 = _wide(min_scale).expand(len(position_N), 1)
    return torch.cat((share_N2.to(scale_N1.dtype), scale_N1), 1)


def read(
    window: Window,
    query_rshD: torch.Tensor,
    place_rs3: torch.Tensor,
    index_rs: torch.Tensor,
    patches: Patches,
    content_h: torch.Tensor,
) -> torch.Tensor:
    """Returns what slots find, [r, s, h, D].

    Args:
        query_rshD, place_rs3: q and (y, x, s) of each slot's query.
        index_rs: int64, the cell of each slot.
        content_h: tau of each head.
    """
    near_rsp = _nearness(window, place_rs3, index_rs, patches.places)
    key_rhDp = patches.key.permute(0, 2, 3, 1)
    scale = query_rshD.shape[-1] ** -0.5
    alike_rhsp = _wide(query_rshD.transpose(1, 2) @ key_rhDp) * scale
    scores_rhsp = near_rsp.unsqueeze(1) + _wide(content_h)[:, None, None] * alike_rhsp
    if patches.images > 1:
        scores_rhsp = scores_rhsp + _image_share(query_rshD, patches)
    if patches.absent is not None:
        scores_rhsp = scores_rhsp.masked_fill(patches.absent[:, None, None], -torch.inf)
    weights_rhsp = scores_rhsp.softmax(-1).to(patches.value.dtype)
    return (weights_rhsp @ patches.value.transpose(1, 2)).transpose(1, 2)


def _nearness(
    window: Window, place_rs3: torch.Tensor, index_rs: torch.Tensor, places_rp3: torch.Tensor
) -> torch.Tensor:
    """The part of the scores that follows from places, fp32 [r, s, p]."""
    scale_rs1 = place_rs3[..., 2:]
    goal_rs2 = place_rs3[..., :2] + scale_rs1 * window.offsets(place_rs3.device)[index_rs]
    cell_rs1 = scale_rs1 / window.grid
    away_rsp2 = (places_rp3[:, None, :, :2] - goal_rs2.unsqueeze(2)) / (window.spread * cell_rs1)[
        :, :, None
    ]
    octaves_rsp = (places_rp3[:, None, :, 2] - cell_rs1.log2()) / window.scale_spread
    return -0.5 * (away_rsp2.square().sum(-1) + octaves_rsp.square())


def _image_share(query_rshD: torch.Tensor, patches: Patches) -> torch.Tensor:
    """log pi of the image of every patch, fp32 [r, h, s, p]."""
    number_I = torch.arange(patches.images, device=patches.image.device)
    of_image_rpI = patches.image.unsqueeze(-1) == number_I
    if patches.absent is not None:
        of_image_rpI = of_image_rpI & ~patches.absent.unsqueeze(-1)
    count_rI = of_image_rpI.sum(1)
    member_rIp = of_image_rpI.transpose(1, 2).to(patches.key.dtype)
    total_rIhD = torch.einsum("rip,rphd->rihd", member_rIp, patches.key)
    mean_rIhD = total_rIhD / count_rI.clamp(min=1)[:, :, None, None]
    alike_rhsI = _wide(torch.einsum("rshd,rihd->rhsi", query_rshD, mean_rIhD))
    alike_rhsI = alike_rhsI * query_rshD.shape[-1] ** -0.5
    nothing_r11I = (count_rI == 0)[:, None, None]
    share_rhsI = alike_rhsI.masked_fill(nothing_r11I, -torch.inf).log_softmax(-1)
    image_rhsp = patches.image[:, None, None].expand(*share_rhsI.shape[:3], -1)
    return share_rhsI.gather(-1, image_rhsp)
