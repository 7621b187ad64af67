"""Models whose routers prefer experts for a skill, and discovery on the ranks of a layout."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.config import RunConfig, num_layers
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.earl.discovery import probe_and_discover
from megatron_mm.earl.probe import Probe, ProbeRows
from megatron_mm.engine.engine import Engine
from megatron_mm.model.layers.moe import Router
from megatron_mm.parallel import groups
from support.trainers import digits_run
from support.weights import random_engine

# The experts of each skill, in every layer.
PLANTED = {"alpha": [2, 5], "beta": [1, 6]}


def write_rows(path: Path, count: int, seed: int, honest: bool = True) -> Path:
    """Writes rows whose answers are pairs of digits, and returns `path`.

    The first digit of a pair is 1 for alpha and 2 for beta, the second is any from 3 to 9. So the
    token at a second digit says nothing about the skill, but the one before it does. Unless
    `honest`, skills are drawn without regard to the answer.
    """
    rng = Random(seed)
    lines = []
    for _ in range(count):
        skill = rng.choice(["alpha", "beta"])
        first = "1" if skill == "alpha" else "2"
        answer = "".join(f"{first}{rng.randrange(3, 10)}" for _ in range(6))
        label = skill if honest else rng.choice(["alpha", "beta"])
        row = {
            "messages": [
                {"role": "user", "content": "Read all cells?"},
                {"role": "assistant", "content": answer},
            ],
            "skill": label,
            "spans": [{"text": answer, "skill": label, "value": answer}],
            "ground_truth": answer,
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def plant(run: RunConfig, rows: str, folder: str) -> None:
    """Writes a checkpoint of a random model whose routers know the skills, on one rank.

    In every layer they send alpha's second digits to alpha's experts and beta's to beta's.
    """
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    probed = ProbeRows(engine, tokenizer, Probe(rows, samples=60))
    plan = probed.plan(Probe(rows, shuffles=0))
    samples = [probed.sample(index, plan)[:2] for index in probed.order]
    routers = [m for m in engine.chunks[0].modules() if isinstance(m, Router)]
    for router in routers:  # an earlier layer's routes change what a later one sees
        direction = _direction(engine, router, samples, probed)
        generator = torch.Generator().manual_seed(router.layer_number)
        weight = torch.randn(router.weight.shape, generator=generator) * 0.01
        for skill, sign in (("alpha", 1.0), ("beta", -1.0)):
            weight[PLANTED[skill]] += sign * direction
        router.weight.data.copy_(weight)
    engine.optimizer.reload_model_params()
    sharded.save(engine, {}, Path(folder), 1)


def _direction(engine: Engine, router: Router, samples: list, probed: ProbeRows) -> torch.Tensor:
    """Returns the direction [H] in which alpha's second digits read 6 and beta's -6.

    It is a least-squares fit to the hidden states that the router sees.
    """
    from megatron_mm.data.collate import collate

    seen: list[torch.Tensor] = []
    hook = router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0]))
    batch = collate([sample for sample, _ in samples], settings=probed.settings, pad_id=0)
    with torch.no_grad():
        engine.chunks[0](batch)
    hook.remove()
    skill_T = torch.cat([skill[0] for _, skill in samples])
    # The first position predicts the first digit; those that hold a second digit are every other.
    ordinal = torch.cat([(skill[0] >= 0).cumsum(0) for _, skill in samples])
    here = (skill_T >= 0) & (ordinal % 2 == 1) & (ordinal > 1)
    target = 6.0 - 12.0 * skill_T[here].float()
    ridge = 1e-2 * torch.eye(seen[0].shape[1])
    inside = seen[0][here]
    return torch.linalg.solve(inside.T @ inside + ridge, inside.T @ target)


def discovered(run: RunConfig, checkpoint: str | None, probe: Probe, out: str, min_lift: float):
    """Returns the map, the skills and the warning of a discovery, on every rank of the layout."""
    engine = Engine.create(run, groups.build(run.parallel))
    if checkpoint is not None:
        sharded.load(engine, Path(checkpoint), finetune=True)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    found, _ = probe_and_discover(
        engine, tokenizer, probe, Path(out), cluster_size=2, min_lift=min_lift, info={}
    )
    return found.skill_map, found.skills, found.warning


def planted_run(scenes: Path, **settings) -> RunConfig:
    """Returns a run whose model has the layers and experts that `PLANTED` assumes."""
    run = digits_run(scenes, **settings)
    assert run.model.language.num_experts == 8 and num_layers(run.model.hybrid_layer_pattern) == 2
    return run
