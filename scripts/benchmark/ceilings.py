"""What the machine reaches at best, and how time and memory are measured on it."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from training.accounting import gemm_flops_per_second

T = TypeVar("T")

# Larger than the caches of any machine.
STREAM_BYTES = {"cpu": 2**28, "cuda": 2**32}
# Width and height of the weights that rows stream through.
WEIGHT_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """Rates of the machine, of plain operations of torch."""

    copy_bytes_per_second: float
    """Of a copy, with bytes read and bytes written counted."""
    read_bytes_per_second: float
    """Of a sum over float32 numbers."""
    gemm_flops_per_second: float
    """Of a large square product in the benchmark's dtype."""
    batch_gemm_flops_per_second: float
    """Of as many rows as decode together with weights that come from memory."""

    @property
    def bytes_per_second(self) -> float:
        return max(self.copy_bytes_per_second, self.read_bytes_per_second)

    @property
    def flops_per_second(self) -> float:
        return max(self.gemm_flops_per_second, self.batch_gemm_flops_per_second)

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher one of each rate."""
        names = [field.name for field in fields(self)]
        return Ceilings(**{name: max(getattr(self, name), getattr(other, name)) for name in names})


def measure_ceilings(device: torch.device, dtype: torch.dtype, batch_size: int) -> Ceilings:
    """Takes seconds; `batch_size` is the number of rows that decode together."""
    return Ceilings(*stream_rates(device), *gemm_rates(device, dtype, batch_size))


def stream_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy and of a sum."""
    source = torch.ones(STREAM_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / best_seconds(device, lambda: target.copy_(source))
    return copied, source.nbytes / best_seconds(device, source.sum)


def gemm_rates(device: torch.device, dtype: torch.dtype, batch_size: int) -> tuple[float, float]:
    """FLOP/s of a large square product, and of `batch_size` rows with one such matrix after the other."""
    size = WEIGHT_SIZE[device.type]
    square = torch.randn(size, size, device=device).to(dtype)
    weights = [square.clone() for _ in range(max(1, STREAM_BYTES[device.type] // square.nbytes))]
    rows = torch.randn(batch_size, size, device=device).to(dtype)

    def stream_weights() -> Tensor:
        return [torch.nn.functional.linear(rows, weight) for weight in weights][-1]

    streamed = 2 * batch_size * size**2 * len(weights) / best_seconds(device, stream_weights)
    return gemm_flops_per_second(device, dtype), streamed


def best_seconds(device: torch.device, operation: Callable[[], Tensor], tries: int = 4) -> float:
    """The shortest time of one call; on a GPU of ten in a row, so that starting them costs nothing."""
    calls = 10 if device.type == "cuda" else 1
    seconds = [timed(device, lambda: [operation() for _ in range(calls)])[0] for _ in range(tries)]
    return min(seconds) / calls


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds until the work is done, on the device as well, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory held inside the context, in bytes.

    On a GPU all that torch has allocated, the weights included. On a CPU the increase of the process's resident memory,
    by the kernel's own mark: a thread that looked now and then would take part of the time that is measured. A process
    hands back late what it has freed, so small figures are rough.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now (man 5 proc)
            self._before = memory_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = memory_bytes("VmHWM") - self._before


def memory_bytes(name: str) -> int:
    """Memory of this process: `VmRSS` for what is in RAM, `VmHWM` for the most that was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
