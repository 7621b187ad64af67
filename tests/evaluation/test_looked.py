"""Evaluation of a model that glimpses: records say where it looked, and a probe of its answers sees
the slots that it saw while it answered."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import SampleBuilder
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.evaluation import examples
from megatron_mm.evaluation.evaluate import evaluate
from megatron_mm.evaluation.examples import write_examples
from megatron_mm.evaluation.questions import EvalSet
from support.trainers import LAYOUTS, digits_run, with_glimpses
from support.weights import random_engine


def looking_run(look_scenes, **settings) -> RunConfig:
    return with_glimpses(digits_run(look_scenes, max_new_tokens=20, **settings), "GE Q *E V L GE J")


def on_rank_evaluate(run: RunConfig, folder) -> list[dict]:
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    looks = LookTokens.of(run, tokenizer)
    # A random model hardly says the one token of the query: it says little else than that.
    for name, param in engine.chunks[-1].named_parameters():
        if name == "output_layer.weight":
            rows = torch.randn(4, param.shape[1], generator=torch.Generator().manual_seed(1))
            param.data.zero_()
            ids = [looks.query_id, *tokenizer.encode("0 1 2")[:3]]
            for token, row in zip(ids, rows, strict=False):
                param.data[token] = row
    _, records = evaluate(engine, tokenizer)
    write_examples(engine, tokenizer, records[:8], folder)
    return records


@pytest.fixture(scope="module")
def one_rank(ranks, look_scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return ranks(1, on_rank_evaluate, looking_run(look_scenes), folder)[0], folder


def test_records_say_where_every_query_looked(one_rank):
    records, folder = one_rank
    asked = 0
    for record in records:
        said = record["prediction"].count("<look>")
        # The last one may have had no room for its slots.
        assert len(record["looked"]) in (said, said - 1)
        asked += len(record["looked"])
        for (place,) in record["looked"]:
            assert 0 < place[2] <= 1 and 0 <= place[0] <= 1
    assert asked > len(records) / 2
    written = json.loads((folder / "evaluation.json").read_text())["examples"]
    assert [example["looked"] for example in written if example["looked"]]


def test_a_look_at_a_pyramid_is_drawn_over_its_finest_patches(one_rank):
    _, folder = one_rank
    (look,) = json.loads((folder / "evaluation.json").read_text())["examples"][0]["looks"]
    assert look["grid"] == [6, 6] and look["pair"] == 0  # nine tiles of 2 x 2 patches
    assert all(len(weights) == 36 for weights in look["weights"])


@pytest.mark.parametrize("name", ["PP2", "CP2", "PP2, encoder beside"])
def test_every_layout_looks_at_the_same_places(ranks, look_scenes, one_rank, tmp_path, name):
    size, sizes = LAYOUTS[name]
    found = ranks(size, on_rank_evaluate, looking_run(look_scenes, **sizes), tmp_path)[0]
    for mine, theirs in zip(found, one_rank[0], strict=True):
        assert mine["prediction"] == theirs["prediction"]
        assert torch.allclose(
            torch.tensor(mine["looked"]), torch.tensor(theirs["looked"]), atol=1e-5
        )
    ours, whole = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path, one_rank[1])
    )
    assert ours["experts"] == whole["experts"]  # no token sits on the fence between two
    for one, other in zip(ours["examples"], whole["examples"], strict=True):
        for mine, its in zip(one["looks"], other["looks"], strict=True):
            # Rounded to 5 digits; fp32 in another order.
            assert torch.allclose(
                torch.tensor(mine["weights"]), torch.tensor(its["weights"]), atol=3e-5
            )


def on_rank_probes(run: RunConfig) -> Microbatch:
    """Returns what is probed of the first row, as if the model had answered as the row does."""
    engine, tokenizer = random_engine(run), load_tokenizer(run.data.tokenizer_model)
    questions, probed, forward = EvalSet(run.data.valid_data, run, tokenizer), [], examples.probe

    def seen(engine, batch, *lengths):
        probed.append(batch)
        return forward(engine, batch, *lengths)

    examples.probe = seen
    try:
        record = {"index": 0, "prediction": ANSWER}
        examples._probe_records(engine, tokenizer, questions, [record])
    finally:
        examples.probe = forward
    return probed[0]


ANSWER = "cell 3<look> is 0, cell 0<look> is 3"


@pytest.mark.parametrize("place", ["hidden", "oracle"])
def test_a_probe_sees_the_looks_of_earlier_turns_and_the_places_of_the_row(
    ranks, look_scenes, tmp_path, place
):
    """It sees what training on the row sees, its places for the oracle among it."""
    row = json.loads((look_scenes / "valid.jsonl").read_text().splitlines()[1])
    assert row["messages"][1]["content"].count("<look>") == len(row["looks"]) == 1
    row["messages"] += [
        {"role": "user", "content": "And cells 3 and 0? Show steps."},
        {"role": "assistant", "content": ANSWER},
    ]
    row["looks"] += [{"box": [0, 0.3, 0.3, 0.6]}, {"box": [0, 0, 0.3, 0.3]}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (tmp_path / "images").symlink_to(look_scenes / "images")
    run = with_glimpses(digits_run(look_scenes), "GE Q *E V L GE J", place)
    run.data.valid_data = str(file)
    (batch,) = ranks(1, on_rank_probes, run)
    builder = SampleBuilder(run, load_tokenizer(run.data.tokenizer_model))
    whole = builder.training(row, "r:1", tmp_path)
    count = min(batch.num_real_tokens, len(whole.tokens_T))
    assert count > whole.queries[-1] + 4 and len(whole.queries) == 3
    assert batch.tokens_T[:count].equal(whole.tokens_T[:count])
    assert batch.queries.positions_N.tolist() == [*whole.queries]
    if place == "oracle":
        assert batch.queries.targets_N3.tolist() == [pytest.approx(t) for t in whole.targets]


def on_rank_probed(run: RunConfig, folder, most: int | None) -> int:
    """Returns how many forward passes one key's probe took."""
    passes, forward = [], examples.probe

    def counted(*args):
        passes.append(1)
        return forward(*args)

    run.data.max_pack_tiles, examples.probe = most, counted
    try:
        on_rank_evaluate(run, folder)
    finally:
        examples.probe = forward
    return len(passes)


def test_a_probe_holds_no_more_tiles_than_allowed_and_shows_the_same(ranks, look_scenes, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = looking_run(look_scenes, micro_batch_size=8)
    (once,) = ranks(1, on_rank_probed, run, whole, None)
    (often,) = ranks(1, on_rank_probed, run, parts, 10)  # one question's
    assert once < often == 8
    read = [json.loads((folder / "evaluation.json").read_text()) for folder in (whole, parts)]
    assert read[0]["experts"] == read[1]["experts"]
    for one, other in zip(*(r["examples"] for r in read), strict=True):
        for mine, its in zip(one["looks"], other["looks"], strict=True):
            # Rounded to 5 digits; kernels of other shapes in between.
            assert torch.allclose(
                torch.tensor(mine["weights"]), torch.tensor(its["weights"]), atol=2e-5
            )
