"""Rewards in worker processes: whatever a reward function does, the run goes on.

A call that hangs is killed at its time limit, and a worker that dies is replaced. No exception is
raised; the samples of such a call get a recorded failure. Under a built-in reward they get 0 as
well: there it was the completion that was too much, and a failure would spare it its advantage.
There are no threads: `score` waits for all workers at once. A call answers for itself alone: one
that a worker never began with, or that found its memory taken by earlier ones, is tried again.
"""

from __future__ import annotations

import atexit
import multiprocessing
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from megatron_mm.errors import RLError
from megatron_mm.rl.rewards.functions import parse_rewards
from megatron_mm.rl.rewards.messages import (
    Answer,
    Call,
    Failed,
    Lost,
    Message,
    Ready,
    one_line,
)
from megatron_mm.rl.rewards.process import RewardProcess, answers
from megatron_mm.rl.rewards.result import Rewards, Task

# Calls of one reward that may run out of time within one `score`. Other ranks wait meanwhile, and
# give up after `distributed_timeout_minutes`.
MAX_TIMEOUTS = 10
MAX_TRIES = 3  # of a call, where something else may be why it came to nothing
MAX_STARTS = 3  # failed starts in a row before the waiting samples are given up


class RewardRunner:
    """The reward functions of `reward_funcs`, in `num_workers` processes. Close it, or use it in a
    `with` statement; its workers end with this process in any case.

    Raises:
        RLError: at construction, in one line, for functions that cannot be loaded.
    """

    def __init__(
        self,
        reward_funcs: Sequence[str],
        num_workers: int = 2,
        timeout: float = 10.0,
        batch_size: int = 1,
        lost_value: float | None = None,
        memory: float = 2.0,
    ) -> None:
        """
        Args:
            timeout: of each call of a function, in seconds.
            batch_size: samples in a call; all of them fail if the call of a user's function fails.
                Those of a built-in one are then called one by one.
            lost_value: reward of a sample whose call ran out of time or ended its worker. None: 0
                for built-in functions, a failure for others.
            memory: GB that a worker, with all that its functions start, may hold.
        """
        self._specs = parse_rewards(reward_funcs)
        self.names = [spec.name for spec in self._specs]
        self._timeout, self._batch_size, self._lost_value = timeout, batch_size, lost_value
        self._memory = int(memory * 1e9)
        self._num_workers = num_workers if self._specs else 0
        # A fresh interpreter: a fork would copy the trainer's threads' locks and its CUDA state.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[RewardProcess] = []
        self._failed_starts = 0
        # It is registered after multiprocessing's own handler and so runs before it, which would
        # wait for the workers.
        self._at_exit = _closer(weakref.ref(self))
        atexit.register(self._at_exit)
        try:
            for _ in range(self._num_workers):
                self._workers.append(self._new_worker())
            for worker in self._workers:
                self._signature = self._first_answer(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, whatever they are doing."""
        atexit.unregister(self._at_exit)
        while self._workers:
            self._workers.pop().kill()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    @property
    def wants_routes(self) -> bool:
        """Whether any function names the argument `routed_experts`."""
        return bool(self._specs) and any(self._signature.wants_routes)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        routed_experts: Sequence[Any] | None = None,
    ) -> Rewards:
        """Returns every reward of every sample.

        Args:
            columns: the rows' other columns, each with N values.
            routed_experts: int16 [positions, layers, k] of each sample; only functions that name
                the argument get it.
        Raises:
            RLError: if the arguments differ in length; never for what a function does.
        """
        count = len(completions)
        lists = dict(columns or {}) | {"prompts": prompts, "completion_ids": completion_ids}
        if routed_experts is not None:
            lists["routed_experts"] = routed_experts
        for key, values in lists.items():
            if len(values) != count:
                raise RLError(
                    f"{key} has {len(values)} values, completions {count}; give one for each"
                )
        given = lists | {"completions": completions}
        rewards, rewarded = Rewards.empty(self.names, count), range(len(self.names))
        starts = range(0, count, self._batch_size)
        pending = deque(
            Task(f, i, min(i + self._batch_size, count)) for i, f in product(starts, rewarded)
        )
        for worker in [w for w in self._workers if w.task]:  # an interrupted call's
            self._lose(worker)
        self._failed_starts = 0
        self._timeouts = [0 for _ in rewarded]
        self._tries: Counter[Task] = Counter()
        while pending or any(worker.task for worker in self._workers):
            self._fill_up()
            if not self._workers:
                for task in pending:
                    rewards.record(task, f"no reward worker can be started ({MAX_STARTS} tries)")
                break
            for worker in [*self._workers]:
                if worker.ready and worker.task is None:
                    self._give_up(pending, rewards)
                    if pending:
                        self._send(worker, pending.popleft(), given, rewards)
            self._take_in(pending, rewards)
        for c, name in enumerate(self.names):
            if self._value_if_lost(c) is not None:
                rewards.logged += [
                    (f"rewards/{name}/frac_lost", float(row[c])) for row in rewards.lost
                ]
        rewards.failures.sort(key=lambda f: (f.sample, self.names.index(f.name)))
        return rewards

    def _give_up(self, pending: deque[Task], rewards: Rewards) -> None:
        """Records a failure for the next tasks as long as their reward has hung too often."""
        while pending and self._timeouts[pending[0].function] >= MAX_TIMEOUTS:
            reason = (
                f"given up after {MAX_TIMEOUTS} calls that took longer than {self._timeout:g} s"
            )
            rewards.record(pending.popleft(), reason)

    def _fill_up(self) -> None:
        """Replaces workers that are gone."""
        for worker in [w for w in self._workers if w.task is None and not w.process.is_alive()]:
            self._lose(worker)
        while len(self._workers) < self._num_workers and self._failed_starts < MAX_STARTS:
            try:
                self._workers.append(self._new_worker())
            except OSError:  # no memory, no processes left
                self._failed_starts += 1

    def _new_worker(self) -> RewardProcess:
        return RewardProcess(self._context, self._specs, self._memory)

    def _lose(self, worker: RewardProcess) -> None:
        self._failed_starts += not worker.ready
        self._workers.remove(worker)
        worker.kill()

    def _first_answer(self, worker: RewardProcess) -> Ready:
        found: list = []
        while not found:
            found = answers([worker])
        answer = found[0][1]
        if not isinstance(answer, Ready):
            reason = answer.reason if isinstance(answer, (Failed, Lost)) else "it said nothing"
            raise RLError(f"a reward worker cannot start: {reason}")
        worker.ready = True
        return answer

    def _send(
        self,
        worker: RewardProcess,
        task: Task,
        given: Mapping[str, Sequence[Any]],
        rewards: Rewards,
    ) -> None:
        """Sends a task to a worker, with the columns that its function takes and no others."""
        function, part = task.function, slice(task.start, task.stop)
        wants = self._signature.wants[function]
        routes = self._signature.wants_routes[function]
        arguments = ("prompts", "completions", "completion_ids", "routed_experts")
        columns = {
            key: list(values[part])
            for key, values in given.items()
            if key not in arguments and (wants is None or key in wants)
        }
        prompts, completions, ids = (list(given[key][part]) for key in arguments[:3])
        routed = given.get("routed_experts") if routes else None
        try:
            routed = None if routed is None else list(routed[part])
            call = Call(0, function, prompts, completions, ids, columns, routed)
            worker.send(task, call, self._timeout)
        except Exception as error:  # a value that cannot be pickled; nothing was written
            rewards.record(task, f"cannot be sent to a worker: {one_line(error)}")

    def _value_if_lost(self, function: int) -> float | None:
        if self._lost_value is None and self._signature.built_in[function]:
            return 0.0
        return self._lost_value

    def _enter(self, task: Task, answer: Message, pending: deque[Task], rewards: Rewards) -> None:
        """Enters the outcome of a task. Samples of a failed call are tried one by one, where one of
        them has to answer for it alone."""
        if isinstance(answer, Answer):
            rewards.record(task, answer)
            return
        assert isinstance(answer, (Failed, Lost))
        value, lost = self._value_if_lost(task.function), isinstance(answer, Lost)
        alone = self._signature.built_in[task.function] or (lost and value is not None)
        if alone and task.stop - task.start > 1:
            pending.extendleft(Task(task.function, i, i + 1) for i in range(task.start, task.stop))
        elif lost and value is not None:
            rewards.record_lost(task, answer.reason, value)
        else:
            rewards.record(task, answer.reason)

    def _is_innocent(self, worker: RewardProcess, answer: Lost) -> bool:
        """Whether an earlier call may be why a worker is lost, and the task may be tried again."""
        self._tries[worker.task] += 1
        cramped = answer.out_of_memory and worker.answered > 0
        return (not worker.begun or cramped) and self._tries[worker.task] < MAX_TRIES

    def _take_in(self, pending: deque[Task], rewards: Rewards) -> None:
        """Waits until a worker answers, dies or runs out of time, and enters the outcome."""
        waiting = [w for w in self._workers if w.task is not None or not w.ready]
        for worker, answer in answers(waiting):
            if isinstance(answer, Ready):
                worker.ready, self._failed_starts = True, 0
                continue
            if worker.task is not None:
                rewards.seconds[self.names[worker.task.function]] += time.monotonic() - worker.since
                if isinstance(answer, Lost) and self._is_innocent(worker, answer):
                    pending.appendleft(worker.task)
                else:
                    late = isinstance(answer, Lost) and answer.timed_out
                    self._timeouts[worker.task.function] += late
                    self._enter(worker.task, answer, pending, rewards)
                worker.task = None
            if isinstance(answer, Lost) or not worker.ready or worker.is_full:
                self._lose(worker)


def _closer(runner: weakref.ref[RewardRunner]) -> Callable[[], None]:
    def close() -> None:
        alive = runner()
        if alive is not None:
            alive.close()

    return close
