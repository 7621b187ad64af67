"""Policy losses: the loss of each sampled token, and its sum over a microbatch.

The tokens of a microbatch lie one after another, as in the stream (shape K); a completion may lie
on several context-parallel ranks. Any split over microbatches and ranks gives the same loss and
gradient: a rank returns a sum (`policy_loss`), and its divisor (`loss_denominator`) follows from
the lengths of all completions of the minibatch, which are known before the first pass.

"sg" below is a stop-gradient. r_t = p(token) / p_old(token).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_mm.rl.algorithms import KL_ESTIMATORS, LOSS_AGGREGATIONS, POLICY_LOSSES
from megatron_mm.rl.settings import ResolvedRL

# exp(20) is 5e8. Larger ratios mean nothing, and an infinite one would turn the zero gradient of a
# clipped token into NaN. Beyond the bound the gradient is 0.
MAX_LOG_RATIO = 20.0

Sums = dict[str, torch.Tensor]  # metric: [numerator, denominator]


@dataclass(frozen=True)
class Tokens:
    """The part of a microbatch that this rank holds. Only `logprobs_K` may need a gradient."""

    logprobs_K: torch.Tensor  # of the sampled tokens, under the weights being trained
    old_logprobs_K: torch.Tensor  # under the weights before the minibatch's first update
    advantages_K: torch.Tensor
    # int64, which completion a token belongs to; -1: no sampled token, or of a completion that
    # is left out. Such a token has no loss and is in no mean.
    completion_K: torch.Tensor
    lengths_N: torch.Tensor  # sampled tokens of each completion, on all ranks together
    ref_logprobs_K: torch.Tensor | None = None  # under the reference model; for KL in the loss
    rollout_weights_K: torch.Tensor | None = None  # `importance_weights`
    entropy_K: torch.Tensor | None = None  # in nats, of the distributions; where it is rewarded
    kl_weights_K: torch.Tensor | None = None  # factors of beta
    learnt_K: torch.Tensor | None = None  # bool: where the policy loss learns; None: everywhere
    # Sums a [N] tensor over the ranks that share this microbatch's completions (context
    # parallelism). None: they are all here.
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def mask_K(self) -> torch.Tensor:
        return self.completion_K >= 0

    def of_completion(self, values_N: torch.Tensor) -> torch.Tensor:
        """Returns [K]: for each token the value of its completion, 1 where there is none."""
        return _of_completion(values_N, self.completion_K)


@dataclass(frozen=True)
class TokenLoss:
    loss_K: torch.Tensor
    # bool: the loss is held constant, or its weight capped, because the ratio is too low or high
    low_K: torch.Tensor
    high_K: torch.Tensor


def ratio(log_ratio_K: torch.Tensor) -> torch.Tensor:
    return log_ratio_K.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clip(tokens: Tokens, rl: ResolvedRL) -> TokenLoss:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A).

    GRPO, arXiv 2402.03300, eq. 3; with epsilon_high above epsilon DAPO's clip-higher, arXiv
    2503.14476, eq. 8; with `delta` the dual clip, arXiv 1912.09729: where A < 0 the loss is
    at most -delta A.
    """
    return _clipped(ratio(tokens.logprobs_K - tokens.old_logprobs_K), tokens.advantages_K, rl)


def gspo(tokens: Tokens, rl: ResolvedRL) -> TokenLoss:
    """`clip` with s = exp(mean over the completion of log r_t) in place of r_t.

    GSPO, arXiv 2507.18071, eq. 5 to 7, in its token form, eq. 13 and 14: s_t = sg(s) p / sg(p).
    With one advantage for a completion both have the same value and gradient; this one also
    takes an advantage for each token, and needs no gradient across ranks.
    """
    log_ratio_K = tokens.logprobs_K.detach() - tokens.old_logprobs_K
    sums_N = completion_sums(log_ratio_K, tokens.completion_K, len(tokens.lengths_N))
    if tokens.reduce is not None:
        sums_N = tokens.reduce(sums_N)
    log_s_K = tokens.of_completion(sums_N / tokens.lengths_N.clamp(min=1))
    own_K = tokens.logprobs_K - tokens.logprobs_K.detach()
    return _clipped(ratio(log_s_K + own_K), tokens.advantages_K, rl)


