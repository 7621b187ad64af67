"""Reward functions that succeed, fail, hang or crash, for the worker processes of reward tests."""

import asyncio
import ctypes
import json
import os
import re
import subprocess
import sys
import time


def good(prompts, completions, completion_ids, length, **columns):
    return [float(len(c) == n) for c, n in zip(completions, length, strict=True)]


def maybe(completions, **columns):
    """Returns None, NaN, text or a number, as the completion says."""
    return [{"none": None, "nan": float("nan"), "text": "high"}.get(c, 2) for c in completions]


async def patient(completions, **columns):
    await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]


def by_word(completions, **columns):
    """Does what the completion says."""
    return [_do(c) for c in completions]


def _do(word):
    if word == "raise":
        raise ValueError("no\nway " + "x" * 10**6)
    if word == "exit":
        sys.exit(3)
    if word == "die":
        os._exit(7)
    if word == "segfault":
        ctypes.string_at(0)
    if word == "sleep":
        time.sleep(600)
    if word == "regex":  # holds Python's lock for years
        re.match(r"(a+)+$", "a" * 60 + "b")
    if word == "child":  # waits for a process of its own
        child = subprocess.Popen(["sleep", os.environ["SLEEP_SECONDS"]])
        child.wait()
    if word == "print":
        for stream in (sys.stdout, sys.stderr):
            for _ in range(50):
                print("x" * 10**6, file=stream)
        os.write(1, b"y" * 10**7)
    if word == "pid":
        return os.getpid()
    return 1.0


def wrong_count(completions, **columns):
    return [1.0] * (len(completions) + 1)


def nothing(completions, **columns):
    return None


def tensor_like(completions, **columns):
    import numpy as np

    return np.ones(len(completions), dtype=np.float32) * 0.5


def routes(completions, routed_experts):
    return [float(r.sum()) for r in routed_experts]


def no_routes(completions, **columns):
    return [float("routed_experts" in columns)] * len(completions)


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Scores one completion in verl's form."""
    right = solution_str == ground_truth and data_source == "digits"
    return {"score": float(right) + (extra_info or {}).get("bonus", 0), "acc": right}


def batch_of(completions, **columns):
    return [float(len(completions))] * len(completions)


not_a_function = 3


def conversational(completions, **columns):
    """Scores TRL's conversational form, as TRL's own examples do."""
    return [float(len(completion[0]["content"])) for completion in completions]


def messages_of(prompts, completions, **columns):
    """Reads every message of prompts and completions."""
    said = [[m["role"] for m in [*p, *c]] for p, c in zip(prompts, completions, strict=True)]
    return [float(roles == ["user", "assistant"]) for roles in said]


def by_get(completions, log_metric, **columns):
    """Reads the last message with get, and logs a number for each completion."""
    for _ in completions:
        log_metric("mine/calls", 1)
    return [float(len(completion[-1].get("content"))) for completion in completions]


def careful(completions, **columns):
    """Catches whatever goes wrong, as verl's examples do."""
    rewards = []
    for completion in completions:
        try:
            rewards.append(float(len(completion[0]["content"])))
        except Exception:
            rewards.append(0.0)
    return rewards


async def patient_messages(completions, **columns):
    await asyncio.sleep(0.01)
    return [float(len(completion[0]["content"])) for completion in completions]


def both_forms(completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text)) for text in texts]


def plain_texts(prompts, completions, **columns):
    """Reads prompts and completions as TRL's text form has them."""
    pairs = zip(prompts, completions, strict=True)
    return [
        float((p + c).upper() == "QUESTION" and c[0] == c[:1] and "N" not in c) for p, c in pairs
    ]


def of_json(completions, **columns):
    """Indexes what a text holds, which is no reading of the text as messages."""
    return [float(json.loads(c)["answer"]) for c in completions]


def of_prompts(prompts, completions, **columns):
    """Reads prompts as messages and completions as text."""
    questions = [prompt[-1]["content"] for prompt in prompts]
    return [float(q + c == "question") for q, c in zip(questions, completions, strict=True)]


def shaped(completions, shape, **columns):
    """Returns the rewards in the shape that the row names."""
    ones = [1.0] * len(completions)
    made = {
        "dict": {i: 1.0 for i, _ in enumerate(completions)},
        "set": {1.0},
        "text": "1" * len(completions),
        "texts": ["1"] * len(completions),
        "huge": [1e300] * len(completions),
        "integer": [10**400] * len(completions),
        "nested": [[one] for one in ones],
        "number": 1.0,
        "generator": (one for one in ones),
    }
    return made[shape[0]]


def no_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": 1.0}


async def late_error(completions, **columns):
    await asyncio.sleep(0.01)
    raise RuntimeError("the judge is down")
