from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.digits.make_digits import main as make_digits
from megatron_mm import platform
from support.markers import LONG, chooses
from support.ranks import RankPool
from tools.fake_gpu import install


def pytest_configure(config):
    """Hides the machine's GPUs from every test, worker, rank and launched program, unless `-m`
    chooses the tests marked gpu: all others compute on the CPU, with its redirects."""
    if not chooses(config.option.markexpr, "gpu"):
        platform.hide_gpus()
    platform.install()


@pytest.fixture(autouse=True)
def same_draws():
    """Makes what a test draws without a generator the same in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n, function, *args)`: run a module-level function on n real gloo ranks."""
    pool = RankPool()
    yield pool.run
    pool.stop()


@pytest.fixture(scope="session")
def gpu_ranks():
    """`ranks` on GPUs that are not there: tools/fake_gpu."""
    pool = RankPool(prepare=install)
    yield pool.run
    pool.stop()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder with 6 images, 48 mixed questions about them and 24 held-out ones."""
    folder = tmp_path_factory.mktemp("scenes")
    counts = "--images 6 --valid-images 4 --align-per-image 1 --mix-per-image 8 --valid-per-key 2"
    make_digits(f"--out {folder} --grid 3 {counts}".split())
    return folder


@pytest.fixture(scope="session")
def look_scenes(tmp_path_factory) -> Path:
    """The same of scenes whose answers look."""
    folder = tmp_path_factory.mktemp("look_scenes")
    counts = "--images 6 --valid-images 4 --align-per-image 1 --mix-per-image 8 --valid-per-key 6"
    make_digits(f"--out {folder} --scenes looking --grid 3 {counts}".split())
    return folder


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """A folder with 40 training images, their rows and 10 held-out rows for each answer."""
    folder = tmp_path_factory.mktemp("digits")
    counts = "--images 40 --valid-images 30 --valid-per-key 10 --jitter 1"
    make_digits(f"--out {folder} {counts}".split())
    return folder


@pytest.fixture(scope="module")
def mixed_rows(tmp_path_factory, scenes) -> Path:
    """Rows with one image, none, two and three, of odd and even lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for n, images in enumerate((1, 0, 2, 0, 3)):
        question = "?".join(["<image>"] * images) + "How many 3" + "?" * (1 + n % 2)
        row = {"messages": [{"role": "user", "content": question}]}
        row["images"] = [f"images/train_{i:06d}.png" for i in range(images)]
        lines.append(json.dumps(row))
    (folder / "images").symlink_to(scenes / "images")
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "mixed.jsonl"


@pytest.fixture
def job():
    """A job of one rank on the GPU."""
    from megatron_mm.config import ParallelConfig
    from megatron_mm.parallel import groups

    groups.start(ParallelConfig())
    yield groups.build(ParallelConfig())
    groups.stop()


def pytest_collection_modifyitems(items):
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if {"ranks", "gpu_ranks"} & (set(item.fixturenames) - set(given)):
            item.add_marker("ranks")
    # Files that take long go first, or one worker would end with them while the other has no work.
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, which only `-m gpu` shows to tests")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
