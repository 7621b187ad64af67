"""Runs on preference pairs: resuming, references, bad rows and settings, packing and workers.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mm.config import MODULES, ConfigError, RunConfig, load, validate
from megatron_mm.config.settings import DataPhase
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.errors import CheckpointError, DataError
from megatron_mm.preference.loader import PairLoader
from megatron_mm.preference.settings import DPOConfig, loss_terms
from support.pair_runs import on_rank_save, on_rank_steps, pairs_run, pairs_trainer, write_pairs
from support.trainers import PP2, VPP2, digits_run

FROZEN = {f"freeze_{module}": True for module in MODULES}
# A rate at which three steps change the rewards well above rounding.
MOVES = dict(lr=1e-3)


@pytest.fixture(scope="module")
def rows(scenes, tmp_path_factory):
    return write_pairs(scenes, tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def start(ranks, scenes, rows, tmp_path_factory):
    """A checkpoint of supervised training that has taken no step, and the next step's number."""
    folder = tmp_path_factory.mktemp("start")
    ranks(1, on_rank_save, digits_run(scenes, valid_data=None), folder)
    return folder


def begun(scenes, rows, start, **settings) -> RunConfig:
    return pairs_run(scenes, rows, load=str(start), finetune=True, **(MOVES | settings))


def on_rank_error(run: RunConfig) -> str:
    try:
        pairs_trainer(run).step()
    except (CheckpointError, DataError) as error:
        return str(error)
    return "nothing"


# ---- resuming and references ----


@pytest.mark.parametrize(("size", "sizes"), [(1, {}), (2, PP2)])
def test_a_run_goes_on_to_the_bit(ranks, scenes, rows, start, tmp_path, size, sizes):
    """Delta and the starting weights, which are no longer the run's, included."""
    whole = ranks(size, on_rank_save, begun(scenes, rows, start, **sizes), tmp_path / "whole", 4)
    first = ranks(size, on_rank_save, begun(scenes, rows, start, **sizes), tmp_path / "cut", 2)
    more = pairs_run(scenes, rows, load=str(tmp_path / "cut"), **sizes, **MOVES)
    rest = ranks(size, on_rank_save, more, tmp_path / "cut", 2)
    for (steps, end), (before, _), (after, new_end) in zip(whole, first, rest, strict=True):
        assert steps == before + after and end == new_end
    deltas = [step["rewards/delta"] for step in whole[0][0]]
    assert deltas[:2] == [0, 0] and 0 not in deltas[2:]
    rewards = [(step["rewards/chosen"] + step["rewards/rejected"]) / 2 for step in whole[0][0]]
    assert deltas[3] == pytest.approx(sum(rewards[:3]) / 3, rel=1e-9)
    again = pairs_run(scenes, rows, load=str(tmp_path / "cut"), **sizes, **MOVES)
    again.training.train_iters = 6
    (more_steps, _), *_ = ranks(size, on_rank_save, again, tmp_path / "twice", 1)
    assert abs(more_steps[0]["rewards/margins"]) > 1e-3  # a second resume has the same reference


