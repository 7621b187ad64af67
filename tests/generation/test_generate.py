"""Completions with caches: the tokens of the slow decoder, the trainer's log-probabilities, and
the same on every layout.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.benchmark.hf_weights import IMAGE_TOKEN, copy_weights, transformers_model
from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.collate import collate
from megatron_mm.data.tiles import image_settings
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import broadcast_batches
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.generation.generate import Prompts, generate, whole_logits
from megatron_mm.generation.sampling import Sampling
from megatron_mm.model.multimodal import MultimodalModel
from megatron_mm.parallel import groups
from support.batches import microbatch, small_model
from support.cascades import with_cascade
from support.grown import with_answers
from support.samples import normalised
from support.slow_generate import generate as slow_generate
from support.trainers import LAYOUTS, PRIME, TP2, TP3, digits_run, with_two_memories
from support.weights import random_engine

NEVER = -1
NEW_TOKENS = 7
# What a step computes in a way of its own: experts of which every rank has the whole, and a shared
# expert whose collectives the dispatcher takes over in training.
WHOLE = TP2 | {"expert_tensor_parallel_size": 1}
OVERLAP = WHOLE | {"expert_model_parallel_size": 2, "moe_shared_expert_overlap": True}
DECODED = LAYOUTS | {"TP2, whole experts": (2, WHOLE), "TP2xEP2, overlap": (2, OVERLAP)}
# Questions of different lengths and skills; more of them than rows, so rows are filled again.
ASKED = (0, 12, 8, 5, 20, 3, 17)


def ask(run: RunConfig, sampling: Sampling, replicas: bool, **settings):
    """The engine, this replica's questions and the completions of each."""
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    dp = engine.groups.pg.dp
    asked = ASKED[dp.rank() :: dp.size()] if replicas else ASKED
    prompts = Prompts(lambda i: questions[asked[i]].sample, asked)
    found = generate(engine, prompts, sampling, pad_id=tokenizer.pad_id, **settings)
    assert len(found) == len(asked)
    return engine, [questions[i].sample for i in asked], asked, found


def trainer_logprobs(engine, samples, found, temperature: float) -> list[list[torch.Tensor]]:
    """The log-probabilities of the completions, from whole sequences; on the last stage."""
    run = engine.run
    settings, pad = image_settings(run), load_tokenizer(run.data.tokenizer_model).pad_id
    out = []
    for sample, group in zip(samples, found, strict=True):
        out.append([])
        for completion in group:
            prompt = collate([sample], settings=settings, pad_id=pad)
            tokens = completion.tokens_G
            batch = with_answers(prompt, tokens.unsqueeze(0), pad, token_multiple(run))
            wanted = torch.arange(len(tokens)) + len(sample.tokens_T) - 1
            finish = partial(
                whole_logits,
                wanted=lambda _, w=wanted: w,
                groups=engine.groups,
                vocab_size=run.model.language.vocab_size,
            )
            if engine.encoder is not None:
                (batch,) = broadcast_batches(engine.groups, [batch])
            logits = engine.forward([batch], lambda _, w=wanted: w, finish)
            if logits:
                scaled = (logits[0] / temperature).log_softmax(-1)
                out[-1].append(scaled.gather(1, tokens[:, None])[:, 0])
    return out


