"""Accounting: phases by a clock that the test moves, figures by hand, and what a GPU waits for by stand-ins."""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from training import accounting
from training.accounting import (
    PHASES,
    Accounting,
    PhaseClock,
    gemm_flops_per_second,
    peak_flops_per_second,
    peak_memory_gib,
)
from training.config import LoraConfig, ModelConfig
from training.models import load_causal_lm, load_scalar_model
from training.packing import repeated_tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Hand:
    """The time of the test."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def forward(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(accounting, "time", SimpleNamespace(perf_counter=lambda: hand.seconds))
    return hand


class Device:
    """A GPU with its own time: an event is reached when the work before it is done."""

    def __init__(self) -> None:
        self.done = 0.0
        self.waits = 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        device = self

        class Event:
            def record(self) -> None:
                self.at = device.done

            def elapsed_time(self, end: Any) -> float:
                return 1000 * (end.at - self.at)

        return Event()

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    gpu = Device()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    yield gpu


def spent(seconds: dict[str, float]) -> dict[str, float]:
    assert tuple(seconds) == PHASES
    return {name: value for name, value in seconds.items() if value}


# The clock


def test_a_phase_inside_another_counts_once_and_what_is_in_none_is_other(hand: Hand) -> None:
    clock = PhaseClock(CPU)
    hand.forward(1)
    with clock.phase("train"):
        hand.forward(2)
        for _ in range(2):
            with clock.phase("optimizer"):
                hand.forward(4)
            hand.forward(8)
    hand.forward(16)
    with clock.phase("train"):
        hand.forward(32)
    assert spent(clock.lap()) == {"train": 2 + 8 + 8 + 32, "optimizer": 8, "other": 17}


def test_a_lap_begins_anew_and_seconds_do_not(hand: Hand) -> None:
    clock = PhaseClock(CPU)
    with clock.phase("score"):
        hand.forward(1)
    assert spent(clock.seconds()) == {"score": 1}
    hand.forward(2)
    assert spent(clock.lap()) == {"score": 1, "other": 2}
    assert spent(clock.lap()) == {}
    hand.forward(4)
    assert spent(clock.lap()) == {"other": 4}


def test_a_lap_inside_a_phase_shares_its_time_out(hand: Hand) -> None:
    clock = PhaseClock(CPU)
    with clock.phase("score"):
        hand.forward(1)
        assert spent(clock.lap()) == {"score": 1}
        hand.forward(2)
    hand.forward(4)
    assert spent(clock.lap()) == {"score": 2, "other": 4}


def test_a_phase_that_fails_ends(hand: Hand) -> None:
    clock = PhaseClock(CPU)
    with pytest.raises(RuntimeError), clock.phase("generate"):
        hand.forward(1)
        raise RuntimeError
    hand.forward(2)
    assert spent(clock.lap()) == {"generate": 1, "other": 2}


def test_what_a_backend_reports_is_taken_from_its_phase_once(hand: Hand) -> None:
    clock = PhaseClock(CPU)
    with clock.phase("generate"):
        hand.forward(8)
    clock.move(3, "generate", "sync")
    assert spent(clock.seconds()) == spent(clock.lap()) == {"generate": 5, "sync": 3}
    assert spent(clock.lap()) == {}


def test_a_name_that_is_no_phase_is_caught() -> None:
    with pytest.raises(AssertionError, match="trian"), PhaseClock(CPU).phase("trian"):
        pass


def test_on_a_gpu_time_is_that_of_its_work_and_nothing_waits_before_a_lap(gpu: Device, hand: Hand) -> None:
    clock = PhaseClock(GPU)
    with clock.phase("train"):
        hand.forward(1)  # the host, which only queues work
        gpu.done += 8
        with clock.phase("optimizer"):
            gpu.done += 2
    gpu.done += 0.5
    assert gpu.waits == 0
    assert spent(clock.lap()) == {"train": 8, "optimizer": 2, "other": 0.5}
    assert gpu.waits == 1
    gpu.done += 1
    assert spent(clock.lap()) == {"other": 1}


# Figures


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch, hand: Hand) -> Accounting:
    """On a machine that multiplies at 100 FLOP/s and promises 200."""
    monkeypatch.setattr(accounting, "gemm_flops_per_second", lambda *_: 100.0)
    monkeypatch.setattr(accounting, "peak_flops_per_second", lambda *_: 200.0)
    monkeypatch.setattr(accounting, "peak_memory_gib", lambda: 1.5)
    return Accounting(torch.bfloat16)


def an_iteration(books: Accounting, hand: Hand) -> None:
    """8 s and 240 FLOPs, evaluation apart."""
    for phase, seconds in (("generate", 2.0), ("score", 1.0), ("train", 4.0), ("evaluate", 10.0)):
        with books.clock.phase(phase):
            hand.forward(seconds)
    hand.forward(1.0)
    books.add("generate", flops=20, tokens=30)
    books.add("score", flops=10, tokens=40, positions=40)
    books.add("score", flops=10, tokens=40, positions=64)
    books.add("train", flops=200, tokens=80, positions=96)


def test_figures_by_hand(books: Accounting, hand: Hand) -> None:
    an_iteration(books, hand)
    assert books.metrics() == {
        "seconds/generate": 2.0,
        "seconds/score": 1.0,
        "seconds/train": 4.0,
        "seconds/evaluate": 10.0,
        "seconds/other": 1.0,
        "tokens_per_second/generate": 15.0,
        "tokens_per_second/score": 80.0,
        "tokens_per_second/train": 20.0,
        "gemm_share/generate": 0.1,
        "gemm_share/score": 0.2,
        "gemm_share/train": 0.5,
        "gemm_share/whole": 0.3,
        "mfu/generate": 0.05,
        "mfu/score": 0.1,
        "mfu/train": 0.25,
        "mfu/whole": 0.15,
        "tokens/padding_share": 40 / 200,
        "memory/peak_gib": 1.5,
    }


def test_several_iterations_between_two_lines_are_counted_together_and_then_forgotten(
    books: Accounting, hand: Hand
) -> None:
    for _ in range(3):
        an_iteration(books, hand)
    metrics = books.metrics()
    assert (metrics["seconds/train"], metrics["tokens_per_second/train"]) == (12.0, 20.0)
    assert (metrics["gemm_share/whole"], metrics["tokens/padding_share"]) == (0.3, 0.2)
    hand.forward(1)
    assert books.metrics() == {"seconds/other": 1.0, "memory/peak_gib": 1.5}


def test_a_run_that_goes_on_counts_what_came_before(books: Accounting, hand: Hand) -> None:
    an_iteration(books, hand)
    saved = json.loads(json.dumps(books.state()))
    an_iteration(books, hand)
    whole = books.metrics()
    resumed = Accounting(torch.bfloat16, saved)
    an_iteration(resumed, hand)
    assert resumed.metrics() == whole
    hand.forward(1)
    assert resumed.metrics() == {"seconds/other": 1.0, "memory/peak_gib": 1.5}


def test_without_a_published_peak_there_is_no_mfu(
    books: Accounting, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "peak_flops_per_second", None)
    an_iteration(books, hand)
    assert {name.split("/")[0] for name in books.metrics()} == {
        *("seconds", "tokens_per_second", "gemm_share", "tokens", "memory")
    }


def test_ranks_add_up_their_work_and_share_the_mean_of_their_seconds(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank multiplies at 300 FLOP/s, trained for 8 s, with 600 FLOPs, 10 tokens and no padding."""
    other = torch.zeros(len(PHASES), 5, dtype=torch.float64)
    other[PHASES.index("train")] = torch.tensor([8.0, 600.0, 10.0, 10.0, 0.0])
    monkeypatch.setattr(accounting, "world_size", lambda: 2)
    monkeypatch.setattr(accounting, "sum_over_ranks", lambda own: own + (300.0 if own.dim() == 0 else other))
    monkeypatch.setattr(accounting, "gemm_flops_per_second", lambda *_: 100.0)
    books = Accounting(torch.float32)
    with books.clock.phase("train"):
        hand.forward(4)
    books.add("train", flops=240, tokens=20, positions=30)
    metrics = books.metrics()
    assert metrics["seconds/train"] == 6
    assert metrics["tokens_per_second/train"] == 30 / 6
    assert metrics["gemm_share/train"] == metrics["gemm_share/whole"] == 840 / 6 / (2 * 200)
    assert metrics["tokens/padding_share"] == 10 / 40


