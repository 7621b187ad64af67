"""Accuracy per skill: greedy answers to the questions of a JSONL file, scored row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.config import model_stages
from megatron_mm.data.errors import DataError
from megatron_mm.data.evalset import EvalItem, EvalSet
from megatron_mm.data.scoring import chance, score
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.parallel.groups import Groups
from megatron_mm.parallel.layout import layouts
from megatron_mm.train.engine import Engine
from megatron_mm.train.feed import agree, receive
from megatron_mm.train.generate import generate

Results = dict[str, dict[str, float]]


def _rounds(keys: list[str], batch_size: int, replicas: int) -> list[list[list[int]]]:
    """rounds -> replicas -> indices. Questions of one kind go together, since their answers
    are of one length; every replica gets as many rounds, the last ones perhaps empty-handed."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches += [[]] * (-len(batches) % replicas)
    return [batches[i : i + replicas] for i in range(0, len(batches), replicas)]


def open_questions(engine: Engine, tokenizer: Tokenizer) -> tuple[EvalSet, list[str]]:
    """The questions and the key of each. Raises DataError on every rank if a row is bad."""
    run, questions, keys, error = engine.run, None, [], None
    try:
        questions = EvalSet(run.data.valid_data, run, tokenizer, run.evaluation.eval_samples)
        keys = [questions.key(index) for index in range(len(questions))]
    except DataError as problem:
        error = str(problem)
    agree(engine.groups, error)
    return questions, keys


def answer(
    engine: Engine, tokenizer: Tokenizer, questions: EvalSet, indices: list[int], stop: bool
) -> tuple[list[tuple[int, EvalItem]], list[str]] | None:
    """The replica's answers to `indices`; on ranks that do not read, no items; None if any
    rank wants to stop.

    Raises:
        DataError: on every rank, if a row is bad.
    """
    groups, settings = engine.groups, engine.run.evaluation
    # Several microbatches at once keep every pipeline stage busy.
    parts = groups.pg.pp.size()
    size = -(-max(1, len(indices)) // parts)
    chunks = [indices[i * size : (i + 1) * size] for i in range(parts)]
    items: list[list[EvalItem]] = []

    def read():
        items.extend([questions[i] for i in chunk] for chunk in chunks)
        # Nothing to ask, but other replicas may need our part of their forward passes.
        return [questions.collate(chunk or [questions[0]]) for chunk in items]

    prompts, stopping = receive(groups, read, stop)
    if stopping:
        return None
    answers = generate(
        engine,
        prompts,
        stop_id=tokenizer.message_end_id,
        pad_id=tokenizer.pad_id,
        max_new_tokens=settings.max_new_tokens,
    )
    if not groups.is_reader:
        return [], []
    asked = [
        pair
        for chunk, row in zip(chunks, items, strict=True)
        for pair in zip(chunk, row, strict=True)
    ]
    texts = [
        _text(tokens, tokenizer)
        for chunk, tokens_NG in zip(chunks, answers, strict=True)
        for tokens, _ in zip(tokens_NG, chunk, strict=False)
    ]
    return asked, texts


def _text(tokens: torch.Tensor, tokenizer: Tokenizer) -> str:
    ids = tokens.tolist()
    if tokenizer.message_end_id in ids:
        ids = ids[: ids.index(tokenizer.message_end_id)]
    return tokenizer.decode(ids)


def evaluate(
    engine: Engine, tokenizer: Tokenizer, stop: Callable[[], bool] = lambda: False
) -> tuple[Results, list[dict]]:
    """(results by key, one record per question); the same on every rank.

    Every rank of the job calls it. A result holds accuracy and chance (the best constant answer)
    from 0 to 1 and the number of questions n. Both are empty if `stop` turned true on any rank.
    """
    groups = engine.groups
    questions, keys = open_questions(engine, tokenizer)
    replica, replicas = groups.pg.dp.rank(), groups.pg.dp.size()
    records = []
    engine.training(False)
    for round_ in _rounds(keys, engine.run.evaluation.eval_batch_size, replicas):
        found = answer(engine, tokenizer, questions, round_[replica], stop())
        if found is None:
            engine.training(True)
            return {}, []
        asked, texts = found
        for (index, item), text in zip(asked, texts, strict=True):
            record = {"index": index, "key": item.key, "prediction": text}
            record |= {"truth": item.ground_truth, "scorer": item.scorer}
            record["score"] = score(item.scorer, text, item.ground_truth)
            records.append(record)
    engine.training(True)
    parts: list = [None] * groups.world.size()
    dist.all_gather_object(parts, records, group=groups.world)
    records = sorted((r for part in parts for r in part), key=lambda r: r["index"])
    constant = chance((r["key"], r["scorer"], r["truth"]) for r in records)
    results: Results = {}
    for key in sorted(constant):
        scores = [r["score"] for r in records if r["key"] == key]
        mean = sum(scores) / len(scores)
        results[key] = {"accuracy": mean, "chance": constant[key], "n": len(scores)}
    return results, records


def write_record(groups: Groups, path: Path, record: dict, indent: int | None = None) -> None:
    """The first rank writes `record` as JSON. Every rank calls it.

    Raises:
        DataError: on every rank, if it cannot be written.
    """
    error = None
    if dist.get_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=indent) + "\n")
        except OSError as problem:
            error = f"cannot write {path}: {problem}"
    agree(groups, error)


def write_results(
    engine: Engine, results: Results, folder: Path, *, iteration: int, seconds: float
) -> None:
    """results.json: the accuracies, and what was trained where. Every rank calls it."""
    run, groups = engine.run, engine.groups
    sizes = {name: math.prod(layout.global_shape) for name, _, layout in layouts(*engine.chunks)}
    parts: list = [None] * groups.world.size()
    dist.all_gather_object(parts, sizes, group=groups.world)
    parallel = run.parallel
    record = {
        "skills": results,
        "iteration": iteration,
        "seconds": seconds,
        "parameters": sum({k: v for part in parts for k, v in part.items()}.values()),
        "layout": {
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "expert_model_parallel_size": parallel.expert_model_parallel_size,
            "data_parallel_size": groups.pg.dp.size(),
        },
        "stages": [" ".join(layer.kind for layer in stage.layers) for stage in model_stages(run)],
    }
    write_record(groups, folder / "results.json", record, indent=1)
