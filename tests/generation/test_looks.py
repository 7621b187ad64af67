"""Completions that look: their slots are forced, the trainer has the rollout's log-probabilities,
and every layout draws the same.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.collate import collate
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.place_tokens import WORDS as PLACE_WORDS
from megatron_mm.data.place_tokens import PlaceTokens
from megatron_mm.data.tiles import image_settings
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.generation.answers import answered
from megatron_mm.generation.generate import Prompts, generate, whole_logits
from megatron_mm.generation.lanes import Completion
from megatron_mm.generation.looked import gather_looked
from megatron_mm.generation.sampling import Sampling
from megatron_mm.model.routing import whole_routes
from megatron_mm.parallel.param_layout import layouts
from support.trainers import CP2, EP2, PP2, TP2, VPP2, digits_run, with_glimpses
from support.weights import random_engine

NEVER = -1
WORDS = 12
NEW_TOKENS = 16
PATTERN = "GE Q *E V"  # a glimpse waits over the boundary of two stages
ASKED = (0, 12, 8, 5, 20)
LAYOUTS = {
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
    "EP2": (2, EP2),
    "TP2xPP2": (4, TP2 | PP2),
    "PP2xVPP2xCP2": (4, PP2 | VPP2 | CP2),
}


class AnyWords(PlaceTokens):
    """Every three tokens say a place, or a random model would hardly ever say one."""

    def said(self, before_N3: torch.Tensor) -> torch.Tensor:
        share_N3 = (before_N3 % 7 + 0.5) / 7
        return torch.cat((share_N3[:, :2], 0.1 + 0.8 * share_N3[:, 2:]), 1)


def looking_run(scenes, place: str = "hidden", **settings) -> RunConfig:
    return with_glimpses(digits_run(scenes, **settings), PATTERN, place)


def _say_little(engine) -> None:
    """Leaves a few words that a random model chooses among, so that one of them is frequent."""
    for name, param, layout in layouts(*engine.modules):
        if name == "output_layer.weight":
            number = torch.arange(len(param)) + layout.offset[0]
            param.data[number >= WORDS] = 0.0


def on_rank_sample(run: RunConfig, turn: int = 8, routes: bool = False) -> dict:
    """What is drawn with a token that a random model draws often in the place of the query, and how
    far the trainer's log-probabilities are from the rollout's."""
    engine = random_engine(run)
    _say_little(engine)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    looks = LookTokens.of(run, tokenizer)
    if looks.words is not None:
        looks = replace(looks, words=AnyWords(looks.words.first, looks.min_scale))
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    samples = [questions[i].sample for i in ASKED]
    prompts = Prompts(lambda i: samples[i], ASKED)

    def drawn(query_id: int) -> list[list[Completion]]:
        tokens = replace(looks, query_id=query_id, most=2)
        sampling = Sampling((NEVER,), NEW_TOKENS, 0.7, top_k=4, seed=3, looks=tokens)
        return generate(
            engine,
            prompts,
            sampling,
            num_generations=2,
            max_num_seqs=6,
            pad_id=tokenizer.pad_id,
            record_routes=routes,
            tokens_a_turn=turn,
        )

    said = Counter(t for group in drawn(NEVER) for c in group for t in c.tokens_G.tolist())
    query_id = said.most_common(1)[0][0]
    tokens = replace(looks, query_id=query_id, most=2)
    found, worst, odd = drawn(query_id), 0.0, 0
    for sample, group in zip(samples, found, strict=True):
        for completion in group:
            stream = answered(sample, completion.tokens_G, tokens)
            at = len(sample.tokens_T) - 1 + completion.places_G
            batch = collate(
                [stream],
                settings=image_settings(run),
                pad_id=tokenizer.pad_id,
                pad_multiple=token_multiple(run),
            )
            (batch,) = broadcast_batches(engine.groups, [batch])
            finish = partial(
                whole_logits,
                wanted=lambda _, w=at: w,
                groups=engine.groups,
                vocab_size=run.model.language.vocab_size,
            )
            record = [{}] if routes else None
            logits = engine.forward([batch], lambda _, w=at: w, finish, routes=record)
            if logits:
                logprobs = (logits[0] / 0.7).log_softmax(-1).gather(1, completion.tokens_G[:, None])
                worst = max(worst, float((logprobs[:, 0] - completion.logprobs_G).abs().max()))
            if routes:
                whole = whole_routes(record[0], engine.groups.pg)
                stacked = torch.stack([whole[index] for index in sorted(whole)], 1)
                seen = completion.routes_SLk
                same = stacked[: len(seen)].sort(-1).values == seen.sort(-1).values
                odd += int((~same.all(-1)).sum())
                assert len(seen) == len(stream.tokens_T) - 1
    every = [c for group in found for c in group]
    return {
        "tokens": [c.tokens_G.tolist() for c in every],
        "places": [c.places_G.tolist() for c in every],
        "asks": sum(int((c.tokens_G == query_id).sum()) for c in every),
        "query": query_id,
        "slot": looks.slot_id,
        "worst": worst,
        "odd": odd,
        "looked": [c.looked_NQ3 for c in every],
    }


@pytest.fixture(scope="module")
def one_rank(ranks, look_scenes):
    return ranks(1, on_rank_sample, looking_run(look_scenes), 8, True)[0]


def test_slots_are_forced_and_belong_to_no_completion(one_rank):
    """They count for the length, and no more than two queries of a sample have any."""
    run_slots = 4
    assert one_rank["asks"] > 10
    for tokens, places in zip(one_rank["tokens"], one_rank["places"], strict=True):
        asks = [n for n, token in enumerate(tokens) if token == one_rank["query"]]
        gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
        wide = [n for n, gap in enumerate(gaps) if gap == 1 + run_slots]
        assert wide == [n for n in asks[:2] if n < len(gaps)]
        assert all(gap == 1 for n, gap in enumerate(gaps) if n not in wide)
        assert places[-1] < NEW_TOKENS


def test_log_probabilities_and_routes_are_the_trainers(one_rank):
    """As without looks (test_generate.py): sums in another order through four sub-layers."""
    assert one_rank["worst"] < 1e-5
    assert one_rank["odd"] == 0


def test_it_is_known_where_every_query_looked(one_rank):
    """A place for each query that has slots, and none of them the zeros of an unused row."""
    for places, looked in zip(one_rank["places"], one_rank["looked"], strict=True):
        slots = sum(b - a > 1 for a, b in zip(places, places[1:], strict=False))
        # A query whose slots the length limit cut off has looked too, if all of them were there.
        assert len(looked) in (slots, slots + 1) and looked.shape[1:] == (1, 3)
        assert (looked[..., 2] >= 0.08).all() and (looked > 0).all() and (looked <= 1).all()


@pytest.mark.parametrize("turn", [1, 3])
def test_the_length_of_a_turn_changes_nothing(ranks, look_scenes, one_rank, turn):
    found = ranks(1, on_rank_sample, looking_run(look_scenes), turn)[0]
    assert found["tokens"] == one_rank["tokens"]


@pytest.mark.parametrize("place", ["random", "oracle"])
def test_controls_look_where_they_should(ranks, look_scenes, one_rank, place):
    """Places that follow from positions or from the row are those of the trainer, too."""
    run = looking_run(look_scenes, place)
    found = ranks(1, on_rank_sample, run, 8)[0]
    assert found["worst"] < 1e-5
    pairs = zip(found["looked"], one_rank["looked"], strict=True)
    assert not any(
        torch.allclose(a, b, atol=1e-3) for a, b in pairs if a.shape == b.shape and len(a)
    )
    if place == "oracle":
        rows = [json.loads(line) for line in Path(run.data.valid_data).read_text().splitlines()]
        for number, looked in enumerate(found["looked"]):
            boxes = rows[ASKED[number // 2]]["looks"][: len(looked)]
            for (place_3,), entry in zip(looked.tolist(), boxes, strict=False):
                left, top, right, bottom = entry["box"]
                centre = (top + bottom) / 2, (left + right) / 2, right - left
                assert place_3 == pytest.approx(centre, abs=1e-5)


def on_rank_ends(run: RunConfig, stop_first: bool) -> list[int]:
    """How often completions of one token looked, which is a stop or all that is allowed."""
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    stops = tuple(range(tokenizer.vocab_size)) if stop_first else (NEVER,)
    sampling = Sampling(
        stops, NEW_TOKENS if stop_first else 1, 0.7, looks=LookTokens.of(run, tokenizer)
    )
    prompts = Prompts(lambda i: questions[i].sample, [0, 1, 2])
    found = generate(engine, prompts, sampling, max_num_seqs=2, pad_id=tokenizer.pad_id)
    every = [completion for group in found for completion in group]
    assert [len(completion.tokens_G) for completion in every] == [1, 1, 1]
    looked = gather_looked(engine, every)
    return [len(places) for places in looked] if engine.groups.is_reader else [0, 0, 0]


@pytest.mark.parametrize("layout", [{}, PP2])
@pytest.mark.parametrize("stop_first", [True, False])
def test_answers_of_one_token_have_looked_nowhere(ranks, look_scenes, layout, stop_first):
    """No decoding step has run when they end."""
    run = looking_run(look_scenes, **layout)
    for counts in ranks(2 if layout else 1, on_rank_ends, run, stop_first):
        assert counts == [0, 0, 0]


def on_rank_refill(run: RunConfig) -> tuple[list, list]:
    """Where a prompt without boxes looks: alone, and in the row of one with boxes."""
    engine = random_engine(run)
    _say_little(engine)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    boxed, bare = questions[0].sample, questions[1].sample
    bare = replace(bare, targets=(None,) * len(bare.targets))

    def drawn(samples: list, query_id: int) -> Completion:
        looks = replace(LookTokens.of(run, tokenizer), query_id=query_id, most=2)
        sampling = Sampling((NEVER,), NEW_TOKENS, 0.7, top_k=4, seed=3, looks=looks)
        numbers = range(2 - len(samples), 2)  # the last has number 1 in both
        prompts = Prompts(lambda i: samples[i], [*numbers])
        found = generate(engine, prompts, sampling, max_num_seqs=1, pad_id=tokenizer.pad_id)
        (completion,) = found[-1]
        return completion

    query_id = int(drawn([bare], NEVER).tokens_G.mode().values)
    return tuple(
        (found.tokens_G.tolist(), found.looked_NQ3.tolist())
        for found in (drawn([bare], query_id), drawn([boxed, bare], query_id))
    )


def test_a_row_forgets_the_boxes_of_its_last_completion(ranks, look_scenes):
    alone, behind = ranks(1, on_rank_refill, looking_run(look_scenes, "oracle"))[0]
    assert alone[1] and behind[0] == alone[0]
    # The cache is longer behind another prompt, so attention rounds otherwise.
    torch.testing.assert_close(torch.tensor(behind[1]), torch.tensor(alone[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["one rank", "PP2", "CP2", "TP2xPP2"])
def test_words_say_where_it_looks(ranks, look_scenes, name):
    """The words before a query in the stream, of the prompt too, are what rollout and trainer
    read."""
    size, sizes = LAYOUTS.get(name, (1, {}))
    for found in ranks(size, on_rank_sample, looking_run(look_scenes, "tokens", **sizes)):
        assert found["worst"] < 1e-5 and found["asks"] > 10
        holders = 0
        said = AnyWords(0, 0.08).said
        for tokens, places, looked in zip(
            found["tokens"], found["places"], found["looked"], strict=True
        ):
            stream = torch.full((places[-1] + 1,), found["slot"])
            stream[torch.tensor(places)] = torch.tensor(tokens)
            asks = [places[n] for n, token in enumerate(tokens) if token == found["query"]]
            for place, there in zip(asks, looked, strict=False):
                holders += len(there)
                if place >= PLACE_WORDS and len(there):
                    before = stream[place - PLACE_WORDS : place]
                    torch.testing.assert_close(there[0], said(before[None])[0])
        assert holders or size > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_draws_the_same(ranks, look_scenes, one_rank, name):
    size, sizes = LAYOUTS[name]
    answers = ranks(size, on_rank_sample, looking_run(look_scenes, **sizes))
    assert all(answer["tokens"] == one_rank["tokens"] for answer in answers)
    holders = 0
    for answer in answers:
        for mine, theirs in zip(answer["looked"], one_rank["looked"], strict=True):
            holders += mine.shape[1]
            assert not mine.shape[1] or torch.allclose(mine, theirs, atol=1e-5)
    assert holders
    assert max(answer["worst"] for answer in answers) < 1e-5
