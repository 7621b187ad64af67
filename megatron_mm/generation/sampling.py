"""From logits to a token and its log-probability, the same on every layout.

What is drawn for a row depends on the seed, the row's own number and how many tokens it has:
on no generator, and on nothing that shares its batch. So a layout, a refilled row or a resumed
run draw the same tokens, up to logits that rounding puts on the other side of a boundary.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Constants of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
# generators"), as signed 64-bit integers, whose products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        temperature: logits are divided by it; 0: always the best token (and log-probabilities
            as at 1).
        top_p: only the likeliest tokens that together reach it; 1: all.
        top_k: only so many of the likeliest tokens; 0: all.
        router_temperature: experts are drawn too, from the softmax of their router's logits over
            it; 0: always the best. A prompt, run once for all of its completions, takes the best.
        stop_ids: a completion ends with the first of them.
    """

    stop_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    router_temperature: float = 0.0


def uniforms(seed: int, row_N: torch.Tensor, step_N: torch.Tensor) -> torch.Tensor:
    """fp64 [N] in [0, 1): one number for each (seed, row, step), row and step int64."""
    return _unit(_state(seed, row_N, step_N))


def gumbels(
    seed: int, row_N: torch.Tensor, step_N: torch.Tensor, place_K: torch.Tensor
) -> torch.Tensor:
    """fp32 [N, K], standard Gumbel: a number for each (seed, row, step, place), independent of
    `uniforms`; rows, steps and places (0 and up) int64."""
    state_NK = _mix(_state(seed, row_N, step_N).unsqueeze(1) + (place_K + 1) * _GOLDEN)
    # Never 0, whose logarithm is none.
    return -(-_unit(state_NK).clamp(min=2.0**-54).log()).log().float()


def _state(seed: int, row_N: torch.Tensor, step_N: torch.Tensor) -> torch.Tensor:
    state = _mix(torch.full_like(row_N, seed) * _GOLDEN)
    state = _mix(state + row_N * _GOLDEN)
    return _mix(state + (step_N + 1) * _GOLDEN)


def _unit(state: torch.Tensor) -> torch.Tensor:
    return _shift(state, 11).double() * 2.0**-53


def draw(
    logits_NV: torch.Tensor, sampling: Sampling, uniform_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, int64 [N], and their log-probabilities, fp32 [N].

    The log-probability is the model's at this temperature, over the whole vocabulary: what
    the trainer computes for the same token. top_p and top_k narrow what is drawn only.
    """
    logits_NV = logits_NV.float()
    if sampling.temperature == 0:
        tokens_N = logits_NV.argmax(1)  # the lowest id among equals
    else:
        logits_NV = logits_NV / sampling.temperature
        tokens_N = _inverse_cdf(_narrowed(logits_NV, sampling).softmax(1), uniform_N)
    chosen_N = logits_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    return tokens_N, chosen_N - logits_NV.logsumexp(1)


def _narrowed(logits_NV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """-inf where a token may not be drawn; the likeliest always may."""
    if 0 < sampling.top_k < logits_NV.shape[1]:
        least_N1 = logits_NV.topk(sampling.top_k, dim=1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if sampling.top_p < 1:
        ordered_NV, order_NV = logits_NV.sort(dim=1, descending=True, stable=True)
        probs_NV = ordered_NV.softmax(1)
        before_NV = probs_NV.cumsum(1) - probs_NV  # what likelier tokens have already
        out_NV = (before_NV >= sampling.top_p).scatter(1, order_NV, before_NV >= sampling.top_p)
        logits_NV = logits_NV.masked_fill(out_NV, -torch.inf)
    return logits_NV


def _inverse_cdf(probs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """The token at whose step the running sum passes u."""
    total_NV = probs_NV.double().cumsum(1)  # fp32 would lose the tail of a large vocabulary
    whole_N1 = total_NV[:, -1:]
    target_N1 = uniform_N.to(total_NV.device)[:, None] * whole_N1
    # Rounding may reach the whole, which no token passes.
    target_N1 = target_N1.minimum(whole_N1.nextafter(torch.zeros_like(whole_N1)))
    tokens_N = torch.searchsorted(total_NV, target_N1, right=True).squeeze(1)
    # Only where a probability is NaN: then so is the log-probability, and the step will say so.
    return tokens_N.clamp(max=probs_NV.shape[1] - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical, not arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
