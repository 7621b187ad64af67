"""Turns a row into a sample: tokens, supervision, and the tiles the model needs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_mm.config.layers.queries import query_settings
from megatron_mm.config.memories import IMAGES, Memory
from megatron_mm.config.objectives import declaration
from megatron_mm.config.settings import RunConfig
from megatron_mm.data.chat import Encoded, encode_prompt, encode_row
from megatron_mm.data.files.forms import held_images
from megatron_mm.data.files.keys import LOOKS, check_keys
from megatron_mm.data.images import (
    Decoder,
    ImageFile,
    TileGrid,
    find_image,
)
from megatron_mm.data.looks import LookTokens, RowLooks, Target, read_boxes, targets_of
from megatron_mm.data.tiles import (
    ImageSettings,
    choose_grids,
    image_settings,
    memory_coordinates,
    memory_extents,
    select_tiles,
    tiles_by_images,
    tiles_seen,
)
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import DataError
from megatron_mm.pictures.boxes import Box

# Bytes of cut tiles that each rank caches: small data sets are decoded only once.
CACHE_BYTES = 256 * 2**20
MAX_SIZES = 10**5  # image sizes kept in memory, about 20 MB, 40 with boxes


class Size(NamedTuple):
    """The cost of a sample: tokens of the stream, tiles through the ViT."""

    tokens: int
    tiles: int


@dataclass(frozen=True)
class ImageMemory:
    """The part of one image that one memory holds."""

    tiles: list[int]  # indices into the image's tiles
    coordinates_M2: torch.Tensor  # float32 (y, x) of the patch centres
    extents_M: torch.Tensor  # float32, sides of the patches


@dataclass(frozen=True)
class SampleImage:
    """Image of a sample: its used tiles, and which of them enter the stream and the memory."""

    tiles: np.ndarray  # uint8 [used tiles, S, S, 3]
    grid: TileGrid
    stream: list[int]  # indices into `tiles`
    memories: dict[str, ImageMemory]  # by the name of the memory
    start: int  # position of the first stream token in the sample

    @classmethod
    def build(
        cls, grid: TileGrid, tiles: Mapping[str, np.ndarray], settings: ImageSettings, start: int
    ) -> SampleImage:
        """
        Args:
            tiles: by key of the row, those of `tiles_by_images`: memories may hold another image
                in the place of the stream's.
        """
        place: dict[tuple[str, int], int] = {}
        for key, used in tiles_by_images(grid, settings).items():
            place |= {(key, tile): len(place) + n for n, tile in enumerate(used)}
        stream = [place[IMAGES, tile] for tile in select_tiles(grid, settings.image_stream)]
        memories = {
            memory.name: ImageMemory(
                [place[memory.images, tile] for tile in select_tiles(grid, memory.tiles)],
                memory_coordinates(grid, memory, settings.patches_per_side),
                memory_extents(grid, memory, settings.patches_per_side),
            )
            for memory in settings.memories
        }
        held = list(tiles.values())
        joined = held[0] if len(held) == 1 else np.concatenate(held)
        return cls(joined, grid, stream, memories, start)


@dataclass
class Sample:
    tokens_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, the next token; the last one is a filler with mask 0
    loss_mask_T: torch.Tensor  # float32, 1 where the label is supervised
    images: list[SampleImage]
    where: str  # "file:row"
    skill_T: torch.Tensor | None = None  # int64, as in `Microbatch`; None: no position has one
    queries: tuple[int, ...] = ()  # positions of query tokens, ascending
    # The place that each should ask for, and each of an answer to a prompt; None: any.
    targets: tuple[Target | None, ...] = ()
    slots: int = 0  # behind each query (data/looks.py)
    added: tuple[int, ...] = ()  # positions of words of places that no text spells

    @property
    def size(self) -> Size:
        """The cost of the sample."""
        return Size(len(self.tokens_T), sum(len(image.tiles) for image in self.images))

    def predicting(self, count: int) -> torch.Tensor:
        """Returns the positions that predict the last `count` tokens of the text, int64: neither
        slots nor `added` words are counted."""
        own_T = torch.ones(len(self.tokens_T), dtype=torch.bool)
        own_T[list(self.added)] = False
        for query in self.queries:
            own_T[query + 1 : query + 1 + self.slots] = False
        places = own_T.nonzero().flatten()
        return places[len(places) - count :] - 1


class _Draft(NamedTuple):
    """Sample whose pixels have not been read."""

    files: dict[str, list[ImageFile]]  # by key of the row, "images" first
    grids: list[TileGrid]
    encoded: Encoded
    targets: tuple[Target | None, ...]


class SampleBuilder:
    """Turns rows into samples. Caches the tiles of the most recently used image files."""

    def __init__(
        self, run: RunConfig, tokenizer: Tokenizer, cache_bytes: int = CACHE_BYTES
    ) -> None:
        model_vocab = run.model.language.vocab_size
        if tokenizer.vocab_size > model_vocab:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids but the model's vocab_size is "
                f"{model_vocab}; set vocab_size to {tokenizer.padded_vocab_size()}"
            )
        self.settings = image_settings(run)
        self.tokenizer = tokenizer
        self.looks = LookTokens.of(run, tokenizer)
        glimpses = query_settings(run.model)
        # Under `oracle` the boxes are the places, under `tokens` the words in front.
        self._learns_places = glimpses is not None and glimpses.query_place in ("hidden", "random")
        self.seq_length = run.data.seq_length
        self._extra_columns = run.data.extra_columns
        # Rollouts hand a row's other keys to the reward functions.
        self._columns = declaration(run).generates
        self._decoder = Decoder()
        self._cache: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._cache_bytes, self._held_bytes = cache_bytes, 0
        self._sizes: dict[tuple[Path | None, Box | None], tuple[int, int]] = {}

    def training(self, row: dict[str, Any], where: str, folder: Path) -> Sample:
        """Returns the whole conversation, its answers supervised. Raises DataError."""
        return self._build(encode_row, row, where, folder)

    def prompt(self, row: dict[str, Any], where: str, folder: Path) -> Sample:
        """Returns the conversation up to where the last answer begins. Raises DataError."""
        return self._build(encode_prompt, row, where, folder)

    def beside(self, sample: Sample, row: dict[str, Any], where: str, folder: Path) -> Sample:
        """Returns the sample that `training` would, with the image objects of `sample`, so that a
        microbatch of both holds their tiles once. Raises DataError, also for images that begin at
        other tokens than there."""
        draft = self._draft(encode_row, row, where, folder)
        encoded = draft.encoded
        starts = [image.start for image in sample.images]
        if encoded.image_starts != starts:
            raise DataError(
                f"{where}: its {len(encoded.image_starts)} images begin at the tokens "
                f"{encoded.image_starts}, those of the other side at {starts}; show images in the "
                "prompt only"
            )
        return self._sample(draft, sample.images, where)

    def measure(self, row: dict[str, Any], where: str, folder: Path) -> Size:
        """Returns the size that `training` would have, from the text and the headers of the
        images. Raises DataError for all that is wrong with the row but pixels that cannot be
        decoded."""
        draft = self._draft(encode_row, row, where, folder)
        tiles = sum(tiles_seen(grid, self._vision) for grid in draft.grids)
        return Size(len(draft.encoded.tokens), tiles)

    def check_prompt(self, row: dict[str, Any], where: str, folder: Path) -> None:
        """Raises DataError for all that is wrong with the row as a prompt but pixels that cannot be
        decoded: the headers of its images are read."""
        self._draft(encode_prompt, row, where, folder)

    @property
    def _vision(self) -> ImageSettings:
        """The settings for a row that has images, which needs a model with vision."""
        assert self.settings is not None
        return self.settings

    def _draft(self, encode: Any, row: dict[str, Any], where: str, folder: Path) -> _Draft:
        memories = self.settings.memories if self.settings else ()
        check_keys(
            row,
            where,
            more=[memory.images for memory in memories] + [LOOKS] * (self.looks is not None),
            extra=self._extra_columns,
            columns=self._columns,
        )
        own = self._files(IMAGES, row, where, folder)
        if own and self.settings is None:
            raise DataError(
                f"{where}: {len(own)} images but the model has no vision; remove them or set "
                "model.vision"
            )
        grids = choose_grids([self._size(f, where) for f in own], self.settings, where)
        files = {IMAGES: own}
        for memory in memories:
            if memory.images not in files:
                files[memory.images] = self._others(memory, grids, row, where, folder)
        stream = [select_tiles(grid, self._vision.image_stream) for grid in grids]
        counts = [len(tiles) * self._vision.tokens_per_tile for tiles in stream]
        looks = self.looks
        boxes = None if looks is None else read_boxes(row, len(own), where)
        given = None if looks is None else RowLooks(looks, boxes)
        encoded: Encoded = encode(row, where, self.tokenizer, counts, self.seq_length, given)
        targets: tuple[Target | None, ...] = ()
        if looks is not None:
            whole = encode is encode_row  # a prompt lacks the queries of the last answer
            targets = targets_of(boxes, len(encoded.queries), looks, where, whole=whole)
            targets = looks.targets(torch.tensor(encoded.tokens), encoded.queries, targets)
        return _Draft(files, grids, encoded, targets)

    def _files(self, key: str, row: dict[str, Any], where: str, folder: Path) -> list[ImageFile]:
        names = row.get(key)
        names = [] if names is None else names
        if not isinstance(names, list):
            raise DataError(f"{where}: {key!r} must be a list of paths or bytes")
        held = held_images(names, where)
        return [find_image(image, n, folder, where) for n, image in enumerate(held, start=1)]

    def _others(
        self, memory: Memory, grids: list[TileGrid], row: dict[str, Any], where: str, folder: Path
    ) -> list[ImageFile]:
        key = memory.images
        files = self._files(key, row, where, folder)
        found = choose_grids([self._size(f, where) for f in files], self.settings, where)
        if found != grids:
            raise DataError(
                f"{where}: {len(files)} images in {key!r} for {len(grids)} in 'images'; "
                f"{memory.images_setting} needs as many, of the same grids of tiles"
            )
        return files

    def _build(self, encode: Any, row: dict[str, Any], where: str, folder: Path) -> Sample:
        draft = self._draft(encode, row, where, folder)
        encoded, images = draft.encoded, []
        for n, (grid, start) in enumerate(zip(draft.grids, encoded.image_starts, strict=True)):
            tiles = {
                key: self._tiles(draft.files[key][n], grid, used, where)
                for key, used in tiles_by_images(grid, self._vision).items()
            }
            images.append(SampleImage.build(grid, tiles, self._vision, start))
        return self._sample(draft, images, where)

    def _sample(self, draft: _Draft, images: list[SampleImage], where: str) -> Sample:
        encoded = draft.encoded
        tokens_T = torch.tensor(encoded.tokens, dtype=torch.int64)
        labels_T = torch.full_like(tokens_T, self.tokenizer.pad_id)
        labels_T[:-1] = tokens_T[1:]
        mask_T = torch.tensor([*encoded.supervised[1:], False], dtype=torch.float32)
        return Sample(
            tokens_T,
            labels_T,
            mask_T,
            images,
            where,
            queries=tuple(encoded.queries),
            targets=self._taught(draft),
            slots=0 if self.looks is None else self.looks.slots,
            added=tuple(encoded.added),
        )

    def _taught(self, draft: _Draft) -> tuple[Target | None, ...]:
        """Returns the places of a sample's queries: where these learn them, only of those whose
        answer is learnt, and of the answer to a prompt."""
        if not self._learns_places:
            return draft.targets
        queries, supervised = draft.encoded.queries, draft.encoded.supervised
        pairs = zip(queries, draft.targets, strict=False)
        learnt = [target if supervised[query] else None for query, target in pairs]
        return (*learnt, *draft.targets[len(queries) :])

    def _size(self, file: ImageFile, where: str) -> tuple[int, int]:
        """Returns (width, height) in pixels of what is shown, from memory for boxes of files seen
        before."""
        key = file.path, file.box
        if key in self._sizes:
            return self._sizes[key]
        size = self._decoder.size(file, where)
        if file.path is not None:
            if len(self._sizes) >= MAX_SIZES:
                self._sizes.clear()
            self._sizes[key] = size
        return size

    def _tiles(
        self, file: ImageFile, grid: TileGrid, used: Sequence[int], where: str
    ) -> np.ndarray:
        """Returns some tiles of an image, uint8 [N, S, S, 3], decoded and cut or remembered."""
        key = (file.path, file.box, grid, *used)
        found = self._cache.get(key)
        if found is not None:
            self._cache.move_to_end(key)
            return found
        found = self._decoder.tiles(file, where, grid, self._vision.image_size, used)
        if file.path is None or found.nbytes > self._cache_bytes:
            return found
        self._cache[key] = found
        self._held_bytes += found.nbytes
        while self._held_bytes > self._cache_bytes:
            self._held_bytes -= self._cache.popitem(last=False)[1].nbytes
        return found
