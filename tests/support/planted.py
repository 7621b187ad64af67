"""Models whose routers prefer experts for a skill, and discovery on the ranks of a layout."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.config import RunConfig, num_layers
from megatron_mm.data.collate import collate
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.earl.discovery import probe_and_discover
from megatron_mm.earl.probe import Probe, ProbeRows
from megatron_mm.engine.engine import Engine
from megatron_mm.model.layers.moe import MixtureOfExperts, Router
from megatron_mm.parallel import groups
from support.trainers import digits_run
from support.weights import random_engine

# The experts that each skill's tokens choose, in every layer.
PLANTED = {"alpha": [2, 5], "beta": [1, 6]}
# The expert of the last layer without which a skill is read worse.
CAUSES = {"alpha": 3, "beta": 4}


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
    """Returns the direction [H] in which alpha's second digits read 6 and beta's -6."""
    skill_T = torch.cat([skill[0] for _, skill in samples])
    # The first position predicts the first digit; those that hold a second digit are every other.
    ordinal = torch.cat([(skill[0] >= 0).cumsum(0) for _, skill in samples])
    here = (skill_T >= 0) & (ordinal % 2 == 1) & (ordinal > 1)
    return _fit(_seen(engine, router, samples, probed)[here], 6.0 - 12.0 * skill_T[here].float())


def _seen(engine: Engine, router: Router, samples: list, probed: ProbeRows) -> torch.Tensor:
    """Returns the hidden states [T, H] that a router sees of samples."""
    seen: list[torch.Tensor] = []
    hook = router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0]))
    batch = collate([sample for sample, _ in samples], settings=probed.settings, pad_id=0)
    with torch.no_grad():
        engine.chunks[0](batch)
    hook.remove()
    return seen[0]


def _fit(seen_TH: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """Returns the least-squares direction [H]."""
    ridge = 1e-2 * torch.eye(seen_TH.shape[1])
    return torch.linalg.solve(seen_TH.T @ seen_TH + ridge, seen_TH.T @ target_T)


def plant_causes(run: RunConfig, rows: str, folder: str) -> None:
    """Writes a checkpoint of a random model whose last layer has an expert for each skill, on one
    rank.

    Every labelled position chooses both experts, so that their routes tell nothing. One raises the
    logit of alpha's first digit against beta's, the other does the opposite. Together they cancel;
    without one, its skill is read worse and the other better. The layer's other experts are 0.
    """
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    probed = ProbeRows(engine, tokenizer, Probe(rows, samples=60))
    plan = probed.plan(Probe(rows, shuffles=0))
    samples = [probed.sample(index, plan)[:2] for index in probed.order]
    (layer,) = [m for m in engine.chunks[0].modules() if isinstance(m, MixtureOfExperts)][-1:]
    seen_TH = _seen(engine, layer.router, samples, probed)
    labelled_T = torch.cat([skill[0] for _, skill in samples]) >= 0
    direction_H = _fit(seen_TH, torch.where(labelled_T, 4.0, -4.0))
    digits = [tokenizer.encode(digit)[-1] for digit in "12"]
    with torch.no_grad():
        weight_VH = engine.chunks[0].output_layer.weight
        towards_H = weight_VH[digits[0]] - weight_VH[digits[1]]
        generator = torch.Generator().manual_seed(5)
        layer.router.weight.copy_(
            torch.randn(layer.router.weight.shape, generator=generator) * 0.01
        )
        layer.experts.gate_up.zero_()
        layer.experts.down.zero_()
        for skill, sign in (("alpha", 1.0), ("beta", -1.0)):
            expert = CAUSES[skill]
            layer.router.weight[expert] = direction_H
            layer.experts.gate_up[expert, :, 0] = direction_H
            layer.experts.down[expert, :, 0] = sign * towards_H
    engine.optimizer.reload_model_params()
    sharded.save(engine, {}, Path(folder), 1)


def slow_effects(run: RunConfig, checkpoint: str, rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes on one rank what a knock-out measures: row by row, token by token, from logits.

    Returns:
        [S, L, E], how far the mean loss of each skill's right tokens rises without each expert, and
        the tokens of each skill [S]. A row's spans are its whole answer.
    """
    engine = Engine.create(run, groups.build(run.parallel))
    sharded.load(engine, Path(checkpoint), finetune=True)
    engine.training(False)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    layers, experts = engine.config.num_layers, run.model.language.num_experts
    builder = SampleBuilder(run, tokenizer)
    totals = torch.zeros(2, layers, experts + 1, dtype=torch.float64)
    counts = torch.zeros(2)
    for line in Path(rows).read_text().splitlines():
        row = json.loads(line)
        skill, answer = sorted(PLANTED).index(row["skill"]), row["messages"][-1]["content"]
        if row["spans"][0]["value"] != answer:
            continue  # not right
        sample = builder.training(row, "row", Path(rows).parent)
        batch = collate([sample], settings=builder.settings, pad_id=0)
        tokens, length = sample.tokens_T.tolist(), len(tokenizer.encode(answer))
        # The last token is the stop; a token is predicted one place before it.
        places = range(len(tokens) - 2 - length, len(tokens) - 2)
        counts[skill] += length
        for layer in range(layers):
            for expert in range(experts + 1):  # the last forbids nothing
                forbidden = torch.arange(experts) == expert
                with engine.forbidding({layer: forbidden}), torch.no_grad():
                    logits_TV = engine.chunks[0](batch).logits().double()
                for place in places:
                    chosen = logits_TV[place].log_softmax(0)[tokens[place + 1]]
                    totals[skill, layer, expert] -= chosen
    means = totals / counts[:, None, None]
    return means[..., :-1] - means[..., -1:], counts


def discovered(run: RunConfig, checkpoint: str | None, probe: Probe, out: str, method):
    """Returns the map, the skills and the warning of a discovery, on every rank of the layout."""
    engine = Engine.create(run, groups.build(run.parallel))
    if checkpoint is not None:
        sharded.load(engine, Path(checkpoint), finetune=True)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    found, _ = probe_and_discover(engine, tokenizer, probe, Path(out), method)
    return found.skill_map, found.skills, found.warning


def planted_run(scenes: Path, **settings) -> RunConfig:
    """Returns a run whose model has the layers and experts that `PLANTED` assumes."""
    run = digits_run(scenes, **settings)
    assert run.model.language.num_experts == 8 and num_layers(run.model.hybrid_layer_pattern) == 2
    return run