# Passes


def load(path: str, *, packing: bool, rank: int = 0, scalar: bool = False) -> Any:
    config = ModelConfig(path=path, packing=packing, lora=LoraConfig(rank=rank))
    return (load_scalar_model if scalar else load_causal_lm)(config, torch.float32)


@pytest.mark.parametrize("packing", [True, False])
def test_a_pass_has_its_useful_work_and_the_positions_that_its_model_computes(
    books: Accounting, hand: Hand, packing: bool, tiny_model: Callable[[str], str], tiny_reward_model: Any
) -> None:
    """Three rows of 7, 3 and 1 tokens, padded to 8; the layers have 2 x (3072 + 4608) numbers and the head 32 a token.

    A pair costs 4 x 32 FLOPs in each of two layers: 28 + 6 + 1 pairs.
    """
    actor = load(tiny_model("llama"), packing=packing)
    critic = nn.Sequential(load(tiny_reward_model("llama"), packing=packing, scalar=True))  # as an engine wraps it
    ids, lengths = torch.zeros(3, 8, dtype=torch.long), [7, 3, 1]
    body, head, attention = 2 * 15360 * 11, 2 * actor.lm_head.weight.numel() * 5, 2 * 128 * 35
    for model, training, flops in (
        (actor, False, body + head + attention),
        (actor, True, 3 * (body + head + attention)),
        (critic, False, body + attention),
    ):
        hand.forward(1.0)
        books.add_pass("score", model, ids, lengths, 5, training=training)
        metrics = books.metrics()
        assert metrics["gemm_share/whole"] == flops / 100
        assert metrics["tokens/padding_share"] == (0 if packing else 13 / 24)