def test_the_starting_weights_are_a_reference_by_name(ranks, scenes, rows, start):
    absent = ranks(1, on_rank_steps, begun(scenes, rows, start), 3)[0]
    named = ranks(1, on_rank_steps, begun(scenes, rows, start, dpo_ref_load=str(start)), 3)[0]
    assert absent == named and abs(named[2]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize("frozen", [FROZEN, {}], ids=["adapters alone", "router and looks too"])
def test_adapters_are_off_in_the_reference(ranks, scenes, rows, start, tmp_path, frozen):
    """Equal to the starting weights by name, of which B is zero; also in a resumed run."""
    lora = dict(lora_rank=2, lora_alpha=64.0, lr=1e-2) | frozen
    absent = ranks(1, on_rank_save, begun(scenes, rows, start, **lora), tmp_path, 2)[0][0]
    named = begun(scenes, rows, start, dpo_ref_load=str(start), **lora)
    expected = ranks(1, on_rank_steps, named, 3)[0]
    resumed = pairs_run(scenes, rows, load=str(tmp_path), **lora)
    assert absent + ranks(1, on_rank_steps, resumed, 1)[0] == expected
    assert abs(expected[2]["rewards/margins"]) > 1e-4


def test_references_that_cannot_be_had(ranks, scenes, rows, start, tmp_path):
    other = digits_run(scenes, valid_data=None, num_experts=4)
    ranks(1, on_rank_save, other, tmp_path / "other")
    run = begun(scenes, rows, start, dpo_ref_load=str(tmp_path / "other"))
    (error,) = ranks(1, on_rank_error, run)
    assert f"cannot load {tmp_path / 'other'}: it holds another model: language.num_exp" in error
    ranks(1, on_rank_save, pairs_run(scenes, rows), tmp_path / "drawn", 1)
    (error,) = ranks(1, on_rank_error, pairs_run(scenes, rows, load=str(tmp_path / "drawn")))
    assert error == (
        f"dpo.dpo_ref_load is None, and {tmp_path / 'drawn'} names no weights that its run started "
        "from; set dpo_ref_load to a checkpoint of the reference model"
    )


# ---- rows ----


def loader(run: RunConfig, rank: int = 0, size: int = 1) -> PairLoader:
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    return PairLoader(run, tokenizer, data_parallel_rank=rank, data_parallel_size=size)


def test_packing_keeps_the_pairs_of_a_step(scenes, rows):
    """Whole pairs, at most the tokens of two full samples a microbatch, the same on any number of
    replicas; interleaved stages get whole rounds of microbatches."""
    plain = loader(pairs_run(scenes, rows))
    packed = pairs_run(scenes, rows, packing=True, micro_batch_size=1)
    made = loader(packed)
    for _ in range(3):
        wanted = [name for batch in plain.next_batch() for name in batch.samples]
        batches = made.next_batch()
        assert sorted(name for batch in batches for name in batch.samples) == sorted(wanted)
        assert 1 < len(batches) < 8
        for batch in batches:
            assert batch.num_real_tokens <= 256 and len(batch.lengths_N) == 2 * len(batch.samples)
            stream = batch.tokens_T
            begins = batch.cu_seqlens.tolist()
            for pair in range(len(batch.samples)):  # the sides' prompts are equal
                one, two = (stream[begins[2 * pair + side] :][:5] for side in (0, 1))
                assert torch.equal(one, two)
    for settings in ({}, PP2 | VPP2):
        run = pairs_run(scenes, rows, packing=True, micro_batch_size=1, **settings)
        found = [loader(run, rank, 2).next_batch() for rank in (0, 1)]
        assert len({len(batches) for batches in found}) == 1
        assert not settings or len(found[0]) % 2 == 0
        names = [name for batches in found for batch in batches for name in batch.samples]
        assert len(names) == len({*names}) == 8


def test_packs_of_pairs_have_no_more_tiles_than_allowed(scenes, rows):
    """A scene has 10 tiles."""
    run = pairs_run(scenes, rows, packing=True, micro_batch_size=4)
    free = loader(run).next_batch()
    assert max(batch.num_tiles for batch in free) > 10
    run.data.max_pack_tiles = 19
    batches = loader(run).next_batch()
    assert max(batch.num_tiles for batch in batches) == 10
    names = [[name for batch in found for name in batch.samples] for found in (free, batches)]
    assert sorted(names[0]) == sorted(names[1])


def test_images_of_a_pair_are_encoded_once(scenes, rows):
    """A scene has 10 tiles, the last of which, its thumbnail, stands in the stream of each side."""
    (batch,) = loader(pairs_run(scenes, rows, micro_batch_size=8)).next_batch()
    lines = rows.read_text().splitlines()
    shown = [json.loads(lines[int(name.rpartition(":")[2]) - 1]) for name in batch.samples]
    images = sum("images" in row for row in shown)
    assert 0 < images < 8 and batch.num_tiles == 10 * images
    assert batch.stream_tiles.tolist() == [10 * n + 9 for n in range(images) for _ in range(2)]


@pytest.mark.parametrize("packing", [False, True])
def test_workers_read_the_same(scenes, rows, packing):
    plain, made = (loader(pairs_run(scenes, rows, packing=packing, num_workers=n)) for n in (0, 2))
    try:
        for _ in range(2):
            for one, two in zip(plain.next_batch(), made.next_batch(), strict=True):
                assert one.samples == two.samples and torch.equal(one.tokens_T, two.tokens_T)
                assert torch.equal(one.pixels_NCHW, two.pixels_NCHW)
    finally:
        made.close()


def test_bad_rows_stop_or_are_left_out(scenes, rows, tmp_path):
    lines = rows.read_text().splitlines()
    bad = json.loads(lines[2])
    lines[2] = json.dumps(bad | {"rejected": bad["chosen"]})
    lines[5] = json.dumps(json.loads(lines[5]) | {"rejected": "3" * 300})
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    (tmp_path / "images").symlink_to(scenes / "images")
    for packing in (False, True):
        settings = dict(packing=packing, global_batch_size=32)
        run = pairs_run(scenes, path, **settings)
        with pytest.raises(DataError, match=r"bad.jsonl:(3|6)") as caught:
            loader(run).next_batch()
        assert "\n" not in str(caught.value)
        run = pairs_run(scenes, path, on_bad_sample="skip", **settings)
        batches = loader(run).next_batch()
        skipped = [why for batch in batches for why in batch.skipped]
        assert len(skipped) == 2 and sum(len(batch.samples) for batch in batches) == 30
        assert sum(len(batch.lengths_N) for batch in batches) == 60


def test_pairs_are_refused_where_they_are_not_read(scenes, rows):
    """An objective without pairs does not take a prompt and a chosen side for verl's row."""
    from megatron_mm.data.loading.loader import TrainLoader

    path = rows.parent / "trl.jsonl"
    row = {"prompt": [{"role": "user", "content": "1?"}], "chosen": "1", "rejected": "2"}
    path.write_text(json.dumps(row))
    run = digits_run(scenes)
    run.data.train_data = [DataPhase(str(path))]
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    made = TrainLoader(run, tokenizer, data_parallel_rank=0, data_parallel_size=1)
    with pytest.raises(DataError, match=r"trl.jsonl:1: nothing uses 3 of the row's 3 keys \('pr"):
        made.next_batch()


# ---- settings ----


def test_settings_are_flags():
    flags = "--objective dpo --loss-type sigmoid sft --loss-weights 1 0.5 --dpo-beta 0.2"
    run = load(None, ["--preset", "tiny", *flags.split()])
    assert loss_terms(run.section(DPOConfig)) == {"sigmoid": 1.0, "sft": 0.5}
    mpo = load(None, ["--objective", "dpo", "--preset", "tiny", "--loss-type", "mpo"])
    assert loss_terms(mpo.section(DPOConfig)) == {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    validate(mpo, 1)
    assert mpo.model == run.model  # the balancing loss among it


@pytest.mark.parametrize(
    ("dpo", "message"),
    [
        ({"loss_type": []}, "dpo.loss_type is []; allowed: at least 1 loss, each once, or mpo"),
        ({"loss_type": ["mpo", "sft"]}, "dpo.loss_type is ['mpo', 'sft']; allowed: at least 1"),
        ({"loss_type": ["sft", "sft"]}, "dpo.loss_type is ['sft', 'sft']; allowed: at least 1"),
        ({"loss_type": ["sigmoyd"]}, "unknown loss_type sigmoyd; did you mean sigmoid?"),
        ({"loss_type": ["no.where"]}, "loss_type no.where cannot be imported: ModuleNotFound"),
        (
            {"loss_type": ["mpo"], "loss_weights": [1.0, 1.0]},
            "dpo.loss_weights has 2 numbers for 3 losses (sigmoid, bco_pair, sft); allowed: none,",
        ),
        ({"loss_weights": [-1.0]}, "dpo.loss_weights is [-1.0]; allowed: 0 or more each, at"),
        ({"loss_weights": [0.0]}, "dpo.loss_weights is [0.0]; allowed: 0 or more each, at"),
        ({"dpo_beta": 0.0}, "dpo.dpo_beta is 0.0; allowed: more than 0"),
        ({"dpo_label_smoothing": 0.5}, "dpo.dpo_label_smoothing is 0.5; allowed: 0 to below 0.5"),
        (
            {"loss_type": ["ipo"], "dpo_label_smoothing": 0.1},
            "dpo.dpo_label_smoothing is 0.1; allowed: 0 with loss_type ipo, or this value with sig",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(dpo, message):
    run = load(None, ["--objective", "dpo", "--preset", "tiny"])
    run.objectives["dpo"] = DPOConfig(**dpo)
    with pytest.raises(ConfigError) as caught:
        validate(run)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    run.training.objective = "sft"
    with pytest.raises(ConfigError):
        validate(run)
