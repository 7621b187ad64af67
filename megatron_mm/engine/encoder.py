"""The encoder beside the pipeline (`vision_parallel` replica): every rank of a replica encodes a
share of the tiles.

    before the schedule  each owner encodes its tiles and sends what comes out to the first stage
    the schedule         takes it for leaves; no activation of the encoder is held meanwhile
    after it             the leaves' gradients go back; each owner encodes again, with gradients

So images cost the pipeline nothing, whatever their number, for one more forward pass of the
encoder. Kimi K2.5 trains in this form (arXiv 2602.02276). All tiles cost the same, so they are
dealt by count (`data.batch.Dealt`).

The encoder's parameters are not the first stage's with copies elsewhere: it is a model of its own,
in megatron-core's DDP and optimizer over all ranks of the job that hold the same part of it.
Nothing is refreshed or reduced twice, and its optimizer state is shared by more ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm import platform
from megatron_mm.config import RunConfig
from megatron_mm.data.batch import Dealt, Microbatch
from megatron_mm.model.vision_tower import Encoded, Encoder
from megatron_mm.parallel.groups import Groups

STREAM = ""  # the name of the stream among those of the memories

Tile = tuple[int, int]  # the microbatch, its tile there


class Part(NamedTuple):
    """One kind of rows that come out of the encoder: the stream, or a memory.

    Attributes:
        rows, width: of a tile.
    """

    name: str
    rows: int
    width: int

    def tiles(self, batch: Microbatch) -> list[int]:
        """The tiles of the microbatch that enter it, in its order."""
        if not batch.num_tiles:  # a step of decoding has no memories either
            return []
        return (batch.memories[self.name].tiles if self.name else batch.stream_tiles).tolist()


@dataclass
class Shares:
    """Who encodes which tiles of some microbatches, and what comes out of each.

    Attributes:
        entered: of each part and microbatch, the tiles that enter it, in its order.
        owned: of each owner, its tiles.
        sent: of each part and owner, the tiles whose rows it sends, each once.
    """

    parts: Sequence[Part]
    entered: list[list[list[int]]]
    owned: list[list[Tile]]
    sent: list[list[list[Tile]]]

    @classmethod
    def of(cls, batches: Sequence[Microbatch], parts: Sequence[Part], owners: int) -> Shares:
        dealt = [batch.dealt or Dealt(0, batch.num_tiles) for batch in batches]
        if owners > 1 and any(batch.num_tiles and batch.dealt is None for batch in batches):
            raise ValueError("tiles that were not dealt to ranks: pass `feed.broadcast_batches`")
        owned = [
            [(b, tile) for b, deal in enumerate(dealt) for tile in deal.of(owner, owners)]
            for owner in range(owners)
        ]
        entered = [[part.tiles(batch) for batch in batches] for part in parts]
        sent = []
        for of_part in entered:
            once = {(b, tile) for b, tiles in enumerate(of_part) for tile in tiles}
            sent.append([[tile for tile in mine if tile in once] for mine in owned])
        return cls(parts, entered, owned, sent)

    def size(self, owner: int) -> int:
        """Elements that an owner sends."""
        return sum(
            len(sent[owner]) * part.rows * part.width
            for part, sent in zip(self.parts, self.sent, strict=True)
        )

    def places(self, part: int) -> list[list[int]]:
        """For each microbatch where its tiles stand among those that all owners send of a part."""
        order = [tile for mine in self.sent[part] for tile in mine]
        place = {tile: number for number, tile in enumerate(order)}
        return [[place[b, tile] for tile in tiles] for b, tiles in enumerate(self.entered[part])]

    def cut(self, flat: torch.Tensor, owner: int) -> list[torch.Tensor]:
        """The rows [tiles, rows, width] of each part, out of what an owner sends."""
        counts = [len(sent[owner]) for sent in self.sent]
        sizes = [n * p.rows * p.width for n, p in zip(counts, self.parts, strict=True)]
        return [
            rows.view(-1, part.rows, part.width)
            for rows, part in zip(flat.split(sizes), self.parts, strict=True)
        ]


@dataclass
class EncoderSide:
    """The encoder of one rank, and its exchange with the first stage.

    Attributes:
        ddp: the encoder with its gradients; None if nothing in it is trained.
        waiting: what the running step needs for its second pass.
    """

    groups: Groups
    module: Encoder
    ddp: DistributedDataParallel | None
    parts: tuple[Part, ...]
    waiting: tuple[Sequence[Microbatch], Shares, list[Encoded]] | None = field(default=None)

    @classmethod
    def create(
        cls,
        run: RunConfig,
        groups: Groups,
        module: Encoder,
        ddp_config: DistributedDataParallelConfig,
    ) -> EncoderSide:
        """Wraps an encoder that is frozen as the settings ask."""
        assert groups.encoder is not None  # who calls this has an encoder beside the pipeline
        ddp = None
        if any(param.requires_grad for param in module.parameters()):
            pg = groups.encoder.pg
            ddp = DistributedDataParallel(module.config, ddp_config, module, pg_collection=pg)
        tower, fusion = module.vision, run.model.fusion
        tokens = tower.grid.patches // fusion.pixel_shuffle_factor**2
        parts = [Part(STREAM, tokens, run.model.language.hidden_size)]
        parts += [Part(m.name, tower.grid.patches, m.width) for m in tower.memories]
        return cls(groups, module, ddp, tuple(parts))

    @property
    def pg(self) -> ProcessGroupCollection:
        assert self.groups.encoder is not None  # `create` asserts it
        return self.groups.encoder.pg

    @property
    def owners(self) -> dist.ProcessGroup:
        assert self.groups.encoder is not None
        return self.groups.encoder.owners

    @property
    def readers(self) -> int:
        """Ranks of the first stage among the owners; they are the first of them."""
        return self.owners.size() // self.groups.pg.pp.size()

    @property
    def answering(self) -> range:
        """Those of them that send gradients back. Tensor-parallel ranks have the same ones, so
        where all of them are owners, one of them does."""
        same = self.groups.pg.tp.size() // self.pg.tp.size()
        return range(0, self.readers, same)

    def encode(self, batches: Sequence[Microbatch], *, train: bool) -> list[Encoded]:
        """Encodes the images of microbatches. Every rank of the replica calls it.

        Args:
            train: whether `backward` follows.
        Returns:
            what each microbatch needs; on other stages than the first without rows.
        """
        if not any(batch.num_tiles for batch in batches):  # every rank sees that
            return [self._no_images() for _ in batches]
        shares = Shares.of(batches, self.parts, self.owners.size())
        me = self.owners.rank()
        train = train and self.ddp is not None
        sizes = [shares.size(owner) for owner in range(self.owners.size())]
        with torch.no_grad():
            passes = [self._encoded(piece) for piece in self._pieces(batches, shares, me)]
            flat = [found[part].flatten() for part in range(len(self.parts)) for found in passes]
            received = self._to_readers(torch.cat([self._nothing(), *flat]), sizes)
        found = self._taken(shares, received, train)
        if train:
            self.waiting = batches, shares, found
        return found

    def backward(self) -> None:
        """Runs the encoder again for the gradients of the leaves of the last `encode`, and adds
        those of its parameters to its DDP's."""
        if self.waiting is None:
            return
        (batches, shares, leaves), self.waiting = self.waiting, None
        me = self.owners.rank()
        flat = self._to_owners(self._gradients(shares, leaves), shares)
        cursors = [0] * len(self.parts)
        gradients = shares.cut(flat, me)
        for piece in self._pieces(batches, shares, me):
            outputs = self._encoded(piece)
            given = []
            for number, rows in enumerate(outputs):
                begin = cursors[number]
                cursors[number] += len(rows)
                given.append(gradients[number][begin : cursors[number]])
            pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
            if pairs:
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))

    def finish(self, num_tokens: torch.Tensor | None) -> None:
        """Reduces and scales the encoder's gradients as the model's.

        Args:
            num_tokens: supervised tokens of the step over all ranks.
        """
        if self.ddp is not None:
            self.ddp.finish_grad_sync()
            if num_tokens is not None:
                self.ddp.scale_gradients(1.0 / num_tokens.clamp(min=1))

    # ---- encoding ----

    def _pieces(
        self, batches: Sequence[Microbatch], shares: Shares, me: int
    ) -> Iterator[tuple[torch.Tensor, list[list[int]]]]:
        """Yields (pixels, for each part the places of its tiles among them) of this rank's tiles:
        no more at a time than the largest microbatch has, so that the encoder needs no more memory
        than as a part of the first stage."""
        most = max(batch.num_tiles for batch in batches)
        mine, device = shares.owned[me], platform.device()
        held = [0] * len(batches)  # of each microbatch, the tiles that were taken
        entering = [set(sent[me]) for sent in shares.sent]
        for begin in range(0, len(mine), most):
            piece = mine[begin : begin + most]
            pixels = []
            for b, batch in enumerate(batches):
                count = sum(number == b for number, _ in piece)
                if count:
                    pixels.append(batch.pixels_NCHW[held[b] : held[b] + count])
                    held[b] += count
            places = [[n for n, tile in enumerate(piece) if tile in part] for part in entering]
            yield platform.moved(torch.cat(pixels), device), places

    def _encoded(self, piece: tuple[torch.Tensor, list[list[int]]]) -> list[torch.Tensor]:
        """The rows [tiles, rows, width] of each part."""
        pixels_NCHW, places = piece
        tower, found = self.module.vision, []
        features = tower.features(pixels_NCHW)
        for part, here in zip(self.parts, places, strict=True):
            chosen = features
            if len(here) < len(features):
                index = platform.moved(torch.tensor(here, dtype=torch.int64), features.device)
                chosen = features.index_select(0, index)
            rows = tower.memory(part.name, chosen) if part.name else tower.stream(chosen)
            found.append(rows.view(-1, part.rows, part.width))
        return found

    def _no_images(self) -> Encoded:
        nothing = {part.name: self._nothing().view(0, part.width) for part in self.parts}
        return Encoded(nothing.pop(STREAM), nothing)

    def _nothing(self) -> torch.Tensor:
        return torch.empty(0, dtype=self.module.config.params_dtype, device=platform.device())

    # ---- between owners and the first stage ----

    def _to_readers(self, flat: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        """Sends an owner's rows to the first stage; returns there those of all owners."""
        group, readers = self.owners, self.readers
        if group.size() == 1:
            return [flat]
        there = sizes if group.rank() < readers else [0] * len(sizes)
        sent = [len(flat)] * readers + [0] * (group.size() - readers)
        received = flat.new_empty(sum(there))
        dist.all_to_all_single(received, flat.repeat(readers), there, sent, group=group)
        return list(received.split(there))

    def _to_owners(self, flats: list[torch.Tensor], shares: Shares) -> torch.Tensor:
        """Sends the first stage's gradients to the owners of their rows; returns there their sum
        over context-parallel ranks."""
        group, answering = self.owners, self.answering
        if group.size() == 1:
            return flats[0]
        mine = shares.size(group.rank())
        answers = group.rank() in answering
        sent = [len(flat) if answers else 0 for flat in flats]
        there = [mine if owner in answering else 0 for owner in range(group.size())]
        out = torch.cat(flats) if answers else self._nothing()
        received = out.new_empty(sum(there))
        dist.all_to_all_single(received, out, there, sent, group=group)
        return received.view(len(answering), mine).sum(0)

    def _taken(self, shares: Shares, received: list[torch.Tensor], train: bool) -> list[Encoded]:
        """The rows of each microbatch, in its order, out of what the owners sent."""
        reads = self.owners.rank() < self.readers
        found: list[dict[str, torch.Tensor]] = [{} for _ in shares.entered[0]]
        cuts = [shares.cut(flat, owner) for owner, flat in enumerate(received)] if reads else []
        for number, part in enumerate(self.parts):
            places = shares.places(number)
            table = self._nothing().view(0, part.rows, part.width)
            if reads:
                table = torch.cat([cut[number] for cut in cuts])
            else:
                places = [[] for _ in places]
            index = torch.tensor([p for of in places for p in of], dtype=torch.int64)
            rows = table.index_select(0, platform.moved(index, table.device))
            counts = [len(of) for of in places]
            for into, mine in zip(found, rows.split(counts), strict=True):
                into[part.name] = mine.flatten(0, 1).detach().requires_grad_(train and reads)
        return [Encoded(rows.pop(STREAM), rows) for rows in found]

    def _gradients(self, shares: Shares, leaves: list[Encoded]) -> list[torch.Tensor]:
        """For each owner the gradients of the rows that it sent, in its order."""
        if self.owners.rank() not in self.answering:
            return [self._nothing() for _ in shares.owned]
        of_owners: list[list[torch.Tensor]] = [[] for _ in shares.owned]
        for number, part in enumerate(self.parts):
            every = [leaf.memories[part.name] if part.name else leaf.stream_kH for leaf in leaves]
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in every]
            index = torch.tensor([p for of in shares.places(number) for p in of])
            rows = torch.cat(grads).view(-1, part.rows, part.width)
            counts = [len(sent) for sent in shares.sent[number]]
            table = rows.new_zeros(sum(counts), part.rows, part.width)
            # A tile may stand in a microbatch more than once. On a GPU `index_add_` would sum in
            # any order, and tensor-parallel copies of the encoder would drift apart.
            places = platform.moved(index.long(), rows.device)
            table.index_put_((places,), rows, accumulate=True)
            for into, mine in zip(of_owners, table.split(counts), strict=True):
                into.append(mine.flatten())
        return [torch.cat(parts) for parts in of_owners]