def sapo(tokens: Tokens, rl: ResolvedRL) -> TokenLoss:
    """-(4 / tau) sigmoid(tau (r - 1)) A, with one tau for A > 0 and another for the rest: the
    slope at r = 1 is A, and it fades on both sides. SAPO, arXiv 2511.20347, eq. 5 and 6."""
    r_K = ratio(tokens.logprobs_K - tokens.old_logprobs_K)
    taus = (rl.sapo_temperature_pos, rl.sapo_temperature_neg)
    tau_K = torch.where(tokens.advantages_K > 0, *(r_K.new_tensor(tau) for tau in taus))
    gate_K = torch.sigmoid(tau_K * (r_K - 1)) * 4 / tau_K
    never_K = torch.zeros_like(tokens.mask_K)
    return TokenLoss(-gate_K * tokens.advantages_K, never_K, never_K)


def cispo(tokens: Tokens, rl: ResolvedRL) -> TokenLoss:
    """-sg(clip(r, 1 - epsilon, 1 + epsilon_high)) A log p: the weight is clipped, never the
    gradient. CISPO, arXiv 2506.13585, eq. 4 and 5."""
    r_K = ratio(tokens.logprobs_K.detach() - tokens.old_logprobs_K)
    low, high = 1 - rl.epsilon, 1 + rl.epsilon_high
    loss_K = -r_K.clamp(low, high) * tokens.advantages_K * tokens.logprobs_K
    return TokenLoss(loss_K, r_K < low, r_K > high)


def reinforce(tokens: Tokens, rl: ResolvedRL) -> TokenLoss:
    """-A log p, without any ratio: the REINFORCE that RLOO, arXiv 2402.14740, goes back to."""
    del rl
    never_K = torch.zeros_like(tokens.mask_K)
    return TokenLoss(-tokens.advantages_K * tokens.logprobs_K, never_K, never_K)


@dataclass(frozen=True)
class LossAggregation:
    """Aggregation of token losses into one loss: their sum divided by `denominator`.

    Attributes:
        per_token: whether a token's loss is divided by the length of its completion first.
        denominator: (lengths [N] of all completions of the minibatch, max_completion_length) ->
            int64, additive over completions. A length is 0 where the completion is left out.
    """

    per_token: bool
    denominator: Callable[[torch.Tensor, int], torch.Tensor]


def _tokens(lengths_N: torch.Tensor, longest: int) -> torch.Tensor:
    del longest
    return lengths_N.sum()


def _completions(lengths_N: torch.Tensor, longest: int) -> torch.Tensor:
    del longest
    return (lengths_N > 0).sum()


def _longest_completions(lengths_N: torch.Tensor, longest: int) -> torch.Tensor:
    return (lengths_N > 0).sum() * longest


TOKEN_MEAN = LossAggregation(False, _tokens)
SEQ_MEAN_TOKEN_MEAN = LossAggregation(True, _completions)
SEQ_MEAN_TOKEN_SUM = LossAggregation(False, _completions)
# Dr. GRPO, arXiv 2503.20783: a constant in place of a completion's own length.
SEQ_MEAN_TOKEN_SUM_NORM = LossAggregation(False, _longest_completions)


