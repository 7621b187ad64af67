"""Estimators of the KL divergence from the reference model, of sampled tokens.

KL(p || ref) is the mean over tokens drawn from p of any of them. J. Schulman, "Approximating KL
divergence", 2020, with log ratio d = log ref - log p:

    k1 = -d              unbiased, of either sign
    k2 = d^2 / 2         biased; its gradient is an unbiased one of the KL divergence
    k3 = exp(d) - 1 - d  unbiased, never negative; GRPO's (arXiv 2402.03300, eq. 4)

In a loss k1 does nothing: the mean of its gradient, that of log p, is zero. In a reward it is
the usual choice (RLOO, REINFORCE++).
"""

from __future__ import annotations

import torch

from megatron_mm.rl.algorithms import KL_ESTIMATORS

MAX_LOG_RATIO = 20.0  # as for policy ratios: exp(20) is 5e8; beyond it k3's gradient is 0


def k1(logprobs_K: torch.Tensor, ref_logprobs_K: torch.Tensor) -> torch.Tensor:
    return -(ref_logprobs_K - logprobs_K)


def k2(logprobs_K: torch.Tensor, ref_logprobs_K: torch.Tensor) -> torch.Tensor:
    return (ref_logprobs_K - logprobs_K).square() / 2


def k3(logprobs_K: torch.Tensor, ref_logprobs_K: torch.Tensor) -> torch.Tensor:
    log_ratio_K = (ref_logprobs_K - logprobs_K).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio_K.exp() - 1 - log_ratio_K


def kl_divergence(
    logprobs_K: torch.Tensor, ref_logprobs_K: torch.Tensor, estimator: str
) -> torch.Tensor:
    """[K], differentiable in `logprobs_K`.

    Args:
        estimator: a name of KL_ESTIMATORS or a dotted path.
    """
    return KL_ESTIMATORS[estimator](logprobs_K, ref_logprobs_K)
