"""The CPU redirects: none of them on a CUDA machine, all of them elsewhere, and the two
collectives that mean more than a redirect."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_mm import platform, redirects

# In a process of its own: this one has installed the redirects already. Torch reads its
# build's answer to is_available() in many places, so pretend before anything else runs.
AS_IF_CUDA = """
import warnings; warnings.simplefilter("ignore")
import torch
torch.cuda.is_available = lambda: True
from megatron_mm import platform, redirects
tables = [*redirects.TORCH_REDIRECTS, *redirects.MEGATRON_REDIRECTS]
before = [getattr(redirects.owner(r.owner), r.name) for r in tables]
assert platform.install() is False and platform.backend() == "nccl"
for redirect, original in zip(tables, before, strict=True):
    found = getattr(redirects.owner(redirect.owner), redirect.name)
    assert found is original and found is not redirect.replacement, redirect
    assert getattr(found, "__module__", None) != redirects.__name__, redirect
print(len(tables), "untouched")
"""


def in_new_process(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# 10 s of CPU time: a process with its imports.
@pytest.mark.slow
def test_with_cuda_nothing_is_touched():
    count = len(redirects.TORCH_REDIRECTS) + len(redirects.MEGATRON_REDIRECTS)
    assert in_new_process(AS_IF_CUDA) == f"{count} untouched"


def test_without_cuda_every_redirect_is_in_place_and_says_why():
    tables = [*redirects.TORCH_REDIRECTS, *redirects.MEGATRON_REDIRECTS]
    assert len({(r.owner, r.name) for r in tables}) == len(tables)
    for redirect in tables:
        assert getattr(redirects.owner(redirect.owner), redirect.name) is redirect.replacement
        assert redirect.why
    assert (platform.device(), platform.backend()) == (torch.device("cpu"), "gloo")


def test_installing_twice_is_harmless():
    """A second layer over `Tensor.type` would say torch.cuda.cuda.FloatTensor."""
    before = {r: getattr(redirects.owner(r.owner), r.name) for r in redirects.TORCH_REDIRECTS}
    assert platform.install() is True
    assert all(getattr(redirects.owner(r.owner), r.name) is f for r, f in before.items())
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"


COMPILED = """
import sys
from megatron_mm import platform, redirects
platform.install()
import torch
from megatron.core import jit
from megatron.core.fusions import fused_bias_geglu
assert jit.jit_fuser is torch.compile is redirects.TORCH_REDIRECTS[0].replacement
print(*(name for name in ("torch._inductor", "wandb", "tensorboard") if name in sys.modules))
"""


def test_megatron_core_compiles_none_of_its_small_functions():
    """Nor does a rank that starts wait for the imports of what it does not use."""
    assert in_new_process(COMPILED) == ""


COMMANDS = {
    "megatron_mm.train.__main__": "--preset tiny --train-data x.jsonl --tokenizer-model t.model",
    "megatron_mm.train.__main__:": "--objective megatron_mm.benchmark.planted.PLANTED",
    "megatron_mm.perf.command": "--preset tiny --world-size 1",
    "megatron_mm.benchmark.command": "gdn",
    "megatron_mm.checkpoint.merge_command": "--load a --save b",
    "megatron_mm.convert.commands.check_parity": "--hf a --checkpoint b",
    "megatron_mm.convert.commands.hf_to_megatron": "--hf a --out b",
    "megatron_mm.convert.commands.megatron_to_hf": "--checkpoint a --out b",
    "megatron_mm.earl.command": "--checkpoint a --data x.jsonl --out m.json",
    "megatron_mm.earl.prune_command": "--checkpoint a",
    "megatron_mm.mimic.map_command": "--routes r",
    "megatron_mm.mimic.record_command": "--checkpoint a",
    "megatron_mm.pass_rate.command": "measure --checkpoint a --data x.jsonl --out y.jsonl",
    "examples.digits.measure": "--run a --skill-map m --data d",
    "examples.digits.hop_shares": "--run a --data d",
    "examples.mimic.measure": "--run a --map m --routes r --skills s --data d",
}
BEGUN = f"""
import importlib, sys
from megatron_mm import platform

class Reached(BaseException):
    pass

def install():
    assert "megatron.core" not in sys.modules, name
    raise Reached

platform.install = install
for name, words in {COMMANDS!r}.items():
    try:
        importlib.import_module(name.rstrip(":")).main(words.split())
    except Reached:
        print(name)
"""


def test_every_command_installs_before_it_imports_megatron_core():
    assert in_new_process(BEGUN).splitlines() == [*COMMANDS]


IMPORTED = """
import megatron.core
from megatron_mm import platform
try:
    platform.install()
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_megatron_core_that_was_imported_before_is_refused():
    assert "call megatron_mm.platform.install() first" in in_new_process(IMPORTED)


CONFTESTS = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, "tests")
for path in sorted(Path("tests").rglob("conftest.py")):
    runpy.run_path(str(path))
    if "megatron.core" in sys.modules:
        print(path)
        break
