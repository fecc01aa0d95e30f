"""Rollouts on the weights that are trained: one attention hook, our own cache, rows that come and go."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.generation.attention_hook import attention_through
from training.generation.hf import HuggingFaceGenerator
from training.generation.interface import (
    Completion,
    Endings,
    Response,
    SamplingConfig,
    draw_uniforms,
    max_positions,
    start_responses,
)
from training.generation.packed_weights import packed_weights
from training.generation.sampler import sample_tokens
from training.generation.slot_cache import FlatTokens, SlotCache

# Prompt tokens of one forward, beside the tokens of the rows that decode: bounds the memory of activations.
PROMPT_TOKENS_CPU = 2048
PROMPT_TOKENS_GPU = 16384


_log = logging.getLogger(__name__)


class NativeGenerator:
    """Continuous batching: a row that ends leaves at once and a waiting prompt takes its place.

    Equal prompts that wait next to each other are computed once. An architecture whose attention cannot be replaced is
    found out at the first call and served by the `hf` backend, with one line that says so.
    """

    def __init__(
        self,
        open_module: Callable[[], AbstractContextManager[nn.Module]],
        endings: Endings,
        batch_size: int,
        cache_gib: float | None = None,
    ) -> None:
        """
        Args:
            open_module: a context in which the causal LM has its whole weights; entered once per call of `generate`.
            endings: what ends a response.
            batch_size: rows decoded together; memory for keys and values grows with it.
            cache_gib: memory for keys and values; rows that do not fit wait for others to end. None for no limit.
        """
        self.open_module = open_module
        self.endings = endings
        self.batch_size = batch_size
        self.cache_gib = cache_gib
        self.last_cache_gib = 0.0
        self.fallback = HuggingFaceGenerator(open_module, endings, batch_size)
        self.takes_the_hook: bool | None = None
        self.has_told_of_waiting = False

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`."""
        if self.takes_the_hook is not False:
            with self.open_module() as module:
                if self.takes_the_hook is None:
                    self.takes_the_hook = follows_the_hook(module)
                if self.takes_the_hook:
                    responses = start_responses(prompt_ids, sampling, limits, module)
                    rows = [_Row(*row) for row in zip(prompt_ids, responses, seeds, strict=True)]
                    capacity = max((len(row.prompt_ids) + row.response.limit for row in rows), default=1)
                    cache = SlotCache(self._slots(module, len(rows), capacity), capacity)
                    _Decoding(module, cache, self.endings, sampling, rows).run()
                    self.last_cache_gib = cache.num_bytes / 2**30
                    return [response.completion() for response in responses]
            _log.warning("the native rollout backend cannot serve this architecture: hf does")
        return self.fallback.generate(prompt_ids, sampling, seeds, limits)

    def metrics(self) -> dict[str, float]:
        """See `Generator.metrics`."""
        return {"rollout/kv_cache_gib": self.last_cache_gib} if self.takes_the_hook else {}

    def _slots(self, module: Any, num_rows: int, capacity: int) -> int:
        """Rows that are decoded together: as many as there are, as are allowed, and as memory holds."""
        wanted = min(self.batch_size, num_rows)
        if self.cache_gib is None:
            return wanted
        row_gib = capacity * bytes_per_token(module) / 2**30
        room = int(self.cache_gib / row_gib)
        if room < 1:
            raise ValueError(
                f"kv_cache_gib is {self.cache_gib:g}, but a row of {capacity} tokens needs {row_gib:.3g}: raise it, or "
                "lower sampling.max_new_tokens"
            )
        if room < wanted and not self.has_told_of_waiting:
            self.has_told_of_waiting = True
            _log.warning(f"{room} of {wanted} rows fit into kv_cache_gib {self.cache_gib:g}: the others wait")
        return min(wanted, room)


@dataclass
class _Row:
    """A prompt and what follows it."""

    prompt_ids: list[int]
    response: Response
    seed: int
    cached: int = 0
    """Tokens in the cache."""


