"""Times completions and steps of reinforcement learning against transformers and TRL."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from megatron_mm.benchmark import prompts as asked
from megatron_mm.benchmark.growth import growth
from megatron_mm.benchmark.grpo import OurGRPO, TheirGRPO, grpo_run, trl_is_missing
from megatron_mm.benchmark.measure import Timed, interleave, ratios, timed
from megatron_mm.benchmark.models import make_batch, make_run
from megatron_mm.benchmark.sides import EXPERTS, Theirs, copy_weights, randomise, same_weights
from megatron_mm.config import RunConfig, without_clvr
from megatron_mm.data.images import normalise
from megatron_mm.data.sample import Sample
from megatron_mm.engine.engine import Engine
from megatron_mm.generation.generate import Prompts as OurPrompts
from megatron_mm.generation.generate import generate
from megatron_mm.generation.sampling import Sampling
from megatron_mm.parallel.groups import Groups

PROMPTS, GROUP = 4, 8
LAYOUTS = ("padded", "prompt by prompt")
GREEDY_TOKENS = 16


def _run(name: str) -> RunConfig:
    run = make_run(name, image_stream="all", vision_memory="none")
    run.model.hybrid_layer_pattern = without_clvr(run.model.hybrid_layer_pattern)
    return run


class OurGeneration:
    def __init__(self, run: RunConfig, groups: Groups):
        self.engine = Engine.create(run, groups)

    def draw(
        self, samples: list[Sample], group: int, tokens: int, temperature: float, routes=False
    ) -> list[list[int]]:
        found = generate(
            self.engine,
            OurPrompts(samples.__getitem__, range(len(samples))),
            Sampling((asked.NEVER,), tokens, temperature),
            num_generations=group,
            max_num_seqs=len(samples) * group,
            pad_id=0,
            record_routes=routes,
        )
        assert found is not None  # nothing stops this generation
        return [c.tokens_G.tolist() for completions in found for c in completions]


class TheirGeneration:
    """transformers' `generate` with its caches: all rows in one call, padded on the left, or one
    call per prompt, without padding."""

    def __init__(self, run: RunConfig, seed: int = 0):
        self.run, self.model = run, Theirs(run).model
        randomise(self.model, seed)  # a fresh model would repeat the last token
        self.model.eval()
        self.padded = True

    def use(self, way: str) -> None:
        layout, experts = way.split(", ")
        self.way, self.padded = way, layout == "padded"
        self.model.model.language_model.set_experts_implementation(experts)

    def choose(self, samples: list[Sample], tokens: int) -> dict[str, float]:
        """Chooses the fastest way and returns the processor seconds of each. Times whole
        completions, because the fastest prefill need not be the fastest overall."""
        seconds = {}
        for way in (f"{layout}, {experts}" for layout in LAYOUTS for experts in EXPERTS):
            self.use(way)
            self.draw(samples, GROUP, 2, 1.0)
            seconds[way] = round(timed(lambda: self.draw(samples, GROUP, tokens, 1.0)).cpu, 4)
        self.use(min(seconds, key=seconds.__getitem__))
        return seconds

    def draw(
        self, samples: list[Sample], group: int, tokens: int, temperature: float
    ) -> list[list[int]]:
        calls = [samples] if self.padded else [[sample] for sample in samples]
        return [row for call in calls for row in self._call(call, group, tokens, temperature)]

    def _call(
        self, samples: list[Sample], group: int, tokens: int, temperature: float
    ) -> list[list[int]]:
        width = max(len(sample.tokens_T) for sample in samples)
        ids = torch.zeros(len(samples), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            ids[row, width - len(sample.tokens_T) :] = sample.tokens_T
            mask[row, width - len(sample.tokens_T) :] = 1
        # Rows are repeated here, because num_return_sequences repeats each tile by itself: a prompt
        # of two tiles would see the first one twice.
        pixels, data = [], self.run.data
        for sample in samples:
            batch = make_batch(self.run, [sample])
            pixels += [batch.pixels_NCHW[batch.stream_tiles]] * group if sample.images else []
        drawn = self.model.generate(
            input_ids=ids.repeat_interleave(group, 0),
            attention_mask=mask.repeat_interleave(group, 0),
            **(
                {"pixel_values": normalise(torch.cat(pixels), data.image_mean, data.image_std)}
                if pixels
                else {}
            ),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        return drawn[:, width:].tolist()


def _same_greedy(ours: OurGeneration, theirs: TheirGeneration, samples: list[Sample]) -> dict:
    """Counts prompts with the same greedy tokens on both sides, with transformers unpadded and
    padded."""
    mine = ours.draw(samples, 1, GREEDY_TOKENS, 0.0)
    found = {}
    for layout in LAYOUTS:
        theirs.use(f"{layout}, eager")
        given = theirs.draw(samples, 1, GREEDY_TOKENS, 0.0)
        found[layout] = sum(a == b for a, b in zip(mine, given, strict=True))
    return found


def generation(name: str, groups: Groups, rounds: int, warmup: int, tokens: int) -> dict[str, Any]:
    """Times eight completions of `tokens` tokens for each of four prompts."""
    run = _run(name)
    ours, theirs = OurGeneration(run, groups), TheirGeneration(run)
    copy_weights(theirs.model, ours.engine.chunks[0])
    samples = asked.make_prompts(run, name, PROMPTS, images=True, seed=0)
    same = _same_greedy(ours, theirs, samples)
    tried = theirs.choose(samples, tokens)
    our_runs, their_runs, recorded = (
        side[warmup:]
        for side in interleave(
            [
                lambda _: ours.draw(samples, GROUP, tokens, 1.0),
                lambda _: theirs.draw(samples, GROUP, tokens, 1.0),
                lambda _: ours.draw(samples, GROUP, tokens, 1.0, routes=True),
            ],
            rounds + warmup,
        )
    )
    for runs in (our_runs, their_runs, recorded):
        assert all(len(row) == tokens for run in runs for row in run.result)
    return {
        "prompts": PROMPTS,
        "completions_of_each": GROUP,
        "new_tokens": tokens,
        "prompt_tokens": [len(sample.tokens_T) for sample in samples],
        "prompt_tiles": [sum(len(i.stream) for i in sample.images) for sample in samples],
        "ours_tokens_per_second": _speed(our_runs, tokens),
        "transformers_tokens_per_second": _speed(their_runs, tokens),
        **ratios(their_runs, our_runs),
        "prompts_of_equal_greedy_tokens": same,
        "transformers_uses": theirs.way,
        "transformers_tried_cpu_seconds": tried,
        "with_recorded_routes": ratios(recorded, our_runs),
    }


def _speed(runs: list[Timed], tokens: int) -> float:
    return round(statistics.median(PROMPTS * GROUP * tokens / run.seconds for run in runs), 1)


def step(name: str, groups: Groups, rounds: int, warmup: int, tokens: int) -> dict[str, Any] | str:
    """Times a GRPO step of the fused model on text prompts: TRL takes images only from a processor,
    and this model has none in transformers."""
    missing = trl_is_missing("GRPOTrainer")
    if missing:
        return missing
    run = _run(name)
    samples = asked.make_prompts(run, name, PROMPTS, images=False, seed=0)
    longest = max(len(sample.tokens_T) for sample in samples)
    grpo_run(run, PROMPTS, GROUP, tokens, longest)
    theirs = TheirGRPO(run, Theirs(run), asked.Prompts(samples))
    tried = theirs.choose()
    ours = OurGRPO(run, groups, asked.Prompts(samples))
    try:
        same_weights(ours, theirs.theirs)
        sides = [lambda _: ours.step(), lambda _: theirs.step()]
        our_runs, their_runs = (side[warmup:] for side in interleave(sides, rounds + warmup))
    finally:
        ours.close()
    lengths = {run.result for run in our_runs + their_runs}
    assert lengths == {tokens}, f"completions of {lengths} tokens"
    return {
        "prompts": "text only",
        "prompt_tokens": [len(sample.tokens_T) for sample in samples],
        "new_tokens": tokens,
        "ours_seconds": round(statistics.median(run.seconds for run in our_runs), 4),
        "trl_seconds": round(statistics.median(run.seconds for run in their_runs), 4),
        **ratios(their_runs, our_runs),
        "trl_tried_cpu_seconds": tried,
    }


def compare(name: str, groups: Groups, rounds: int, warmup: int, tokens: int) -> dict[str, Any]:
    """Compares one model: completions, a whole step, and the growth of the cost of a token."""
    return {
        "generation": generation(name, groups, rounds, warmup, tokens),
        "grpo_step": step(name, groups, rounds, warmup, tokens),
        "token_at_512_over_16": growth(_run(name), groups, PROMPTS * GROUP, rounds, warmup),
    }
