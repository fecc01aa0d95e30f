"""Rollouts with the Hugging Face module's own key-value cache: works for every causal LM, on any device."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from training.generation.interface import Completion, SamplingConfig
from training.generation.sampler import sample_tokens


class HuggingFaceGenerator:
    """Decodes batches of prompts, padded on the left, and drops rows from the batch as they end."""

    def __init__(
        self,
        open_module: Callable[[], AbstractContextManager[nn.Module]],
        eos_ids: Sequence[int],
        batch_size: int,
    ) -> None:
        """
        Args:
            open_module: a context in which the causal LM has its whole weights; entered once per call of `generate`.
            eos_ids: tokens that end a response.
            batch_size: rows decoded together; memory for keys and values grows with it.
        """
        self.open_module = open_module
        self.eos_ids = list(eos_ids)
        self.batch_size = batch_size

    def generate(self, prompt_ids: list[list[int]], sampling: SamplingConfig, seeds: list[int]) -> list[Completion]:
        """See `Generator.generate`."""
        # Neighbours of like length: less padding.
        order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
        completions: dict[int, Completion] = {}
        with self.open_module() as module:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                decoding = _Decoding(module, self.eos_ids, sampling)
                results = decoding.run([prompt_ids[row] for row in rows], [seeds[row] for row in rows])
                completions.update(zip(rows, results, strict=True))
        return [completions[row] for row in range(len(prompt_ids))]


class _Decoding:
    """One batch of rows from prompt to end: cache, masks, and the rows that are still running."""

    def __init__(self, module: nn.Module, eos_ids: list[int], sampling: SamplingConfig) -> None:
        self.module: Any = module
        self.sampling = sampling
        self.device = next(module.parameters()).device
        self.eos_ids = torch.tensor(eos_ids, device=self.device)
        self.takes_positions = "position_ids" in inspect.signature(_forward_of(module)).parameters

    def run(self, prompt_ids: list[list[int]], seeds: list[int]) -> list[Completion]:
        limit = self.sampling.max_new_tokens
        input_ids, mask = self._left_padded(prompt_ids)
        uniforms = torch.stack([_uniforms(seed, limit) for seed in seeds]).to(self.device)
        tokens = torch.zeros(len(seeds), limit, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(len(seeds), limit, device=self.device)
        lengths = torch.full((len(seeds),), limit, device=self.device)
        finished = torch.zeros(len(seeds), dtype=torch.bool, device=self.device)

        running = torch.arange(len(seeds), device=self.device)  # rows of the result that are still in the batch
        cache = DynamicCache()
        for step in range(limit):
            logits = self._forward(input_ids, mask, cache)
            if step < self.sampling.min_new_tokens:
                logits[:, self.eos_ids] = -torch.inf
            drawn, drawn_logprobs = sample_tokens(logits, uniforms[running, step], self.sampling)
            tokens[running, step], logprobs[running, step] = drawn, drawn_logprobs
            ended = torch.isin(drawn, self.eos_ids)
            finished[running[ended]] = True
            lengths[running[ended]] = step + 1
            keep = (~ended).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < len(running):
                cache.batch_select_indices(keep)
                running, mask, drawn = running[keep], mask[keep], drawn[keep]
            input_ids = drawn[:, None]
            mask = torch.cat([mask, mask.new_ones(len(keep), 1)], dim=1)
        return [
            Completion(tokens[row, :length].tolist(), logprobs[row, :length].tolist(), bool(finished[row]))
            for row, length in enumerate(lengths.tolist())
        ]

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


def _uniforms(seed: int, count: int) -> Tensor:
    """`count` random numbers in [0, 1) that depend on `seed` alone. Drawn on the CPU: equal on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
