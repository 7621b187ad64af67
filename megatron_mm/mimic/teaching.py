"""Mimic learning in fine-tuning: what the routers learn from each step, and how much.

How much follows from the number of steps done, so a resumed run goes on exactly. Each rank keeps of
the teacher's routes those that its stages need, and of its answers nothing but on the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_mm import platform
from megatron_mm.config import RunConfig, hops
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.earl.alignment import Maps
from megatron_mm.earl.router_term import RouterTargets, router_term, taught
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.engine.objective import Objective
from megatron_mm.errors import ConfigError, DataError, RLError
from megatron_mm.mimic.batch import MimicBatch
from megatron_mm.mimic.expert_map import ExpertMap, load_expert_map, permuted
from megatron_mm.mimic.loader import MimicLoader
from megatron_mm.mimic.route_file import RouteFile
from megatron_mm.mimic.settings import MimicConfig
from megatron_mm.mimic.targets import RouteTargets, annealed


def mimics(run: RunConfig) -> bool:
    """Whether a run's settings name a teacher or a coefficient."""
    mimic = run.section(MimicConfig)
    return bool(mimic.mimic_routes or mimic.mimic_skill_coeff)


def teaches_routers(run: RunConfig) -> bool:
    """Whether the routers of a run learn from a teacher's routes or from skills, or are compared
    with the former."""
    mimic = run.section(MimicConfig)
    return bool(mimic.mimic_map or mimic.mimic_skill_coeff)


def open_map(run: RunConfig, routes: RouteFile) -> ExpertMap | None:
    """Reads the map that the settings name, or its control; None if they name none.

    Raises:
        DataError: it cannot be used.
    """
    mimic = run.section(MimicConfig)
    if not mimic.mimic_map:
        return None
    layers = [*hops(run.model)]
    found = load_expert_map(mimic.mimic_map, routes, layers, run.model.language.num_experts)
    seed = mimic.mimic_map_shuffle_seed
    return found if seed is None else permuted(found, seed)


class Teaching:
    """Adds to each step's microbatches what their routers learn. Every rank makes one.

    Raises:
        ConfigError: for an objective with another router term, or another loss.
        DataError: on every rank, for a map that cannot be used.
    """

    def __init__(self, run: RunConfig, engine: Engine, objective: Objective, loader: TrainLoader):
        self._mimic, self._run, self._engine = run.section(MimicConfig), run, engine
        _check(run, objective)
        self._routes: RouteTargets | None = None
        self._member_SLE: torch.Tensor | None = None
        error = None
        try:
            self._open(loader)
        except (DataError, RLError) as problem:
            error = str(problem)
        raise_together(engine.groups, error)

    def _open(self, loader: TrainLoader) -> None:
        if isinstance(loader, MimicLoader) and (mapped := open_map(self._run, loader.routes)):
            chunks = self._engine.chunks
            here = {index for chunk in chunks for index in chunk.moe_layers}
            device = platform.device()
            self._routes = RouteTargets(
                {mine: theirs for mine, theirs in mapped.layers.items() if mine in here},
                {i: a.to(device) for i, a in mapped.experts.items() if i in here},
                1.0 / len(mapped.layers),
            )
        if self._mimic.mimic_skill_coeff:
            maps = Maps.of(self._run)
            assert maps is not None  # the coefficient is rejected without a map
            self._member_SLE = maps.used.membership()

    def targets(self, batches: Sequence[Microbatch]) -> list[Microbatch]:
        """Returns this rank's microbatches of the next step with what they teach."""
        mimic, step = self._mimic, self._engine.scheduler.num_steps
        length, share = self._run.training.train_iters, mimic.mimic_anneal_share
        of_routes, of_skills = (
            annealed(coefficient, step, length, share)
            for coefficient in (mimic.mimic_route_coeff, mimic.mimic_skill_coeff)
        )
        answers = mimic.mimic_kd_coeff > 0 and self._engine.groups.is_last_stage
        made: list[Microbatch] = []
        for batch in batches:
            if isinstance(batch, MimicBatch):
                needed = {*self._routes.layers.values()} if self._routes else set()
                batch = batch.keeping(needed, answers)
                if self._routes:
                    scale = of_routes * self._routes.scale
                    batch = taught(batch, replace(self._routes, scale=scale))
            if self._member_SLE is not None:  # of weight 0 it is measured, as the routes are
                batch = taught(batch, self._of_skills(batch, of_skills))
            made.append(batch)
        return made

    def _of_skills(self, batch: Microbatch, coefficient: float) -> RouterTargets:
        """EARL's router term with weight 1 at labelled tokens that are learnt."""
        assert batch.skill_T is not None and self._member_SLE is not None  # as for alignment
        weight_T = (batch.skill_T >= 0) * batch.loss_mask_T
        layers = self._member_SLE.shape[1]
        return RouterTargets(weight_T, self._member_SLE, coefficient / layers)


def _check(run: RunConfig, objective: Objective) -> None:
    mimic, name = run.section(MimicConfig), type(objective).__name__
    if teaches_routers(run) and objective.router_term is not router_term:
        raise ConfigError(
            f"mimic.mimic_map is {mimic.mimic_map!r} and mimic_skill_coeff "
            f"{mimic.mimic_skill_coeff}; allowed: left out with {name}, whose router_term is "
            f"{objective.router_term}; call SupervisedFineTuning.__init__"
        )
    held = getattr(objective, "kd_coeff", None)
    if mimic.mimic_kd_coeff and held != mimic.mimic_kd_coeff:
        raise ConfigError(
            f"mimic.mimic_kd_coeff is {mimic.mimic_kd_coeff}; allowed: 0 with {name}, whose "
            f"kd_coeff is {held}; call SupervisedFineTuning.__init__"
        )
