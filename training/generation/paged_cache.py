"""Keys and values in pages that rows of one prompt share."""

import math
from collections import Counter

import torch
from torch import Tensor

from training.attention import AttentionRule
from training.generation.kv_cache import KvCache

PAGE_TOKENS = 64


class PagedCache(KvCache):
    """A pool of pages: a row holds those that its prompt and its longest response need, wherever they are free.

    Rows of one prompt share the pages that it fills, which nobody writes to; the page where it ends, each row has for
    itself. A row of another slot is another line of the page table: nothing is copied. Nothing that decodes is read by
    the host, so a step can be captured in a CUDA graph.
    """

    def __init__(self, slots: int, capacity: int, num_pages: int, device: torch.device) -> None:
        """
        Args:
            slots: rows that it has room for.
            capacity: tokens that a row has room for at most.
            num_pages: pages of PAGE_TOKENS tokens, besides one that idle rows write to.
            device: of the model.
        """
        super().__init__((num_pages + 1) * PAGE_TOKENS)
        self.num_pages = num_pages
        self.free = list(range(num_pages, 0, -1))
        self._most_used = 0
        self._shared = Counter[int]()  # rows that hold a page
        self._pages: list[list[int]] = []  # by slot
        # Page 0 is where a row of no slot writes.
        self._table = torch.zeros(slots, pages_of(capacity), dtype=torch.int32, device=device)

    @property
    def peak_share(self) -> float:
        return self._most_used / self.num_pages

    def admit(self, slot: int, prompt_tokens: int, limit: int, twin: int | None) -> bool:
        shared = [] if twin is None else self._pages[twin][: pages_of(self.shared_tokens(prompt_tokens))]
        needed = pages_of(prompt_tokens + limit) - len(shared)
        if slot >= self._table.shape[0] or needed > len(self.free):
            return False
        assert slot == len(self._pages)
        pages = shared + [self.free.pop() for _ in range(needed)]
        self._shared.update(pages)
        self._pages.append(pages)
        self._write_table(slot)
        self._most_used = max(self._most_used, self.num_pages - len(self.free))
        return True

    def retire(self, slot: int, last: int, cached: Tensor) -> None:
        assert last == len(self._pages) - 1
        for page in self._pages[slot]:
            self._shared[page] -= 1
            if not self._shared[page]:
                self.free.append(page)
        self._pages[slot] = self._pages[last]
        self._pages.pop()
        self._table[last] = 0
        if slot < last:
            self._write_table(slot)

    def _write_table(self, slot: int) -> None:
        pages = torch.tensor(self._pages[slot], dtype=torch.int32)
        self._table[slot, : len(pages)] = pages.to(self._table.device)

    def decoding_places(self, lengths: Tensor) -> Tensor:
        page = self._table[: lengths.shape[0]].gather(1, (lengths // PAGE_TOKENS)[:, None])[:, 0]
        return page.long() * PAGE_TOKENS + lengths % PAGE_TOKENS

    def prompt_places(self, slot: int, positions: Tensor) -> Tensor:
        pages = torch.tensor(self._pages[slot])
        return pages[positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS

    def shared_tokens(self, prompt_tokens: int) -> int:
        return prompt_tokens // PAGE_TOKENS * PAGE_TOKENS

    def attend_rows(self, keys: Tensor, values: Tensor, query: Tensor, seen: Tensor, rule: AttentionRule) -> Tensor:
        """See `KvCache.attend_rows`. On a GPU one kernel reads the pages; elsewhere they are put side by side."""
        key_pages, value_pages = (memory.unflatten(0, (-1, PAGE_TOKENS)) for memory in (keys, values))
        table = self._table[: query.shape[0]]
        if query.is_cuda:
            # Imported here: Triton comes with torch's GPU builds only.
            from training.generation.paged_attention_kernel import paged_attention

            return paged_attention(
                query,
                key_pages,
                value_pages,
                table,
                seen,
                scaling=rule.scaling,
                sliding_window=rule.sliding_window,
                softcap=rule.softcap,
            )
        row_keys, row_values = (pages[table].flatten(1, 2) for pages in (key_pages, value_pages))
        return self.attend_laid_out(row_keys, row_values, query, seen, rule)


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return math.ceil(tokens / PAGE_TOKENS)
