"""The GPU kernels: compiled for Hopper, and timed where there is a GPU: `python -m scripts.benchmark.kernels`.

Compiling needs no GPU: it tells each kernel's registers, what of them does not fit and is spilled to memory, and its
shared memory. `--output FILE` keeps all figures as JSON.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scripts.benchmark.ceilings import best_seconds, stream_rates
from scripts.benchmark.reporting import circumstances, run_and_keep
from training.config import check_range
from training.config_files import load_config
from training.generation.interface import SamplingConfig
from training.generation.paged_attention_kernel import (
    attend_constants,
    attend_kernel,
    choose_splits,
    combine_constants,
    combine_kernel,
    num_multiprocessors,
    paged_attention,
)
from training.generation.sampler import sample_tokens
from training.generation.sampler_kernel import (
    draw_constants,
    draw_kernel,
    draw_tokens,
    summarize_constants,
    summarize_kernel,
)

HOPPER = GPUTarget("cuda", 90, 32)
SPLITS = (1, 8)
VOCAB = 128_256
DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Registers, spills and shared memory of the GPU kernels in bf16; on a GPU also their times."""

    head_dims: tuple[int, ...] = (64, 128, 256)
    """Widths of a head."""
    groups: tuple[int, ...] = (1, 4, 8)
    """Query heads that share one key head."""
    page_tokens: int = 64
    """Tokens of a page, a power of 2."""
    batch_sizes: tuple[int, ...] = (8, 32, 128, 256)
    """Rows that are timed."""
    kv_heads: int = 8
    """Key heads of what is timed."""
    tokens: int = 1024
    """Tokens that each row of what is timed holds. Memory grows with it."""
    output: str | None = None
    """File for all figures as JSON; None writes none."""

    def __post_init__(self) -> None:
        check_range(self, "page_tokens", low=16)
        check_range(self, "kv_heads", "tokens", low=1)


# Compiled