def on_rank_sample(run: RunConfig, temperature: float, group: int, rows: int) -> dict:
    sampling = Sampling((NEVER,), NEW_TOKENS, temperature, seed=3)
    engine, samples, asked, found = ask(
        run, sampling, True, num_generations=group, max_num_seqs=rows
    )
    # With expert parallelism replicas compute together: each checks as many.
    most = -(-len(ASKED) // engine.groups.pg.dp.size())
    again = [(samples[i % len(samples)], found[i % len(samples)]) for i in range(most)]
    theirs = trainer_logprobs(engine, *zip(*again, strict=True), temperature or 1.0)
    worst = 0.0
    for (_, group_found), group_again in zip(again, theirs, strict=True):
        for completion, logprobs in zip(group_found, group_again, strict=False):
            worst = max(worst, float((completion.logprobs_G - logprobs).abs().max()))
    return {
        "tokens": {n: [c.tokens_G.tolist() for c in g] for n, g in zip(asked, found, strict=True)},
        "logprobs": {n: [c.logprobs_G for c in g] for n, g in zip(asked, found, strict=True)},
        "worst": worst,
    }


def merged(answers: list[dict], key: str) -> dict:
    """Over replicas; ranks of one replica must agree."""
    whole = {}
    for answer in answers:
        for number, value in answer[key].items():
            known = whole.setdefault(number, value)
            for a, b in zip(known, value, strict=True):
                assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return whole


def on_rank_against_transformers(run: RunConfig) -> list[tuple[list[int], list[int]]]:
    """(the slow decoder's, theirs) of each sample: images in one, in none and in two places."""
    engine = Engine.create(run, groups.build(run.parallel))
    hf = transformers_model(run.model)
    copy_weights(hf, engine.chunks[0])
    engine.training(False)
    batch = microbatch(run.model, 1, (1, 0, 2))
    batch.tokens_T[batch.tokens_T == IMAGE_TOKEN] = 1
    batch.tokens_T[batch.stream_positions] = IMAGE_TOKEN
    (ours,) = slow_generate(engine, [batch], stop_id=NEVER, pad_id=0, max_new_tokens=NEW_TOKENS)
    found, tile = [], 0
    for i, images in enumerate((1, 0, 2)):
        tokens = batch.tokens_T[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        tiles = batch.stream_tiles[tile : tile + images]
        tile += images
        theirs = hf.generate(
            input_ids=tokens.unsqueeze(0),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
            **({"pixel_values": normalised(batch.pixels_NCHW[tiles])} if images else {}),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found.append((ours[i].tolist(), theirs[0, len(tokens) :].tolist()))
    return found


def test_greedy_answers_are_those_of_transformers(ranks):
    model = small_model("GE *E GE", vision_memory="none")
    found = ranks(1, on_rank_against_transformers, RunConfig(model=model))[0]
    for ours, theirs in found:
        assert ours == theirs and len(ours) == NEW_TOKENS
    assert len({tuple(ours) for ours, _ in found}) == 3


def on_rank_slow(run: RunConfig) -> list:
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    prompts = [questions.joined([questions[i].sample]) for i in ASKED]
    answers = slow_generate(
        engine, prompts, stop_id=NEVER, pad_id=tokenizer.pad_id, max_new_tokens=NEW_TOKENS
    )
    return [a[0].tolist() for a in answers]


@pytest.fixture(scope="module")
def one_rank(ranks, scenes):
    return {
        temperature: ranks(1, on_rank_sample, digits_run(scenes), temperature, 2, 6)[0]
        for temperature in (0.0, 0.8)
    }


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_log_probabilities_are_the_trainers(one_rank, temperature):
    """Sums in another order through six sub-layers of fp32; 980 tokens were within 3e-6 on one
    rank, TP2, PP2 and CP2 each."""
    assert one_rank[temperature]["worst"] <= limit(temperature)


def test_greedy_completions_are_those_of_the_slow_decoder(ranks, scenes, one_rank):
    slow = ranks(1, on_rank_slow, digits_run(scenes))[0]
    for number, answer in zip(ASKED, slow, strict=True):
        assert one_rank[0.0]["tokens"][number] == [answer, answer]


def limit(temperature: float) -> float:
    """How far log-probabilities may differ: logits by 1e-5, a hundred roundings, over the
    temperature that divides them."""
    return 1e-5 / (temperature or 1.0)


def test_samples_of_a_prompt_differ_and_do_not_depend_on_the_rows(ranks, scenes, one_rank):
    tokens = one_rank[0.8]["tokens"]
    assert sum(a != b for a, b in tokens.values()) >= len(ASKED) - 1
    for rows in (2, 14):
        other = ranks(1, on_rank_sample, digits_run(scenes), 0.8, 2, rows)[0]
        assert other["tokens"] == tokens and other["worst"] <= limit(0.8)


@pytest.mark.parametrize("name", [name for name in DECODED if name != "one rank"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_completions_do_not_depend_on_the_layout(ranks, scenes, one_rank, name, temperature):
    size, sizes = DECODED[name]
    answers = ranks(size, on_rank_sample, digits_run(scenes, **sizes), temperature, 2, 6)
    assert merged(answers, "tokens") == one_rank[temperature]["tokens"]
    logprobs = merged(answers, "logprobs")
    for number, group in one_rank[temperature]["logprobs"].items():
        for ours, theirs in zip(group, logprobs[number], strict=True):
            assert (ours - theirs).abs().max() <= limit(temperature)
    assert max(answer["worst"] for answer in answers) <= limit(temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_padding_of_a_vocabulary_is_never_drawn(ranks, scenes, temperature):
    """The same tokens and log-probabilities as of one rank, which has no padding."""
    expected = ranks(1, on_rank_sample, digits_run(scenes, **PRIME), temperature, 2, 6)[0]
    run = digits_run(scenes, **TP3, **PRIME)
    answers = ranks(3, on_rank_sample, run, temperature, 2, 6)
    assert merged(answers, "tokens") == expected["tokens"]
    logprobs = merged(answers, "logprobs")
    for number, group in expected["logprobs"].items():
        for ours, theirs in zip(group, logprobs[number], strict=True):
            assert (ours - theirs).abs().max() <= limit(temperature)
    assert max(answer["worst"] for answer in answers) <= limit(temperature)


def test_padding_is_cut_off_what_is_drawn_from(ranks, scenes):
    run = digits_run(scenes, **TP3, **PRIME)
    assert set(ranks(3, on_rank_widths, run)) == {(389, True)}


def on_rank_widths(run: RunConfig) -> tuple[int, bool]:
    """Width of the gathered logits, and whether all of them are of real tokens."""
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    batch = questions.joined([questions[0].sample])
    finish = partial(
        whole_logits,
        wanted=lambda batch: torch.arange(len(batch.tokens_T)),
        groups=engine.groups,
        vocab_size=run.model.language.vocab_size,
    )
    (logits,) = engine.forward([batch], lambda batch: torch.arange(len(batch.tokens_T)), finish)
    return logits.shape[1], bool((logits.abs() < 1e3).all())


@pytest.mark.parametrize("name", ["one rank", "PP2xVPP2", "CP2"])
def test_decoding_with_two_memories_is_the_full_forward_pass(ranks, scenes, name):
    size, sizes = LAYOUTS[name]
    answers = ranks(size, on_rank_sample, with_two_memories(digits_run(scenes, **sizes)), 0.0, 2, 6)
    assert max(answer["worst"] for answer in answers) <= 1e-5
    slow = ranks(1, on_rank_slow, with_two_memories(digits_run(scenes)))[0]
    tokens = merged(answers, "tokens")
    assert [tokens[number] for number in ASKED] == [[answer, answer] for answer in slow]


@pytest.mark.parametrize("name", ["one rank", "PP2xVPP2", "EP2", "TP2xEP2, overlap"])
@pytest.mark.parametrize("hard_from", [0.0, 1.0])
def test_decoding_with_a_second_hop_is_the_full_forward_pass(ranks, scenes, name, hard_from):
    """For those that the gate hands over, and for all."""
    size, sizes = DECODED[name]
    cascade = {"pattern": "GC L *E J GC", "delegate_hard_from": hard_from}
    run = with_cascade(digits_run(scenes, **sizes), **cascade)
    answers = ranks(size, on_rank_sample, run, 0.0, 2, 6)
    assert max(answer["worst"] for answer in answers) <= limit(0.0)
    slow = ranks(1, on_rank_slow, with_cascade(digits_run(scenes), **cascade))[0]
    tokens = merged(answers, "tokens")
    assert [tokens[number] for number in ASKED] == [[answer, answer] for answer in slow]


def on_rank_stops(run: RunConfig, stops: tuple[int, ...]) -> list:
    sampling = Sampling(stops, NEW_TOKENS, 0.8, seed=3)
    settings = dict(num_generations=2, max_num_seqs=6)
    *_, found = ask(run, sampling, True, **settings)
    return [[(c.tokens_G.tolist(), c.finished) for c in group] for group in found]


def test_a_completion_ends_with_a_stop_token(ranks, scenes, one_rank):
    free = one_rank[0.8]["tokens"]
    stop = free[ASKED[0]][0][2]
    found = ranks(1, on_rank_stops, digits_run(scenes), (stop, 10**6))[0]
    ended = 0
    for number, group in zip(ASKED, found, strict=True):
        for (tokens, finished), whole in zip(group, free[number], strict=True):
            end = whole.index(stop) + 1 if stop in whole else NEW_TOKENS
            assert tokens == whole[:end] and finished == (stop in whole)
            ended += finished
    assert 0 < ended < 2 * len(ASKED)


def on_rank_bad(run: RunConfig) -> str:
    from megatron_mm.errors import DataError

    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)

    def read(index):
        if index == 2 and engine.groups.pg.dp.rank() == engine.groups.pg.dp.size() - 1:
            raise DataError("valid.jsonl:3: unreadable")
        return questions[index].sample

    settings = dict(max_num_seqs=2, pad_id=tokenizer.pad_id)
    try:
        generate(engine, Prompts(read, range(5)), Sampling((NEVER,), 3), **settings)
    except DataError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", ["PP2", "DP2"])
def test_a_prompt_that_cannot_be_read_is_an_error_on_every_rank(ranks, scenes, name):
    size, sizes = LAYOUTS[name]
    assert set(ranks(size, on_rank_bad, digits_run(scenes, **sizes))) == {
        "valid.jsonl:3: unreadable"
    }


def on_rank_stopped(run: RunConfig) -> bool:
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    turns = iter(range(100))
    mine = engine.groups.world.rank() == 0
    found = generate(
        engine,
        Prompts(lambda i: questions[i].sample, range(4)),
        Sampling((NEVER,), 20),
        max_num_seqs=2,
        pad_id=tokenizer.pad_id,
        stop=partial(lambda: mine and next(turns) > 3),
    )
    return found is None


def test_a_stop_on_one_rank_stops_all(ranks, scenes):
    assert ranks(2, on_rank_stopped, digits_run(scenes)) == [True, True]


def on_rank_passes(run: RunConfig) -> list[str]:
    """Returns, in order, when the model is told of a first microbatch and which passes it runs."""
    seen: list[str] = []
    forward = MultimodalModel.forward

    def listened(self, batch, positions=None, looks=None, cache=None, **how):
        seen.append("step" if cache is not None and cache.stepping else "whole")
        return forward(self, batch, positions, looks, cache, **how)

    with (
        mock.patch.object(MultimodalModel, "forward", listened),
        mock.patch.object(
            DistributedDataParallel, "set_is_first_microbatch", lambda self: seen.append("told")
        ),
    ):
        engine, samples, *_ = ask(run, Sampling((NEVER,), 4), False, max_num_seqs=4)
        seen.append("between")
        batch = collate(samples, settings=image_settings(run), pad_id=0)
        engine.forward([batch, batch], None, lambda *_, **__: None)
    return seen


def test_weights_in_fp8_are_made_anew_for_whole_passes_and_not_for_steps(ranks, scenes):
    """Transformer Engine keeps them until the model is told of a first microbatch, which
    megatron-core's schedules do. Between two passes, weights may be updated or swapped."""
    seen = ranks(1, on_rank_passes, digits_run(scenes))[0]
    at = seen.index("between")
    decoded, plain = seen[:at], seen[at + 1 :]
    assert plain == ["told", "whole", "whole"]
    assert decoded.count("step") > 4 and decoded.count("told") >= 2  # rows are filled again
    pairs = list(zip(decoded, decoded[1:], strict=False))
    assert ("told", "step") not in pairs and ("step", "whole") not in pairs
