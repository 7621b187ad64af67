"""From a row to a sample: tokens, what is supervised, and the tiles the model needs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_mm.config.schema import RunConfig
from megatron_mm.data.chat import Encoded, encode_prompt, encode_row
from megatron_mm.data.errors import DataError
from megatron_mm.data.images import TilePlan, cut_tiles, load_image, plan_tiles, resolve_image_path
from megatron_mm.data.layout import ImageSettings, image_settings, patch_centres, select_tiles
from megatron_mm.data.tokenizer import Tokenizer

# Cut tiles kept in memory by each rank; small images then cost nothing after one epoch.
CACHE_BYTES = 256 * 2**20


@dataclass
class SampleImage:
    """One image of a sample: the tiles that are used, and what each is used for."""

    tiles: np.ndarray  # uint8 [used tiles, S, S, 3]
    plan: TilePlan
    stream: list[int]  # indices into `tiles`
    memory: list[int]  # indices into `tiles`
    memory_coordinates_M2: torch.Tensor  # float32 (y, x) of the memory's patch centres
    start: int = 0  # position of the first stream token in the sample


@dataclass
class Sample:
    tokens_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, the next token; the last one is a filler with mask 0
    loss_mask_T: torch.Tensor  # float32, 1 where the label is supervised
    images: list[SampleImage]
    where: str  # "file:row"
    row: dict[str, Any] = field(default_factory=dict, repr=False)


class SampleBuilder:
    """Turns rows into samples; keeps the most recently used images, already cut."""

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
        self.seq_length = run.data.seq_length
        self._cache: OrderedDict[Path, SampleImage] = OrderedDict()
        self._free_bytes = cache_bytes

    def training(self, row: dict[str, Any], where: str, folder: Path) -> Sample:
        """The whole conversation, its answers supervised. Raises DataError."""
        return self._build(encode_row, row, where, folder)

    def prompt(self, row: dict[str, Any], where: str, folder: Path) -> Sample:
        """The conversation up to where the last answer begins. Raises DataError."""
        return self._build(encode_prompt, row, where, folder)

    def _build(self, encode: Any, row: dict[str, Any], where: str, folder: Path) -> Sample:
        names = row.get("images")
        names = [] if names is None else names
        if not isinstance(names, list):
            raise DataError(f"{where}: 'images' must be a list of paths")
        if names and self.settings is None:
            raise DataError(
                f"{where}: {len(names)} images but the model has no vision; remove them or set "
                "model.vision"
            )
        images = [self._image(resolve_image_path(folder, n, where), where) for n in names]
        per_tile = self.settings.tokens_per_tile if self.settings else 0
        counts = [len(image.stream) * per_tile for image in images]
        encoded: Encoded = encode(row, where, self.tokenizer, counts, self.seq_length)
        for image, start in zip(images, encoded.image_starts, strict=True):
            image.start = start
        tokens_T = torch.tensor(encoded.tokens, dtype=torch.int64)
        labels_T = torch.full_like(tokens_T, self.tokenizer.pad_id)
        labels_T[:-1] = tokens_T[1:]
        mask_T = torch.tensor([*encoded.supervised[1:], False], dtype=torch.float32)
        return Sample(tokens_T, labels_T, mask_T, images, where, row)

    def _image(self, path: Path, where: str) -> SampleImage:
        found = self._cache.get(path)
        if found is None:
            found = prepare_image(path, where, self.settings)
            self._free_bytes -= found.tiles.nbytes
            while self._free_bytes < 0 and self._cache:
                self._free_bytes += self._cache.popitem(last=False)[1].tiles.nbytes
            if self._free_bytes < 0:  # larger than the whole cache
                self._free_bytes += found.tiles.nbytes
            else:
                self._cache[path] = found
        else:
            self._cache.move_to_end(path)
        # A copy, because `start` belongs to one sample; the tiles themselves are shared.
        return replace(found)


def prepare_image(path: Path, where: str, settings: ImageSettings) -> SampleImage:
    """Decode and cut one image, keeping only tiles that the stream or the memory uses."""
    image = load_image(path, where)
    plan = plan_tiles(
        *image.size,
        image_size=settings.image_size,
        max_num_tiles=settings.max_num_tiles,
        use_thumbnail=settings.use_thumbnail,
    )
    stream = select_tiles(plan, settings.image_stream)
    memory = select_tiles(plan, settings.vision_memory)
    used = sorted({*stream, *memory})
    tiles = np.ascontiguousarray(cut_tiles(image, plan, settings.image_size)[used])
    centres = [patch_centres(plan, tile, settings.patches_per_side) for tile in memory]
    return SampleImage(
        tiles,
        plan,
        stream=[used.index(tile) for tile in stream],
        memory=[used.index(tile) for tile in memory],
        memory_coordinates_M2=torch.cat([torch.zeros(0, 2), *centres]),
    )
