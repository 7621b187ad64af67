"""Turns of several tokens: the same completions for any number, few looks at the device, tensors
that stay where they are, and steps as recordings.

A function that starts with `on_rank_` runs on every rank; the test compares what they return.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch
from megatron.core import parallel_state

from megatron_mm.config import RunConfig
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engine.engine import Engine
from megatron_mm.evaluation.questions import EvalSet
from megatron_mm.generation import generate as generation
from megatron_mm.generation.generate import Prompts
from megatron_mm.generation.graphs import Replayed
from megatron_mm.generation.sampling import Sampling
from support.trainers import EP2, LAYOUTS, PP2, TP2, digits_run, with_two_memories
from support.weights import random_engine

NEVER, MOST, GROUP = -1, 21, 2
ASKED = (0, 12, 8, 5, 20, 3, 17)


def complete(engine: Engine, sampling: Sampling, rows: int, turn: int, routes: bool = False):
    """The completions of this replica's questions."""
    run = engine.run
    tokenizer = load_tokenizer(run.data.tokenizer_model)
    questions, dp = EvalSet(run.data.valid_data, run, tokenizer), engine.groups.pg.dp
    asked = ASKED[dp.rank() :: dp.size()]
    return generation.generate(
        engine,
        Prompts(lambda i: questions[asked[i]].sample, asked),
        sampling,
        num_generations=GROUP,
        max_num_seqs=rows,
        pad_id=tokenizer.pad_id,
        record_routes=routes,
        tokens_a_turn=turn,
    )


def details(engine: Engine, rows: int, turn: int, stops: tuple[int, ...]) -> list[tuple]:
    """(tokens, log-probabilities, finished, routes) of the completions."""
    completions = complete(engine, Sampling(stops, MOST, 0.8, seed=3), rows, turn, routes=True)
    return [
        (c.tokens_G, c.logprobs_G, c.finished, c.routes_SLk) for group in completions for c in group
    ]


def on_rank_turns(run: RunConfig, rows: int, turns: tuple[int, ...], stops: tuple[int, ...]):
    """`details` by the number of tokens a turn."""
    engine = random_engine(run)
    return {turn: details(engine, rows, turn, stops) for turn in turns}


# Stop tokens enough that many rows end inside a turn, and rows too few for all completions.
STOPS = tuple(range(0, 384, 7))


@pytest.mark.parametrize("layout", ["one rank", "TP2", "PP2", "EP2", "CP2"])
def test_completions_do_not_depend_on_the_tokens_a_turn(ranks, scenes, layout):
    size, sizes = LAYOUTS[layout]
    for answer in ranks(size, on_rank_turns, digits_run(scenes, **sizes), 6, (1, 3, 8), STOPS):
        lengths = {len(tokens) for tokens, *_ in answer[1]}
        assert len(lengths) > 2 and max(lengths) <= MOST
        assert any(finished for _, _, finished, _ in answer[1])
        for turn in (3, 8):
            for one, other in zip(answer[1], answer[turn], strict=True):
                assert torch.equal(one[0], other[0]) and one[2] == other[2]
                # Rows end, and rows are filled again, at other steps: kernels of other shapes.
                assert (one[1] - other[1]).abs().max() <= 1e-5
                assert one[3].shape == other[3].shape
                assert (one[3] == other[3]).double().mean() > 0.98


def test_without_ends_and_refills_the_tokens_a_turn_change_no_bit(ranks, scenes):
    rows = GROUP * len(ASKED)
    (answer,) = ranks(1, on_rank_turns, digits_run(scenes), rows, (1, 5, 8, 64), (NEVER,))
    for turn in (5, 8, 64):
        for one, other in zip(answer[1], answer[turn], strict=True):
            assert all(torch.equal(one[n], other[n]) for n in (0, 1, 3))


def on_rank_looks(run: RunConfig, turn: int) -> Counter:
    """How often the ranks agreed on a turn, filled rows, and how often the host read tokens."""
    engine = random_engine(run)
    counts, agree, read = Counter(), generation.largest, generation.on_the_host
    prefill = generation._Generation.prefill

    def agreed(values):
        counts["agreed"] += 1
        return agree(values)

    def looked(drawn):
        counts["read"] += 1
        return read(drawn)

    def filled(self):
        counts["filled"] += 1
        prefill(self)

    generation.largest, generation.on_the_host = agreed, looked
    generation._Generation.prefill = filled
    try:
        complete(engine, Sampling((NEVER,), MOST, 0.8, seed=3), GROUP * len(ASKED), turn)
    finally:
        generation.largest, generation.on_the_host = agree, read  # the rank lives on
        generation._Generation.prefill = prefill
    return counts


@pytest.mark.parametrize("turn", [1, 8])
def test_ranks_agree_and_hosts_read_once_a_turn(ranks, scenes, turn):
    for counts in ranks(2, on_rank_looks, digits_run(scenes, **EP2), turn):
        # A prefill draws the first token. The last time, the ranks agree that nothing is left.
        turns = counts["filled"] + math.ceil((MOST - 1) / turn)
        assert 0 < counts["filled"] <= len(ASKED)
        assert (counts["agreed"], counts["read"]) == (turns + 1, turns)