@pytest.mark.parametrize("packing", [True, False])
def test_a_beginning_that_is_computed_once_counts_once(
    books: Accounting, hand: Hand, packing: bool, tiny_model: Callable[[str], str]
) -> None:
    """Three rows of 22, 20 and 18 tokens that begin with the same 17: 26 tokens, 17 x 18 / 2 pairs, and those behind.

    Behind the 17 stand 5, 3 and 1 tokens, which look at the 17 and at 15, 6 and 1 of their own.
    """
    actor = load(tiny_model("llama"), packing=packing)
    lengths = [22, 20, 18]
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    ids = torch.where(torch.arange(24) < 17, 3, torch.arange(3)[:, None] + 4)
    hand.forward(1.0)
    books.add_pass("score", actor, ids, lengths, 9, repeated=repeated_tokens(ids, mask))
    together = 26 * 2 * 15360 + 2 * 128 * (17 * 18 // 2 + 17 * 9 + 15 + 6 + 1)
    apart = 60 * 2 * 15360 + 2 * 128 * sum(length * (length + 1) // 2 for length in lengths)
    head = 2 * actor.lm_head.weight.numel() * 9
    assert books.metrics()["gemm_share/whole"] == ((together if packing else apart) + head) / 100


def test_the_reference_and_the_rollout_of_an_actor_with_adapters_pass_none(
    books: Accounting, hand: Hand, tiny_model: Callable[[str], str]
) -> None:
    actor, plain = load(tiny_model("llama"), packing=True, rank=4), load(tiny_model("llama"), packing=True)
    ids = torch.zeros(1, 8, dtype=torch.long)
    shares = []
    for model in (plain, actor):
        hand.forward(1.0)
        books.add_rollout(model, [[1, 2, 3]], [5])
        if model is actor:
            with actor.disable_adapter():
                books.add_pass("score", actor, ids, [8], 5, adapters=False)
        else:
            books.add_pass("score", plain, ids, [8], 5)
        shares.append(books.metrics()["gemm_share/whole"])
    assert shares[0] == shares[1]
    hand.forward(1.0)
    books.add_pass("score", actor, ids, [8], 5)
    books.add_rollout(actor, [[1, 2, 3]], [5])
    # Rank 4, in two layers: 4 numbers for each row and column of seven matrices.
    adapters = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert books.metrics()["gemm_share/whole"] == pytest.approx(shares[0] + 2 * adapters * 8 / 100, rel=1e-12)


# The machine


def test_the_gemm_rate_is_the_best_of_a_fifth_of_a_second(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [0.15, 0.04, 0.02, 0.03, 0.001]
    monkeypatch.setattr(accounting, "GEMM_SIZE", {"cpu": 10})
    monkeypatch.setattr(torch, "mm", lambda *_: hand.forward(durations.pop(0)))
    assert gemm_flops_per_second(CPU, torch.float32) == pytest.approx(2000 / 0.02)
    assert durations == [0.03, 0.001]  # 0.21 s had passed
    slow = [5.0, 4.0, 1.0]
    monkeypatch.setattr(torch, "mm", lambda *_: hand.forward(slow.pop(0)))
    assert gemm_flops_per_second(CPU, torch.float32) == pytest.approx(2000 / 4)
    assert slow == [1.0]


def test_this_machine_multiplies() -> None:
    assert 1e8 < gemm_flops_per_second(CPU, torch.float32) < 1e15


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_published_peak_is_that_of_the_device(
    name: str, tera: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    expected = None if tera is None else tera * 1e12
    assert peak_flops_per_second(GPU, torch.bfloat16) == peak_flops_per_second(GPU, torch.float16) == expected
    assert peak_flops_per_second(GPU, torch.float32) is None
    assert peak_flops_per_second(CPU, torch.bfloat16) is None


def test_peak_memory_is_that_of_a_process_with_torch() -> None:
    assert 0.05 < peak_memory_gib() < 200
