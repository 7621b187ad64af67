"""Evaluation of a model that glimpses: records say where it looked, and a probe of its answers sees
the slots that it saw while it answered."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mm.config import RunConfig
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.evaluation import examples
from megatron_mm.evaluation.evaluate import evaluate
from megatron_mm.evaluation.examples import write_examples
from support.trainers import CP2, PP2, digits_run, with_glimpses
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


@pytest.mark.parametrize("sizes", [PP2, CP2])
def test_every_layout_looks_at_the_same_places(ranks, look_scenes, one_rank, tmp_path, sizes):
    found = ranks(2, on_rank_evaluate, looking_run(look_scenes, **sizes), tmp_path)[0]
    for mine, theirs in zip(found, one_rank[0], strict=True):
        assert mine["prediction"] == theirs["prediction"]
        assert torch.allclose(
            torch.tensor(mine["looked"]), torch.tensor(theirs["looked"]), atol=1e-5
        )


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
