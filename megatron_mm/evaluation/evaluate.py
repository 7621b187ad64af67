"""Accuracy per skill: greedy answers to the questions of a file, scored row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_mm.config import model_stages
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.sample import Sample
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import raise_together
from megatron_mm.errors import DataError
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.evaluation.scoring import chance, score
from megatron_mm.generation.generate import Prompts, generate
from megatron_mm.generation.looked import Looked, gather_looked
from megatron_mm.generation.sampling import Sampling
from megatron_mm.outputs import whole_file
from megatron_mm.parallel.groups import Groups
from megatron_mm.parallel.param_layout import layouts
from megatron_mm.report.metrics_log import ANSWERS_FILE, RESULTS_FILE

Results = dict[str, dict[str, float]]
SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
)


def open_questions(
    engine: Engine, tokenizer: Tokenizer, *, check: bool = False
) -> tuple[EvalSet, list[str]]:
    """Opens the validation questions and returns them with the result key of each. Their rows are
    read on the first rank: on all of them they would be read as often as there are ranks.

    Args:
        check: whether to read also the headers of their images.
    Raises:
        DataError: on every rank, if a row is bad.
    """
    run, error = engine.run, None
    assert run.data.valid_data is not None, "an evaluation needs `valid_data`"
    questions: EvalSet | None = None
    found: list[list[str]] = [[]]
    try:
        questions = EvalSet(run.data.valid_data, run, tokenizer, run.evaluation.eval_samples)
        if dist.get_rank() == 0:
            for index in range(len(questions)):
                found[0].append(questions.key(index))
                if check:
                    questions.check(index)
    except DataError as problem:
        error = str(problem)
    raise_together(engine.groups, error)
    assert questions is not None  # else there was an error
    dist.broadcast_object_list(found, src=0, group=engine.groups.world)
    return questions, found[0]


class _Asked(NamedTuple):
    """The part of an `EvalItem` that is needed once it has been read: no pixels."""

    key: str
    ground_truth: str
    scorer: str


def _answers(
    engine: Engine, tokenizer: Tokenizer, questions: EvalSet, asked: list[int], stop
) -> list[tuple[int, _Asked, str, Looked | None]] | None:
    """Returns (index, question, answer, where it looked) of each question in `asked`, on the
    reader; an empty list on other ranks; None if any rank wants to stop."""
    settings = engine.run.evaluation
    items: list[_Asked] = []

    def read(number: int) -> Sample:
        item = questions[asked[number]]
        items.append(_Asked(item.key, item.ground_truth, item.scorer))
        return item.sample

    found = generate(
        engine,
        Prompts(read, asked),
        Sampling(
            tokenizer.end_ids,
            settings.max_new_tokens,
            temperature=0.0,
            looks=LookTokens.of(engine.run, tokenizer),
        ),
        max_num_seqs=settings.eval_batch_size,
        pad_id=tokenizer.pad_id,
        stop=stop,
    )
    if found is None:
        return None
    completions = [completion for (completion,) in found]
    looked = gather_looked(engine, completions)
    texts = [tokenizer.decode_answer(completion.tokens_G.tolist()) for completion in completions]
    if not engine.groups.is_reader:
        return []
    places: Sequence[Looked | None] = [None] * len(texts) if looked is None else looked
    return list(zip(asked, items, texts, places, strict=True))


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: EvalSet,
    chosen: Iterable[int],
    keys: Sequence[str],
    stop: Callable[[], bool] = lambda: False,
) -> list[dict] | None:
    """Asks questions and scores the answers. Every rank of the job calls it.

    Args:
        chosen: indices of the questions.
        keys: result keys of all questions.

    Returns:
        A record for each chosen question, by index, the same on every rank; None if `stop`
        returned true on any rank.

    Raises:
        DataError: on every rank, if a row is bad or a scorer fails on any of them.
    """
    groups = engine.groups
    # Questions of one key are asked together, since their answers have similar lengths.
    order = sorted(chosen, key=keys.__getitem__)
    asked = order[groups.pg.dp.rank() :: groups.pg.dp.size()]
    found = _answers(engine, tokenizer, questions, asked, stop)
    if found is None:
        return None
    records, error = [], None
    try:
        for index, item, text, looked in found:
            record = {"index": index, "key": item.key, "prediction": text}
            record |= {"truth": item.ground_truth, "scorer": item.scorer}
            record["score"] = score(item.scorer, text, item.ground_truth)
            if looked is not None:
                record["looked"] = looked
            records.append(record)
    except DataError as problem:
        error = problem
    raise_together(groups, error)
    parts: list = [None] * groups.world.size()
    dist.all_gather_object(parts, records, group=groups.world)
    return sorted((r for part in parts for r in part), key=lambda r: r["index"])


def evaluate(
    engine: Engine, tokenizer: Tokenizer, stop: Callable[[], bool] = lambda: False
) -> tuple[Results, list[dict]]:
    """Evaluates the model on the validation questions. Every rank of the job calls it.

    Returns:
        (results by key, a record per question), the same on every rank; both empty if `stop`
        returned true on any rank. A result holds accuracy and chance (score of the best constant
        answer), from 0 to 1, and the number of questions n.

    Raises:
        DataError: on every rank, if a row is bad.
    """
    questions, keys = open_questions(engine, tokenizer)
    records = ask(engine, tokenizer, questions, range(len(keys)), keys, stop)
    if records is None:
        return {}, []
    constant = chance((r["key"], r["scorer"], r["truth"]) for r in records)
    results: Results = {}
    for key in sorted(constant):
        scores = [r["score"] for r in records if r["key"] == key]
        mean = sum(scores) / len(scores)
        results[key] = {"accuracy": mean, "chance": constant[key], "n": len(scores)}
    return results, records


def write_record(groups: Groups, path: Path, record: dict, indent: int | None = None) -> None:
    """Writes `record` as JSON on the first rank; see `write_text`."""
    write_text(groups, path, json.dumps(record, indent=indent) + "\n")


def write_text(groups: Groups, path: Path, text: str) -> None:
    """Writes a file on the first rank, whole or not at all. Every rank calls it.

    Raises:
        DataError: on every rank, if it cannot be written.
    """
    error = None
    if dist.get_rank() == 0:
        try:
            with whole_file(path) as partial:
                partial.write_text(text)
        except OSError as problem:
            error = f"cannot write {path}: {problem}"
    raise_together(groups, error)


def write_results(
    engine: Engine,
    results: Results,
    records: list[dict],
    folder: Path,
    *,
    iteration: int,
    seconds: float,
) -> None:
    """Writes results.json (accuracies, model size and layout) and answers.jsonl (the record of
    every question, to compare runs question by question). Every rank calls it.

    Args:
        iteration: optimizer steps done.
        seconds: time trained.
    """
    run, groups = engine.run, engine.groups
    sizes = {name: math.prod(layout.global_shape) for name, _, layout in layouts(*engine.modules)}
    parts: list = [None] * groups.world.size()
    dist.all_gather_object(parts, sizes, group=groups.world)
    parallel = run.parallel
    record = {
        "skills": results,
        "iteration": iteration,
        "seconds": seconds,
        "parameters": sum({k: v for part in parts for k, v in part.items()}.values()),
        "layout": {
            **{name: getattr(parallel, name) for name in SIZES},
            "data_parallel_size": groups.pg.dp.size(),
        },
        "stages": [" ".join(layer.kind for layer in stage.layers) for stage in model_stages(run)],
    }
    write_record(groups, folder / RESULTS_FILE, record, indent=1)
    write_text(groups, folder / ANSWERS_FILE, "".join(json.dumps(r) + "\n" for r in records))
