"""Losses of preference pairs, one function each.

S is the log-probability of a whole answer under the policy, the sum over its tokens, S_ref that
under the reference model; s = S - S_ref, and c and r are the chosen and the rejected side. The
implicit reward is beta s. Every function returns the loss of each pair, fp64 [P], differentiable in
the policy's sums. Names and formulas are those of TRL's `DPOTrainer`.

Shapes: P pairs, N = 2 P sides, chosen and rejected by turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from megatron_mm.preference.settings import DPOConfig


@dataclass(frozen=True)
class Pairs:
    """The sides of some pairs.

    Attributes:
        logps_N: fp64, S of each side. Only these may need a gradient.
        ref_logps_N: fp64, S_ref.
        lengths_N: the tokens of each answer.
        delta: the mean implicit reward of both sides over the steps before this one.
    """

    logps_N: torch.Tensor
    ref_logps_N: torch.Tensor
    lengths_N: torch.Tensor
    delta: float = 0.0

    @property
    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """s_c and s_r, fp64 [P] each."""
        return sides(self.logps_N - self.ref_logps_N)

    @property
    def gap_P(self) -> torch.Tensor:
        """s_c - s_r"""
        chosen_P, rejected_P = self.ratios
        return chosen_P - rejected_P


Loss = Callable[[Pairs, DPOConfig], torch.Tensor]


def sides(values_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the values of the chosen and of the rejected sides, [P] each."""
    return values_N[0::2], values_N[1::2]


def sigmoid(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """-log sigmoid(beta (s_c - s_r)). DPO, arXiv 2305.18290, eq. 7. With label smoothing ls, the
    mean of it and of its mirror image with the weights 1 - ls and ls: conservative DPO (E.
    Mitchell, "A note on DPO with noisy preferences", 2023)."""
    gap_P, share = dpo.dpo_beta * pairs.gap_P, dpo.dpo_label_smoothing
    return -(1 - share) * logsigmoid(gap_P) - share * logsigmoid(-gap_P)


def hinge(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """max(0, 1 - beta (s_c - s_r)). SLiC, arXiv 2305.10425, on DPO's rewards."""
    return torch.relu(1 - dpo.dpo_beta * pairs.gap_P)


def robust(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """[-(1 - ls) log sigmoid(beta (s_c - s_r)) + ls log sigmoid(-beta (s_c - s_r))] / (1 - 2 ls):
    unbiased where a share ls of the pairs is the wrong way round. Robust DPO, arXiv 2403.00409."""
    gap_P, share = dpo.dpo_beta * pairs.gap_P, dpo.dpo_label_smoothing
    loss_P = -(1 - share) * logsigmoid(gap_P) + share * logsigmoid(-gap_P)
    return loss_P / (1 - 2 * share)


def ipo(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """(s_c / |c| - s_r / |r| - 1 / (2 beta))^2. IPO, arXiv 2310.12036, eq. 17, with the means over
    tokens that its authors use (TRL does the same)."""
    lengths = sides(pairs.lengths_N)
    chosen_P, rejected_P = (s / n for s, n in zip(pairs.ratios, lengths, strict=True))
    return (chosen_P - rejected_P - 1 / (2 * dpo.dpo_beta)).square()


def bco_pair(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """-log sigmoid(beta s_c - delta) - log sigmoid(-(beta s_r - delta)), delta a running mean of
    the rewards. BCO, arXiv 2404.04656, and the quality loss of MPO, arXiv 2411.10442. InternVL's
    code takes the microbatch at hand into delta first, so that it depends on the layout; here delta
    is that of earlier steps."""
    chosen_P, rejected_P = (dpo.dpo_beta * s - pairs.delta for s in pairs.ratios)
    return -logsigmoid(chosen_P) - logsigmoid(-rejected_P)


def apo_zero(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """1 - sigmoid(beta s_c) + sigmoid(beta s_r): chosen up, rejected down. APO, arXiv
    2408.06266."""
    chosen_P, rejected_P = pairs.ratios
    return 1 - (dpo.dpo_beta * chosen_P).sigmoid() + (dpo.dpo_beta * rejected_P).sigmoid()


def apo_down(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """sigmoid(beta s_c) + 1 - sigmoid(beta (s_c - s_r)): both down, rejected further. APO, arXiv
    2408.06266."""
    chosen_P, _ = pairs.ratios
    return (dpo.dpo_beta * chosen_P).sigmoid() + 1 - (dpo.dpo_beta * pairs.gap_P).sigmoid()


def sppo_hard(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """(s_c - 1 / (2 beta))^2 + (s_r + 1 / (2 beta))^2. SPPO with certain preferences, arXiv
    2405.00675."""
    chosen_P, rejected_P = pairs.ratios
    half = 1 / (2 * dpo.dpo_beta)
    return (chosen_P - half).square() + (rejected_P + half).square()


def nca_pair(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """-log sigmoid(beta s_c) - (log sigmoid(-beta s_c) + log sigmoid(-beta s_r)) / 2. NCA, arXiv
    2402.05369, for pairs."""
    chosen_P, rejected_P = (dpo.dpo_beta * s for s in pairs.ratios)
    return -logsigmoid(chosen_P) - (logsigmoid(-chosen_P) + logsigmoid(-rejected_P)) / 2


def sft(pairs: Pairs, dpo: DPOConfig) -> torch.Tensor:
    """-S_c / |c|: the cross entropy of the chosen answer, a mean over its own tokens."""
    del dpo
    chosen_P, _ = sides(pairs.logps_N)
    return -chosen_P / sides(pairs.lengths_N)[0]
