"""Text and images to what the model of this folder takes. Travels with exported weights.

An image is stretched to the grid of square tiles whose aspect ratio is closest to its own, cut,
and joined by a thumbnail of the whole. `image_stream` says which tiles stand in the token
stream, `memories` which of them each memory holds for the looks that read it. Behind a `<look>` of
an answer stand its slots.
"""

import base64
import os
from collections.abc import Sequence
from io import BytesIO
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin

# What training reads. PIL would hand a PostScript file to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS, MAX_BYTES = 2**26, 2**29

START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
LOOK, SLOT = "<look>", "<LOOK_CONTEXT>"
TURNS = ("<|im_start|>", "<|im_end|>")
# Generation starts behind this text, so that it was encoded by itself in training.
BEFORE_ANSWER = "<|im_start|>assistant\n"


def grid_of(width: int, height: int, size: int, most: int) -> tuple[int, int]:
    """(rows, columns) of at most `most` tiles of `size` pixels."""
    grids = [(r, c) for c in range(1, most + 1) for r in range(1, most // c + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[1]))
    best, best_distance = (1, 1), float("inf")
    for rows, columns in grids:
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * size**2 * rows * columns
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (rows, columns), distance
    return best


def shown(image) -> Image.Image:
    """An image as a viewer shows it: turned as its EXIF orientation says, transparency over white.
    It may be PIL's, an array or tensor uint8 [H, W, 3 or 4], the bytes of a file, a path, base64 or
    an address."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (3, 4):
            raise ValueError(f"an image of {array.dtype} {array.shape}; give uint8 [H, W, 3]")
        return _shown(Image.fromarray(array))
    if isinstance(image, Image.Image):
        # PIL does not turn a TIFF that it maps into memory from its path.
        path = getattr(image, "filename", "")
        if image.format != "TIFF" or not path or getattr(image, "fp", None) is None:
            return _shown(image)
        image = path
    if isinstance(image, str) and not os.path.isfile(image):
        if image.startswith(("http://", "https://")):
            with urlopen(image, timeout=30) as answer:
                image = answer.read(MAX_BYTES + 1)
            if len(image) > MAX_BYTES:
                raise ValueError(f"an image of more than {MAX_BYTES} bytes")
        else:
            image = base64.b64decode(image.split("base64,")[-1], validate=True)
    with BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file:
        return _shown(Image.open(file, formats=FORMATS))


def _shown(image: Image.Image) -> Image.Image:
    # The header of a file, which training would have refused too.
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image of {image.width}x{image.height} pixels, over {MAX_PIXELS}")
    # Of each decoder: its raw mode, alone or first in a tuple.
    args = [part.args for part in getattr(image, "tile", [])]
    raw = [str(one[0] if isinstance(one, tuple) and one else one) for one in args]
    deep = any(one.endswith((";16B", ";16L", ";16N")) for one in raw)
    if image.mode[0] in "IF" or deep:
        raise ValueError(f"an image of mode {image.mode} (more than 8 bits a channel)")
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("an image of more than 1 frame; give the one you mean")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Inputs(BatchFeature):
    """The processor's result. Places keep their precision in `.to(device, dtype)`."""

    def to(self, *args, **kwargs) -> "Inputs":
        kept = {n: self[n] for n in ("memory_coordinates", "memory_extents") if n in self}
        super().to(*args, **kwargs)
        for name, value in kept.items():
            self[name] = value.to(self["input_ids"].device)
        return self


class MegatronMMProcessor(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, chat_template=None, tiles=None, looks=None, **kwargs):
        self.tiles, self.looks = tiles, looks
        super().__init__(tokenizer, chat_template=chat_template)

    def _tiles(self, image: Image.Image, most: int):
        """Returns (used tiles uint8 [N, S, S, 3], indices into them for the stream, and for every
        memory such indices, the centres [M, 2] and the sides [M] of its patches)."""
        s = self.tiles
        size = s["image_size"]
        width, height = image.size
        rows, columns = grid_of(width, height, size, most)
        grid = rows * columns
        thumbnail = s["use_thumbnail"] and grid > 1

        def choose(what: str) -> list[int]:
            if what == "none":
                return []
            if what in ("all", "pyramid"):
                return list(range(grid + thumbnail))
            return list(range(grid)) if what == "tiles" or grid == 1 else [grid]

        stream = choose(s["image_stream"])
        memories = [choose(memory["tiles"]) for memory in s["memories"]]
        used = sorted({*stream, *(tile for memory in memories for tile in memory)})

        def resized(w: int, h: int) -> np.ndarray:
            small = image if image.size == (w, h) else image.resize((w, h), Image.BICUBIC)
            return np.asarray(small)

        canvas = resized(columns * size, rows * size)
        cut = canvas.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
        cut = cut.reshape(grid, size, size, 3)
        if thumbnail:
            cut = np.concatenate([cut, resized(size, size)[None]])
        held = [
            (
                [used.index(tile) for tile in memory],
                torch.cat([self._centres(tile, rows, columns) for tile in memory]),
                torch.cat([self._sides(tile, rows, columns) for tile in memory]),
            )
            for memory in memories
        ]
        return cut[used], [used.index(tile) for tile in stream], held

    def _centres(self, tile: int, rows: int, columns: int) -> torch.Tensor:
        """Places (y, x) of a tile's patches in fractions of the image; the thumbnail covers all."""
        side = self.tiles["image_size"] // self.tiles["patch_size"]
        row, column = divmod(tile, columns)
        if tile >= rows * columns:
            rows, columns, row, column = 1, 1, 0, 0
        centres = (torch.arange(side, dtype=torch.float32) + 0.5) / side
        y, x = torch.meshgrid((row + centres) / rows, (column + centres) / columns, indexing="ij")
        return torch.stack([y.flatten(), x.flatten()], dim=-1)

    def _sides(self, tile: int, rows: int, columns: int) -> torch.Tensor:
        """Sides of a tile's patches in fractions of the image's."""
        count = self.tiles["image_size"] // self.tiles["patch_size"]
        cells = rows * columns
        return torch.full((count**2,), (cells if tile < cells else 1) ** -0.5 / count)

    def _cut(self, images):
        """All images of a prompt, with fewer tiles each if they would be too many tokens."""
        s, cost = self.tiles, 0
        for most in range(s["max_num_tiles"], 0, -1):
            found = [self._tiles(image, most) for image in images]
            cost = s["tokens_per_tile"] * sum(len(tiles) for tiles, *_ in found)
            if s["max_image_tokens"] is None or cost <= s["max_image_tokens"]:
                return found
        raise ValueError(f"{len(images)} images need {cost} tokens at one tile each")

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text without images, the slots of its looks among them."""
        ids: list[int] = []
        pieces = text.split(BEFORE_ANSWER)
        for number, piece in enumerate(pieces):
            piece += BEFORE_ANSWER if number < len(pieces) - 1 else ""
            ids += self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
        # A tokenizer may normalise text, such as full-width brackets, to a control token.
        of = self.tokenizer.convert_tokens_to_ids
        never, counted = [START, END, CONTEXT], [*TURNS]
        if self.looks is not None:
            never, counted = [*never, SLOT], [*counted, LOOK]
        for token, allowed in [(t, 0) for t in never] + [(t, text.count(t)) for t in counted]:
            found = ids.count(of(token))
            if found != allowed:
                raise ValueError(f"text becomes {found} tokens {token}, the template has {allowed}")
        if self.looks is None:
            return ids
        query, slots = of(LOOK), [of(SLOT)] * self.looks["slots"]
        return [i for one in ids for i in ([one, *slots] if one == query else [one])]

    def _check_looks(self, prompt: str) -> None:
        """Rejects looks that training would not read."""
        if self.looks is None or LOOK not in prompt:
            return
        turns = prompt.split(TURNS[0])
        if any(LOOK in turn and not turn.startswith("assistant\n") for turn in turns):
            raise ValueError(f"a turn that is no assistant's has {LOOK}; only answers look")
        if CONTEXT not in prompt[: prompt.index(LOOK)]:
            raise ValueError(f"no image stands before the first {LOOK}")
        found, most = prompt.count(LOOK), self.looks["most"]
        if found > most:
            raise ValueError(f"a prompt has {found} {LOOK}; allowed: {most}")

    def _check(self, kwargs: dict, return_tensors) -> None:
        """Rejects what would be ignored."""
        allowed = {"padding": (True, False, "longest"), "padding_side": ("left",)}
        allowed |= {"add_special_tokens": (True, False), "truncation": (False,)}
        allowed |= {"return_attention_mask": (True,), "return_dict": (True,)}
        groups = [kwargs.pop(name, {}) for name in ("text_kwargs", "images_kwargs")]
        for name, value in {**kwargs, **groups[0], **groups[1]}.items():
            if value is not None and value not in allowed.get(name, ()):
                raise ValueError(f"{name}={value!r} is not supported by this processor")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is {return_tensors!r}; this processor gives 'pt'")

    def __call__(self, images=None, text=None, return_tensors="pt", **kwargs) -> BatchFeature:
        """
        Args:
            images: of all prompts, in the order of their marks `<IMG_CONTEXT>`: one image, a list,
                or a list for each prompt. The chat template writes a mark for an image.
            text: a prompt or a list of them.
        """
        self._check(kwargs, return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        given = _flat(images)
        marks = [t.count(CONTEXT) for t in texts]
        if sum(marks) != len(given):
            raise ValueError(f"{sum(marks)} marks {CONTEXT} but {len(given)} images")
        if isinstance(images, (list, tuple)) and any(i is None or _is_list(i) for i in images):
            found = [len(_flat(one)) for one in images]
            if len(found) > 1 and found != marks:
                raise ValueError(f"{found} images for the prompts' {marks} marks {CONTEXT}")
        pictures = [shown(image) for image in given]
        of = self.tokenizer.convert_tokens_to_ids
        per_tile = self.tiles["tokens_per_tile"]
        rows, pixels, stream, tiles = [], [], [], 0
        # Of every memory: tiles, and centres, sides, prompts and first positions of its patches.
        memories: list[tuple[list, ...]] = [([], [], [], [], []) for _ in self.tiles["memories"]]
        for number, prompt in enumerate(texts):
            self._check_looks(prompt)
            pieces = prompt.split(CONTEXT)
            mine, pictures = pictures[: len(pieces) - 1], pictures[len(pieces) - 1 :]
            cut = self._cut(mine) if mine else []
            ids = []
            for piece, words in enumerate(pieces):
                if piece:
                    used, in_stream, held = cut[piece - 1]
                    ids += [of(START), *[of(CONTEXT)] * (len(in_stream) * per_tile)]
                    pixels.append(used)
                    stream += [tiles + tile for tile in in_stream]
                    for memory, (in_memory, places, sides) in zip(memories, held, strict=True):
                        memory[0].extend(tiles + tile for tile in in_memory)
                        memory[1].append(places)
                        memory[2].append(sides)
                        memory[3].extend([number] * len(places))
                        memory[4].extend([len(ids)] * len(places))
                    ids.append(of(END))
                    tiles += len(used)
                ids += self._encode(words)
            rows.append(ids)
        longest = max(len(ids) for ids in rows)
        before = torch.tensor([longest - len(ids) for ids in rows])
        pad = self.tokenizer.pad_token_id or 0
        data = {
            "input_ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows]),
            "attention_mask": (torch.arange(longest) >= before[:, None]).long(),
        }
        if pixels:
            mean, std = (
                torch.tensor(self.tiles[name], dtype=torch.float32).view(3, 1, 1)
                for name in ("mean", "std")
            )
            scaled = torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2).float() / 255.0
            data["pixel_values"] = ((scaled - mean) / std).contiguous()
        if pixels and memories:
            counts = torch.tensor([len(memory[0]) for memory in memories])
            owner, visible = (
                torch.tensor(sum((memory[n] for memory in memories), []), dtype=torch.int64)
                for n in (3, 4)
            )
            data |= {
                "stream_tiles": torch.tensor(stream, dtype=torch.int64),
                "memory_tiles": torch.tensor(sum((memory[0] for memory in memories), [])),
                "memory_number": torch.arange(len(memories)).repeat_interleave(counts),
                "memory_coordinates": torch.cat([c for memory in memories for c in memory[1]]),
                "memory_extents": torch.cat([e for memory in memories for e in memory[2]]),
                "memory_sample": owner,
                "memory_visible_from": visible + before[owner],
            }
        return Inputs(data)


def _is_list(images) -> bool:
    return isinstance(images, Sequence) and not isinstance(images, (str, bytes))


def _flat(images) -> list:
    """The images of one, a list, or a list for each prompt."""
    if images is None:
        return []
    return [image for some in images for image in _flat(some)] if _is_list(images) else [images]
