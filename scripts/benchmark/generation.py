"""How fast tokens are drawn, beside transformers and the machine's floor: `python -m scripts.benchmark.generation`.

Every backend draws responses of the same forced lengths to the same prompts, in turns within one process. Give
`--model FOLDER` or `--shape 1b`; `--output FILE` keeps all figures as JSON.
"""

import math
import random
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from scripts.benchmark.backends import BACKENDS, Run, Workload
from scripts.benchmark.ceilings import Ceilings, PeakMemory, measure_ceilings
from scripts.benchmark.costs import SHAPES, Cost, rollout_costs
from scripts.benchmark.reporting import circumstances, run_and_keep, spread_of
from training.config import check_range
from training.config_files import load_config
from training.costs import DecoderShape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BASELINE = "generate-dynamic"
Backend = Literal[
    "native",
    "hf",
    "generate-dynamic",
    "generate-dynamic-fp32",
    "generate-static",
    "generate-static-compiled",
    "continuous-batching",
]


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts, drawn evenly between two bounds, and of responses, drawn exponentially up to a cap."""

    min_prompt: int
    max_prompt: int
    mean_response: int
    max_response: int


LENGTHS = {
    ("fixed", "cpu"): Lengths(32, 32, 32, 32),
    ("fixed", "cuda"): Lengths(256, 256, 256, 256),
    ("chat", "cpu"): Lengths(32, 64, 48, 128),
    ("chat", "cuda"): Lengths(64, 256, 370, 1024),
}
PROMPTS = {"cpu": 48, "cuda": 256}
BATCH_SIZE = {"cpu": 16, "cuda": 256}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Tokens per second of the rollout backends and of transformers, on a GPU if there is one."""

    model: str | None = None
    """Folder of a causal language model in the Hugging Face layout."""
    shape: Literal["135m", "1b", "3b", "8b"] | None = None
    """In place of a model: random weights in the sizes of SmolLM2-135M, Llama-3.2-1B and 3B, or Llama-3.1-8B."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of weights and cache."""
    workload: Literal["fixed", "chat"] = "chat"
    """fixed: all prompts and responses equally long. chat: lengths vary, most responses are short."""
    prompts: int | None = None
    """Number of prompts, one response each; None takes 48 on a CPU and 256 on a GPU."""
    prompt_tokens: int | None = None
    """Longest prompt; None takes 64 (chat) or 32 (fixed) on a CPU and 256 on a GPU."""
    response_tokens: int | None = None
    """Longest response; None takes 128 (chat, mean 48) or 32 (fixed) on a CPU, 1024 (mean 370) or 256 on a GPU."""
    batch_size: int | None = None
    """Rows decoded together; None takes 16 on a CPU and 256 on a GPU. Memory grows with it."""
    repeats: int = 3
    """Rounds in which every backend runs once. More give steadier medians."""
    backends: tuple[Backend, ...] = ()
    """Backends to run; empty means all that the device has."""
    seed: int = 1
    """Seed of lengths, prompts and samples."""
    output: str | None = None
    """File for all figures as JSON; None writes none."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ValueError("model and shape are both given or both missing: give one of them")
        check_range(self, "prompts", "prompt_tokens", "batch_size", "repeats", low=1)
        check_range(self, "response_tokens", low=2)


def draw_workload(config: BenchmarkConfig, vocab_size: int, device: torch.device) -> Workload:
    """Random tokens; the lengths depend on the seed alone, not on the model."""
    lengths = LENGTHS[config.workload, device.type]
    max_prompt = config.prompt_tokens or lengths.max_prompt
    max_response = config.response_tokens or lengths.max_response
    min_prompt = max(1, max_prompt * lengths.min_prompt // lengths.max_prompt)
    rng = random.Random(config.seed)
    # 1.08: the cap takes 7% from the mean of an exponential distribution whose mean is 0.4 caps.
    rate = lengths.max_response / (1.08 * lengths.mean_response * max_response)
    widths, limits = [], []
    for _ in range(config.prompts or PROMPTS[device.type]):
        widths.append(rng.randint(min_prompt, max_prompt))
        drawn = max_response if config.workload == "fixed" else math.ceil(rng.expovariate(rate))
        limits.append(min(max(drawn, 1), max_response))
    prompt_ids = [[rng.randrange(vocab_size) for _ in range(width)] for width in widths]
    return Workload(prompt_ids, limits, max_response, config.seed)


def load_model(config: BenchmarkConfig, device: torch.device) -> Any:
    """The model in evaluation mode, without an end-of-sequence token: nothing but the limits ends a response."""
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype], "attn_implementation": "sdpa"}
    if config.shape is not None:
        sizes = LlamaConfig(**SHAPES[config.shape], max_position_embeddings=8192)
        with device:
            model = AutoModelForCausalLM.from_config(sizes, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(config.model, **options).to(device)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


@dataclass
class Measurement:
    """What one backend took."""

    failure: str | None = None
    """Why there are no figures, in one line."""
    seconds: list[float] = field(default_factory=list)
    """Of the whole workload, one for each repeat."""
    prefill_seconds: list[float] = field(default_factory=list)
    """Of the same prompts with responses of one token."""
    peak_memory_bytes: int = 0


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Measures, prints the table and returns what the JSON holds.

    Raises: ValueError, if a layer's window is shorter than a row.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = config.batch_size or BATCH_SIZE[device.type]
    model = load_model(config, device)
    shape = DecoderShape.of(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    workload = draw_workload(config, model.config.vocab_size, device)
    ceilings, measured = measure(config, model, workload, batch_size)
    costs = rollout_costs(
        shape,
        workload.prompt_ids,
        workload.limits,
        batch_size=batch_size,
        number_bytes=DTYPES[config.dtype].itemsize,
        flops_per_second=ceilings.flops_per_second,
        bytes_per_second=ceilings.bytes_per_second,
    )
    result = {
        **circumstances("scripts.benchmark.generation", config, device, ("torch", "transformers")),
        "model": {"architecture": model.config.model_type, "parameters": parameters, **asdict(shape)},
        "workload": {
            "prompt_tokens": [len(ids) for ids in workload.prompt_ids],
            "response_tokens": workload.limits,
            "batch_size": batch_size,
        },
        "ceilings": asdict(ceilings),
        "floor": {phase: asdict(cost) for phase, cost in costs.items()},
        "backends": {name: figures(one, measured.get(BASELINE), costs, workload) for name, one in measured.items()},
    }
    print_report(result)
    return result


def measure(
    config: BenchmarkConfig, model: Any, workload: Workload, batch_size: int
) -> tuple[Ceilings, dict[str, Measurement]]:
    """All repeats of all backends, in turns, after one run of each to warm up, which tells its memory."""
    device = model.device
    names = config.backends or default_backends(config, device)
    prefill = replace(workload, limits=[1] * len(workload.limits))
    measured, runs = {name: Measurement() for name in names}, {}
    ceilings = []
    for repeat in range(config.repeats + 1):
        for name, one in measured.items():
            if one.failure is not None:
                continue
            try:
                if repeat == 0:
                    runs[name] = BACKENDS[name](model, batch_size)
                    with PeakMemory(device) as memory:
                        take(runs[name], workload)
                    one.peak_memory_bytes = memory.bytes
                    continue
                one.seconds.append(take(runs[name], workload))
                one.prefill_seconds.append(take(runs[name], prefill))
                print(f"repeat {repeat} of {config.repeats}: {name} took {one.seconds[-1]:.2f} s", file=sys.stderr)
            except Exception as error:  # whatever a backend dies of, the others are still measured
                one.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        ceilings.append(measure_ceilings(device, model.dtype, batch_size))
    return reduce(Ceilings.best, ceilings), measured


def default_backends(config: BenchmarkConfig, device: torch.device) -> list[str]:
    """All that the device has."""
    elsewhere = {"generate-dynamic-fp32"} if device.type == "cuda" else {"generate-static-compiled"}
    if config.dtype == "fp32":
        elsewhere.add("generate-dynamic-fp32")
    return [name for name in BACKENDS if name not in elsewhere]


def take(run: Run, workload: Workload) -> float:
    """Seconds of one run; raises RuntimeError if a response has not the length that was asked for."""
    seconds, responses = run(workload)
    found = [len(response) for response in responses]
    if found != workload.limits:
        raise RuntimeError(f"drew {sum(found)} tokens where {sum(workload.limits)} were asked for")
    return seconds


def figures(
    one: Measurement, baseline: Measurement | None, costs: Mapping[str, Cost], workload: Workload
) -> dict[str, Any]:
    """What is reported of a backend."""
    if one.failure is not None:
        return {"failure": one.failure}
    decode_seconds = [whole - prefill for whole, prefill in zip(one.seconds, one.prefill_seconds, strict=True)]
    seconds = statistics.median(one.seconds)
    found: dict[str, Any] = {
        "seconds": one.seconds,
        "prefill_seconds": one.prefill_seconds,
        "tokens_per_second": sum(workload.limits) / seconds,
        "spread": (max(one.seconds) - min(one.seconds)) / seconds,
        "floor_share": sum(cost.seconds for cost in costs.values()) / seconds,
        "prefill_floor_share": costs["prefill"].seconds / statistics.median(one.prefill_seconds),
        "decode_floor_share": costs["decode"].seconds / statistics.median(decode_seconds),
        "peak_memory_bytes": one.peak_memory_bytes,
        "ratios": None,
        "ratio": None,
    }
    if baseline is not None and baseline.failure is None:
        ratios = [theirs / own for theirs, own in zip(baseline.seconds, one.seconds, strict=True)]
        found |= {"ratios": ratios, "ratio": statistics.median(ratios)}
    return found


def print_report(result: Mapping[str, Any]) -> None:
    """The header and the table for the terminal."""
    workload, ceilings, config = result["workload"], result["ceilings"], result["config"]
    prompts, responses = workload["prompt_tokens"], workload["response_tokens"]
    floor = sum(cost["seconds"] for cost in result["floor"].values())
    print(
        f"{config['model'] or config['shape']} in {config['dtype']}, {result['model']['parameters'] / 1e6:.0f}M "
        f"parameters, on {result['device']['name']}\n"
        f"{config['workload']}: {len(prompts)} prompts of {spread_of(prompts)} tokens, responses of "
        f"{spread_of(responses)} tokens, {workload['batch_size']} rows together\n"
        f"ceilings: copy {ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s, read "
        f"{ceilings['read_bytes_per_second'] / 1e9:.1f} GB/s, GEMM {ceilings['gemm_flops_per_second'] / 1e12:.3g} "
        f"TFLOP/s, with {workload['batch_size']} rows {ceilings['batch_gemm_flops_per_second'] / 1e12:.3g} TFLOP/s\n"
        f"floor: {floor:.3g} s, {sum(responses) / floor:.0f} tokens/s\n"
    )
    print(f"{'':26}{'seconds':>9}{'spread':>8}{'tokens/s':>10}{'ratio':>18}", end="")
    print(f"{'floor share':>13}{'prefill':>9}{'decode':>8}{'memory':>11}")
    for name, one in result["backends"].items():
        if "failure" in one:
            print(f"{name:26}{one['failure']}")
            continue
        ratio = "-"
        if one["ratio"] is not None:
            ratio = f"{one['ratio']:.2f} ({min(one['ratios']):.2f}-{max(one['ratios']):.2f})"
        print(
            f"{name:26}{statistics.median(one['seconds']):9.2f}{one['spread']:8.0%}{one['tokens_per_second']:10.0f}"
            f"{ratio:>18}{one['floor_share']:13.1%}{one['prefill_floor_share']:9.1%}{one['decode_floor_share']:8.1%}"
            f"{one['peak_memory_bytes'] / 2**20:7.0f} MiB"
        )
    memory = "allocated on the device" if result["device"]["gpus"] else "increase of the process's resident memory"
    print(f"\nratio: {BASELINE}'s seconds over the backend's, in each repeat. memory: {memory}, at its peak.")


def main() -> None:
    config = load_config(BenchmarkConfig)
    run_and_keep(run, config)


if __name__ == "__main__":
    main()
