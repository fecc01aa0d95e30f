"""Where a run's time goes, and how much of what the device could compute in it was of use."""

import contextlib
import itertools
import math
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from training.costs import DecoderShape, transformer_of
from training.distributed import device, max_over_ranks, sum_over_ranks, world_size
from training.packing import packs

OTHER = "other"
EVALUATE = "evaluate"
PHASES = ("generate", "score", "train", "optimizer", "sync", EVALUATE, OTHER)
COLUMNS = ("flops", "tokens", "positions", "padding")
# Where larger products are no faster.
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
GEMM_SECONDS = 0.2
# FLOP/s of dense products in bf16 and fp16, by a part of the device's name, the first that fits. From NVIDIA's data
# sheets, where figures with sparsity are halved: H100 and H200 (SXM 1979 TFLOP/s, NVL 1671, PCIe 1513), A100 (312,
# dense), GB200 NVL72 (5000 a GPU), HGX B200 (4500 a GPU).
PEAK_FLOPS = {
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H200 NVL": 835.5e12,
    "H100": 989.5e12,
    "H200": 989.5e12,
    "A100": 312e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


class PhaseClock:
    """Divides time into phases without a gap: each moment belongs to the innermost phase, or to "other".

    On a GPU the moments are events in the stream of its work, which nothing waits for until the times are asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._inside = [OTHER]
        self._moved: list[tuple[float, str, str]] = []
        self._marks = [(OTHER, self._now())]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One of `PHASES`; inside of another one, its time is taken from that one."""
        assert name in PHASES, name
        self._inside.append(name)
        self._mark()
        try:
            yield
        finally:
            self._inside.pop()
            self._mark()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count a part of one phase as another: what a backend reports of its own time."""
        self._moved.append((seconds, source, target))

    def seconds(self) -> dict[str, float]:
        """Of each of `PHASES` since the last lap; together, all the time that has passed."""
        self._mark()
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (name, begin), (_, end) in itertools.pairwise(self._marks):
            seconds[name] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        for moved, source, target in self._moved:
            seconds[source] -= moved
            seconds[target] += moved
        return seconds

    def lap(self) -> dict[str, float]:
        """As `seconds`, then begins anew."""
        seconds = self.seconds()
        self._marks, self._moved = self._marks[-1:], []
        return seconds

    def _mark(self) -> None:
        self._marks.append((self._inside[-1], self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Accounting:
    """Collects the seconds and the useful work of each phase, over all ranks, for the lines of the log."""

    def __init__(self, dtype: torch.dtype, before: Sequence[Sequence[float]] | None = None) -> None:
        """Measures the device for less than half a second. Every rank must call this.

        Args:
            dtype: that the models compute in.
            before: what `state` gave at the checkpoint that the run goes on from; None for a new run.
        """
        own_rate = gemm_flops_per_second(device(), dtype)
        self.gemm_flops_per_second = float(sum_over_ranks(torch.tensor(own_rate, dtype=torch.float64))) / world_size()
        self.peak_flops_per_second = peak_flops_per_second(device(), dtype)
        self.clock = PhaseClock(device())
        self._work = {name: Counter[str]() for name in PHASES}
        self._before = torch.tensor(before or [[0.0] * (1 + len(COLUMNS))] * len(PHASES), dtype=torch.float64)
        self._shapes: dict[nn.Module, DecoderShape] = {}

    def shape_of(self, model: nn.Module) -> DecoderShape:
        """What passes of a model cost, counted at the first call: not while its adapters are off and so frozen."""
        if model not in self._shapes:
            self._shapes[model] = DecoderShape.of(model)
        return self._shapes[model]

    def add_rollout(
        self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], response_lengths: Sequence[int]
    ) -> None:
        """Counts what this rank has generated with adapters folded in; one list of ids for each response."""
        flops = self.shape_of(model).rollout_flops(prompt_ids, response_lengths)
        self.add("generate", flops=flops, tokens=sum(response_lengths))

    def add_pass(
        self,
        phase: str,
        model: nn.Module,
        input_ids: Tensor,
        lengths: Sequence[int],
        logits: int,
        *,
        repeated: Sequence[int] = (),
        training: bool = False,
        adapters: bool = True,
    ) -> None:
        """Counts a forward of this rank, and its backward if `training`.

        Args:
            model: what computes it, in whatever wraps it.
            input_ids: [rows, time]; only their shape is looked at.
            lengths: tokens of each row, as numbers of the host: asking the device for them would make it wait.
            logits: response tokens of all rows.
            repeated: as `packing.repeated_tokens` has it; they count where they are computed once.
            adapters: false for the reference that is the actor with its adapters off.
        """
        shape = self.shape_of(model)
        count = shape.training_flops if training else partial(shape.forward_flops, adapters=adapters)
        tokens = sum(lengths)
        if not packs(transformer_of(model)):
            self.add(phase, flops=count(lengths, logits), tokens=tokens, positions=input_ids.numel())
            return
        # Both are linear in rows: what is not computed is what passes of those beginnings alone would be.
        flops = count(lengths, logits) - count(repeated, 0)
        self.add(phase, flops=flops, tokens=tokens, positions=tokens)

    def add(self, phase: str, *, flops: int, tokens: int, positions: int | None = None) -> None:
        """Counts useful work of this rank.

        Args:
            flops: as `costs.DecoderShape` counts them.
            tokens: tokens of all rows of a pass; of a rollout, those of its responses.
            positions: of the tokens that its products were computed for, padding included; None if unknown.
        """
        self._work[phase].update(flops=flops, tokens=tokens)
        if positions is not None:
            self._work[phase].update(positions=positions, padding=positions - tokens)

    def metrics(self) -> dict[str, float]:
        """For the log: all that was counted since the last call. Every rank must call this.

        Seconds are the mean over ranks. "whole" is all the time but for evaluation.
        """
        sums = self._sums(self.clock.lap())
        self._work = {name: Counter[str]() for name in PHASES}
        self._before.zero_()
        return self._figures(sums) | {"memory/peak_gib": peak_memory_gib()}

    def state(self) -> list[list[float]]:
        """What was counted since the last `metrics`, for a run that goes on from here. Every rank must call this."""
        return self._sums(self.clock.seconds()).tolist()

    def _sums(self, seconds: Mapping[str, float]) -> Tensor:
        """[phases, 5] of seconds, as the mean over ranks, and of FLOPs, tokens, positions and padding of all ranks."""
        own = [[seconds[name], *(self._work[name][column] for column in COLUMNS)] for name in PHASES]
        sums = sum_over_ranks(torch.tensor(own, dtype=torch.float64))
        sums[:, 0] /= world_size()
        return self._before + sums

    def _figures(self, sums: Tensor) -> dict[str, float]:
        """Of what `_sums` gives."""
        rows = dict(zip(PHASES, sums.tolist(), strict=True))
        whole = [sum(column) for column in zip(*(row for name, row in rows.items() if name != EVALUATE), strict=True)]
        shares = {"gemm_share": self.gemm_flops_per_second, "mfu": self.peak_flops_per_second}
        timed = {name: row for name, row in rows.items() if row[0] > 0}
        metrics = {f"seconds/{name}": row[0] for name, row in timed.items()}
        metrics |= {f"tokens_per_second/{name}": row[2] / row[0] for name, row in timed.items() if row[2] > 0}
        for share, rate in shares.items():
            for name, (seconds, flops, *_) in {**timed, "whole": whole}.items():
                if rate is not None and flops > 0:
                    metrics[f"{share}/{name}"] = flops / (seconds * world_size() * rate)
        positions, padding = whole[3:]
        return metrics | ({"tokens/padding_share": padding / positions} if positions else {})


def phase_of(accounting: Accounting | None, name: str) -> contextlib.AbstractContextManager:
    """A phase of its clock; nothing where nobody counts."""
    return contextlib.nullcontext() if accounting is None else accounting.clock.phase(name)


def gemm_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large square product within a fifth of a second, or of the second product if that is later."""
    size = GEMM_SIZE[device.type]
    square = torch.randn(size, size, device=device).to(dtype)
    calls = 4 if device.type == "cuda" else 1  # one after the other, so that starting them costs nothing
    best, begun = math.inf, time.perf_counter()
    for attempt in itertools.count():
        # The first one also starts the library that multiplies.
        if attempt >= 2 and time.perf_counter() - begun > GEMM_SECONDS:
            break
        clock = PhaseClock(device)
        for _ in range(calls):
            torch.mm(square, square)
        best = min(best, clock.lap()[OTHER] / calls)
    return 2 * size**3 / best


def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the maker of a device publishes for products in `dtype`; None where this is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    whole_device = "MIG" not in name  # else a slice, by another name for each size
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name and whole_device), None)


def peak_memory_gib() -> float:
    """Largest memory that any rank has used so far: of its GPU, or of its process where there is none."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return float(max_over_ranks(torch.tensor(peak)))
