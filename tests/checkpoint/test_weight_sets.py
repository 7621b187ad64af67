"""Sets of weights in host memory: swapped to the bit, averaged as by hand, saved on any layout.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mm.checkpoint import sharded
from megatron_mm.checkpoint.parameters import parameters
from megatron_mm.checkpoint.weight_sets import WeightSets, copied
from megatron_mm.config import RunConfig
from megatron_mm.config.layers.cascade import CascadeSettings
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.weight_set import WeightSet
from megatron_mm.errors import CheckpointError
from support.checkpoint_runs import create, tiny_run, train
from support.fingerprints import parameter_hash, state_hash
from support.gathering import at_rank_0

# layout -> (ranks, sizes, whose average it reads)
LAYOUTS = {
    "1": (1, {}, "TP2xPP2"),
    "TP2": (2, dict(tp=2), "PP2"),
    "PP2": (2, dict(pp=2), "EP2"),
    "EP2": (2, dict(ep=2), "CP2"),
    "CP2": (2, dict(context_parallel_size=2), "1"),
    "TP2xPP2": (4, dict(tp=2, pp=2), "TP2"),
}
ALPHA = 0.3


def moving_sets(engine: Engine, dtype: torch.dtype | None = torch.float32) -> WeightSets:
    """Sets with a moving average, which begins with the weights of the moment."""
    sets = WeightSets(engine)
    names = [name for name, _, _ in parameters(engine)]
    sets.add("reference", WeightSet(names, lambda: copied(engine), dtype), moves=True)
    return sets


def whole_average(engine: Engine) -> dict[str, torch.Tensor]:
    """Returns the whole tensors of the moving set on rank 0; copies are equal to the bit."""
    weights = engine.moving["reference"].weights
    mine = {
        name: (layout.global_shape, layout.block, layout.held(weights[name].float()))
        for name, _, layout in parameters(engine)
    }
    result: dict[str, torch.Tensor] = {}
    for part in at_rank_0(mine):
        for name, (shape, block, values) in part.items():
            target = result.setdefault(name, torch.full(shape, float("nan")))
            assert target[block].isnan().all() or torch.equal(target[block], values), name
            target[block] = values
    assert not any(tensor.isnan().any() for tensor in result.values())
    return result


# ---- swapping ----


def on_rank_swap(run: RunConfig) -> list[str]:
    """Returns hashes of the engine's parameters: before, with either set, after, after an error
    inside, and with what a set that has some parameters alone must give."""
    engine = create(run)
    train(engine, range(1))
    sets, seen = WeightSets(engine), [parameter_hash(engine)]
    some = [name for name, _, _ in parameters(engine)][::2]
    sets.add("some", WeightSet.of({n: w + 1 for n, w in copied(engine, {*some}).items()}))
    sets.add("all", WeightSet.of({n: 2 * w for n, w in copied(engine).items()}))
    with sets.swapping() as put:
        for name in ("all", "some"):
            put(name)
            seen.append(parameter_hash(engine))
    seen.append(parameter_hash(engine))
    with pytest.raises(ZeroDivisionError), sets.swapping() as put:
        put("all")
        raise ZeroDivisionError
    seen.append(parameter_hash(engine))
    with torch.no_grad():
        for name, param, _ in parameters(engine):
            if name in some:
                param.add_(1)
    return [*seen, parameter_hash(engine)]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sizes", [{}, dict(pp=2)], ids=str)
def test_the_engines_own_weights_come_back_to_the_bit(ranks, sizes, bf16):
    run = tiny_run(sizes, bf16=bf16)
    for seen in ranks(2 if sizes else 1, on_rank_swap, run):
        before, every, some, after, failed, expected = seen
        assert before == after == failed and len({before, every, some}) == 3
        assert some == expected  # not a mixture with the set before it


# ---- the moving average ----


def on_rank_average(run: RunConfig, steps: int, every: int) -> tuple[float, float]:
    """Moves an average every few steps beside a slow loop in fp64. Returns the largest difference
    of any number, relative to the tensor's largest, and how far average and policy are apart."""
    engine = create(run)
    sets = moving_sets(engine)
    assert engine.moving["reference"].weights  # makes it
    slow = {name: w.double() for name, w in copied(engine).items()}
    for step in range(1, steps + 1):
        train(engine, [step], ((0,),))
        if step % every == 0:
            sets.mix("reference", ALPHA)
            for name, param, _ in parameters(engine):
                slow[name] = ALPHA * param.detach().double() + (1 - ALPHA) * slow[name]
    found = engine.moving["reference"].weights
    worst = moved = 0.0
    for name, param, _ in parameters(engine):
        scale = slow[name].abs().max().clamp(min=1e-9)
        worst = max(worst, float((found[name] - slow[name]).abs().max() / scale))
        moved = max(moved, float((param - found[name]).abs().max() / scale))
    return worst, moved


def test_thirty_steps_are_those_of_a_slow_loop(ranks):
    """fp32 rounds each of ten moves by 6e-8; the rounding of earlier ones fades."""
    for worst, moved in ranks(1, on_rank_average, tiny_run(), 30, 3):
        assert worst <= 4e-7 and moved > 1e-2


