"""The alignment term of supervised fine-tuning: the routers learn to send the tokens of a skill to
its experts, and all other tokens to the common ones, before anything is reinforced.

One step of N supervised tokens minimises, over all its microbatches and ranks,

    L = L_sft + c * ( sum_{labelled t, l} b_s(t) m_tl / P  +  sum_{other t, l} m_tl / U )

    m_tl = -log sum_{e in cluster(s(t), l)} softmax(router logits at t in layer l)_e
    b_s  = min(20, mean_{s': W_s' > 0} W_s' / W_s)
    W_s  = 0.95 W_s + n_s                            before b_s is read, every step

c is `router_align_coeff`. A position is labelled if its next token lies in a labelled span of the
row's answer, s(t) is that span's skill, and n_s is how many of the step's positions have skill s.
The other positions are all real tokens besides, those of prompts too; their cluster is the common
one. Padding takes no part. P and U are the numbers of terms in the two sums: pairs of a position
and a layer in which its cluster has experts. b_s gives rare skills the pull of frequent ones.

Shapes as in router_term.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_mm.data.batch import Microbatch
from megatron_mm.earl.router_term import RouterTargets, TaughtBatch, taught

DECAY, MOST = 0.95, 20.0


def running_mass(mass_S: torch.Tensor, counts_S: torch.Tensor) -> torch.Tensor:
    """Returns W after a step with these labelled positions, fp64 [S]."""
    return DECAY * mass_S + counts_S


def balance(mass_S: torch.Tensor) -> torch.Tensor:
    """Returns b for W, fp64 [S]; 1 for a skill that was never seen."""
    seen_S = mass_S > 0
    mean = mass_S.sum() / seen_S.sum().clamp(min=1)
    return torch.where(seen_S, mean / mass_S.where(seen_S, 1.0), 1.0).clamp(max=MOST)


@dataclass(frozen=True)
class StepCounts:
    """Numbers of positions in a step, over all its microbatches.

    Attributes:
        labelled_S: int64, positions of each skill.
        others: real positions without a skill.
        supervised: tokens that the loss is divided by.
    """

    labelled_S: torch.Tensor
    others: int
    supervised: int

    @classmethod
    def of(cls, batches: Sequence[Microbatch], skills: int) -> torch.Tensor:
        """Returns the counts of some microbatches as int64 [S + 2], to be summed over replicas."""
        counts = torch.zeros(skills + 2, dtype=torch.int64)
        for batch in batches:
            assert batch.skill_T is not None  # the loader labels every row
            real_T = batch.skill_T[: batch.num_real_tokens]
            counts[: skills + 1] += torch.bincount(real_T % (skills + 1), minlength=skills + 1)
            counts[-1] += batch.loss_mask_T.sum().long()
        return counts

    @classmethod
    def read(cls, counts: torch.Tensor) -> StepCounts:
        """Reads the sum of what `of` returned."""
        others, supervised = counts[-2:].tolist()
        return cls(counts[:-2], others, supervised)


def aligned_batch(
    batch: Microbatch,
    counts: StepCounts,
    mass_S: torch.Tensor,
    cluster_SLE: torch.Tensor,
    coefficient: float,
) -> TaughtBatch:
    """Adds what the routers learn to a microbatch.

    Args:
        counts: of the whole step.
        mass_S: W with these counts.
        cluster_SLE: `SkillMap.clusters()`.
    """
    assert batch.skill_T is not None
    layers_S = cluster_SLE.any(2).sum(1)  # [S + 1]
    labelled_pairs = int((layers_S[:-1] * counts.labelled_S).sum())
    other_pairs = int(layers_S[-1]) * counts.others
    # Index -1 is the last one: positions without a skill.
    weight_S = torch.cat(
        (
            balance(mass_S) / max(labelled_pairs, 1),
            torch.tensor([1 / max(other_pairs, 1)], dtype=torch.float64),
        )
    )
    weight_T = weight_S.float()[batch.skill_T]
    weight_T[batch.num_real_tokens :] = 0.0
    scale = coefficient * counts.supervised
    return taught(batch, RouterTargets(weight_T, cluster_SLE, scale))
