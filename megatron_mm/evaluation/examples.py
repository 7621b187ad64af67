"""Writes evaluation.json, with example questions, attention of looks and experts by skill, and
experts_before.json, with the experts before training."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_mm.config import memories_of_pairs, parse_pattern, token_multiple
from megatron_mm.config.layers.looks import LOOK
from megatron_mm.data.batch import Microbatch
from megatron_mm.data.loading.packing import chunks
from megatron_mm.data.looks import LookTokens
from megatron_mm.data.messages import IMAGE_MARK
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.engine.feed import from_reader, receive
from megatron_mm.evaluation.evaluate import ask, open_questions, write_record
from megatron_mm.evaluation.probe import Load, Looks, probe
from megatron_mm.evaluation.questions import EvalItem, EvalSet
from megatron_mm.generation.answers import answered
from megatron_mm.report.metrics_log import BEFORE_FILE, EVALUATION_FILE

SHOWN_PER_KEY = 3  # examples in the report
PROBED_PER_KEY = 32  # questions behind the experts-by-skill map


def write_examples(engine: Engine, tokenizer: Tokenizer, records: list[dict], folder: Path) -> None:
    """Probes some answered questions of every key and writes folder/evaluation.json. Every rank
    calls it.

    Args:
        records: records of `evaluate`, the same on every rank.
    """
    # All replicas do the same work, because expert parallelism couples their forward passes.
    valid_data = engine.run.data.valid_data
    assert valid_data is not None, "an evaluation needs `valid_data`"
    questions = EvalSet(valid_data, engine.run, tokenizer)
    examples: list[dict] = []
    load: dict[str, Load] = {}
    engine.training(False)
    for key, places in _probed([record["key"] for record in records]).items():
        chosen = [records[place] for place in places]
        items, answers, looks, routes = _probe_records(engine, tokenizer, questions, chosen)
        if items:
            load[key] = {layer: counts.sum(0) for layer, counts in routes.items()}
            for i in range(min(SHOWN_PER_KEY, len(items))):
                shown = _example(chosen[i], items[i], folder)
                shown["looks"] = _looks(engine, tokenizer, items[i], answers[i], looks, i)
                examples.append(shown)
    engine.training(True)
    record = {"examples": examples, "experts": _experts(load)}
    write_record(engine.groups, folder / EVALUATION_FILE, record)


def write_experts_before(
    engine: Engine, tokenizer: Tokenizer, folder: Path, stop: Callable[[], bool]
) -> None:
    """Writes folder/experts_before.json: experts by skill over the questions that `write_examples`
    will probe, with the model's current answers. Writes nothing if `stop` returns true on any rank.
    Every rank calls it."""
    questions, keys = open_questions(engine, tokenizer)
    probed = _probed(keys)
    chosen = sorted(place for places in probed.values() for place in places)
    records = ask(engine, tokenizer, questions, chosen, keys, stop)
    if records is None:
        return
    load: dict[str, Load] = {}
    engine.training(False)
    for key in probed:
        of_key = [record for record in records if record["key"] == key]
        *_, routes = _probe_records(engine, tokenizer, questions, of_key)
        if routes:
            load[key] = {layer: counts.sum(0) for layer, counts in routes.items()}
    engine.training(True)
    write_record(engine.groups, folder / BEFORE_FILE, {"experts": _experts(load)})


def _probed(keys: Sequence[str]) -> dict[str, list[int]]:
    """Chooses the positions in `keys` to probe, by key."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    chosen = {}
    for turn, key in enumerate(sorted(places)):
        # Keys ask about the same images in the same order, so each begins at another place.
        first = turn * SHOWN_PER_KEY % max(1, len(places[key]) - PROBED_PER_KEY)
        chosen[key] = places[key][first : first + PROBED_PER_KEY]
    return chosen


