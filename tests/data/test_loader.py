"""Order, sharding, resumption, phases, and what happens to bad rows."""

import json

import pytest
import torch

from megatron_mm.config.settings import DataPhase
from megatron_mm.data.files.rows import Rows
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.loading.order import Order, PhaseSize
from megatron_mm.data.loading.shuffle import RowGroup
from megatron_mm.errors import DataError
from megatron_mm.evaluation.questions import EvalSet


def loader(run, tokenizer, rank=0, size=1, **more):
    return TrainLoader(run, tokenizer, data_parallel_rank=rank, data_parallel_size=size, **more)


def names(batch):
    return [name for microbatch in batch for name in microbatch.samples]


def test_locate():
    phases = [
        PhaseSize(([RowGroup(4, 0)],), (1.0,), 6),
        PhaseSize(([RowGroup(3, 0)],), (1.0,), None),
    ]
    order = Order(phases, seed=0)
    assert [tuple(order.locate(n)) for n in (0, 3, 4, 5, 6, 8, 9, 3006)] == [
        (0, 0, 0, 0), (0, 0, 0, 3), (0, 0, 1, 0), (0, 0, 1, 1),
        (1, 0, 0, 0), (1, 0, 0, 2), (1, 0, 1, 0), (1, 0, 1000, 0),
    ]  # fmt: skip
    with pytest.raises(DataError, match="sample 7 is asked for but the phases hold 6"):
        Order(phases[:1], seed=0).locate(6)


