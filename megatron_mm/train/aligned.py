"""Alignment in supervised fine-tuning: rows with the skills of their tokens, and what the routers
learn from each step (earl/align_term.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.earl.align_term import StepCounts, aligned_batch, running_mass
from megatron_mm.earl.alignment import Alignment, Maps
from megatron_mm.earl.router_term import TaughtBatch, router_term
from megatron_mm.engine.feed import sum_over_readers
from megatron_mm.engine.objective import Objective
from megatron_mm.errors import ConfigError
from megatron_mm.parallel.groups import Groups


class LabelledLoader(TrainLoader):
    """Loads rows with the skills of their positions.

    Attributes:
        mass_S: fp64, the running mass of each skill's labels in the steps so far; the same on every
            rank. It is saved with the position in the data.
    """

    def __init__(self, alignment: Alignment, run: RunConfig, tokenizer: Tokenizer, **layout: Any):
        assert alignment.maps is not None  # only completions are labelled without a map
        self.maps: Maps = alignment.maps
        self.mass_S = torch.zeros(len(self.maps.found.names), dtype=torch.float64)
        super().__init__(run, tokenizer, labels=partial(alignment.row_skills, tokenizer), **layout)

    def state_dict(self) -> dict[str, Any]:
        """See `TrainLoader.state_dict`."""
        mass = dict(zip(self.maps.found.names, self.mass_S.tolist(), strict=True))
        return super().state_dict() | {"skill_mass": mass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TrainLoader.load_state_dict`. A skill that the state does not know has mass 0."""
        super().load_state_dict(state)
        known = state.get("skill_mass", {})
        mass = [float(known.get(name, 0.0)) for name in self.maps.found.names]
        self.mass_S = torch.tensor(mass, dtype=torch.float64)


class Aligner:
    """Adds to each step's microbatches what their routers learn.

    Raises:
        ConfigError: for an objective with another router term, or none.
    """

    def __init__(
        self, groups: Groups, objective: Objective, loader: LabelledLoader, coefficient: float
    ):
        if objective.router_term is not router_term:
            raise ConfigError(
                f"earl.router_align_coeff is {coefficient}; allowed: 0 with "
                f"{type(objective).__name__}, whose router_term is {objective.router_term}; call "
                "SupervisedFineTuning.__init__"
            )
        self._groups, self._loader, self._coefficient = groups, loader, coefficient
        self._cluster_SLE = loader.maps.used.clusters()

    def targets(self, batches: Sequence[Microbatch]) -> list[TaughtBatch]:
        """Returns this rank's microbatches of a step with their targets, and adds the step's labels
        to the running mass. Every rank of the job calls it: the counts of the whole step must be
        known before its first backward pass, in one sum of S + 2 numbers on the CPU."""
        loader = self._loader
        counts = StepCounts.of(batches, len(loader.mass_S))
        counts = StepCounts.read(sum_over_readers(self._groups, counts))
        loader.mass_S = running_mass(loader.mass_S, counts.labelled_S)
        return [
            aligned_batch(batch, counts, loader.mass_S, self._cluster_SLE, self._coefficient)
            for batch in batches
        ]
