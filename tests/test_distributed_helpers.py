import os
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from training import distributed


@pytest.fixture
def started() -> Iterator[None]:
    distributed.start(timeout_minutes=1)
    yield
    distributed.stop()


def test_without_a_start_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in distributed.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main()
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    distributed.barrier()
    distributed.stop()


def test_the_launchers_variables_count_before_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (5, 8, 1)
    assert not distributed.is_main()


def test_a_lone_process_starts_a_group_of_one(started: None) -> None:
    assert torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.gather_objects("x") == ["x"]
    distributed.barrier()


def test_stop_takes_back_what_start_has_set_and_a_second_start_works() -> None:
    before = dict(os.environ)
    for _ in range(2):
        distributed.start(timeout_minutes=1)
        assert os.environ["MASTER_PORT"].isdigit()
        distributed.stop()
        assert not torch.distributed.is_initialized()
        assert {name: os.environ.get(name) for name in distributed.LAUNCHER_VARIABLES} == {
            name: before.get(name) for name in distributed.LAUNCHER_VARIABLES
        }


def test_two_lone_processes_do_not_meet() -> None:
    code = (
        "from training import distributed; distributed.start(1); print(distributed.world_size(), flush=True); input();"
        "distributed.stop()"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:  # both print while both are up
        assert run.stdout is not None
        assert run.stdout.readline() == "1\n"
    for run in runs:
        run.communicate("\n", timeout=60)
        assert run.returncode == 0


def test_start_compiles_nothing(started: None) -> None:
    import deepspeed.ops

    if distributed.device().type == "cpu":
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_start_passes_its_timeout_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    seen = {}
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: seen.update(options))
    distributed.start(timeout_minutes=2.5)
    distributed.stop()
    assert seen["timeout"].total_seconds() == 150


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_sums_are_new_tensors_of_the_same_kind(started: None, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    for reduce in (distributed.sum_over_ranks, distributed.max_over_ranks):
        result = reduce(tensor)
        assert result.dtype == dtype
        assert result.device == tensor.device
        assert torch.equal(result, tensor)
        result.zero_()
        assert tensor.sum() == 10


def test_sums_carry_no_gradient(started: None) -> None:
    assert not distributed.sum_over_ranks(torch.ones(2, requires_grad=True)).requires_grad


def test_device_is_the_cpu_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert distributed.device() == torch.device("cpu")


@pytest.mark.gpu
def test_device_is_the_gpu_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert distributed.device() == torch.device("cuda", 0)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_repeat_and_differ_over_ranks_and_seeds() -> None:
    """O4"""
    drawn = {}
    for seed in (0, 1, 2):
        for rank in (0, 1, 2):
            distributed.seed_everything(seed, rank)
            drawn[seed, rank] = draw()
    distributed.seed_everything(1, 1)
    assert draw() == drawn[1, 1]
    assert len(set(drawn.values())) == 9


def test_large_seeds_are_allowed() -> None:
    distributed.seed_everything(2**32 - 1, 100)