class _Decoding:
    """All rows of one call, from waiting to done."""

    def __init__(
        self, module: Any, cache: SlotCache, endings: Endings, sampling: SamplingConfig, rows: list[_Row]
    ) -> None:
        self.module = module
        self.cache = cache
        self.device = next(module.parameters()).device
        self.endings = endings
        self.eos_ids = torch.tensor(sorted(endings.eos_ids), dtype=torch.long, device=self.device)
        self.sampling = sampling
        self.uniforms = torch.zeros(cache.slots, sampling.max_new_tokens, device=self.device)
        # Taken from the end. The longest first: a long one that starts late is decoded alone.
        self.waiting = sorted(rows, key=lambda row: -row.response.limit)[::-1]
        self.running: list[_Row] = []  # by slot

    def run(self) -> None:
        with attention_through(self.module, self.cache), packed_weights(self.module, self.cache.slots):
            while self.running or self.waiting:
                logits = self._forward(self._admit())
                self._sample(logits)
                self._retire()

    def _admit(self) -> list[list[_Row]]:
        """Waiting rows that fit now, those of equal prompts together."""
        budget = PROMPT_TOKENS_GPU if self.device.type == "cuda" else PROMPT_TOKENS_CPU
        admitted: list[list[_Row]] = []
        for slot in range(len(self.running), self.cache.slots):
            if not self.waiting:
                break
            row = self.waiting[-1]
            if admitted and admitted[-1][0].prompt_ids == row.prompt_ids:
                admitted[-1].append(row)
            elif admitted and budget < len(row.prompt_ids):
                break
            else:
                admitted.append([row])
                budget -= len(row.prompt_ids)
            self.waiting.pop()
            row.cached = len(row.prompt_ids)
            self.uniforms[slot] = draw_uniforms(row.seed, self.sampling.max_new_tokens)
        return admitted

    def _forward(self, admitted: list[list[_Row]]) -> Tensor:
        """Logits [rows, vocab] after the last token of each row, the admitted ones behind the others."""
        slots = iter(range(len(self.running), self.cache.slots))
        prompts = [(rows[0].prompt_ids, [next(slots) for _ in rows]) for rows in admitted]
        tokens, lengths = [row.response.tokens[-1] for row in self.running], [row.cached for row in self.running]
        logits = _forward(self.module, self.cache, tokens, lengths, prompts)
        for row in self.running:
            row.cached += 1
        self.running += [row for rows in admitted for row in rows]
        return logits

    def _sample(self, logits: Tensor) -> None:
        drawn = [len(row.response.tokens) for row in self.running]
        too_short = [slot for slot, count in enumerate(drawn) if count < self.sampling.min_new_tokens]
        if too_short:
            logits[torch.tensor(too_short, device=self.device)[:, None], self.eos_ids] = -torch.inf
        uniforms = self.uniforms[: len(drawn)].gather(1, torch.tensor(drawn, device=self.device)[:, None])[:, 0]
        tokens, logprobs = sample_tokens(logits, uniforms, self.sampling)
        for row, token, logprob in zip(self.running, tokens.tolist(), logprobs.tolist(), strict=True):
            row.response.append(token, logprob, self.endings)

    def _retire(self) -> None:
        """Take out the rows that are done; the last rows move into their slots."""
        for slot in reversed(range(len(self.running))):
            if not self.running[slot].response.done:
                continue
            last = self.running.pop()
            if slot < len(self.running):
                self.cache.move(len(self.running), slot, last.cached)
                self.uniforms[slot] = self.uniforms[len(self.running)]
                self.running[slot] = last


def bytes_per_token(module: Any) -> int:
    """Memory of one token's keys and values in all layers."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * next(module.parameters()).element_size()


def follows_the_hook(module: Any) -> bool:
    """Whether the module's logits, computed through the hook, are those of its own attention.

    Some architectures do not look their attention up by name, or add to it what the hook does not know: they would
    write nonsense in silence. Compared on two rows of unequal length: first their prompts, then token by token.
    """
    device = next(module.parameters()).device
    vocab_size = module.get_input_embeddings().weight.shape[0]
    longest = min(12, max_positions(module) or 12)
    rows = [torch.arange(start, start + longest).mul(7).remainder(vocab_size).tolist() for start in (1, 40)]
    lengths = [max(1, longest // 3), max(1, longest // 2)]
    steps = longest - lengths[1]
    cache = SlotCache(slots=2, capacity=longest)
    try:
        with attention_through(module, cache):
            prompts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
            logits = [_forward(module, cache, [], [], [(prompt, [slot]) for slot, prompt in enumerate(prompts)])]
            for step in range(steps):
                seen = [length + step for length in lengths]
                tokens = [row[length] for row, length in zip(rows, seen, strict=True)]
                logits.append(_forward(module, cache, tokens, seen, []))
    except (AttributeError, TypeError):  # its attention is called in another way, or it takes no positions
        return False
    found = torch.stack(logits, dim=1).float()
    own = [module(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float() for row in rows]
    expected = torch.stack([row[length - 1 : length + steps] for row, length in zip(own, lengths, strict=True)])
    tolerance = 1e-3 if next(module.parameters()).dtype == torch.float32 else 0.2
    return bool(cache.keys) and bool((found - expected).abs().max() < tolerance * expected.std())


def _forward(
    module: Any,
    cache: SlotCache,
    tokens: Sequence[int],
    lengths: Sequence[int],
    prompts: Sequence[tuple[list[int], Sequence[int]]],
) -> Tensor:
    """Logits [rows, vocab] after the last token of every row.

    Args:
        module: inside `attention_through(module, cache)`.
        tokens: the newest token of each row that decodes.
        lengths: how many tokens of that row the cache holds.
        prompts: what is new, each with the slots that it is written to; every slot counts as a row.
    """
    device = next(module.parameters()).device
    ids, positions, last = list(tokens), list(lengths), list(range(len(tokens)))
    places = []
    for prompt, slots in prompts:
        places.append((slice(len(ids), len(ids) + len(prompt)), slots))
        ids += prompt
        positions += range(len(prompt))
        last += [len(ids) - 1] * len(slots)
    cache.begin(FlatTokens(torch.tensor(lengths, dtype=torch.long, device=device), places))
    output = module(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=torch.tensor(last, device=device),
        use_cache=False,
    )
    return output.logits[0]
