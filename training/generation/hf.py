"""Rollouts with the Hugging Face module's own key-value cache: works for every causal LM, on any device."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from training.generation.interface import (
    Completion,
    Endings,
    Response,
    SamplingConfig,
    draw_uniforms,
    start_responses,
)
from training.generation.sampler import sample_tokens


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
    ) -> list[Completion]:
        """See `Generator.generate`."""
        # Neighbours of like length: less padding.
        order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
        with self.open_module() as module:
            responses = start_responses(prompt_ids, sampling, limits, module)
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                _Decoding(module, self.endings, sampling).run(
                    [prompt_ids[row] for row in rows], [responses[row] for row in rows], [seeds[row] for row in rows]
                )
        return [response.completion() for response in responses]

    def metrics(self) -> dict[str, float]:
        """See `Generator.metrics`."""
        return {}


class _Decoding:
    """One batch of rows from prompt to end: cache, masks, and the rows that are still running."""

    def __init__(self, module: nn.Module, endings: Endings, sampling: SamplingConfig) -> None:
        self.module: Any = module
        self.endings = endings
        self.sampling = sampling
        self.device = next(module.parameters()).device
        self.takes_positions = "position_ids" in inspect.signature(_forward_of(module)).parameters

    def run(self, prompt_ids: list[list[int]], responses: list[Response], seeds: list[int]) -> None:
        input_ids, mask = self._left_padded(prompt_ids)
        uniforms = torch.stack([draw_uniforms(seed, self.sampling.max_new_tokens) for seed in seeds]).to(self.device)
        eos_ids = torch.tensor(sorted(self.endings.eos_ids), dtype=torch.long, device=self.device)
        cache = DynamicCache()
        for step in range(self.sampling.max_new_tokens):
            logits = self._forward(input_ids, mask, cache)
            if step < self.sampling.min_new_tokens:
                logits[:, eos_ids] = -torch.inf
            tokens, logprobs = sample_tokens(logits, uniforms[:, step], self.sampling)
            for response, token, logprob in zip(responses, tokens.tolist(), logprobs.tolist(), strict=True):
                response.append(token, logprob, self.endings)
            running = [row for row, response in enumerate(responses) if not response.done]
            if not running:
                return
            if len(running) < len(responses):
                responses = [responses[row] for row in running]
                keep = torch.tensor(running, device=self.device)
                cache.batch_select_indices(keep)
                uniforms, mask, tokens = uniforms[keep], mask[keep], tokens[keep]
            input_ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)

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
