import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from training.config import OptimConfig
from training.optim import SCHEDULES, adamw, lr_lambda, parameter_groups


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)


def names_of(model: nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_every_schedule_can_be_chosen() -> None:
    assert set(get_args(get_type_hints(OptimConfig)["schedule"])) == set(SCHEDULES)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # 10 steps, of which 2 warm up; then progress is 0, 1/8, ..., 7/8.
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1, *[math.cos(math.pi * k / 16) ** 2 for k in range(8)]]),
    ],
)
def test_schedules_by_hand(schedule: str, factors: list[float]) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_fraction=0.2)  # type: ignore[arg-type]
    factor = lr_lambda(config, total_steps=10)
    assert [factor(step) for step in range(10)] == pytest.approx(factors)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_ends_at_0(schedule: str) -> None:
    """L7, R7"""
    factor = lr_lambda(OptimConfig(lr=1.0, schedule=schedule), total_steps=50)  # type: ignore[arg-type]
    assert factor(49) > 0
    assert factor(50) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_factor_is_the_floor_and_stays(schedule: str) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_fraction=0.1, min_lr_fraction=0.25)  # type: ignore[arg-type]
    factor = lr_lambda(config, total_steps=20)
    assert [factor(20), factor(1000)] == pytest.approx([0.25, 0.25])
    assert min(factor(step) for step in range(2, 20)) > 0.25


def test_no_step_of_a_run_has_a_learning_rate_of_0() -> None:
    for total_steps in (1, 2, 3, 100):
        for warmup_fraction in (0.0, 0.03, 0.5, 1.0):
            factor = lr_lambda(OptimConfig(lr=1.0, warmup_fraction=warmup_fraction), total_steps)
            assert all(0 < factor(step) <= 1 for step in range(total_steps))


def test_warmup_takes_its_share_of_the_steps_and_no_more() -> None:
    for total_steps in range(100, 2000, 100):
        factor = lr_lambda(OptimConfig(lr=1.0, warmup_fraction=0.03, schedule="constant"), total_steps)
        assert sum(factor(step) < 1 for step in range(total_steps)) == 3 * total_steps // 100 - 1


def test_scheduler_sets_the_learning_rate_of_both_groups() -> None:
    model = TinyModel()
    config = OptimConfig(lr=2.0, warmup_fraction=0.5, schedule="linear")
    optimizer = adamw(parameter_groups(model, 0.1), config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda(config, 4))
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]


def test_biases_and_norms_do_not_decay() -> None:
    model = TinyModel()
    matrices, vectors = parameter_groups(model, weight_decay=0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert names_of(model, matrices) == {"embedding.weight", "linear.weight"}
    assert names_of(model, vectors) == {"linear.bias", "norm.weight", "norm.bias"}


def test_frozen_parameters_are_left_out() -> None:
    model = TinyModel().requires_grad_(False)
    model.linear.weight.requires_grad_(True)
    (group,) = parameter_groups(model, weight_decay=0.1)
    assert names_of(model, group) == {"linear.weight"}


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(TinyModel().requires_grad_(False), weight_decay=0.1)


def test_tied_parameters_are_updated_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    (group,) = parameter_groups(model, weight_decay=0.1)
    assert len(group["params"]) == 1


def test_partitioned_parameters_are_sorted_by_their_whole_shape() -> None:
    model = TinyModel()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    matrices, _ = parameter_groups(model, weight_decay=0.1)
    assert names_of(model, matrices) == {"embedding.weight", "linear.weight"}


def test_adamw_makes_the_step_of_the_paper() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    config = OptimConfig(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    optimizer = adamw([weight], config)
    weight.grad = torch.tensor([[3.0, -0.5]], dtype=torch.float64)
    optimizer.step()
    # First step: both bias-corrected means make the update sign(gradient); the decay takes lr * decay * weight.
    expected = [1.0 - 0.1 * 0.5 * 1.0 - 0.1, -2.0 - 0.1 * 0.5 * -2.0 + 0.1]
    assert weight[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_eps_is_added_after_the_bias_correction() -> None:
    """L7: three steps by hand, with gradients of the size of eps. Added before it, the first step is 16x smaller.

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; step = lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    (Kingma & Ba 2015, algorithm 1)
    """
    lr, b1, b2, eps = 0.1, 0.9, 0.999, 1e-5
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = adamw([weight], OptimConfig(lr=lr, betas=(b1, b2), eps=eps))
    position = m = v = 0.0
    for t, gradient in enumerate((1e-5, -3e-5, 2e-5), start=1):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        position -= lr * m / (1 - b1**t) / ((v / (1 - b2**t)) ** 0.5 + eps)
        assert weight.item() == pytest.approx(position, rel=1e-9)


@pytest.mark.gpu
def test_fused_adamw_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(64, 64), torch.randn(64, 64)
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        weight = nn.Parameter(start.to(device))
        optimizer = adamw([weight], OptimConfig(lr=1e-3, weight_decay=0.1))
        for _ in range(5):
            weight.grad = gradient.to(device)
            optimizer.step()
        assert optimizer.defaults["fused"]
        results.append(weight.detach().cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
