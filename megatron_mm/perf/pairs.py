"""Memory of preference pairs beside a supervised step: the microbatch of both sides, and the
reference in host memory.

The reference's forward pass keeps nothing for a backward one and comes before training, so it holds
less at its peak; a test holds it to that.
"""

from __future__ import annotations

import torch

from megatron_mm.checkpoint.parameters import parameters
from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.perf.assumed import samples_of_one, their_completions
from megatron_mm.perf.rollout import reference_width
from megatron_mm.preference.batch import PreferenceBatch
from megatron_mm.preference.reference import reference_names


def pairs_batch(run: RunConfig, batch: Microbatch) -> PreferenceBatch:
    """`batch`, whose supervised tokens are those of answers, with what the reference says."""
    sides = run.training.micro_batch_size * samples_of_one(run)
    return PreferenceBatch(
        **vars(batch) | {"position_weight_T": torch.zeros(len(batch.tokens_T))},
        **their_completions(run, batch),
        ref_logps_N=torch.zeros(sides, dtype=torch.float64),
        delta=0.0,
    )


def held_reference(engine: Engine) -> int:
    """Bytes of host memory that the reference takes on a rank: its own weights, and those of the
    policy while it is in their place (`preference/reference.py`)."""
    names = {*reference_names(engine)}
    weights = sum(param.nbytes for name, param, _ in parameters(engine) if name in names)
    return (1 + reference_width(engine.run)) * weights
