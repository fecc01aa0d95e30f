"""One step of decoding: state on the device, forward, draw; captured in CUDA graphs where there is a GPU."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.generation.interface import SamplingConfig
from training.generation.kv_cache import FlatTokens, KvCache
from training.generation.responses import Responses

SMALLEST_BUCKET = 8

_log = logging.getLogger(__name__)


class Decoder:
    """Rows in slots, the first ones in use, and what each needs for its next token.

    On a GPU a step is captured once for each bucket of rows (8, 16, 32, ...) and then replayed by one call. The graphs
    hold while weights and cache stay where they are in memory; an optimizer step changes what they read, not where.
    """

    def __init__(self, module: Any, cache: KvCache, responses: Responses, capacity: int) -> None:
        """
        Args:
            module: the causal LM.
            cache: with as many slots as it has room for.
            responses: one row for each slot, on the module's device.
            capacity: tokens of the longest row that the cache has room for.
        """
        self.module, self.cache, self.responses, self.capacity = module, cache, responses, capacity
        self.device = responses.tokens.device
        self.slots = responses.drawn.shape[0]
        self.newest = torch.zeros(self.slots, dtype=torch.long, device=self.device)
        self.lengths = torch.zeros(self.slots, dtype=torch.long, device=self.device)  # tokens in the cache
        self.captures = self.device.type == "cuda"
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None
        self.weights: list[int] = []

    def serves(self, module: Any, slots: int, capacity: int, sampling: SamplingConfig) -> bool:
        """Whether it has room for such rows, drawn in this way."""
        return (
            self.module is module
            and self.slots >= slots
            and self.capacity >= capacity
            and self.responses.sampling == sampling
        )

    def begin(self) -> None:
        """Before a rollout: weights that have moved since the last one take their graphs along."""
        weights = [parameter.data_ptr() for parameter in self.module.parameters()]
        if weights != self.weights:
            self.graphs, self.weights = {}, weights

    def read(self, decoding: int, prompts: Sequence[tuple[list[int], Sequence[int]]]) -> None:
        """One step of the first `decoding` rows, and the first token of rows that follow them.

        Args:
            prompts: token ids, and the slots of the rows that begin with them, in order.
        """
        for ids, slots in prompts:
            self.lengths[slots[0] : slots[-1] + 1] = len(ids)
        newest, lengths = self.newest[:decoding], self.lengths[:decoding]
        self._advance(decoding, flat_forward(self.module, self.cache, newest, lengths, prompts))

    def decode(self, rows: int, steps: int) -> None:
        """So many steps of the first `rows` rows; those that end meanwhile stay as they are."""
        bucket = bucket_of(rows, self.slots)
        for _ in range(steps):
            if not self.captures:
                self._step(rows)
            elif bucket in self.graphs:
                self.graphs[bucket].replay()
            else:
                self._step_and_capture(bucket)

    def retire(self, slot: int, last: int) -> None:
        """Free a slot; the row in the last one moves into it."""
        self.cache.retire(slot, last, self.lengths[last])
        if slot < last:
            self.responses.move(last, slot)
            self.newest[slot], self.lengths[slot] = self.newest[last], self.lengths[last]
        self.lengths[last] = self.responses.limits[last] = 0

    def _step(self, rows: int) -> None:
        self._advance(rows, flat_forward(self.module, self.cache, self.newest[:rows], self.lengths[:rows], ()))

    def _advance(self, decoding: int, logits: Tensor) -> None:
        """Take over the [rows, vocab] logits of the next tokens, of which the first `decoding` rows go on."""
        self.lengths[:decoding] += ~self.responses.done(decoding)
        self.newest[: logits.shape[0]] = self.responses.draw(logits)

    def _step_and_capture(self, rows: int) -> None:
        """One step as it is, which also warms up what may not happen in a capture; then the capture of another."""
        self._step(rows)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self._step(rows)
        except RuntimeError as error:  # the model reads something back from the device
            _log.warning(f"a decoding step cannot be captured in a CUDA graph and runs without: {error}")
            self.captures, self.graphs = False, {}
            return
        self.pool = graph.pool()
        self.graphs[rows] = graph


def bucket_of(rows: int, slots: int) -> int:
    """The next power of two, of which there are few enough to capture each."""
    return min(slots, max(SMALLEST_BUCKET, 1 << (rows - 1).bit_length()))


def flat_forward(
    module: Any, cache: KvCache, tokens: Tensor, lengths: Tensor, prompts: Sequence[tuple[list[int], Sequence[int]]]
) -> Tensor:
    """Logits [rows, vocab] after the last token of every row.

    Args:
        module: inside `attention_through(module, cache)`.
        tokens: [decoding] the newest token of each row that decodes.
        lengths: [decoding] how many tokens of that row the cache holds.
        prompts: what is new, each with the slots that it is written to; every slot counts as a row.
    """
    decoding = tokens.shape[0]
    cache.begin(FlatTokens(lengths, [(len(ids), slots) for ids, slots in prompts]))
    positions, keep = lengths, None
    if prompts:
        ids = [token for ids, _ in prompts for token in ids]
        places = [place for ids, _ in prompts for place in range(len(ids))]
        last = list(range(decoding))
        end = decoding
        for prompt, slots in prompts:
            end += len(prompt)
            last += [end - 1] * len(slots)
        new = torch.tensor([ids, places], device=tokens.device)
        tokens, positions = torch.cat([torch.stack([tokens, lengths]), new], dim=1)
        keep = torch.tensor(last, device=tokens.device)
    output = module(
        input_ids=tokens[None],
        position_ids=positions[None],
        logits_to_keep=0 if keep is None else keep,  # 0 for all
        use_cache=False,
    )
    return output.logits[0]