def policy_loss(tokens: Tokens, rl: ResolvedRL) -> tuple[torch.Tensor, Sums]:
    """Returns the numerator of the loss over this rank's part, and sums to log.

    Returns:
        a scalar to be summed over microbatches and ranks and divided by `loss_denominator`, and
        the sums of TRL's metrics `clip_ratio/*` and `kl`.
    """
    mask_K = tokens.mask_K
    tokens = _cleaned(tokens)
    found = POLICY_LOSSES[rl.policy_loss](tokens, rl)
    loss_K = found.loss_K
    if tokens.learnt_K is not None:  # as in TRL, all tokens stay in the mean and in the KL term
        loss_K = torch.where(tokens.learnt_K, loss_K, 0.0)
    if tokens.rollout_weights_K is not None:
        loss_K = loss_K * tokens.rollout_weights_K
    if tokens.entropy_K is not None:
        loss_K = loss_K - rl.entropy_coef * tokens.entropy_K
    sums = {
        "clip_ratio/low_mean": _share(found.low_K, mask_K),
        "clip_ratio/high_mean": _share(found.high_K, mask_K),
        "clip_ratio/region_mean": _share(found.low_K | found.high_K, mask_K),
    }
    if tokens.learnt_K is not None:
        sums["entropy/frac_learnt"] = _share(tokens.learnt_K, mask_K)
    if tokens.rollout_weights_K is not None and rl.rollout_is_mode == "mask":
        sums["rollout_is/frac_masked"] = _share((tokens.rollout_weights_K == 0), mask_K)
    if tokens.ref_logprobs_K is not None:
        kl_K = kl_divergence(tokens.logprobs_K, tokens.ref_logprobs_K, rl.kl_estimator)
        if not rl.use_kl_in_reward:
            own = 1.0 if tokens.kl_weights_K is None else tokens.kl_weights_K
            loss_K = loss_K + rl.beta * own * kl_K
        sums["kl"] = _share(kl_K.detach(), mask_K)
    if LOSS_AGGREGATIONS[rl.loss_agg_mode].per_token:
        loss_K = loss_K / tokens.of_completion(tokens.lengths_N)
    return torch.where(mask_K, loss_K, 0.0).sum(), sums


def loss_denominator(
    mode: str, lengths_N: torch.Tensor, max_completion_length: int
) -> torch.Tensor:
    """Returns the divisor of the sum of all `policy_loss`; int64, additive over completions.

    Args:
        mode: a name of LOSS_AGGREGATIONS or a dotted path.
        lengths_N: of all completions of the minibatch on all ranks, 0 for those left out. If all
            are left out the divisor is 0, and so is every numerator.
    """
    return LOSS_AGGREGATIONS[mode].denominator(lengths_N, max_completion_length)


def loss_counts(mode: str, lengths_N: torch.Tensor, max_completion_length: int) -> torch.Tensor:
    """Returns int64 [N]: what each completion counts in `loss_denominator`."""
    each = [lengths_N[n : n + 1] for n in range(len(lengths_N))]
    counts = [int(loss_denominator(mode, one, max_completion_length)) for one in each]
    return torch.tensor(counts, dtype=torch.int64)


def importance_weights(
    old_logprobs_K: torch.Tensor,
    rollout_logprobs_K: torch.Tensor,
    completion_K: torch.Tensor,
    num_completions: int,
    rl: ResolvedRL,
) -> torch.Tensor:
    """Returns [K], constants: p_old / p_rollout of each token or, with `rollout_is` "sequence", of
    the product over its completion, all of which must be on this rank.

    Outside its bounds a weight is held at the upper one ("TIS" of Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training", 2025) or, with `rollout_is_mode` "mask",
    is 0 (TRL's `vllm_importance_sampling_mode`; MOPD, arXiv 2601.02780, section 4).
    """
    log_K = (old_logprobs_K - rollout_logprobs_K).detach()
    if rl.rollout_is == "sequence":
        log_K = _of_completion(completion_sums(log_K, completion_K, num_completions), completion_K)
    weights_K, high = ratio(log_K), rl.rollout_is_threshold
    if rl.rollout_is_mode == "truncate":
        return weights_K.clamp(max=high)
    inside_K = (weights_K >= rl.rollout_is_threshold_low) & (weights_K <= high)
    return torch.where(inside_K, weights_K, 0.0)


def entropy_threshold(entropies_K: torch.Tensor, share: float) -> torch.Tensor:
    """Returns the entropy, fp64, that the `share` of tokens with the highest ones reach: the
    quantile 1 - share with linear interpolation, as `torch.quantile`, which TRL's
    `top_entropy_quantile` takes, but of any number of tokens. Infinite of none.

    Args:
        entropies_K: on the CPU.
    """
    if not len(entropies_K):
        return torch.tensor(torch.inf, dtype=torch.float64)
    place = (1 - share) * (len(entropies_K) - 1)
    low = int(place)
    high = min(low + 1, len(entropies_K) - 1)
    # A step may have 10^8 tokens: of two of them alone the place in the order is needed.
    parted_K = np.partition(entropies_K.numpy(), (low, high))
    bounds_2 = torch.from_numpy(parted_K[[low, high]]).double()
    return torch.lerp(bounds_2[0], bounds_2[1], place - low)


