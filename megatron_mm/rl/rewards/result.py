"""The rewards of a batch of completions: values, and the reasons why some are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_mm.rl.rewards.messages import Answer, Score


class Task(NamedTuple):
    """Samples `start` to `stop` (exclusive) for one function."""

    function: int
    start: int
    stop: int


@dataclass(frozen=True)
class Failure:
    sample: int
    name: str  # of the reward
    reason: str  # one line


@dataclass
class Rewards:
    """The rewards of N samples by C functions; `RewardRunner.score` fills it in."""

    names: list[str]
    # NaN where a reward does not apply (None) and where it failed
    values: list[list[float]]  # [N][C]
    failed: list[list[bool]]  # [N][C]
    # Where the value stands in place of an answer that never came; its reason is a failure's.
    lost: list[list[bool]]  # [N][C]
    failures: list[Failure] = field(default_factory=list)  # by sample
    seconds: dict[str, float] = field(default_factory=dict)  # of workers, by reward
    logged: list[tuple[str, float]] = field(default_factory=list)  # by `log_metric`

    @classmethod
    def empty(cls, names: Sequence[str], count: int) -> Rewards:
        values = [[float("nan")] * len(names) for _ in range(count)]
        failed, lost = ([[False] * len(names) for _ in range(count)] for _ in range(2))
        return cls([*names], values, failed, lost, seconds=dict.fromkeys(names, 0.0))

    def record(self, task: Task, answer: Answer | str) -> None:
        """Enters the scores of a task's samples, or the reason why none of them has one."""
        if isinstance(answer, Answer):
            self.logged += answer.logged
        for place, sample in enumerate(range(task.start, task.stop)):
            score = Score(None, answer) if isinstance(answer, str) else answer.scores[place]
            if score.reason is not None:
                self.failed[sample][task.function] = True
                self.failures.append(Failure(sample, self.names[task.function], score.reason))
            elif score.value is not None:
                self.values[sample][task.function] = score.value

    def record_lost(self, task: Task, reason: str, value: float) -> None:
        """Enters `value` for the samples of a task whose answer never came."""
        for sample in range(task.start, task.stop):
            self.values[sample][task.function] = value
            self.lost[sample][task.function] = True
            self.failures.append(Failure(sample, self.names[task.function], reason))