"""


def test_no_conftest_imports_megatron_core():
    """A test file that is named alone has its folder's conftest loaded before any hook runs."""
    assert in_new_process(CONFTESTS) == ""


STARTED = """
import os, torch
torch.cuda.is_available = lambda: True  # as after CUDA has started
from megatron_mm import platform
try:
    platform.hide_gpus()
except RuntimeError as error:
    print(error)
"""


def test_cuda_that_has_started_cannot_be_hidden():
    assert "in a process of its own" in in_new_process(STARTED)


ONE_RANK = """
import warnings; warnings.simplefilter("ignore")
from pathlib import Path
from megatron_mm import platform
platform.install()
from megatron_mm.config import ParallelConfig
from megatron_mm.parallel import groups

def looking():
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return len(names) - names.count("pt_gloo_runloop")  # those sleep until there is work

groups.start(ParallelConfig())
counts = [looking()]
found = groups.build(ParallelConfig())
counts += [looking()]
del found
groups.stop()
print(*counts, looking())
"""


# 6 s of CPU time: a process with its imports.
@pytest.mark.slow
def test_groups_of_one_rank_do_not_have_a_looking_thread_each():
    """Four more were measured: theirs, the replica's and the world's among them. There are 25
    groups. When they are gone, so is what they shared."""
    before, built, after = map(int, in_new_process(ONE_RANK).split())
    assert built - before <= 4 and after <= before


OTHER_VERSION = """
import importlib.metadata, torch
original = torch.cuda.current_device
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.13.1" if name == "megatron-core" else version(name)
from megatron_mm import platform
try:
    platform.install()
except RuntimeError as error:
    print(error)
assert torch.cuda.current_device is original, "half installed"
"""


def test_another_megatron_core_is_refused_with_both_versions():
    (line,) = in_new_process(OTHER_VERSION).splitlines()
    assert platform.MEGATRON_CORE_VERSION in line and "0.13.1" in line


def test_the_version_here_is_the_one_the_redirects_were_written_for():
    assert importlib.metadata.version("megatron-core") == platform.MEGATRON_CORE_VERSION


def test_what_asks_for_cuda_gets_the_cpu():
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0)),
        torch.empty(2, device=torch.cuda.current_device(), pin_memory=True),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(device="cuda:0", dtype=torch.float64),
        torch.ones(2).cuda(),
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert made[4].dtype == torch.float64
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64  # as a cast, as ever


# ---- collectives that gloo lacks ----

WIDTH = 3


def part_of(rank: int, rows: int) -> torch.Tensor:
    return torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH) + 100.0 * rank


def on_rank_gather(lengths: list[int], members: list[int] | None) -> list[torch.Tensor] | None:
    group = None if members is None else dist.new_group(members)
    if members is not None and dist.get_rank() not in members:
        return None
    rank = dist.get_rank(group)
    parts = [torch.full((length, WIDTH), torch.nan) for length in lengths]
    dist.all_gather(parts, part_of(rank, lengths[rank]), group=group)
    return parts


def on_rank_scatter(lengths: list[int], members: list[int] | None) -> torch.Tensor | None:
    group = None if members is None else dist.new_group(members)
    if members is not None and dist.get_rank() not in members:
        return None
    rank = dist.get_rank(group)
    output = torch.full((lengths[rank], WIDTH), torch.nan)
    inputs = [part_of(10 * rank + to, length) for to, length in enumerate(lengths)]
    kept = [x.clone() for x in inputs]
    dist.reduce_scatter(output, inputs, group=group)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True)), "inputs changed"
    return output


# Even, uneven with an empty part, three ranks, and a group whose ranks are not the job's.
LENGTHS = {
    "even": ([2, 2], None),
    "uneven": ([3, 1], None),
    "an empty part": ([0, 4], None),
    "three": ([1, 5, 2], None),
    "a subgroup": ([1, 4], [1, 2]),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_all_gather(ranks, case):
    lengths, members = LENGTHS[case]
    found = ranks(3 if members else len(lengths), on_rank_gather, lengths, members)
    assert sum(parts is not None for parts in found) == len(lengths)
    for parts in found:
        for rank, part in enumerate(parts or []):
            assert torch.equal(part, part_of(rank, lengths[rank]))


@pytest.mark.parametrize("case", LENGTHS)
def test_reduce_scatter(ranks, case):
    lengths, members = LENGTHS[case]
    found = ranks(3 if members else len(lengths), on_rank_scatter, lengths, members)
    outputs = [output for output in found if output is not None]
    assert len(outputs) == len(lengths)
    for to, output in enumerate(outputs):
        expected = sum(part_of(10 * rank + to, lengths[to]) for rank in range(len(lengths)))
        assert torch.equal(output, expected)  # small integers: exact in any order


def test_a_device_context_still_reaches_the_factories():
    """transformers builds what it loads on "meta"; what is not on meta it takes for finished."""
    with torch.device("meta"):
        made = [torch.empty(2), torch.zeros(2), torch.arange(2), torch.nn.Linear(2, 2).weight]
    assert all(tensor.is_meta for tensor in made)
    assert torch.empty(2).device.type == "cpu"
