"""The output layer: hidden states to what the model predicts of the next tokens.

Shapes: K positions, H hidden, V this tensor-parallel rank's slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron_mm import platform
from megatron_mm.model.layers.cross_entropy import PADDED_LOGIT, Softmax, linear_logprobs
from megatron_mm.model.layers.linear import padded_vocab_size
from megatron_mm.parallel.param_layout import Initializer, place


@dataclass(frozen=True)
class Predictions:
    """Statements of the last stage about the next token at some positions, computed when asked for.

    Log-probabilities and entropies take little memory at any size (`cross_entropy.py`); logits are
    a whole matrix, for a few rows or for a loss that needs them.

    Attributes:
        hidden_KH: the same on all tensor-parallel ranks; behind the final norm.
        weight_VH: this rank's slice of the output layer's weight.
        held: its rows that are no padding.
        tp: the ranks that share the vocabulary.
    """

    hidden_KH: torch.Tensor
    weight_VH: torch.Tensor
    held: int
    tp: ProcessGroup

    @property
    def device(self) -> torch.device:
        return self.hidden_KH.device  # megatron-core's schedules ask a stage's output for it

    def logprobs(self, labels_K: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Returns fp32 [K], differentiable, the same on all tensor-parallel ranks: the
        log-probability of each label.

        Args:
            labels_K: int64, tokens of the whole vocabulary.
            temperature: divisor of the logits.
        """
        return self._scored(labels_K, temperature, entropy=False)[0]

    def logprobs_and_entropy(
        self, labels_K: torch.Tensor, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `logprobs` does, and the entropy of each distribution in nats, alike."""
        logprobs_K, entropy_K = self._scored(labels_K, temperature, entropy=True)
        assert entropy_K is not None  # it was asked for
        return logprobs_K, entropy_K

    def logits(self) -> torch.Tensor:
        """Returns [K, V], in the type of the weight: this rank's slice, differentiable. Where TP
        does not divide the vocabulary the last ones are padding at `PADDED_LOGIT`."""
        logits_KV = torch.matmul(self.hidden_KH, self.weight_VH.t())
        if self.held < len(self.weight_VH):
            logits_KV[:, self.held :] = PADDED_LOGIT
        return logits_KV

    def _scored(
        self, labels_K: torch.Tensor, temperature: float, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        softmax = Softmax(temperature, self.held, self.tp)
        return linear_logprobs(self.hidden_KH, self.weight_VH, labels_K, softmax, entropy=entropy)


class OutputLayer(nn.Module):
    """The weight of the output layer, split over `tp` by tokens. Rows past the vocabulary are
    padding and get no gradient."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        init: Initializer,
        tp: ProcessGroup,
        dtype: torch.dtype,
    ):
        super().__init__()
        rows, self.tp = padded_vocab_size(vocab_size, tp) // tp.size(), tp
        weight = torch.empty(rows, hidden_size, dtype=dtype, device=platform.device())
        self.weight = nn.Parameter(weight)
        place(self.weight, init, split={0: tp}, whole={0: vocab_size})

    def forward(self, hidden_K1H: torch.Tensor) -> Predictions:
        """Takes whole hidden states, the same on all ranks of `tp`; their gradient is this rank's
        part of a sum that the caller takes. DDP waits here for the weight to arrive."""
        held = self.weight.param_layout.held_shape[0]
        return Predictions(hidden_K1H.squeeze(1), self.weight, held, self.tp)
