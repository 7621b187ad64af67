"""A vocabulary that tensor parallelism does not divide is padded, and nothing sees the padding."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megatron_mm.checkpoint import folders, sharded, storage
from megatron_mm.checkpoint.optimizer_state import collect
from megatron_mm.config import RunConfig, validate
from megatron_mm.model.layers.output import Predictions
from megatron_mm.parallel import groups
from megatron_mm.parallel.param_layout import layouts
from support.checkpoint_runs import assert_same, create, tiny_run, train, whole
from support.invariance import compare
from support.layouts import parallel_config, step_gradients

VOCABULARY = 331  # prime
TABLES = ("embedding.weight", "output_layer.weight")
# layout -> (ranks, sizes)
LAYOUTS = {
    "TP2": (2, dict(tp=2)),
    "TP3": (3, dict(tp=3)),
    "TP2xPP2": (4, dict(tp=2, pp=2)),
    "TP2xDP2": (4, dict(tp=2, etp=1)),  # with the distributed optimizer
}
LOSS_TOLERANCE = 1e-6  # as in tests/checkpoint/test_reshard.py: three losses, two updates between


def with_vocabulary(run: RunConfig, size: int = VOCABULARY) -> RunConfig:
    """The run with heads that 2 and 3 ranks share, and this vocabulary."""
    language, fusion = run.model.language, run.model.fusion
    language.vocab_size = size
    language.hidden_size = 48
    language.num_attention_heads, language.num_query_groups = 6, 1
    language.linear_num_key_heads, language.linear_num_value_heads = 6, 12
    language.moe_ffn_hidden_size = 24
    fusion.clvr_num_attention_heads, fusion.memory_hidden_size = 6, 24
    run.model.language.init_method_std = run.model.vision.vision_init_method_std = 0.02
    return run


def of_layout(name: str, **training) -> RunConfig:
    run = with_vocabulary(tiny_run(LAYOUTS.get(name, (1, {}))[1], **training))
    run.optimizer.lr = 1e-3
    validate(run)
    return run


@pytest.fixture(scope="module")
def reference(ranks):
    """By padding of the stream, which is the number of tensor-parallel ranks."""
    run = with_vocabulary(tiny_run())
    return {
        multiple: ranks(1, step_gradients, run, parallel_config(), None, multiple)[0]
        for multiple in (2, 3)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_one_rank(ranks, reference, name):
    """They include the gradients of the real rows of both tables, in whole tensors of 331 rows."""
    size, sizes = LAYOUTS[name]
    run = with_vocabulary(tiny_run())
    found = ranks(size, step_gradients, run, parallel_config(**sizes))[0]
    assert found[1]["embedding.weight"].shape == (VOCABULARY, 48)
    compare(found, reference[sizes["tp"]])


def padding_of(engine, values) -> list[torch.Tensor]:
    """The padded rows of both tables, from `values(name, parameter)`, where this rank has them."""
    found = []
    for name, param, layout in layouts(*engine.chunks):
        if name in TABLES:
            value = values(name, param)
            found += [value.view(layout.local_shape)[layout.held_shape[0] :]]
    return [rows for rows in found if rows.numel()]


def on_rank_train(run: RunConfig) -> dict:
    """Gradient norm before each of three steps, losses, and what padding holds in the end."""
    engine = create(run)
    norms, losses, gradients = [], [], []
    measure = engine.gradient_norm

    def gradient_norm() -> float:
        norms.append(measure())
        gradients.extend(padding_of(engine, lambda n, p: p.main_grad))
        return norms[-1]

    engine.gradient_norm = gradient_norm
    losses = train(engine, range(3))
    state = collect(engine)
    kept = padding_of(engine, lambda n, p: p.detach())
    for kind in ("exp_avg", "exp_avg_sq"):
        kept += padding_of(engine, lambda n, p, k=kind: state[n][k])
    return {
        "losses": losses,
        "norms": [float(norm) for norm in norms],
        "gradients": [rows.count_nonzero().item() for rows in gradients],
        "rows": sum(len(rows) for rows in kept),
        "kept": [rows.count_nonzero().item() for rows in kept],
    }


@pytest.mark.parametrize("name", ["TP2", "TP3", "TP2xDP2"])
def test_training_is_that_of_one_rank(ranks, name):
    """Losses and gradient norms over three steps with weight decay; padding stays zero."""
    size, sizes = LAYOUTS[name]
    (expected,) = ranks(1, on_rank_train, of_layout("one"))
    found = ranks(size, on_rank_train, of_layout(name))
    assert expected["rows"] == 0
    for answer in found:
        assert answer["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
        assert answer["norms"] == pytest.approx(expected["norms"], rel=2e-6)  # 2.1e-7 was measured
        assert not any(answer["gradients"]) and not any(answer["kept"])
    padded = -VOCABULARY % sizes["tp"]
    replicas = size // sizes["tp"]
    # Weight and two moments of two tables.
    assert sum(answer["rows"] for answer in found) == padded * replicas * 6


def on_rank_start(run: RunConfig, folder) -> dict[str, torch.Tensor]:
    engine = create(run)
    sharded.save(engine, {}, folder, 0)
    return whole(engine)


def files(folder) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of the tensors on disk."""
    path, run = folders.resolve(folder)
    stored, _ = storage.read_index(path, run["checksums"])
    return {key: tuple(shape) for key, shape in stored.items()}


