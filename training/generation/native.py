"""Rollouts on the weights that are trained: one attention hook, our own cache, rows that come and go."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from training.generation.attention_hook import attention_through
from training.generation.decoder import Decoder, flat_forward
from training.generation.hf import HuggingFaceGenerator
from training.generation.interface import (
    Completion,
    Endings,
    OnFinish,
    SamplingConfig,
    checked_limits,
    max_positions,
)
from training.generation.kv_cache import KvCache, SlotCache
from training.generation.lean_layers import lean_layers
from training.generation.paged_cache import PAGE_TOKENS, PagedCache, pages_of
from training.generation.responses import Responses
from training.supervision import alive

# Tokens of the prompts of one forward, padded to the longest of them, beside the tokens of the rows that decode: bounds
# the memory of activations. On a CPU more of them take longer: what is between two layers then leaves the caches.
PROMPT_TOKENS_CPU = 1024
PROMPT_TOKENS_GPU = 16384
# Steps between two looks at which rows have ended, for which the host has to wait for the device.
STEPS_UNSEEN_CPU = 1
STEPS_UNSEEN_GPU = 8


_log = logging.getLogger(__name__)


class NativeGenerator:
    """Continuous batching: a row that ends leaves and a waiting prompt takes its place.

    Equal prompts that wait next to each other are computed once. An architecture whose attention cannot be replaced is
    found out at the first call and served by the `hf` backend, with one line that says so.
    """

    def __init__(
        self,
        open_module: Callable[[], AbstractContextManager[nn.Module]],
        endings: Endings,
        batch_size: int,
        cache_gib: float | None = None,
        keep_cache: bool = True,
        paged: bool | None = None,
        steps_unseen: int | None = None,
    ) -> None:
        """
        Args:
            open_module: a context in which the causal LM has its whole weights; entered once per call of `generate`.
            endings: what ends a response.
            batch_size: rows decoded together; memory for keys and values grows with it.
            cache_gib: memory for keys and values; rows that do not fit wait for others to end. None for no limit.
            keep_cache: hold that memory, and the CUDA graphs that point to it, from one call to the next.
            paged: keep keys and values in pages; None does so on a GPU, where a kernel reads them in place.
            steps_unseen: steps between two looks at which rows have ended; None for what suits the device.
        """
        self.open_module = open_module
        self.endings = endings
        self.batch_size = batch_size
        self.cache_gib = cache_gib
        self.keep_cache = keep_cache
        self.paged = paged
        self.steps_unseen = steps_unseen
        self.fallback = HuggingFaceGenerator(open_module, endings, batch_size)
        self.takes_the_hook: bool | None = None
        self.decoder: Decoder | None = None
        self.last_metrics: dict[str, float] = {}
        self.has_told_of_waiting = False

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        limits: Sequence[int] | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Completion]:
        """See `Generator.generate`."""
        if self.takes_the_hook is not False:
            # Without what autograd keeps beside each tensor, a step on a CPU takes a twentieth less time.
            with self.open_module() as module, torch.inference_mode():
                if self.takes_the_hook is None:
                    self.takes_the_hook = follows_the_hook(module)
                if self.takes_the_hook:
                    limits = checked_limits(prompt_ids, sampling, limits, module)
                    return self._decode(module, prompt_ids, sampling, seeds, limits, on_finish) if prompt_ids else []
            _log.warning("the native rollout backend cannot serve this architecture: hf does")
        return self.fallback.generate(prompt_ids, sampling, seeds, limits, on_finish)

    def sleep(self) -> None:
        """See `Generator.sleep`."""
        self.decoder = None

    def metrics(self) -> dict[str, float]:
        """See `Generator.metrics`."""
        return self.last_metrics

    def _decode(
        self,
        module: Any,
        prompt_ids: list[list[int]],
        sampling: SamplingConfig,
        seeds: list[int],
        limits: Sequence[int],
        on_finish: OnFinish | None,
    ) -> list[Completion]:
        wanted = min(self.batch_size, len(prompt_ids))
        capacity = max(len(ids) + limit for ids, limit in zip(prompt_ids, limits, strict=True))
        # Put back at the end: a rollout that was cut short leaves it in disorder.
        decoder, self.decoder = self.decoder, None
        if decoder is None or not decoder.serves(module, wanted, capacity, sampling):
            del decoder  # its memory is free before the new one's is taken
            decoder = self._new_decoder(module, wanted, capacity, sampling)
        decoder.begin()
        rollout = _Rollout(decoder, prompt_ids, seeds, limits, self.steps_unseen, on_finish)
        with attention_through(module, decoder.cache), lean_layers(module, decoder.cache, wanted):
            while rollout.unfinished:
                rollout.step()
                alive()
        if rollout.room < wanted and not self.has_told_of_waiting:
            self.has_told_of_waiting = True
            _log.warning(f"{rollout.room} of {wanted} rows fit into kv_cache_gib {self.cache_gib:g}: the others wait")
        self.last_metrics = {
            "rollout/kv_cache_gib": decoder.cache.num_bytes / 2**30,
            "rollout/kv_cache_peak": decoder.cache.peak_share,
        }
        if self.keep_cache:
            self.decoder = decoder
        return [rollout.completions[row] for row in range(len(prompt_ids))]

    def _new_decoder(self, module: Any, wanted: int, capacity: int, sampling: SamplingConfig) -> Decoder:
        """One that has room for as many rows as are wanted and as memory holds."""
        device = next(module.parameters()).device
        paged = device.type == "cuda" if self.paged is None else self.paged
        row_tokens = pages_of(capacity) * PAGE_TOKENS if paged else capacity
        tokens = wanted * row_tokens
        if self.cache_gib is not None:
            tokens = min(tokens, int(self.cache_gib * 2**30 / bytes_per_token(module)))
        if tokens < row_tokens:
            raise ValueError(
                f"kv_cache_gib is {self.cache_gib:g}, but a row of {capacity} tokens needs "
                f"{row_tokens * bytes_per_token(module) / 2**30:.3g}: raise it, or lower sampling.max_new_tokens"
            )
        cache: KvCache
        if paged:
            cache = PagedCache(wanted, capacity, tokens // PAGE_TOKENS, device)
        else:
            cache = SlotCache(tokens // row_tokens, capacity)
        return Decoder(module, cache, Responses(wanted, sampling, self.endings, device), capacity)


class _Rollout:
    """The rows of one call, from waiting to done."""

    def __init__(
        self,
        decoder: Decoder,
        prompt_ids: list[list[int]],
        seeds: Sequence[int],
        limits: Sequence[int],
        steps_unseen: int | None,
        on_finish: OnFinish | None,
    ) -> None:
        self.decoder = decoder
        self.on_finish = on_finish
        self.prompt_ids, self.seeds, self.limits = prompt_ids, seeds, limits
        is_gpu = decoder.device.type == "cuda"
        self.steps_unseen = steps_unseen or (STEPS_UNSEEN_GPU if is_gpu else STEPS_UNSEEN_CPU)
        self.prompt_tokens = PROMPT_TOKENS_GPU if is_gpu else PROMPT_TOKENS_CPU
        # Taken from the end. The longest first: a long one that starts late is decoded alone.
        self.waiting = sorted(range(len(prompt_ids)), key=lambda row: -limits[row])[::-1]
        self.running: list[int] = []  # by slot
        self.room = len(prompt_ids)  # rows that ran when the cache had no room for another
        self.completions: dict[int, Completion] = {}

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> None:
        """One more token, or several, for each row; rows that end make room."""
        decoding = len(self.running)
        prompts = self._admit()
        if prompts:
            rows = self.running[decoding:]
            self.decoder.responses.start(
                decoding, [self.seeds[row] for row in rows], [self.limits[row] for row in rows]
            )
            self.decoder.read(decoding, prompts)
        else:
            self.decoder.decode(decoding, self.steps_unseen)
        self._retire()

    def _admit(self) -> list[tuple[list[int], list[int]]]:
        """Waiting rows that fit now: prompts, and the slots of the rows that begin with each."""
        cache = self.decoder.cache
        prompts: list[tuple[list[int], list[int]]] = []
        longest = 0
        while self.waiting:
            row, slot = self.waiting[-1], len(self.running)
            ids = self.prompt_ids[row]
            twin = prompts[-1][1][0] if prompts and prompts[-1][0] == ids else None
            longest = max(longest, len(ids))
            if twin is None and prompts and (len(prompts) + 1) * longest > self.prompt_tokens:
                break
            if not cache.admit(slot, len(ids), self.limits[row], twin):
                self.room = min(self.room, slot)
                break
            if twin is None:
                prompts.append((ids, []))
            prompts[-1][1].append(slot)
            self.running.append(self.waiting.pop())
        return prompts

    def _retire(self) -> None:
        """Take out the rows that are done; the last rows move into their slots."""
        done = self.decoder.responses.done(len(self.running)).nonzero()[:, 0].tolist()
        if not done:
            return
        drawn = self.decoder.responses.completions(done)
        rows = [self.running[slot] for slot in done]
        self.completions |= zip(rows, drawn, strict=True)
        if self.on_finish is not None:
            self.on_finish(rows, drawn)
        for slot in reversed(done):
            self.decoder.retire(slot, len(self.running) - 1)
            self.running[slot] = self.running[-1]
            self.running.pop()


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
        with attention_through(module, cache), lean_layers(module, cache, rows=2):
            prompts = [(row[:length], [slot]) for slot, (row, length) in enumerate(zip(rows, lengths, strict=True))]
            none = torch.zeros(0, dtype=torch.long, device=device)
            logits = [flat_forward(module, cache, none, none, prompts)]
            for step in range(steps):
                seen = [length + step for length in lengths]
                tokens = [row[length] for row, length in zip(rows, seen, strict=True)]
                newest, held = torch.tensor([tokens, seen], device=device)
                logits.append(flat_forward(module, cache, newest, held, []))
    except (AttributeError, TypeError):  # its attention is called in another way, or it takes no positions
        return False
    found = torch.stack(logits, dim=1).float()
    own = [module(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float() for row in rows]
    expected = torch.stack([row[length - 1 : length + steps] for row, length in zip(own, lengths, strict=True)])
    # Another attention is off by a third of the logits' deviation or more. Rounding to 16 bits in 30 layers comes to a
    # twentieth, but to a quarter at the worst of a whole vocabulary, so that the largest difference tells little.
    tolerance = 1e-3 if next(module.parameters()).dtype == torch.float32 else 0.15
    error = (found - expected).square().mean().sqrt()
    return bool(cache.layers) and bool(error < tolerance * expected.std())
