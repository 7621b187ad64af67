"""Reward functions that succeed, fail, hang or crash, for the worker processes of reward tests."""

import asyncio
import ctypes
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