def test_a_checkpoint_of_the_start_is_that_of_one_rank(ranks, tmp_path):
    """Names, shapes and bits: the draws of the real rows do not depend on the padding."""
    expected = ranks(1, on_rank_start, of_layout("one"), tmp_path / "one")[0]
    shapes = files(tmp_path / "one")
    assert shapes["model.output_layer.weight"] == (VOCABULARY, 48)
    for name, (size, _) in LAYOUTS.items():
        found = ranks(size, on_rank_start, of_layout(name), tmp_path / name)[0]
        assert_same(found, expected)
        assert files(tmp_path / name) == shapes


def on_rank_resume(run: RunConfig, source, folder) -> tuple[dict, dict, list[float]]:
    """The state as loaded and as saved again, and the losses of two more steps."""
    run.training.seed += 1
    engine = create(run)
    sharded.load(engine, source)
    loaded = whole(engine)
    sharded.save(engine, {}, folder, 2)
    return loaded, files(folder) if dist.get_rank() == 0 else {}, train(engine, range(2, 4))


def on_rank_save(run: RunConfig, folder) -> tuple[dict, list[float]]:
    engine = create(run)
    train(engine, range(2))
    sharded.save(engine, {}, folder, 2)
    return whole(engine), train(engine, range(2, 4))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_checkpoints_reshard_with_optimizer_state(ranks, tmp_path, bf16):
    """From TP3 to one rank and to TP2, plain, with replicas and with stages: bitwise, and each goes
    on alike."""
    way = ("one", "TP2", "TP2xDP2", "TP2xPP2")
    expected, losses = ranks(3, on_rank_save, of_layout("TP3", bf16=bf16), tmp_path / "0")[0]
    assert expected["exp_avg.output_layer.weight"].shape == (VOCABULARY, 48)
    assert expected["exp_avg.output_layer.weight"].any(dim=1).all()  # no row is left out
    shapes = files(tmp_path / "0")
    for i, name in enumerate(way):
        size = LAYOUTS.get(name, (1, {}))[0]
        run = of_layout(name, bf16=bf16)
        loaded, again, next_losses = ranks(
            size, on_rank_resume, run, tmp_path / str(i), tmp_path / str(i + 1)
        )[0]
        assert_same(loaded, expected)
        assert again == shapes
        # bf16 rounds the sums over slices to 8 bits: 2.4e-5 was measured.
        assert next_losses == pytest.approx(losses, rel=2e-4 if bf16 else LOSS_TOLERANCE)


def on_rank_logprobs(size: int, temperature: float) -> tuple[torch.Tensor, ...]:
    """Log-probabilities, entropies and this rank's gradient from fixed logits, which stand in the
    weight's columns."""
    pg = groups.build(parallel_config(tp=dist.get_world_size())).pg
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(7, size, generator=generator)
    labels = torch.randint(0, size, (7,), generator=generator)
    part = -(-size // pg.tp.size())
    padded = torch.full((7, part * pg.tp.size()), 100.0)  # would count most if it counted
    padded[:, :size] = logits
    first = part * pg.tp.rank()
    mine = padded[:, first : first + part].t().contiguous().requires_grad_()
    predictions = Predictions(torch.eye(7), mine, min(max(size - first, 0), part), pg.tp)
    logprobs, entropies = predictions.logprobs_and_entropy(labels, temperature)
    logprobs.sum().backward()
    return logprobs.detach(), entropies.detach(), mine.grad.t()


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-6])
@pytest.mark.parametrize(("size", "world"), [(VOCABULARY, 3), (VOCABULARY, 2), (5, 4)])
def test_log_probabilities_and_entropies_are_those_of_the_vocabulary(
    ranks, size, world, temperature
):
    """Against torch's own distribution. With 5 tokens on 4 ranks the last holds only padding."""
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(7, size, generator=generator).double()
    labels = torch.randint(0, size, (7,), generator=generator)
    logits.requires_grad_()
    there = torch.distributions.Categorical(logits=logits / temperature)
    logprobs = there.log_prob(labels)
    logprobs.sum().backward()
    found = ranks(world, on_rank_logprobs, size, temperature)
    gradient = torch.cat([answer[2] for answer in found], 1)
    assert not gradient[:, size:].any()
    # fp32 rounds at 6e-8: the logits are as large as 15 / temperature, and a probability's relative
    # error, like a gradient's (1 / temperature large), is the logit's absolute one.
    close = dict(rtol=1e-5, atol=1e-6 * max(1.0, 4 / temperature))
    torch.testing.assert_close(
        gradient[:, :size].double(), logits.grad, rtol=1e-4, atol=1e-4 / temperature
    )
    for ours, entropies, _ in found:
        torch.testing.assert_close(ours.double(), logprobs.detach(), **close)
        assert entropies.isfinite().all()
        torch.testing.assert_close(entropies.double(), there.entropy().detach(), **close)


def on_rank_narrow(run: RunConfig) -> list[float]:
    engine = create(run)
    return train(engine, range(2))


def test_a_rank_may_hold_only_padding(ranks):
    """9 tokens on 4 ranks are 3, 3, 3 and 0."""
    run = tiny_run()
    run.model.language.vocab_size = 9
    (expected,) = ranks(1, on_rank_narrow, run)
    run = tiny_run(dict(tp=4))
    run.model.language.vocab_size = 9
    for losses in ranks(4, on_rank_narrow, run):
        assert all(map(math.isfinite, losses))
        assert losses == pytest.approx(expected, rel=LOSS_TOLERANCE)