def on_rank_state_of_the_run() -> list[float]:
    """The gate's state in the reference after the policy's has changed and a share was mixed in."""
    run = tiny_run(pattern="GC *E")
    run.model.layers["C"] = CascadeSettings()
    engine = create(run)
    sets = moving_sets(engine)
    (name,) = [name for name, _, of in parameters(engine) if of.set_by_run]
    found = [float(engine.moving["reference"].weights[name])]
    for chunk in engine.chunks:
        dict(chunk.named_parameters())[name].data.fill_(1.0)
    sets.mix("reference", ALPHA)
    return [*found, float(engine.moving["reference"].weights[name])]


def test_what_the_run_sets_is_taken_over_and_not_averaged(ranks):
    """A gate that is six tenths hard is none."""
    assert ranks(1, on_rank_state_of_the_run) == [[0.0, 1.0]]


def on_rank_small_moves(run: RunConfig) -> tuple[int, int, bool]:
    """Moves sets by 0.005 of a difference of one bf16 step, in fp32 and in the parameters' own
    dtype; returns in how many tensors anything moved, and whether equal weights stay equal."""
    engine = create(run)
    names = [name for name, _, _ in parameters(engine)]
    sets, begin = WeightSets(engine), copied(engine)
    fine = WeightSet(names, lambda: copied(engine), torch.float32)
    coarse = WeightSet(names, lambda: copied(engine))
    sets.add("fine", fine)
    sets.add("coarse", coarse)

    def moved(one: WeightSet) -> int:
        return sum(not torch.equal(w.float(), begin[n].float()) for n, w in one.weights.items())

    for name in ("fine", "coarse"):
        sets.mix(name, 0.005)  # made here, of these weights
    still = moved(fine) == moved(coarse) == 0
    with torch.no_grad():
        for _, param, _ in parameters(engine):
            param.mul_(1 + 2**-7)
    for name in ("fine", "coarse"):
        sets.mix(name, 0.005)
    return moved(fine), moved(coarse), still


def test_a_small_step_is_not_lost_in_bf16(ranks):
    for fine, coarse, still in ranks(1, on_rank_small_moves, tiny_run(bf16=True)):
        assert still and fine > 30 and coarse < fine / 4  # some parameters are in fp32


# ---- checkpoints ----


def on_rank_save(run: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Saves an average after two steps and two moves, and moves on."""
    engine = create(run)
    sets = moving_sets(engine)
    for step in range(2):
        train(engine, [step], ((1, 0), (0, 0)))
        sets.mix("reference", ALPHA)
    sharded.save(engine, {}, folder, 2)
    saved = whole_average(engine)
    sets.mix("reference", 1.0)
    return saved


def on_rank_load(run: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    engine = create(run)
    moving_sets(engine)
    sharded.load(engine, folder)
    return whole_average(engine)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """layout -> (folder, the whole average), made once."""
    made: dict[str, tuple[Path, dict]] = {}

    def make(layout: str):
        if layout not in made:
            size, sizes, _ = LAYOUTS[layout]
            folder = tmp_path_factory.mktemp("average")
            made[layout] = folder, ranks(size, on_rank_save, tiny_run(sizes), folder)[0]
        return made[layout]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_reshards_to_the_bit(ranks, saved, layout):
    size, sizes, source = LAYOUTS[layout]
    folder, expected = saved(source)
    found = ranks(size, on_rank_load, tiny_run(sizes), folder)[0]
    assert found.keys() == expected.keys() and len(found) > 30
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def on_rank_before_a_step(run: RunConfig, folder: Path) -> tuple[str, str]:
    """Saves a set that nothing has asked for yet, of a run that has taken no step."""
    engine = create(run)
    moving_sets(engine, None)
    sharded.save(engine, {}, folder, 0)
    before = state_hash(engine, generators=False)
    run.training.seed += 1
    again = create(run, engine.groups)
    moving_sets(again, None)
    sharded.load(again, folder)
    return before, state_hash(again, generators=False)


def test_a_set_of_the_start_is_saved_before_it_is_needed(ranks, tmp_path):
    for before, after in ranks(2, on_rank_before_a_step, tiny_run(bf16=True), tmp_path):
        assert before == after


def on_rank_without(run: RunConfig, folder: Path, moves: bool, finetune: bool) -> str:
    engine = create(run)
    if moves:
        moving_sets(engine)
    before = parameter_hash(engine)
    try:
        sharded.load(engine, folder, finetune=finetune)
    except CheckpointError as error:
        assert parameter_hash(engine) == before
        return str(error)
    return "loaded"


def test_an_average_is_neither_dropped_nor_made_up(ranks, saved, tmp_path):
    folder, _ = saved("1")
    (said,) = ranks(1, on_rank_without, tiny_run(), folder, False, False)
    assert "are unexpected (first moving.reference." in said and "; set sync_ref_model" in said
    assert ranks(1, on_rank_without, tiny_run(), folder, False, True) == ["loaded"]
    ranks(1, on_rank_plain, tiny_run(), tmp_path)
    (said,) = ranks(1, on_rank_without, tiny_run(), tmp_path, True, False)
    assert "are missing (first moving.reference." in said and "\n" not in said


def on_rank_plain(run: RunConfig, folder: Path) -> None:
    sharded.save(create(run), {}, folder, 0)
