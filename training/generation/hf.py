"""Rollouts with the Hugging Face module's own key-value cache: works for every causal LM, on any device."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from training.generation.interface import Completion, Endings, OnFinish, SamplingConfig, checked_limits
from training.generation.responses import Responses
from training.supervision import alive


class HuggingFaceGenerator:
    """Decodes batches of prompts, padded on the left, and drops rows from the batch as they end."""

    def __init__(
        self,
        open_module: Callable[[], AbstractContextManager[nn.Module]],
        endings: Endings,
        batch_size: int,
    ) -> None:
        """
        Args:
            open_module: a context in which the causal LM has its whole weights; entered once per call of `generate`.
            endings: what ends a response.
            batch_size: rows decoded together; memory for keys and values grows with it.
        """
        self.open_module = open_module
        self.endings = endings
        self.batch_size = batch_size

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        limits: Sequence[int] | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`."""
        # Neighbours of like length: less padding.
        order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
        completions: dict[int, Completion] = {}
        with self.open_module() as module:
            limits = checked_limits(prompt_ids, sampling, limits, module)
            decoding = _Decoding(module)
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                responses = Responses(len(rows), sampling, self.endings, decoding.device)
                responses.start(0, [seeds[row] for row in rows], [limits[row] for row in rows])
                for ended, drawn in decoding.run([prompt_ids[row] for row in rows], responses):
                    numbers = [rows[place] for place in ended]
                    completions |= zip(numbers, drawn, strict=True)
                    if on_finish is not None:
                        on_finish(numbers, drawn)
        return [completions[row] for row in range(len(prompt_ids))]

    def metrics(self) -> dict[str, float]:
        """See `Generator.metrics`."""
        return {}

    def sleep(self) -> None:
        """See `Generator.sleep`: nothing is kept."""


class _Decoding:
    """One batch of rows from prompt to end: cache, masks, and the rows that are running."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.device = next(module.parameters()).device
        self.takes_positions = "position_ids" in inspect.signature(_forward_of(module)).parameters

    def run(
        self, prompt_ids: list[list[int]], responses: Responses
    ) -> Iterator[tuple[Sequence[int], Sequence[Completion]]]:
        """Yields which prompts' responses have ended, and those, as soon as some have."""
        input_ids, mask = self._left_padded(prompt_ids)
        cache = DynamicCache()
        rows = list(range(len(prompt_ids)))
        while rows:
            input_ids = responses.draw(self._forward(input_ids, mask, cache))[:, None]
            alive()
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            done = responses.done(len(rows)).tolist()
            if any(done):
                ended = [place for place, is_done in enumerate(done) if is_done]
                yield [rows[place] for place in ended], responses.completions(ended)
                running = [place for place, is_done in enumerate(done) if not is_done]
                rows = [rows[place] for place in running]
                keep = torch.tensor(running, dtype=torch.long, device=self.device)
                cache.batch_select_indices(keep)
                responses.keep(keep)
                input_ids, mask = input_ids[keep], mask[keep]

    def _left_padded(self, prompt_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(ids) for ids in prompt_ids)
        input_ids = torch.zeros(len(prompt_ids), width, dtype=torch.long)
        mask = torch.zeros(len(prompt_ids), width, dtype=torch.long)
        for row, ids in enumerate(prompt_ids):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        return input_ids.to(self.device), mask.to(self.device)

    def _forward(self, input_ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [batch, vocab] after the last token of each row; the cache grows by `input_ids`."""
        positions = {}
        if self.takes_positions:
            positions["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -input_ids.shape[1] :]
        output = self.module(
            input_ids=input_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **positions,
        )
        return output.logits[:, -1]


def _forward_of(module: Any) -> Callable:
    """The forward that names its arguments, also behind an adapter's wrapper."""
    return module.get_base_model().forward if hasattr(module, "get_base_model") else module.forward
