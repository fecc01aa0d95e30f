"""The rollout backends that the benchmark compares: ours, and those of transformers."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from scripts.benchmark.ceilings import timed
from training.generation.backends import GENERATORS
from training.generation.interface import Endings, SamplingConfig

PAGE_TOKENS = 256
# Tokens of one forward at most. Transformers' own choice may be so large that its mask takes a minute to fill.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Workload:
    """Prompts, and how long the response to each one is to be."""

    prompt_ids: list[list[int]]
    limits: list[int]
    """Tokens of each response."""
    max_new_tokens: int
    """Tokens that any response may have, which a backend that keeps its memory makes room for."""
    seed: int


# Draws the responses to a workload: the seconds that it took, and the tokens of each response.
Run = Callable[[Workload], tuple[float, list[list[int]]]]


def own_backend(name: str, model: Any, batch_size: int) -> Run:
    """A rollout backend of `training.generation`; it returns log-probabilities as well."""

    @contextlib.contextmanager
    def open_module() -> Iterator[nn.Module]:
        with torch.no_grad():
            yield model

    generator = GENERATORS[name](open_module, Endings.of(()), batch_size)

    def run(workload: Workload) -> tuple[float, list[list[int]]]:
        sampling = SamplingConfig(max_new_tokens=workload.max_new_tokens)
        seeds = [workload.seed + row for row in range(len(workload.limits))]
        work = partial(generator.generate, workload.prompt_ids, sampling, seeds, workload.limits)
        seconds, completions = timed(model.device, work)
        if getattr(generator, "takes_the_hook", True) is False:
            raise RuntimeError("does not serve this architecture")
        return seconds, [completion.response_ids for completion in completions]

    return run


def transformers_generate(cache: str | None, compiled: bool, model: Any, batch_size: int) -> Run:
    """`model.generate` on batches of prompts of like length, padded on the left; each runs to its longest response."""
    if compiled and model.device.type != "cuda":
        raise RuntimeError("transformers compiles generate on a GPU only")

    def generate_batch(workload: Workload, rows: Sequence[int]) -> list[list[int]]:
        width = max(len(workload.prompt_ids[row]) for row in rows)
        padding = [width - len(workload.prompt_ids[row]) for row in rows]
        ids = [[0] * pad + workload.prompt_ids[row] for pad, row in zip(padding, rows, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in padding]
        options = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=max(workload.limits[row] for row in rows),
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=not compiled,
        )
        input_ids, attention_mask = torch.tensor([ids, mask], device=model.device)
        output = model.generate(input_ids, attention_mask=attention_mask, generation_config=options)
        return [tokens[: workload.limits[row]] for row, tokens in zip(rows, output[:, width:].tolist(), strict=True)]

    def generate(workload: Workload) -> list[list[int]]:
        order = sorted(range(len(workload.limits)), key=lambda row: len(workload.prompt_ids[row]))
        responses: dict[int, list[int]] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            responses |= zip(rows, generate_batch(workload, rows), strict=True)
        return [responses[row] for row in range(len(order))]

    def run(workload: Workload) -> tuple[float, list[list[int]]]:
        torch.manual_seed(workload.seed)
        return timed(model.device, partial(generate, workload))

    return run


def continuous_batching(model: Any, batch_size: int) -> Run:
    """The continuous batching of transformers, with a limit for each request; its cache's set-up is not timed."""

    def drain(manager: Any, workload: Workload) -> list[list[int]]:
        for row, (ids, limit) in enumerate(zip(workload.prompt_ids, workload.limits, strict=True)):
            manager.add_request(ids, request_id=str(row), max_new_tokens=limit)
        responses: dict[int, list[int]] = {}
        while len(responses) < len(workload.limits):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("its thread ended before the responses did")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                responses[int(result.request_id)] = result.generated_tokens
        return [responses[row] for row in range(len(workload.limits))]

    def run(workload: Workload) -> tuple[float, list[list[int]]]:
        max_prompt, max_response = max(map(len, workload.prompt_ids)), max(workload.limits)
        pages = math.ceil((max_prompt + max_response) / PAGE_TOKENS) + 1
        torch.manual_seed(workload.seed)
        context = model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                max_requests_per_batch=batch_size,
                max_batch_tokens=BATCH_TOKENS[model.device.type],
                num_blocks=batch_size * pages,
                seed=workload.seed,
            ),
            workload_hints=WorkloadHints(max_prompt, max_response, len(workload.limits)),
        )
        with context as manager:
            return timed(model.device, partial(drain, manager, workload))

    return run


def in_float32(make: Callable[[Any, int], Run], model: Any, batch_size: int) -> Run:
    """A backend on a copy of the model in float32, as people run models on a CPU."""
    return make(copy.deepcopy(model).float(), batch_size)


# By name: from a model and the number of rows that decode together.
BACKENDS: dict[str, Callable[[Any, int], Run]] = {
    **{name: partial(own_backend, name) for name in GENERATORS},
    "generate-dynamic": partial(transformers_generate, None, False),
    "generate-dynamic-fp32": partial(in_float32, partial(transformers_generate, None, False)),
    "generate-static": partial(transformers_generate, "static", False),
    "generate-static-compiled": partial(transformers_generate, "static", True),
    "continuous-batching": continuous_batching,
}
