"""The vision memories of a model: named sets of patch features that looks attend to.

Settings describe the memory `vision` by `vision_memory` and its companions, and any further one by
a section of `fusion.memories`. `memories` turns both into complete descriptions. Every other
module reads those and not the settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.config.families import vision_family
from megatron_mm.config.layers.kinds import LAYERS
from megatron_mm.config.settings import RunConfig
from megatron_mm.config.settings_model import MemoryConfig, ModelConfig, VisionMemory
from megatron_mm.errors import ConfigError, unknown

VISION = "vision"  # the memory of `vision_memory`
IMAGES = "images"  # the rows' key for the images of the token stream


@dataclass(frozen=True)
class Memory:
    """One vision memory.

    Attributes:
        tiles: the tiles of each image whose patches it holds; never none.
        width: features of a row.
        fold: rows that fill one row of the hidden size on the wire.
        coordinates: whether its keys carry the places of their patches.
        images: the rows' key for the images that it holds.
    """

    name: str
    tiles: VisionMemory
    width: int
    fold: int
    coordinates: bool
    images: str

    @property
    def tiles_setting(self) -> str:
        """The name of the setting that chose its tiles, for messages."""
        return "vision_memory" if self.name == VISION else f"memories.{self.name}.tiles"

    @property
    def images_setting(self) -> str:
        """The name of the setting that chose its images, for messages."""
        return "memory_images" if self.name == VISION else f"memories.{self.name}.images"

    @property
    def width_setting(self) -> str:
        """The name of the setting that chose its width, for messages."""
        return "memory_hidden_size" if self.name == VISION else f"memories.{self.name}.hidden_size"


def memories(model: ModelConfig, images: str = IMAGES) -> tuple[Memory, ...]:
    """Returns the memories that hold anything, `vision` first, the others in their order.

    Args:
        images: `memory_images` of the run, for callers that read rows.

    Raises:
        ConfigError: for a name that no memory can have.
    """
    for name in model.fusion.memories:
        if not name.isidentifier() or name == VISION:
            raise ConfigError(
                f"memories holds {name!r}; allowed: a name of letters, digits and _ other than "
                f"{VISION}, which vision_memory describes"
            )
    if model.vision is None:
        return ()
    fusion, hidden = model.fusion, model.language.hidden_size
    vision = MemoryConfig(
        fusion.vision_memory, fusion.memory_hidden_size, fusion.memory_coordinates, images
    )
    found = []
    for name, section in {VISION: vision, **fusion.memories}.items():
        if section.tiles != "none":
            width = section.hidden_size or hidden // 4
            found.append(
                Memory(
                    name,
                    section.tiles,
                    width,
                    hidden // width,
                    section.coordinates,
                    section.images,
                )
            )
    return tuple(found)


def look_memories(model: ModelConfig) -> tuple[Memory, ...]:
    """Returns the memory that each layer reads, by `Layer.reader`; empty if no such layer is
    built.

    Raises:
        ConfigError: for a memory that does not exist, or a list that is not one name for each look.
    """
    letters, names = model.hybrid_layer_pattern, model.fusion.look_memories
    looks = sum(letters.count(kind.letter) for kind in LAYERS.used(letters) if kind.reads_memory)
    available = {memory.name: memory for memory in memories(model)}
    if not looks or not available:
        return ()
    if not names:
        return (next(iter(available.values())),) * looks
    if len(names) != looks:
        raise ConfigError(
            f"look_memories names {len(names)} memories for the {looks} L of hybrid_layer_pattern; "
            "allowed: one for each L, or none for the first memory everywhere"
        )
    for name in names:
        if name not in available:
            raise unknown("memory in look_memories:", name, available)
    return tuple(available[name] for name in names)


def read_memories(model: ModelConfig) -> tuple[Memory, ...]:
    """Returns the memories that some look reads, each once, in the order of `memories`."""
    read = {memory.name for memory in look_memories(model)}
    return tuple(memory for memory in memories(model) if memory.name in read)


def check_memories(run: RunConfig) -> None:
    """Checks tiles, widths, images and readers of the memories.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    model = run.model
    for name, section in model.fusion.memories.items():
        if section.hidden_size is not None and section.hidden_size < 1:
            raise ConfigError(
                f"memories.{name}.hidden_size is {section.hidden_size}; allowed: more than 0"
            )
        if not section.images:
            raise ConfigError(f"memories.{name}.images is ''; allowed: a key of the rows")
    if model.vision is None and any(s.tiles != "none" for s in model.fusion.memories.values()):
        names = ", ".join(model.fusion.memories)
        raise ConfigError(f"memories holds {names}; allowed: none, because model.vision is none")
    found, read = memories(model, run.data.memory_images), look_memories(model)
    for memory in found:
        if memory.tiles in ("thumbnail", "pyramid") and not run.data.use_thumbnail:
            raise ConfigError(
                f"use_thumbnail is False; allowed: true, because {memory.tiles_setting} is "
                f"{memory.tiles}"
            )
        if not read:  # nothing is built
            continue
        if memory.name not in {other.name for other in read}:
            raise ConfigError(
                f"{memory.tiles_setting} is {memory.tiles!r} but no look reads the memory "
                f"{memory.name}; allowed: none, or the name in look_memories"
            )
        # On the wire, rows of a memory are folded into rows of the hidden size.
        hidden = model.language.hidden_size
        if hidden % memory.width:
            raise ConfigError(
                f"hidden_size {hidden} does not divide by {memory.width_setting} {memory.width}; "
                f"allowed: a divisor of {hidden}"
            )


def most_tiles(run: RunConfig, images: int = 1) -> int:
    """Returns the most tiles that each of `images` images of a row is cut into, its thumbnail not
    among them: `max_num_tiles`, or fewer where those that the ViT sees would cost more than
    `max_image_tokens` (data/tiles.py, `choose_grids`)."""
    data, fusion = run.data, run.model.fusion
    if data.max_image_tokens is None or run.model.vision is None:
        return data.max_num_tiles
    patches = vision_family(run.model).grid(run.model.vision, None)
    per_tile = (patches.height // (patches.patch * fusion.pixel_shuffle_factor)) ** 2
    choices: dict[str, set[str]] = {IMAGES: {fusion.image_stream}}
    for memory in memories(run.model, data.memory_images):
        choices.setdefault(memory.images, set()).add(memory.tiles)

    def seen(cells: int) -> int:
        thumbnail, found = int(data.use_thumbnail), 0  # of more than one tile
        for chosen in choices.values():
            whole = bool(chosen & {"all", "pyramid"})
            found += cells * (whole or "tiles" in chosen)
            found += thumbnail * (whole or "thumbnail" in chosen)
        return found

    budget = data.max_image_tokens
    fits = (n for n in range(data.max_num_tiles, 1, -1) if images * per_tile * seen(n) <= budget)
    return next(fits, 1)
