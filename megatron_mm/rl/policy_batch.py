"""A microbatch of completions: prompts and what was sampled, and what the policy loss needs.

Values of sampled tokens stand at the position whose logits they were drawn from: the last prompt
token up to the completion's second-to-last. Shapes: T stream, N completions, G tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_mm.data.batch import Microbatch
from megatron_mm.data.collate import collate
from megatron_mm.data.sample import Sample
from megatron_mm.data.tiles import ImageSettings


@dataclass
class PolicyBatch(Microbatch):
    members: list[int] = field(default_factory=list)  # which of the replica's completions
    # int64, number of the completion whose token was sampled from here; -1: none, or of a
    # completion that is left out
    completion_T: torch.Tensor | None = None
    lengths_N: torch.Tensor | None = None  # int64, on the CPU; 0: left out
    advantages_T: torch.Tensor | None = None
    rollout_logprobs_T: torch.Tensor | None = None
    old_logprobs_T: torch.Tensor | None = None  # None: those of the pass itself
    ref_logprobs_T: torch.Tensor | None = None
    rollout_weights_T: torch.Tensor | None = None
    # The router term: skill ids (-1: none), the weight of each position, and its scale.
    skill_T: torch.Tensor | None = None
    router_weight_T: torch.Tensor | None = None
    router_scale: float = 0.0

    @property
    def sampled(self) -> torch.Tensor:
        """int64, ascending: the positions from which tokens were sampled."""
        return self.loss_mask_T.nonzero().flatten()

    def spread(self, values_G: Sequence[torch.Tensor]) -> torch.Tensor:
        """[T]: the values of each member's tokens at their positions, 0 elsewhere."""
        whole = torch.zeros(len(self.tokens_T))
        if values_G:
            whole[self.sampled] = torch.cat([*values_G]).float()
        return whole


def answered(prompt: Sample, tokens_G: torch.Tensor) -> Sample:
    """The prompt and its completion, whose tokens are supervised."""
    start, count = len(prompt.tokens_T), len(tokens_G)
    tokens_T = torch.cat((prompt.tokens_T, tokens_G))
    mask_T = torch.zeros(len(tokens_T))
    mask_T[start - 1 : start - 1 + count] = 1.0
    return Sample(tokens_T, torch.cat((tokens_T[1:], tokens_T[-1:])), mask_T, prompt.images,
                  prompt.where)  # fmt: skip


def policy_batch(
    samples: Sequence[Sample],
    members: Sequence[int],
    *,
    settings: ImageSettings | None,
    pad_id: int,
    pad_multiple: int,
) -> PolicyBatch:
    """Of `answered` samples; none gives a microbatch of padding."""
    batch = collate(samples, settings=settings, pad_id=pad_id, pad_multiple=pad_multiple)
    lengths_N = torch.tensor([int(s.loss_mask_T.sum()) for s in samples], dtype=torch.int64)
    completion_T = torch.full_like(batch.tokens_T, -1)
    sampled = batch.loss_mask_T.nonzero().flatten()
    completion_T[sampled] = torch.arange(len(samples)).repeat_interleave(lengths_N)
    return PolicyBatch(
        **vars(batch), members=[*members], completion_T=completion_T, lengths_N=lengths_N
    )


def token_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of samples in bins of at most `capacity` tokens, each into the first with room, so
    that neighbours (completions of one prompt, whose images are then computed once) stay together.
    A sample longer than that has one to itself."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index, length in enumerate(lengths):
        place = next((b for b, left in enumerate(free) if left >= length), len(bins))
        if place == len(bins):
            bins.append([])
            free.append(capacity)
        bins[place].append(index)
        free[place] -= length
    return bins
