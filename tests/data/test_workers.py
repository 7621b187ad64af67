"""Worker processes: the same batches, and no way to hang or to stay behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from megatron_mm.cli import STOPS
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.loading.workers import WorkerPool
from megatron_mm.errors import DataError
from support.batches import values_of
from support.desk import Desk


def loader(run, tokenizer, rank=0, size=1, **more):
    return TrainLoader(run, tokenizer, data_parallel_rank=rank, data_parallel_size=size, **more)


def equal(a, b):
    others = values_of(b)
    assert values_of(a).keys() == others.keys()
    for name, one in values_of(a).items():
        other = others[name]
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other), name
        else:
            assert one == other, name


def gone(pids, seconds=10):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive = [p for p in pids if psutil.pid_exists(p)]
        # A zombie has ended; whoever adopted it has not looked yet.
        alive = [p for p in alive if psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("packing", [False, True])
def test_batches_and_states_are_those_without_workers(
    run, tokenizer, write_rows, make_row, packing
):
    """Also after going back, after a resume, and with rows that are skipped."""
    images = ([], ["wide.png"], ["small.png"])
    rows = [
        make_row("<image>" * len(images[n % 3]) + "q?" * n, "1", images[n % 3]) for n in range(40)
    ]
    rows[7], rows[31] = "{", make_row("<image>", "1", ["none.png"])
    run.data.train_data[0].path = str(write_rows(*rows))
    run.data.on_bad_sample, run.data.packing = "skip", packing
    steps = 7  # more than one epoch
    plain = loader(run, tokenizer, 1, 2)
    states, expected = [plain.state_dict()], []
    for _ in range(steps):
        expected.append(plain.next_batch())
        states.append(json.loads(json.dumps(plain.state_dict())))
    run.data.num_workers = 2
    made = loader(run, tokenizer, 1, 2)
    for first, last in ((0, 4), (2, 3), (5, steps)):  # on, back to step 2, and forward to 5
        made.load_state_dict(states[first])
        for number in range(first, last):
            assert made.state_dict() == states[number]
            for a, b in zip(made.next_batch(), expected[number], strict=True):
                equal(a, b)
            # What is read ahead is no part of the state.
            assert made.state_dict() == states[number + 1]
    assert any(m.skipped for batch in expected for m in batch) or packing
    pids = made._pool.pids
    assert len(pids) == 2
    made.close()
    assert gone(pids)


@pytest.mark.kills
def test_a_bad_row_and_a_killed_worker_are_one_line(run, tokenizer, write_rows, make_row):
    rows = [make_row(f"q{n}") for n in range(8)]
    path = write_rows(*rows[:5], make_row("<image>?", "1", ["none.png"]), *rows[6:])
    run.data.train_data[0].path, run.data.num_workers = str(path), 1
    made = loader(run, tokenizer)
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows.jsonl:6: image .*none.png does not exist"):
            made.next_batch()
        assert made.consumed_samples == 0
    (pid,) = made._pool.pids
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(
        DataError, match=r"rows.jsonl:\d and 1 rows with it: the data worker .* signal 9; lower"
    ) as caught:
        made.next_batch()
    assert "\n" not in str(caught.value) and time.monotonic() - begin < 30
    made.close()


@pytest.mark.kills
def test_a_pool_fails_in_one_line_and_never_hangs():
    pool = WorkerPool(1, Desk, ())
    ticket = pool.submit("divide", 0, "rows.jsonl:1")
    with pytest.raises(DataError, match="a data worker failed: ZeroDivisionError: division by"):
        pool.result(ticket)
    ticket = pool.submit("unreadable", 0, "rows.jsonl:2")
    with pytest.raises(DataError, match="rows.jsonl:2: .*MemoryError: no memory for the answer"):
        pool.result(ticket)
    # Far more than a pipe holds, answered in turn, taken in any order, or not at all.
    tickets = [pool.submit("big", 2_000_000 + n, "x") for n in range(8)]
    doubled = pool.submit("double", 4, "x")
    pool.forget(tickets[5:])
    assert pool.result(doubled) == 8
    assert [len(pool.result(t)) - 2_000_000 for t in (tickets[3], tickets[0])] == [3, 0]
    # Signals to the whole job are the trainer's to handle.
    for number in STOPS:
        os.kill(pool.pids[0], number)
    assert pool.result(pool.submit("double", 5, "x")) == 10
    late = [pool.submit("sleep", 600, "rows.jsonl:3"), pool.submit("double", 1, "rows.jsonl:4")]
    time.sleep(0.2)
    os.kill(pool.pids[0], signal.SIGKILL)
    late.append(pool.submit("double", 1, "rows.jsonl:5"))
    for ticket in late[:2]:
        with pytest.raises(DataError, match="rows.jsonl:3: the data worker .* with signal 9"):
            pool.result(ticket)
    with pytest.raises(DataError, match="rows.jsonl:[35]: the data worker .* with signal 9"):
        pool.result(late[2])
    assert not pool._answers.keys() - set(tickets) and not pool._forgotten
    pool.close()


def test_a_worker_that_cannot_start_says_why():
    pool = WorkerPool(1, Desk, (True,))
    with pytest.raises(DataError, match="^tokenizer_model is gone$"):
        pool.result(pool.submit("double", 1, "x"))
    busy = pool.pids
    pool.submit("sleep", 600, "x")
    pool.close()
    assert gone(busy)


def test_nor_what_it_is_made_from(tokenizer, tmp_path):
    """A tokenizer is loaded again in the worker, where its file may be gone."""
    lost = replace(tokenizer, path=str(tmp_path / "gone.model"))
    pool = WorkerPool(1, Desk, (lost,))
    with pytest.raises(DataError, match="gone.model' is neither a SentencePiece file nor a folder"):
        pool.result(pool.submit("double", 1, "x"))


SCRIPT = """
import os, signal, sys
sys.path[:0] = {path!r}
from megatron_mm.data.loading.workers import WorkerPool
from support.desk import Desk

if __name__ == "__main__":
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pool = WorkerPool(1, Desk, ())
    assert [pool.result(pool.submit("double", n, "x")) for n in range(4)] == [0, 2, 4, 6]
    print(*pool.pids, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    pool.submit("sleep", 600, "x")  # and leaves with this under way
    if sys.argv[1] == "raises":
        raise SystemExit(3)
"""


@pytest.mark.kills
@pytest.mark.parametrize(("how", "code"), [("killed", -signal.SIGKILL), ("raises", 3)])
def test_workers_do_not_outlive_the_trainer(tmp_path, how, code):
    """A trainer with gloo running, that is killed or leaves without a word."""
    script = tmp_path / "trainer.py"
    script.write_text(SCRIPT.format(path=sys.path))
    done = subprocess.run(
        [sys.executable, str(script), how], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == code, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 1 and gone(pids)
