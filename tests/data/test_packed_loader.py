"""Packing on real rows: what is in a pack, who gets it, and going on elsewhere."""

import json
from collections import Counter

import pytest
import torch

from megatron_mm.data.files.rows import open_row_files
from megatron_mm.data.loading.loader import TrainLoader
from megatron_mm.data.loading.reader import Place, Reader
from megatron_mm.data.loading.shuffle import RowGroupCache
from megatron_mm.errors import DataError

SEQ_LENGTH, MICRO, GLOBAL = 128, 2, 8


@pytest.fixture
def packing(run, write_rows, make_row):
    """64 rows of 10 to 118 tokens: half of them text alone, some with two images."""
    images = ([], ["wide.png"], [], ["small.png", "wide.png"])
    rows = [
        make_row("<image>" * len(images[n % 4]) + "How many? " * (1 + n % 9), "3", images[n % 4])
        for n in range(64)
    ]
    run.data.train_data[0].path = str(write_rows(*rows))
    run.data.packing = True
    return run


def loader(run, tokenizer, rank=0, size=1, state=None):
    made = TrainLoader(run, tokenizer, data_parallel_rank=rank, data_parallel_size=size)
    if state is not None:
        made.load_state_dict(json.loads(json.dumps(state)))
    return made


def step(run, tokenizer, size, state):
    """One step of a whole job: the microbatches of every rank, and the state after it."""
    ranks = [loader(run, tokenizer, rank, size, state) for rank in range(size)]
    batches = [made.next_batch() for made in ranks]
    after = [made.state_dict() for made in ranks]
    assert all(one == after[0] for one in after)
    return batches, after[0]


def names(batches):
    return [name for batch in batches for m in batch for name in m.samples]


def test_a_pack_has_no_more_tiles_than_allowed(packing, tokenizer):
    """Two images in one row have up to 3 + 1 tiles each."""
    free = [m.num_tiles for m in loader(packing, tokenizer).next_batch()]
    most = max(free) - 1
    packing.data.max_pack_tiles = most
    made = loader(packing, tokenizer)
    for _ in range(3):
        assert max(m.num_tiles for m in made.next_batch()) <= most
    packing.data.max_pack_tiles = 1
    with pytest.raises(DataError) as error:
        loader(packing, tokenizer).next_batch()
    where, _, said = str(error.value).partition(": ")
    assert where.startswith(packing.data.train_data[0].path) and "\n" not in said
    assert said.endswith(
        " image tiles, max_pack_tiles is 1; raise it, or lower max_num_tiles or max_image_tokens"
    )


def test_what_is_in_a_pack(packing, tokenizer):
    made = loader(packing, tokenizer)
    batch = made.next_batch()
    assert len(batch) == GLOBAL // MICRO
    source = open_row_files(packing.data.train_data[0].path, RowGroupCache())
    reader = Reader(packing, tokenizer, [source])
    kinds = set()
    for microbatch in batch:
        assert microbatch.num_real_tokens <= MICRO * SEQ_LENGTH
        bounds = microbatch.cu_seqlens.tolist()
        tiles = 0
        for name, start, end in zip(microbatch.samples, bounds, bounds[1:], strict=False):
            (sample,) = reader.build([Place(0, int(name.rpartition(":")[2]) - 1)])
            assert torch.equal(microbatch.tokens_T[start:end], sample.tokens_T)
            tiles += sum(len(image.tiles) for image in sample.images)
        kinds.add(bool(tiles))
        assert len(microbatch.pixels_NCHW) == tiles
    filled = sum(m.num_real_tokens for m in batch) / (len(batch) * MICRO * SEQ_LENGTH)
    assert kinds == {True} and filled > 0.95
    assert len(names([batch])) > GLOBAL  # places of seq_length tokens, not samples


def test_sizes_are_those_of_the_samples(packing, tokenizer, digits_folder):
    for memory in ("none", "tiles"):
        packing.model.fusion.vision_memory = memory
        for path in (packing.data.train_data[0].path, digits_folder / "mix.jsonl"):
            source = open_row_files(path, RowGroupCache())
            reader = Reader(packing, tokenizer, [source])
            places = [Place(0, n) for n in range(len(source))]
            for size, sample in zip(reader.measure(places), reader.build(places), strict=True):
                tiles = sum(len(image.tiles) for image in sample.images)
                assert size == (len(sample.tokens_T), tiles)


