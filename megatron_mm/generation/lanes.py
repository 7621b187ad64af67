"""Lanes: the rows in which completions are generated.

A lane is one microbatch of a decoding step. All ranks of a replica know the drawn tokens, so each
keeps the same state of every lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_mm.data.batch import Microbatch
from megatron_mm.model.decode import DecodeCache, Filling

FREE = -1


@dataclass(frozen=True)
class Completion:
    """Completion of a prompt.

    Attributes:
        tokens_G: int64. The last one is a stop token if `finished`; otherwise the length limit was
            reached.
        logprobs_G: fp32, log-probability of each token under the model that drew it, at its
            temperature.
        routes_SLk: int16, if recorded: experts chosen in each MoE layer of this rank, for prompt
            and completion without its last token, which no router saw.
    """

    tokens_G: torch.Tensor
    logprobs_G: torch.Tensor
    finished: bool
    routes_SLk: torch.Tensor | None = None

    @property
    def routes_GLk(self) -> torch.Tensor:
        """The recorded routes of the positions whose logits were sampled, the last G that any
        router saw."""
        assert self.routes_SLk is not None, "routes were not recorded"
        return self.routes_SLk[-len(self.tokens_G) :]


class Lane:
    """R rows, each free or generating one completion.

    Attributes:
        number_R: int64, unique per completion; with the count it seeds the next draw.
        count_R: int64, number of tokens drawn.
    """

    def __init__(self, rows: int, max_tokens: int):
        self.cache = DecodeCache(rows)
        self.owner_R2 = torch.full((rows, 2), FREE)  # (prompt, index of the completion)
        self.number_R = torch.zeros(rows, dtype=torch.int64)
        self.count_R = torch.zeros(rows, dtype=torch.int64)
        self.tokens_RG = torch.zeros(rows, max_tokens, dtype=torch.int64)
        self.logprobs_RG = torch.zeros(rows, max_tokens)

    @property
    def active_R(self) -> torch.Tensor:
        return self.owner_R2[:, 0] != FREE

    @property
    def busy_rows(self) -> torch.Tensor:
        """int64 indices of the rows that are generating."""
        return self.active_R.nonzero().flatten()

    @property
    def free(self) -> int:
        return int((~self.active_R).sum())

    def fill(
        self, batch: Microbatch, prompts: range, numbers: Sequence[int], group: int
    ) -> Filling:
        """Assigns free rows to `group` completions of each sample of `batch`, and returns them.
        The forward pass of the batch then fills their caches.

        Args:
            prompts: indices of the samples among the prompts.
            numbers: see `Prompts.numbers`.
        """
        (rows,) = (~self.active_R).nonzero(as_tuple=True)
        rows = rows[: len(prompts) * group]
        prompt = torch.arange(len(prompts)).repeat_interleave(group)
        sample = torch.arange(group).repeat(len(prompts))
        filling = self.cache.filling = Filling(rows, prompt)
        self.cache.lengths_R[rows] = batch.cu_seqlens.diff()[prompt]
        self.owner_R2[rows] = torch.stack((prompt + prompts.start, sample), 1)
        self.number_R[rows] = torch.tensor(numbers, dtype=torch.int64)[prompt] * group + sample
        self.count_R[rows] = 0
        return filling

    def advance(
        self, rows: torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor, stops: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        """Appends a token to each of `rows`. Yields (prompt, index, completion) for completions
        that end with it, and frees their rows."""
        place = self.count_R[rows]
        self.tokens_RG[rows, place] = tokens
        self.logprobs_RG[rows, place] = logprobs
        self.count_R[rows] += 1
        stopped = torch.isin(tokens, torch.tensor(stops, dtype=torch.int64))
        ended = stopped | (self.count_R[rows] == self.tokens_RG.shape[1])
        for row, finished in zip(rows[ended].tolist(), stopped[ended].tolist(), strict=True):
            count = int(self.count_R[row])
            tokens_G, logprobs_G = self.tokens_RG[row, :count], self.logprobs_RG[row, :count]
            routes = self.cache.routes.tensors.get("experts")
            if routes is not None:
                routes = routes[row, :, : self.cache.lengths_R[row]].transpose(0, 1)
                # Copied even on the CPU, because the row will be refilled.
                routes = routes.to("cpu", copy=True)
            done = Completion(tokens_G.clone(), logprobs_G.clone(), finished, routes)
            prompt, sample = self.owner_R2[row].tolist()
            self.owner_R2[row] = FREE
            yield prompt, sample, done

    def shrink(self, multiple: int) -> None:
        """Drops free rows once half of all are free, keeping a multiple of `multiple` rows."""
        busy = self.busy_rows
        wanted = max(1, -(-len(busy) // multiple)) * multiple
        if 2 * wanted > self.cache.rows:
            return
        (free,) = (~self.active_R).nonzero(as_tuple=True)
        rows = torch.cat((busy, free[: wanted - len(busy)]))
        self.cache.keep(rows)
        for name in ("owner_R2", "number_R", "count_R", "tokens_RG", "logprobs_RG"):
            setattr(self, name, getattr(self, name)[rows])

    def next_tokens(self, pad_id: int) -> Microbatch:
        """Returns one position per row: its last token, or a pad token if the row is free."""
        rows = torch.arange(self.cache.rows)
        tokens = self.tokens_RG[rows, (self.count_R - 1).clamp(min=0)]
        return Microbatch.build(
            torch.where(self.active_R, tokens, pad_id),
            [1] * len(rows),
            position_ids_T=self.cache.lengths_R.clone(),
        )