def _probe_records(
    engine: Engine, tokenizer: Tokenizer, questions: EvalSet, records: list[dict]
) -> tuple[list[EvalItem], list[list[int]], Looks, Load]:
    """Returns, on the reader, the questions, the tokens of their answers with the slots of looks,
    and what a forward pass over both shows, in microbatches that hold no more than those of
    training; elsewhere nothing."""
    groups, run = engine.groups, engine.run
    tokens = LookTokens.of(run, tokenizer)
    items: list[EvalItem] = []
    answers: list[list[int]] = []
    lengths: list[tuple[int, int]] = []  # of each prompt and its answer

    def read() -> list[Microbatch]:
        items.extend(questions[record["index"]] for record in records)
        whole = []
        for item, record in zip(items, records, strict=True):
            ids = [*tokenizer.encode(record["prediction"]), tokenizer.message_end_id]
            whole.append(answered(item.sample, torch.tensor(ids), tokens))
            prompt = len(item.sample.tokens_T)
            answers.append(whole[-1].tokens_T[prompt:].tolist())
            lengths.append((prompt, len(answers[-1])))
        most = run.training.micro_batch_size * run.data.seq_length
        split = chunks([sample.size for sample in whole], most, run.data.max_pack_tiles)
        multiple = token_multiple(run)
        return [questions.joined([whole[i] for i in chunk], multiple) for chunk in split]

    batches, _ = receive(groups, read)
    lengths = from_reader(groups, lengths)
    looks: Looks = {}
    counts: dict[int, list[torch.Tensor]] = defaultdict(list)
    first = 0
    for batch in batches:
        own = lengths[first : first + len(batch.samples)]
        first += len(own)
        some_looks, some_load = probe(engine, batch, [p for p, _ in own], [a for _, a in own])
        for pair, weights in some_looks.items():
            looks[pair] = [*looks.get(pair, ()), *weights]
        for layer, its in some_load.items():
            counts[layer].append(its)
    return items, answers, looks, {layer: torch.cat(its) for layer, its in counts.items()}


def _example(record: dict, item: EvalItem, folder: Path) -> dict:
    image = item.images[0] if item.images else None
    path = image.path.resolve() if image and image.path else None
    return {
        "key": record["key"],
        "image": os.path.relpath(path, folder.resolve()) if path else None,
        "box": image.box if image else None,
        "question": item.question.replace(IMAGE_MARK, "").strip(),
        "prediction": record["prediction"],
        "truth": record["truth"],
        "score": record["score"],
        "looked": record.get("looked"),
    }


def _looks(
    engine: Engine, tokenizer: Tokenizer, item: EvalItem, answer: list[int], looks: Looks, i: int
) -> list[dict]:
    """Attention weights of each look over the first image, with the patches of the memory that it
    reads in reading order; of a pyramid the finest."""
    if not item.sample.images:
        return []
    model = engine.run.model
    layers, reads = parse_pattern(model.hybrid_layer_pattern), memories_of_pairs(model)
    opened = [n for n, layer in enumerate(layers) if layer.kind == LOOK.letter]
    found = []
    for pair in sorted(looks):
        held = item.sample.images[0].memories[reads[pair].name]
        finest = (held.extents_M == held.extents_M.min()).nonzero().flatten()
        where = held.coordinates_M2[finest]
        rows, columns = len(where[:, 0].unique()), len(where[:, 1].unique())
        order = finest[(where[:, 0] * 1e4 + where[:, 1]).argsort()]
        at = opened[pair]
        before = [layer.number for layer in layers[:at] if layer.number is not None]
        weights = looks[pair][i][: len(answer)][:, order]
        found.append(
            {
                "pair": pair,
                "layer": before[-1] if before else 0,
                "memory": reads[pair].name,
                "tokens": [tokenizer.decode([t]) for t in answer],
                "grid": [rows, columns],
                "weights": [[round(float(w), 5) for w in row] for row in weights],
            }
        )
    return found


def _experts(load: dict[str, Load]) -> dict:
    """Share of each expert in the routing choices, by key and layer."""
    keys = sorted(load)
    layers = sorted({layer for counts in load.values() for layer in counts})
    shares = [
        [(load[key][layer] / load[key][layer].sum()).tolist() for layer in layers] for key in keys
    ]
    return {"keys": keys, "layers": layers, "load": shares}
