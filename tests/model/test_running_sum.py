"""Running sums by products are cumsum's, whatever the length."""

from __future__ import annotations

import pytest
import torch

from megatron_mm.model.running_sum import BLOCK, running_sum, summed_by_products


@pytest.mark.parametrize("length", [1, 2, 64, BLOCK, BLOCK + 1, 3 * BLOCK, BLOCK**2 + 5])
def test_products_of_any_length(length):
    x = torch.randn(3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = summed_by_products(x)
    assert found.shape == x.shape
    # fp64 in another order: 65,000 terms of size 1 add up to some 250, in steps of 3e-14.
    torch.testing.assert_close(found, x.cumsum(-1), rtol=1e-12, atol=1e-10)


def test_a_single_row_and_no_row_at_all():
    x = torch.arange(1.0, 6.0)
    assert summed_by_products(x).tolist() == [1.0, 3.0, 6.0, 10.0, 15.0]
    assert summed_by_products(x.new_zeros(0, 5)).shape == (0, 5)


def test_on_the_cpu_it_is_cumsum():
    x = torch.randn(4, 7, 3)
    for dim in (0, 1, -1):
        assert running_sum(x, dim).equal(x.cumsum(dim))


class Elsewhere(torch.Tensor):
    """On a GPU, if it is asked."""

    is_cuda = True


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_on_a_gpu_no_sum_is_left_to_chance(monkeypatch, dim):
    x = torch.randn(4, 7, 3, dtype=torch.float64)

    def refused(*_):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    expected = x.cumsum(dim)
    monkeypatch.setattr(torch.Tensor, "cumsum", refused)
    with pytest.raises(RuntimeError):
        running_sum(x.as_subclass(Elsewhere), dim)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    found = running_sum(x.as_subclass(Elsewhere), dim)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