def on_rank_prefills(run: RunConfig, most: int | None) -> tuple[list[int], list[torch.Tensor]]:
    """The tiles of each lane's prompts that were read together, and all completions' tokens."""
    engine, tiles = random_engine(run), []
    engine.run.data.max_pack_tiles = most
    admit = generation._Generation._admit

    def admitted(self):
        batches = admit(self)
        tiles.extend(len(batch.pixels_NCHW) for batch in batches)
        return batches

    generation._Generation._admit = admitted
    try:
        found = complete(engine, Sampling(STOPS, MOST, 0.8, seed=3), GROUP * len(ASKED), 8)
    finally:
        generation._Generation._admit = admit
    return tiles, [c.tokens_G for group in found for c in group]


def test_prompts_read_together_have_no_more_tiles_than_allowed(ranks, scenes):
    """A question has 10 tiles; one that exceeds the limit is read alone."""
    run = digits_run(scenes, micro_batch_size=8)
    ((free, expected),) = ranks(1, on_rank_prefills, run, None)
    assert max(free) > 20
    for most, together in ((20, 20), (29, 20), (5, 10)):
        ((tiles, tokens),) = ranks(1, on_rank_prefills, run, most)
        assert max(tiles) == together and sum(tiles) == sum(free)
        assert all(map(torch.equal, tokens, expected))


# ---- recordings


class Stand:
    """Stands in for CUDA graphs: a recording runs the step again, and asserts what a graph needs.

    What a graph was given when it was recorded it uses for ever: no tensor may have moved, and no
    number on the host may count, such as a length.
    """

    def __init__(self, generation):
        self.generation, self.counts = generation, Counter()

    def record(self, step):
        self.counts["recorded"] += 1
        places = self.generation._addresses()
        spans = [lane.cache.span for lane in self.generation.lanes]

        def again():
            self.counts["replayed"] += 1
            assert self.generation._addresses() == places
            assert [lane.cache.span for lane in self.generation.lanes] == spans
            # The host's own numbers, which a graph cannot read.
            numbers = [
                x
                for lane in self.generation.lanes
                for x in (lane.count_R, lane.prompt_R, lane.owner_R2)
            ]
            for x in numbers:
                x.add_(10**6)
            try:
                found = step()
            finally:
                for x in numbers:
                    x.sub_(10**6)
            assert self.generation._addresses() == places
            return found

        return again


def on_rank_moved_buffer(run: RunConfig) -> tuple[bool, bool]:
    """Whether a recording would go on after a prefill of more tokens than any before."""
    engine, seen = random_engine(run), []
    shared = parallel_state.get_global_memory_buffer()
    prefill = generation._Generation.prefill

    def filled(self):
        before = self._addresses()
        prefill(self)
        again = self._addresses()
        shared.get_tensor([10**6], torch.float32, "mpu")  # as sequence parallelism gathers into it
        seen.append((before[1] != again[1], again != self._addresses()))
        shared.buffer.clear()

    generation._Generation.prefill = filled
    try:
        complete(engine, Sampling(STOPS, 3, 0.8, seed=3), GROUP * len(ASKED), 8)
    finally:
        generation._Generation.prefill = prefill
    return seen[0]


def test_recordings_end_when_a_buffer_of_the_process_moves(ranks, scenes):
    """megatron-core's own grows by taking other memory; a graph would write to the old."""
    for gathers, moved in ranks(2, on_rank_moved_buffer, digits_run(scenes, **TP2)):
        assert gathers and moved


def on_rank_recorded(run: RunConfig, rows: int, stops: tuple[int, ...]) -> tuple:
    """Completions of plain steps and of recorded ones, and what was counted."""
    engine = random_engine(run)
    made, init = [], generation._Generation.__init__

    def recording(self, *args):
        init(self, *args)
        stand = Stand(self)
        made.append(stand)
        self.replayed = Replayed(stand.record)

    found = [details(engine, rows, 8, stops)]
    generation._Generation.__init__ = recording
    try:
        found.append(details(engine, rows, 8, stops))
    finally:
        generation._Generation.__init__ = init  # the rank lives on
    return *found, made[0].counts


@pytest.mark.parametrize("layout", [{}, TP2, PP2])
def test_recorded_steps_are_the_steps(ranks, scenes, layout):
    run = with_two_memories(digits_run(scenes, **layout))
    for plain, recorded, counts in ranks(2 if layout else 1, on_rank_recorded, run, 6, STOPS):
        for one, other in zip(plain, recorded, strict=True):
            assert all(torch.equal(one[n], other[n]) for n in (0, 1, 3)) and one[2] == other[2]
        assert 0 < counts["recorded"] < counts["replayed"]


def test_a_recording_ends_when_a_tensor_moves():
    runs, records = [], []

    def record(step):
        records.append(step)
        return partial(runs.append, "recorded")

    replayed, place = Replayed(record), [1]
    step = partial(runs.append, "as it is")
    for shape, where in ((4, 1), (4, 1), (4, 1), (2, 1), (4, 1), (4, 2), (4, 2)):
        place[0] = where
        replayed.run(step, shape, lambda: place[0])
    plain, recorded = "as it is", "recorded"
    assert runs == [plain, recorded, recorded, plain, recorded, plain, recorded]
    assert len(records) == 2
