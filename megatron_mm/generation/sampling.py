"""Draws tokens from logits, the same on every layout.

A draw depends only on the seed, the completion's number and its number of tokens, not on a
generator or on other rows of the batch. So every layout, refilled row and resumed run draws the
same tokens, except where rounding moves a logit across a boundary.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mm.data.looks import LookTokens
from megatron_mm.model.running_sum import running_sum

# Constants of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
# generators", OOPSLA), as signed 64-bit integers, whose products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Attributes:
        stop_ids: a completion ends with the first of these tokens.
        max_tokens: length limit of a completion.
        temperature: divisor of the logits; 0: greedy, with log-probabilities as at 1.
        top_p: draw only from the likeliest tokens whose probabilities reach this sum; 1: all.
        top_k: draw only from this many of the likeliest tokens; 0: all.
        router_temperature: experts of completion tokens are drawn from the softmax of the router's
            logits divided by it; 0: greedy. Prompts, prefilled once for all of their completions,
            are always routed greedily.
        looks: the tokens of looks, behind which slots are forced; None: there are none. Slots count
            for `max_tokens`.
    """

    stop_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    router_temperature: float = 0.0
    looks: LookTokens | None = None


def uniforms(seed: int, row_N: torch.Tensor, step_N: torch.Tensor) -> torch.Tensor:
    """Returns uniform numbers in [0, 1), fp64 [N], one for each (seed, row, step).

    Args:
        row_N, step_N: int64.
    """
    return _unit(_state(seed, row_N, step_N))


def gumbels(
    seed: int, row_N: torch.Tensor, step_N: torch.Tensor, place_K: torch.Tensor
) -> torch.Tensor:
    """Returns standard Gumbel numbers, fp32 [N, K], one for each (seed, row, step, place),
    independent of `uniforms`.

    Args:
        row_N, step_N, place_K: int64, from 0.
    """
    state_NK = _mix(_state(seed, row_N, step_N).unsqueeze(1) + (place_K + 1) * _GOLDEN)
    # Clamped, because the logarithm of 0 is not finite.
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
    """Draws tokens, int64 [N], and returns them with their log-probabilities, fp32 [N].

    Log-probabilities are the model's at this temperature over the whole vocabulary, as the trainer
    computes them; top_p and top_k affect only the draw.

    Args:
        uniform_N: uniform numbers in [0, 1).
    """
    logits_NV = logits_NV.float()
    if sampling.temperature == 0:
        tokens_N = logits_NV.argmax(1)  # the lowest id among equals
    else:
        if sampling.temperature != 1:
            logits_NV = logits_NV / sampling.temperature
        tokens_N = _inverse_cdf(_narrowed(logits_NV, sampling).softmax(1), uniform_N)
    chosen_N = logits_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    return tokens_N, chosen_N - logits_NV.logsumexp(1)


def _narrowed(logits_NV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Sets the logits of excluded tokens to -inf. The likeliest token is never excluded."""
    if 0 < sampling.top_k < logits_NV.shape[1]:
        least_N1 = logits_NV.topk(sampling.top_k, dim=1).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if sampling.top_p < 1:
        ordered_NV, order_NV = logits_NV.sort(dim=1, descending=True, stable=True)
        probs_NV = ordered_NV.softmax(1)
        before_NV = running_sum(probs_NV) - probs_NV  # probability of likelier tokens
        out_NV = (before_NV >= sampling.top_p).scatter(1, order_NV, before_NV >= sampling.top_p)
        logits_NV = logits_NV.masked_fill(out_NV, -torch.inf)
    return logits_NV


def _inverse_cdf(probs_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """Returns the first token at which the cumulative probability exceeds u."""
    total_NV = running_sum(probs_NV.double())  # fp32 would lose the tail of a large vocabulary
    whole_N1 = total_NV[:, -1:]
    target_N1 = uniform_N.to(total_NV.device)[:, None] * whole_N1
    # Rounding may reach the total, which no cumulative sum exceeds.
    target_N1 = target_N1.minimum(whole_N1.nextafter(torch.zeros_like(whole_N1)))
    tokens_N = torch.searchsorted(total_NV, target_N1, right=True).squeeze(1)
    # Beyond the last token only if a probability is NaN; the step then fails on the NaN loss.
    return tokens_N.clamp(max=probs_NV.shape[1] - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