def test_the_samples_of_a_step_do_not_depend_on_the_layout(run, tokenizer):
    single = loader(run, tokenizer)
    steps = [names(single.next_batch()) for _ in range(3)]
    assert all(len(step) == 8 for step in steps) and len({*steps[0], *steps[1]}) == 16
    for size in (2, 4):
        ranks = [loader(run, tokenizer, rank, size) for rank in range(size)]
        for step in steps:
            batches = [names(rank.next_batch()) for rank in ranks]
            assert all(len(batch) == 8 // size for batch in batches)
            # Microbatch m of rank r holds samples (m * size + r) * 2 + [0, 2).
            order = [
                name
                for m in range(8 // size // 2)
                for batch in batches
                for name in batch[2 * m : 2 * m + 2]
            ]
            assert order == step
    run.training.micro_batch_size = 8
    (whole,) = loader(run, tokenizer).next_batch()
    assert whole.samples == steps[0]


def test_resume_is_exact_and_may_change_the_layout(run, tokenizer):
    first = loader(run, tokenizer)
    for _ in range(2):
        first.next_batch()
    state = json.loads(json.dumps(first.state_dict()))
    assert state == {"consumed_samples": 16}
    expected = first.next_batch()
    second = loader(run, tokenizer, consumed_samples=16)
    third = loader(run, tokenizer)
    third.load_state_dict(state)
    for resumed in (second, third):
        for a, b in zip(expected, resumed.next_batch(), strict=True):
            assert a.samples == b.samples and torch.equal(a.tokens_T, b.tokens_T)
            assert torch.equal(a.pixels_NCHW, b.pixels_NCHW)
    shards = [
        names(loader(run, tokenizer, rank, 4, consumed_samples=16).next_batch())
        for rank in range(4)
    ]
    assert [name for shard in shards for name in shard] == names(expected)


def test_every_epoch_holds_each_row_once_in_a_new_order(run, tokenizer, write_rows, make_row):
    path = write_rows(*(make_row(f"q{n}", "1") for n in range(8)))
    run.data.train_data = [DataPhase(str(path))]
    epochs = [names(made.next_batch()) for made in [loader(run, tokenizer)] for _ in range(3)]
    wanted = {f"{path}:{n}" for n in range(1, 9)}
    assert all(set(epoch) == wanted for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    run.training.seed += 1
    assert names(loader(run, tokenizer).next_batch()) != epochs[0]


def test_phases_follow_each_other_inside_a_batch(run, tokenizer, digits_folder):
    align, mix = (str(digits_folder / f"{name}.jsonl") for name in ("align", "mix"))
    run.data.train_data = [DataPhase(align, 11), DataPhase(mix, 9)]
    made = loader(run, tokenizer)
    files = [name.rpartition(":")[0] for _ in range(2) for name in names(made.next_batch())]
    assert files == [align] * 11 + [mix] * 5
    with pytest.raises(DataError, match="sample 24 is asked for but the phases hold 20"):
        made.next_batch()
    assert made.consumed_samples == 16


def test_bad_settings(run, tokenizer, digits_folder):
    with pytest.raises(DataError, match="global_batch_size 8 .*micro_batch_size 2 x .* 3 = 6"):
        loader(run, tokenizer, 0, 3)
    mix = str(digits_folder / "mix.jsonl")
    for phases, what in (
        ([], "0 phases"),
        ([DataPhase(mix), DataPhase(mix)], "phase 1 of 2 has no `samples`"),
        ([DataPhase(mix, 0)], "phase 1 has samples 0"),
        ([DataPhase("none.jsonl")], "none.jsonl: there is no such file"),
    ):
        run.data.train_data = phases
        with pytest.raises(DataError, match=what):
            loader(run, tokenizer)


def test_empty_files_are_refused_at_construction(run, tokenizer, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n \n")
    run.data.train_data = [DataPhase(str(path))]
    with pytest.raises(DataError, match="empty.jsonl: 0 rows"):
        loader(run, tokenizer)
    with pytest.raises(DataError, match="empty.jsonl: 0 rows"):
        EvalSet(path, run, tokenizer)


def test_rows_count_lines_from_1(write_rows, make_row):
    rows = Rows(write_rows(make_row("a"), "", make_row("é漢"), '{"messages": [', "[1]"))
    assert len(rows) == 4
    assert rows[1]["messages"][0]["content"] == "é漢"
    assert rows.where(1).endswith("rows.jsonl:3")
    for index, what in ((2, "rows.jsonl:4: not valid JSON"), (3, "rows.jsonl:5: .* is a list")):
        with pytest.raises(DataError, match=what) as caught:
            rows[index]
        assert "\n" not in str(caught.value)


BAD_ROWS = {
    "not valid JSON": "{",
    "0 <image> marks but 1 images": {"images": ["small.png"]},
    "does not exist": {"question": "<image>", "images": ["none.png"]},
    "leaves the data folder": {"question": "<image>", "images": ["../small.png"]},
    "is an empty answer": {"answer": ""},
    "seq_length is 128": {"question": "a" * 200},
    "spells the special token": {"question": "<|im_start|>"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_stops_or_is_skipped(run, tokenizer, write_rows, make_row, reason):
    bad = BAD_ROWS[reason]
    path = write_rows(
        *(make_row(f"q{n}") for n in range(5)),
        bad if isinstance(bad, str) else make_row(**bad),
        *(make_row(f"q{n}") for n in range(2)),
    )
    run.data.train_data = [DataPhase(str(path))]
    with pytest.raises(DataError, match=f"rows.jsonl:6: .*{reason}") as caught:
        loader(run, tokenizer).next_batch()
    assert "\n" not in str(caught.value)
    run.data.on_bad_sample = "skip"
    batch = loader(run, tokenizer).next_batch()
    skipped = [line for microbatch in batch for line in microbatch.skipped]
    assert skipped == [str(caught.value)]
    assert sorted(names(batch)) == [f"{path}:{n}" for n in (1, 2, 3, 4, 5, 7, 8)]
    assert [len(m.samples) + len(m.skipped) for m in batch] == [2, 2, 2, 2]


def test_a_microbatch_of_bad_rows_is_all_padding(run, tokenizer, write_rows):
    run.data.train_data = [DataPhase(str(write_rows("{", "{")))]
    run.data.on_bad_sample = "skip"
    for microbatch in loader(run, tokenizer, pad_multiple=4).next_batch():
        assert len(microbatch.tokens_T) == 4 and len(microbatch.skipped) == 2
        assert microbatch.loss_mask_T.sum() == 0 and microbatch.num_real_tokens == 0


def test_evalset(run, tokenizer, digits_folder, write_rows, make_row):
    made = EvalSet(digits_folder / "valid.jsonl", run, tokenizer, limit=24)
    assert len(made) == 24 and len(list(made)) == 24
    items = [made[i] for i in range(12)]
    assert len({item.key for item in items}) == 12
    assert all(image.path.is_file() for item in items for image in item.images)
    batch = made.joined([item.sample for item in items])
    assert batch.loss_mask_T.sum() == 0 and len(batch.samples) == 12
    ends = [batch.tokens_T[end - 1].item() for end in batch.cu_seqlens[1:]]
    assert set(ends) == set(tokenizer.encode("assistant\n"))
    plain = EvalSet(write_rows(make_row("q?", "42")), run, tokenizer)[0]
    assert (plain.ground_truth, plain.scorer, plain.key) == ("42", "exact", "all")
    assert plain.question == "q?"
    assert (
        EvalSet(write_rows(make_row("q?", ground_truth=3)), run, tokenizer)[0].ground_truth == "3"
    )
    bad = (
        ({"scorer": "f1"}, "'f1' is unknown"),
        ({"ground_truth": [3]}, "ground_truth is a list"),
        ({"id": 3}, "nothing uses 1 of the row's 3 keys"),
    )
    for more, what in bad:
        with pytest.raises(DataError, match=f"rows.jsonl:1: .*{what}"):
            EvalSet(write_rows(make_row("q?", **more)), run, tokenizer)[0]
