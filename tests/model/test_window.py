"""The mathematics of a glimpse: against a loop in numpy, finite differences, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from megatron_mm.model.layers.window import Patches, Window, place, read, with_floor

SIDE = 4  # patches along a side of the fine tiles together; the coarse one has half as many
WINDOW = Window(2, 0.5, 1.0)


def pyramid(images: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [p, 3] and image numbers [p] of images of a fine and a coarse level."""
    found = []
    for side in (SIDE, SIDE // 2):
        centre = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        size = torch.full_like(y, math.log2(1 / side))
        found.append(torch.stack((y, x, size), -1).view(-1, 3))
    level = torch.cat(found)
    return level.repeat(images, 1), torch.arange(images).repeat_interleave(len(level))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patches_of(images: int, heads: int = 2, width: int = 3, absent=None) -> Patches:
    places, image = pyramid(images)
    count = len(places)
    key, value = (drawn(1, count, heads, width, seed=seed) for seed in (1, 2))
    return Patches(key, value, places[None], image[None], images, absent)


def slow(window, query, asked, index, held: Patches, content):
    """The formula of window.py in loops, fp64."""
    query, asked, content = (x.double().numpy() for x in (query, asked, content))
    key, value, places = (x[0].double().numpy() for x in (held.key, held.value, held.places))
    image, absent = held.image[0].numpy(), None if held.absent is None else held.absent[0].numpy()
    slots, heads, width = query.shape[1:]
    found = np.zeros((slots, heads, width))
    for s in range(slots):
        y, x, scale = asked[0, s]
        row, column = divmod(int(index[0, s]), window.grid)
        goal_y = y + scale * ((row + 0.5) / window.grid - 0.5)
        goal_x = x + scale * ((column + 0.5) / window.grid - 0.5)
        for h in range(heads):
            shares = {}
            for number in range(held.images):
                mine = [
                    p
                    for p in range(len(image))
                    if image[p] == number and (absent is None or not absent[p])
                ]
                if mine:
                    mean = key[mine, h].mean(0)
                    shares[number] = np.exp(query[0, s, h] @ mean / math.sqrt(width))
            total = sum(shares.values())
            scores = np.full(len(image), -np.inf)
            for p in range(len(image)):
                if absent is not None and absent[p]:
                    continue
                away = (places[p, 0] - goal_y) ** 2 + (places[p, 1] - goal_x) ** 2
                cell = scale / window.grid
                near = -0.5 * away / (window.spread * cell) ** 2
                near -= 0.5 * ((places[p, 2] - math.log2(cell)) / window.scale_spread) ** 2
                alike = content[h] * (query[0, s, h] @ key[p, h]) / math.sqrt(width)
                scores[p] = near + alike + math.log(shares[image[p]] / total)
            weights = np.exp(scores - scores.max())
            found[s, h] = (weights / weights.sum()) @ value[:, h]
    return found


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_formula(images, padded):
    held = patches_of(images)
    if padded:  # the last image's coarse level is not there
        absent = torch.zeros(1, held.key.shape[1], dtype=torch.bool)
        absent[:, -4:] = True
        held = Patches(held.key, held.value, held.places, held.image, images, absent)
    query, content = drawn(1, 4, 2, 3, seed=3), torch.tensor([0.0, 1.5])
    asked = torch.tensor([[0.3, 0.6, 0.5]]).expand(1, 4, 3)
    index = torch.arange(4)[None]
    found = read(WINDOW, query, asked, index, held, content)[0]
    expected = torch.from_numpy(slow(WINDOW, query, asked, index, held, content))
    # fp32 against fp64: sums of some 20 terms of size 1.
    assert torch.allclose(found.double(), expected, atol=2e-6)


def test_an_absent_image_has_no_share():
    """A row of a rectangle whose second image is padding is a row with one image."""
    two, one = patches_of(2), patches_of(1)
    count = one.key.shape[1]
    absent = torch.arange(2 * count)[None] >= count
    held = Patches(two.key, two.value, two.places, two.image, 2, absent)
    alone = Patches(two.key[:, :count], two.value[:, :count], one.places, one.image, 1, None)
    query, content = drawn(1, 4, 2, 3), torch.ones(2)
    asked, index = torch.tensor([[0.5, 0.5, 0.4]]).expand(1, 4, 3), torch.arange(4)[None]
    found, expected = (read(WINDOW, query, asked, index, each, content) for each in (held, alone))
    assert torch.allclose(found, expected, atol=1e-6)


def test_finite_differences_of_the_place(double):
    """Of what the linear says, through place and scale, in fp64."""
    places, image = pyramid(2)
    asked, key, value, query = (
        drawn(*shape, seed=n).double().requires_grad_()
        for n, shape in enumerate([(2, 3), (1, 40, 2, 3), (1, 40, 2, 3), (1, 8, 2, 3)])
    )
    content = torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
    of_slot, index = torch.arange(2).repeat_interleave(4), torch.arange(4).repeat(2)[None]

    def glimpse(asked, key, value, query, content):
        where = with_floor(place(asked, 0.1), torch.tensor(0.3))[of_slot][None]
        held = Patches(key, value, places.double()[None], image[None], 2, None)
        return read(WINDOW, query, where, index, held, content)

    assert gradcheck(glimpse, (asked, key, value, query, content))


def test_places_stay_in_the_image_and_scales_within_bounds():
    asked = torch.tensor([[0.0, 0.0, -3.0], [9.0, -9.0, 9.0], [0.0, 0.0, -50.0]])
    found = place(asked, 0.08)
    assert torch.allclose(found[0, :2], torch.tensor([0.5, 0.5]))
    assert 0.85 < found[0, 2] < 0.9  # the first query sees nearly the whole image
    assert found[1, 0] > 0.99 and found[1, 1] < 0.01
    assert math.isclose(float(found[1, 2]), 0.08, rel_tol=1e-3) and found[2, 2] == 1.0


def test_a_floor_holds_scales_up_and_nothing_else():
    """What is asked for below it keeps its place; the scale's gradient waits."""
    asked = torch.tensor([[0.2, 0.4, 0.1], [0.6, 0.8, 0.5]], requires_grad=True)
    found = with_floor(asked, torch.tensor([0.3]))
    assert torch.equal(found.detach(), torch.tensor([[0.2, 0.4, 0.3], [0.6, 0.8, 0.5]]))
    found.sum().backward()
    assert torch.equal(asked.grad, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))


def test_a_narrow_window_reads_the_nearest_patch_of_its_size():
    """As the spread goes to 0, each slot reads one patch, of the level whose patches have the size
    of a cell."""
    places, image = pyramid()
    value = torch.eye(len(places))[None, :, None]  # says which patch was read
    held = Patches(torch.zeros_like(value), value, places[None], image[None], 1, None)
    narrow = Window(2, 0.02, 0.05)
    index, query = torch.arange(4)[None], torch.zeros(1, 4, 1, len(places))
    for scale, level in ((2 / SIDE, slice(0, SIDE**2)), (1.0, slice(SIDE**2, None))):
        where = torch.tensor([[0.5, 0.5, scale]]).expand(1, 4, 3)
        found = read(narrow, query, where, index, held, torch.zeros(1))[0, :, 0]
        offsets = narrow.offsets(torch.device("cpu")) * scale + 0.5
        inside = places[level]
        for slot in range(4):
            nearest = (inside[:, :2] - offsets[slot]).square().sum(1).argmin() + level.start
            assert found[slot].argmax() == nearest and found[slot].max() > 0.99