def test_a_step_is_the_same_under_any_layout(packing, tokenizer):
    state = None
    for _ in range(3):
        found = [step(packing, tokenizer, size, state) for size in (1, 2, 4)]
        packs = [{tuple(m.samples) for batch in batches for m in batch} for batches, _ in found]
        assert packs[0] == packs[1] == packs[2] and len(packs[0]) == GLOBAL // MICRO
        state = found[0][1]
        assert state["held"] and all(after == state for _, after in found)


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_nothing_is_lost_or_repeated_when_the_layout_changes(
    packing, tokenizer, write_rows, make_row, on_bad_sample
):
    """Three epochs of the file, stopped and resumed mid-buffer after every step."""
    packing.data.on_bad_sample = on_bad_sample
    packing.data.train_data[0].samples = 3 * 64
    path, bad = packing.data.train_data[0].path, []
    if on_bad_sample == "skip":  # two that measuring finds, and one that only decoding does
        with open(path) as file:
            rows = [json.loads(line) for line in file]
        rows[3], rows[17] = "{", make_row("<image>?", "1", ["none.png"])
        rows[20] = make_row("<image>?", "1", ["cut.png"])
        cut = write_rows(*rows).parent
        (cut / "cut.png").write_bytes((cut / "small.png").read_bytes()[:60])
        bad = [f"{path}:{n}" for n in (4, 18, 21)]
    seen, skipped, state, sizes = Counter(), Counter(), None, [1, 2, 4, 2]
    for number in range(100):
        try:
            batches, state = step(packing, tokenizer, sizes[number % 4], state)
        except DataError as error:
            assert "192 samples are used up" in str(error)
            break
        seen.update(names(batches))
        skipped.update(
            line.split(": ")[0] for batch in batches for m in batch for line in m.skipped
        )
    assert number >= 6 and state["consumed_samples"] == state["position"] == 192
    expected = {f"{path}:{n}": 3 for n in range(1, 65)}
    assert seen == {name: 3 for name in expected if name not in bad}
    assert skipped == {name: 3 for name in bad}


def test_a_bad_row_stops_every_rank_alike(packing, tokenizer, write_rows, make_row):
    write_rows(*(make_row("q" * 99 + "<image>", "1") for _ in range(8)))
    found = []
    for rank in range(2):
        made = loader(packing, tokenizer, rank, 2)
        for _ in range(2):  # it stays where it is
            with pytest.raises(DataError, match=r"rows.jsonl:\d: 1 <image> marks but 0") as error:
                made.next_batch()
            found.append(str(error.value))
        assert made.state_dict() == {"consumed_samples": 0, "position": 0, "held": []}
    assert len(set(found)) == 1


def test_with_and_without_packing(packing, tokenizer):
    """A run may begin to pack; it may stop only where no sample is held."""
    packing.data.packing = False
    plain = loader(packing, tokenizer)
    plain.next_batch()
    packing.data.packing = True
    made = loader(packing, tokenizer, state=plain.state_dict())
    assert made.consumed_samples == 8
    packed = names([made.next_batch()])
    assert made.state_dict()["position"] == 8 + len(packed) + len(made.state_dict()["held"])
    packing.data.packing = False
    held = len(made.state_dict()["held"])
    with pytest.raises(DataError, match=f"holds {held} samples that were read but not"):
        loader(packing, tokenizer, state=made.state_dict())


@pytest.mark.parametrize("skip", [False, True])
def test_a_held_row_that_is_bad_after_a_resume(packing, tokenizer, skip):
    """An image is gone, or a limit is lower: a row that was good when it was read."""
    packing.data.on_bad_sample = "skip" if skip else "error"
    begun = loader(packing, tokenizer)
    begun.next_batch()
    state = begun.state_dict()
    assert state["held"]
    packing.data.max_num_tiles = packing.data.max_pack_tiles = 1  # none with two images
    resumed = loader(packing, tokenizer, state=state)
    if not skip:
        with pytest.raises(DataError, match="2 image tiles, max_pack_tiles is 1"):
            resumed.next_batch()
        return
    batch = resumed.next_batch()
    path, rows = packing.data.train_data[0].path, map(begun._place, state["held"])
    held = {f"{path}:{place.row + 1}" for place in rows}
    left_out = {line.split(": ")[0] for m in batch for line in m.skipped}
    assert held & left_out and not left_out & {*names([batch])}
    after = resumed.state_dict()
    assert after["consumed_samples"] == after["position"] - len(after["held"])
