"""Greedy decoding and evaluation: the same on every layout, and right on one.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace

import pytest
import torch
from batches import microbatch, small_model
from fingerprints import parameter_hash
from hf_weights import IMAGE_TOKEN, copy_weights, transformers_model
from trainers import LAYOUTS, digits_run, prompts_of, random_engine

from megatron_mm.config import RunConfig, token_multiple
from megatron_mm.data.collate import collate
from megatron_mm.data.evalset import EvalSet
from megatron_mm.data.layout import image_settings
from megatron_mm.data.rows import Rows
from megatron_mm.data.sample import Sample
from megatron_mm.data.scoring import score
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.parallel import groups
from megatron_mm.train.engine import Engine
from megatron_mm.train.evaluate import evaluate
from megatron_mm.train.generate import generate, with_answers
from megatron_mm.train.loop import Trainer

# ---- prompts with answers ----


@pytest.mark.parametrize("pad_multiple", [1, 2, 4])
@pytest.mark.parametrize("grown", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("stream", ["thumbnail", "all"])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4), (1, 4, 2), (3,), (4,)])
def test_with_answers_is_collating_the_longer_samples(
    scenes, mixed_rows, stream, grown, pad_multiple, chosen
):
    run = digits_run(scenes, image_stream=stream, seq_length=512)
    settings = image_settings(run)
    pad = load_tokenizer(run.data.tokenizer_model).pad_id
    samples = [prompts_of(run, mixed_rows)[i] for i in chosen]
    assert [len(s.images) for s in samples] == [(1, 0, 2, 0, 3)[i] for i in chosen]
    answers = torch.arange(7, 7 + len(samples) * grown).view(len(samples), grown)
    found = with_answers(
        collate(samples, settings=settings, pad_id=pad), answers, pad, pad_multiple
    )
    longer = [
        Sample(torch.cat((s.tokens_T, answer)), *[torch.zeros(len(s.tokens_T) + grown)] * 2,
               s.images, s.where)
        for s, answer in zip(samples, answers, strict=True)
    ]  # fmt: skip
    expected = collate(longer, settings=settings, pad_id=pad, pad_multiple=pad_multiple)
    for field in fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name in ("labels_T", "loss_mask_T"):  # nothing is supervised
            assert not ours.any() and ours.shape == theirs.shape
        elif isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


# ---- greedy decoding ----

NEW_TOKENS = 5


def on_rank_generate(run: RunConfig, stop_id: int) -> dict:
    """Answers to three microbatches, the last of which is the first with other images; how
    close the second best token ever was."""
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    # Every replica asks the same, so that all ranks have something to compare.
    prompts = [questions.collate([questions[i] for i in part]) for part in ((0, 12, 8), (5, 20))]
    prompts.append(replace(prompts[0], pixels_NCHW=-prompts[0].pixels_NCHW.flip(0)))
    margins = []
    forward = engine.forward

    def watched(batches, positions, finish):
        def note(logits, batch, positions):
            if token_multiple(engine.run) == 1:
                best = logits[:, 0].topk(2).values
                margins.append(float((best[:, 0] - best[:, 1]).min()))
            return finish(logits, batch, positions)

        return forward(batches, positions, note)

    engine.forward = watched
    settings = dict(stop_id=stop_id, pad_id=tokenizer.pad_id, max_new_tokens=NEW_TOKENS)
    answers = generate(engine, prompts, **settings)
    return {
        "answers": [a.tolist() for a in answers],
        "margin": min(margins, default=None),
        "pad": tokenizer.pad_id,
    }


NEVER = -1


@pytest.fixture(scope="module")
def one_rank_answers(ranks, scenes):
    return ranks(1, on_rank_generate, digits_run(scenes), NEVER)[0]


def test_the_answers_differ_and_are_far_from_ties(one_rank_answers):
    """What the comparison of layouts rests on: rounding (1e-6) cannot change a choice, and
    the choices depend on the prompt and on its images."""
    assert one_rank_answers["margin"] > 1e-4
    first, second, other_images = one_rank_answers["answers"]
    assert all(a != b for a, b in zip(first, other_images, strict=True))
    rows = [*first, *second, *other_images]
    assert len({tuple(row) for row in rows}) >= 4 and {len(row) for row in rows} == {NEW_TOKENS}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one rank"])
def test_greedy_answers_do_not_depend_on_the_layout(ranks, scenes, one_rank_answers, name):
    size, sizes = LAYOUTS[name]
    for rank in ranks(size, on_rank_generate, digits_run(scenes, **sizes), NEVER):
        assert rank["answers"] == one_rank_answers["answers"]


@pytest.mark.parametrize("name", ["one rank", "PP2"])
def test_a_stop_ends_its_answer_and_then_the_generation(ranks, scenes, one_rank_answers, name):
    """Pads follow a stop; no microbatch grows once every answer has stopped."""
    free = one_rank_answers["answers"]
    size, sizes = LAYOUTS[name]
    pad = one_rank_answers["pad"]
    for stop in (free[0][0][2], free[1][1][0]):
        ends = [[row.index(stop) + 1 if stop in row else NEW_TOKENS for row in p] for p in free]
        longest = max(max(part) for part in ends)
        expected = [
            [row[:end] + [pad] * (longest - end) for row, end in zip(rows, part, strict=True)]
            for rows, part in zip(free, ends, strict=True)
        ]
        assert expected != free
        for rank in ranks(size, on_rank_generate, digits_run(scenes, **sizes), stop):
            assert rank["answers"] == expected


def on_rank_all_stop(run: RunConfig) -> tuple[list, int, int]:
    """One question per microbatch; stop at what its first token is known to be."""
    engine = random_engine(run)
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions = EvalSet(run.data.valid_data, run, tokenizer)
    prompts = [questions.collate([questions[0]])]
    passes = []
    forward = engine.forward
    engine.forward = lambda *args: passes.append(1) or forward(*args)
    settings = dict(pad_id=tokenizer.pad_id, max_new_tokens=NEW_TOKENS)
    (free,) = generate(engine, prompts, stop_id=NEVER, **settings)
    passes.clear()
    (found,) = generate(engine, prompts, stop_id=int(free[0, 0]), **settings)
    return found.tolist(), int(free[0, 0]), len(passes)


def test_nothing_is_computed_after_the_last_stop(ranks, scenes):
    found, first, passes = ranks(1, on_rank_all_stop, digits_run(scenes))[0]
    assert (found, passes) == ([[first]], 1)


def on_rank_against_transformers(run: RunConfig) -> list[tuple[list[int], list[int]]]:
    """(ours, theirs) of each sample: images in one, in none and in two places."""
    engine = Engine.create(run, groups.build(run.parallel))
    hf = transformers_model(run.model)
    copy_weights(hf, engine.chunks[0])
    engine.training(False)
    batch = microbatch(run.model, 1, (1, 0, 2))
    batch.tokens_T[batch.tokens_T == IMAGE_TOKEN] = 1
    batch.tokens_T[batch.stream_positions] = IMAGE_TOKEN
    (ours,) = generate(engine, [batch], stop_id=NEVER, pad_id=0, max_new_tokens=NEW_TOKENS)
    found, tile = [], 0
    for i, images in enumerate((1, 0, 2)):
        tokens = batch.tokens_T[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        tiles = batch.stream_tiles[tile : tile + images]
        tile += images
        theirs = hf.generate(
            input_ids=tokens.unsqueeze(0),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
            **({"pixel_values": batch.pixels_NCHW[tiles]} if images else {}),
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


# ---- evaluation ----

QUESTIONS = 11  # does not divide by replicas, stages or batch


def on_rank_evaluate(run: RunConfig) -> tuple[dict, list[dict], bool]:
    engine = random_engine(run)
    engine.training(True)
    results, records = evaluate(engine, load_tokenizer(run.data.tokenizer_model))
    return results, records, engine.models[0].training


def evaluation_run(scenes, **settings) -> RunConfig:
    return digits_run(
        scenes, eval_samples=QUESTIONS, eval_batch_size=3, max_new_tokens=3, **settings
    )


@pytest.fixture(scope="module")
def one_rank_evaluation(ranks, scenes):
    return ranks(1, on_rank_evaluate, evaluation_run(scenes))[0]


@pytest.mark.parametrize("name", ["PP2", "DP2", "EP2", "TP2"])
def test_every_question_is_scored_once_on_every_layout(ranks, scenes, one_rank_evaluation, name):
    expected, expected_records, _ = one_rank_evaluation
    size, sizes = LAYOUTS[name]
    for results, records, training in ranks(
        size, on_rank_evaluate, evaluation_run(scenes, **sizes)
    ):
        assert [record["index"] for record in records] == list(range(QUESTIONS))
        assert records == expected_records and results == expected
        assert training  # as it was before


def test_results_follow_from_the_records(one_rank_evaluation, scenes):
    results, records, _ = one_rank_evaluation
    rows = Rows(scenes / "valid.jsonl")
    assert sum(result["n"] for result in results.values()) == QUESTIONS
    for record in records:
        row = rows[record["index"]]
        assert record["truth"] == row["ground_truth"]
        assert record["score"] == score(row["scorer"], record["prediction"], row["ground_truth"])
        direct = row["form"] == "direct"
        assert record["key"] == (row["skill"] if direct else f"{row['skill']}/{row['form']}")
    for key, result in results.items():
        scores = [record["score"] for record in records if record["key"] == key]
        assert (result["accuracy"], result["n"]) == (sum(scores) / len(scores), len(scores))


def test_chance_is_the_best_constant_answer(ranks, scenes, tmp_path):
    """Four questions whose answers are 3, 3, 5 and 3, and a second kind all alike."""
    (tmp_path / "images").symlink_to(scenes / "images")
    kinds = [("ocr", truth) for truth in "3353"] + [("count", "7")] * 2
    random.Random(0).shuffle(kinds)
    rows = [
        {
            "messages": [{"role": "user", "content": f"<image>How many {n}?"}],
            "images": ["images/valid_000000.png"],
            "ground_truth": truth,
            "skill": skill,
        }
        for n, (skill, truth) in enumerate(kinds)
    ]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = evaluation_run(scenes, valid_data=str(path))
    results, _, _ = ranks(1, on_rank_evaluate, run)[0]
    assert {key: (r["chance"], r["n"]) for key, r in results.items()} == {
        "ocr": (0.75, 4),
        "count": (1.0, 2),
    }


def on_rank_evaluate_between(run: RunConfig, between: bool) -> tuple[list, list | None, str]:
    """Metrics of three steps, records of an evaluation after the second, parameters."""
    trainer = Trainer(run, groups.build(run.parallel))
    metrics, records = [], None
    for step in range(3):
        if between and step == 2:
            _, records = evaluate(trainer.engine, trainer.tokenizer)
        found = trainer.step()
        metrics.append({name: found[name] for name in found if name != "iteration time"})
    return metrics, records, parameter_hash(trainer.engine)


@pytest.mark.parametrize("name", ["PP2", "DP2"])
def test_an_evaluation_between_steps_disturbs_nothing(ranks, scenes, name):
    size, sizes = LAYOUTS[name]
    run = evaluation_run(scenes, **sizes)
    with_one = ranks(size, on_rank_evaluate_between, run, True)
    without = ranks(size, on_rank_evaluate_between, run, False)
    for a, b in zip(with_one, without, strict=True):
        assert (a[0], a[2]) == (b[0], b[2])
    if name == "DP2":  # parameters arrive late, and yet before they are evaluated
        run = evaluation_run(scenes, overlap_grad_reduce=True, overlap_param_gather=True)
        late = ranks(size, on_rank_evaluate_between, run, True)
        assert [rank[1] for rank in late] == [rank[1] for rank in with_one]
