"""Experts in scope, and the same written slowly: constants where a row does not teach."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from megatron_mm.config import RunConfig, num_layers
from megatron_mm.data.batch import Microbatch
from megatron_mm.engine.engine import Engine
from megatron_mm.model.layers.moe import MixtureOfExperts
from support.experts import moe_layers
from support.layouts import steps_batches
from support.routes import random_routes

SKILLS = 3


def clusters_of(run: RunConfig) -> torch.Tensor:
    """Returns bool [S, L, E]: exclusive clusters, two experts for the first skill and one for each
    other; what is left is nobody's. The second skill has none in layer 1."""
    layers, experts = num_layers(run.model.hybrid_layer_pattern), run.model.language.num_experts
    clusters = torch.zeros(SKILLS, layers, experts, dtype=torch.bool)
    for layer in range(layers):
        for place, skill in enumerate((0, 0, 1, 2)):
            clusters[skill, layer, (layer + place) % experts] = True
    clusters[1, 1] = False
    return clusters


def with_skills(run: RunConfig, pad_multiple: int, routed: bool = False) -> list[Microbatch]:
    """Returns the four microbatches of a step. A supervised label's value says the skill; every
    third position has none.

    Args:
        routed: with random routes, as a rollout's that are replayed.
    """
    found = []
    for seed, batch in enumerate(steps_batches(run, pad_multiple)):
        skill_T = torch.where(batch.loss_mask_T > 0, batch.labels_T % SKILLS, -1)
        skill_T[::3] = -1
        routes = random_routes(run, batch, seed) if routed else None
        found.append(replace(batch, skill_T=skill_T, routes=routes))
    return found


with_skills_and_routes = partial(with_skills, routed=True)


def scope_experts(engine: Engine) -> None:
    for chunk in engine.chunks:
        chunk.expert_scope = clusters_of(engine.run)


def scope_slowly(engine: Engine) -> None:
    """Replaces the layers of experts of an engine on one rank. The engine itself has no scope."""
    clusters, seen = clusters_of(engine.run), {}
    (chunk,) = engine.chunks

    def note(module, args):
        seen["skill_T"] = args[0].skill_T

    chunk.register_forward_pre_hook(note)
    for layer in moe_layers(engine):
        assert layer.alone
        layer._in_place = partial(_slow, layer, clusters[:, layer.layer_number - 1], seen)


def _slow(
    layer: MixtureOfExperts, clusters_SE: torch.Tensor, seen: dict, hidden_t1H, padding_1t
) -> torch.Tensor:
    probs_tE, chosen_tE = layer.router(hidden_t1H, None if padding_1t is None else padding_1t.t())
    flat, skill_T = hidden_t1H.flatten(0, 1), seen["skill_T"]
    out = torch.zeros_like(flat)
    for expert in range(chosen_tE.shape[1]):
        gate_up, down = layer.experts.gate_up[expert], layer.experts.down[expert]
        learns_T = torch.tensor([s >= 0 and bool(clusters_SE[s, expert]) for s in skill_T.tolist()])
        for taught in (True, False):
            rows = (chosen_tE[:, expert] & (learns_T == taught)).nonzero().flatten()
            weights = (gate_up, down) if taught else (gate_up.detach(), down.detach())
            gate, up = (flat[rows] @ half.t() for half in weights[0])
            inner = F.silu(gate) * up * probs_tE[rows, expert].unsqueeze(1)
            out = out.index_add(0, rows, inner @ weights[1].t())
    return out.view_as(hidden_t1H) + layer.shared_experts(hidden_t1H)