@dataclass(frozen=True)
class Build:
    """A kernel as it is launched: the constants it is compiled with, and the types of its other arguments."""

    kernel: Any
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    types: Mapping[str, str]

    def compile(self) -> dict[str, Any]:
        """What is reported of it."""
        names = self.kernel.arg_names
        # Addresses and strides of real models are multiples of 16, which Triton sees at launch.
        aligned = [name for name, kind in self.types.items() if kind.startswith("*") or name.endswith("stride")]
        compiled = triton.compile(
            ASTSource(
                self.kernel,
                {name: self.types.get(name, "constexpr") for name in names},
                dict(self.constants),
                {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
            ),
            target=HOPPER,
            options=dict(self.options),
        )
        return {
            "kernel": self.kernel.__name__,
            "constants": dict(self.constants),
            "options": dict(self.options),
            **registers_of(compiled.asm["cubin"]),
            "shared_bytes": compiled.metadata.shared,
        }


def registers_of(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and its bytes of local memory, which hold what did not fit into them."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert used is not None, text
    registers, stack, local = map(int, used.groups())
    return {"registers": registers, "spilled_bytes": stack + local}


def builds(config: KernelsConfig) -> Iterator[Build]:
    """All kernels in all sizes that are asked for."""
    strides = dict.fromkeys(
        ("query_row_stride", "query_head_stride", "page_stride", "token_stride", "kv_head_stride", "table_stride"),
        "i32",
    )
    tables = {"page_table_at": "*i32", "lengths_at": "*i32", "log_sums_at": "*fp32", "scaling": "fp32"}
    for head_dim, group, splits in product(config.head_dims, config.groups, SPLITS):
        constants, options = attend_constants(group, head_dim, config.page_tokens, DTYPE.itemsize)
        constants |= {"query_dim_stride": 1, "SPLITS": splits}
        pointers = dict.fromkeys(("queries_at", "keys_at", "values_at"), "*bf16")
        pointers["output_at"] = "*bf16" if splits == 1 else "*fp32"
        others = {"SLIDING_WINDOW": None, "BOUND": None}
        yield Build(attend_kernel, constants | others, options, pointers | tables | strides)
    for head_dim, splits in product(config.head_dims, (8, 64)):
        pointers = {"partial_at": "*fp32", "log_sums_at": "*fp32", "output_at": "*bf16"}
        yield Build(combine_kernel, *combine_constants(head_dim, splits), pointers)
    sizes = {"scale": "fp32", "row_stride": "i32", "vocab": "i32", "blocks": "i32"}
    pointers = {"logits_at": "*bf16", "largest_at": "*fp32", "sums_at": "*fp32"}
    yield Build(summarize_kernel, *summarize_constants(), pointers | sizes)
    pointers |= {"uniforms_at": "*fp32", "tokens_at": "*i64", "logprobs_at": "*fp32"}
    yield Build(draw_kernel, *draw_constants(VOCAB), pointers | sizes | {"temperature": "fp32"})


# Timed


@dataclass(frozen=True)
class Case:
    """What is timed, and the same in plain torch."""

    kernel: str
    sizes: Mapping[str, int]
    bytes: int
    """That have to be read."""
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]


def time_kernels(
    config: KernelsConfig, device: torch.device, repeatable: Callable[[Callable[[], Tensor]], Callable[[], Any]]
) -> dict[str, Any]:
    """Seconds of each kernel and of the same in plain torch, and the share of the memory's rate that is reached.

    `repeatable` makes of an operation what is timed.
    """
    rate = max(stream_rates(device))
    found = []
    for case in cases(config, device):
        seconds = best_seconds(device, repeatable(case.ours))
        plain_seconds = best_seconds(device, repeatable(case.plain))
        found.append(
            {
                "kernel": case.kernel,
                "sizes": dict(case.sizes),
                "bytes": case.bytes,
                "seconds": seconds,
                "plain_seconds": plain_seconds,
                "share_of_rate": case.bytes / seconds / rate,
                "ratio": plain_seconds / seconds,
            }
        )
    return {"bytes_per_second": rate, "kernels": found}


def cases(config: KernelsConfig, device: torch.device) -> Iterator[Case]:
    """One at a time, so that only one needs memory."""
    for sizes in product(config.head_dims, config.groups, config.batch_sizes):
        yield attention_case(config, *sizes, device)
    for rows in config.batch_sizes:
        yield draw_case(rows, device)


def attention_case(config: KernelsConfig, head_dim: int, group: int, rows: int, device: torch.device) -> Case:
    tensors = attention_inputs(config, rows, group, head_dim, device)
    options: dict[str, Any] = {"scaling": None, "sliding_window": None, "softcap": None}
    max_tokens = tensors[3].shape[1] * config.page_tokens
    splits = choose_splits(rows, config.kv_heads, max_tokens, num_multiprocessors(device))
    return Case(
        kernel="paged_attention",
        sizes={"rows": rows, "head_dim": head_dim, "group": group, "tokens": config.tokens, "splits": splits},
        bytes=2 * rows * config.tokens * config.kv_heads * head_dim * DTYPE.itemsize,
        ours=lambda: paged_attention(*tensors, **options),
        plain=lambda: gathered_attention(*tensors),
    )


def draw_case(rows: int, device: torch.device) -> Case:
    logits, uniforms = torch.randn(rows, VOCAB, device=device).to(DTYPE), torch.rand(rows, device=device)
    return Case(
        kernel="draw_tokens",
        sizes={"rows": rows, "vocab": VOCAB},
        bytes=logits.nbytes,
        ours=lambda: draw_tokens(logits, uniforms, 0.7)[1],
        plain=lambda: sample_tokens(logits, uniforms, SamplingConfig(temperature=0.7))[1],
    )


def attention_inputs(
    config: KernelsConfig, rows: int, group: int, head_dim: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Rows of equal lengths in a shuffled pool."""
    pages = math.ceil(config.tokens / config.page_tokens)
    query = torch.randn(rows, group * config.kv_heads, head_dim, device=device, dtype=DTYPE)
    pool = torch.randn(2, rows * pages, config.page_tokens, config.kv_heads, head_dim, device=device, dtype=DTYPE)
    page_table = torch.randperm(rows * pages, device=device).int().view(rows, pages)
    return query, pool[0], pool[1], page_table, torch.full((rows,), config.tokens, dtype=torch.int32, device=device)


def gathered_attention(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, lengths: Tensor
) -> Tensor:
    """The same in plain torch, which copies keys and values first."""
    rows, _, head_dim = query.shape
    keys, values = (pool[page_table.long()].flatten(1, 2).transpose(1, 2) for pool in (key_pages, value_pages))
    mask = torch.arange(keys.shape[2], device=query.device) < lengths[:, None, None, None]
    grouped = query.view(rows, keys.shape[1], -1, head_dim)
    return F.scaled_dot_product_attention(grouped, keys, values, mask).view(query.shape)


def captured(operation: Callable[[], Tensor]) -> Callable[[], Any]:
    """The operation as a CUDA graph, as the engine runs it: without the time that Python takes to start it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            operation()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operation()
    return graph.replay


# Reported


def run(config: KernelsConfig) -> dict[str, Any]:
    """Compiles, measures, prints the tables and returns what the JSON holds."""
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, and an interpreted kernel is never compiled: unset it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'kernel':18}{'registers':>9}{'spilled':>9}{'shared':>8}  constants")
    kernels = []
    for build in builds(config):
        one = build.compile()
        kernels.append(one)
        shown = {name: value for name, value in (one["constants"] | one["options"]).items() if value is not None}
        constants = " ".join(f"{name}={value}" for name, value in shown.items())
        print(f"{one['kernel']:18}{one['registers']:9}{one['spilled_bytes']:9}{one['shared_bytes']:8}  {constants}")
    timed = None
    if device.type == "cuda":
        timed = time_kernels(config, device, captured)
        print_times(timed)
    else:
        print("\nno GPU: nothing is timed")
    return {
        **circumstances("scripts.benchmark.kernels", config, device, ("torch", "triton")),
        "target": "sm_90",
        "kernels": kernels,
        "timed": timed,
    }


def print_times(timed: Mapping[str, Any]) -> None:
    """The second table."""
    print(f"\nmemory: {timed['bytes_per_second'] / 1e9:.0f} GB/s")
    print(f"{'':18}{'microseconds':>13}{'share of rate':>15}{'plain torch':>13}{'ratio':>8}  sizes")
    for one in timed["kernels"]:
        sizes = " ".join(f"{name}={value}" for name, value in one["sizes"].items())
        print(
            f"{one['kernel']:18}{one['seconds'] * 1e6:13.1f}{one['share_of_rate']:15.1%}"
            f"{one['plain_seconds'] * 1e6:13.1f}{one['ratio']:8.2f}  {sizes}"
        )


def main() -> None:
    config = load_config(KernelsConfig)
    run_and_keep(run, config)


if __name__ == "__main__":
    main()