def logprob_abs_diff(tokens: Tokens, rollout_logprobs_K: torch.Tensor) -> Sums:
    """Sums the absolute differences of trainer's and rollout's log-probabilities, in nats."""
    difference_K = (tokens.old_logprobs_K - rollout_logprobs_K).abs()
    return {"train/train_rollout_logprob_abs_diff": _share(difference_K, tokens.mask_K)}


def kl_divergence(
    logprobs_K: torch.Tensor, ref_logprobs_K: torch.Tensor, estimator: str
) -> torch.Tensor:
    """Estimates the KL divergence from the reference model at each token; [K], differentiable in
    `logprobs_K`. KL(p || ref) is the mean of `k1`, `k2` or `k3` over tokens drawn from p. Below,
    d = log ref - log p (J. Schulman, "Approximating KL divergence", 2020).

    Args:
        estimator: a name of KL_ESTIMATORS or a dotted path.
    """
    return KL_ESTIMATORS[estimator](logprobs_K, ref_logprobs_K)


def k1(logprobs_K: torch.Tensor, ref_logprobs_K: torch.Tensor) -> torch.Tensor:
    """-d: unbiased, of either sign. In a loss it does nothing, since the mean of its gradient, that
    of log p, is zero. In a reward it is the usual choice (RLOO, REINFORCE++)."""
    return -(ref_logprobs_K - logprobs_K)


def k2(logprobs_K: torch.Tensor, ref_logprobs_K: torch.Tensor) -> torch.Tensor:
    """d^2 / 2: biased; its gradient is an unbiased one of the KL divergence."""
    return (ref_logprobs_K - logprobs_K).square() / 2


def k3(logprobs_K: torch.Tensor, ref_logprobs_K: torch.Tensor) -> torch.Tensor:
    """exp(d) - 1 - d: unbiased, never negative; GRPO's (arXiv 2402.03300, eq. 4)."""
    log_ratio_K = (ref_logprobs_K - logprobs_K).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio_K.exp() - 1 - log_ratio_K


def completion_sums(
    values_K: torch.Tensor, completion_K: torch.Tensor, num_completions: int
) -> torch.Tensor:
    """Returns [N]: the sum over each completion's tokens; tokens of completion -1 are in none."""
    # In a last entry of their own: to choose by the mask, the host would wait for a GPU.
    here_K = completion_K >= 0
    places_K = torch.where(here_K, completion_K, num_completions)
    sums_N = values_K.new_zeros(num_completions + 1)
    return sums_N.index_add(0, places_K, torch.where(here_K, values_K, 0.0))[:-1]


def _of_completion(values_N: torch.Tensor, completion_K: torch.Tensor) -> torch.Tensor:
    # -1 takes the last entry, which is no completion's; there may be no completion at all.
    return torch.cat((values_N, values_N.new_ones(1)))[completion_K]


def _cleaned(tokens: Tokens) -> Tokens:
    """Puts zeros where no token was sampled: the gradient of an infinite value there, times 0,
    would be NaN."""
    names = ["logprobs_K", "old_logprobs_K", "advantages_K", "ref_logprobs_K"]
    names += ["rollout_weights_K", "entropy_K"]
    values = {name: getattr(tokens, name) for name in names}
    mask_K = tokens.mask_K
    zeroed = {n: torch.where(mask_K, v, 0.0) for n, v in values.items() if v is not None}
    return replace(tokens, **zeroed)


def _clipped(r_K: torch.Tensor, advantages_K: torch.Tensor, rl: ResolvedRL) -> TokenLoss:
    low, high = 1 - rl.epsilon, 1 + rl.epsilon_high
    free_K = r_K if rl.delta is None else r_K.clamp(max=rl.delta)
    loss_K = -torch.min(free_K * advantages_K, r_K.clamp(low, high) * advantages_K)
    r_K = r_K.detach()
    return TokenLoss(loss_K, (r_K < low) & (advantages_K < 0), (r_K > high) & (advantages_K > 0))


def _share(values_K: torch.Tensor, mask_K: torch.Tensor) -> torch.Tensor:
    total = torch.where(mask_K, values_K.double(), 0.0).sum()
    return torch.stack((total, mask_K.sum().double()))
