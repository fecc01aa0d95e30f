"""The trained losses and their gradients are functions of the examples alone, however these come to be batches.

Every test compares what a stage computes with `invariance_checks.by_definition`: plain transformers on each row alone.
Beside each stands a formula that is wrong, which must show in the same data.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from step1_sft.train import demonstration_loss
from step2_reward.train import preference_loss
from step3_ppo.ppo import actor_loss, critic_loss, ptx_loss
from tests.invariance_checks import (
    CENTRING,
    CHECKS,
    LENGTHS,
    PPO,
    PTX,
    SCALAR,
    Example,
    Folders,
    Forward,
    Result,
    Row,
    adapter_off_is_the_reference,
    assert_same,
    assert_visible,
    by_definition,
    examples,
    experience_of,
    gradients,
    pairs_of,
)
from tests.launching import failures_of, under_torchrun
from tests.tiny_models import CONFIGS, save_tiny_model
from tests.tiny_runs import SPLIT_EVERYTHING
from tests.tiny_tokenizers import EOS, PAD
from training.config import EngineConfig, ModelConfig
from training.data import Batch, collate
from training.models import load_causal_lm, load_scalar_model

ALL = len(LENGTHS)


@dataclass(frozen=True)
class Layout:
    """How the examples become batches."""

    pad_id: int = PAD
    pad_to_multiple: int = 1
    order: Sequence[int] = range(ALL)
    sizes: Sequence[int] = (ALL,)
    """Examples in each micro-batch."""
    change: Callable[[Batch], Batch] = lambda batch: batch
    """What a wrong program does to a batch."""

    @property
    def padding(self) -> tuple[int, int]:
        return self.pad_id, self.pad_to_multiple

    def batch(self, rows: list[Row]) -> Batch:
        return self.change(collate(rows, *self.padding))


def sft(model: Any, data: list[Example], denominators: Tensor, layout: Layout) -> Tensor:
    return demonstration_loss(model, layout.batch([example.row for example in data]), denominators[0])[0]


def reward(model: Any, data: list[Example], denominators: Tensor, layout: Layout) -> Tensor:
    pairs = pairs_of(data, *layout.padding)
    pairs = replace(pairs, batch=layout.change(pairs.batch))
    return preference_loss(model, pairs, denominators[2], centring=CENTRING, use_margins=True)[0]


def actor(model: Any, data: list[Example], denominators: Tensor, layout: Layout) -> Tensor:
    micro = experience_of(data, *layout.padding)
    micro = replace(micro, batch=layout.change(micro.batch))
    ptx = layout.batch([example.ptx for example in data])
    models: Any = SimpleNamespace(actor=model)
    return actor_loss(models, micro, PPO, denominators[0])[0] + PTX * ptx_loss(models, ptx, denominators[1])


def critic(model: Any, data: list[Example], denominators: Tensor, layout: Layout) -> Tensor:
    micro = experience_of(data, *layout.padding)
    models: Any = SimpleNamespace(critic=model)
    return critic_loss(models, replace(micro, batch=layout.change(micro.batch)), PPO, denominators[0])[0]


LOSSES: dict[str, Callable[[Any, list[Example], Tensor, Layout], Tensor]] = {
    "sft": sft,
    "reward": reward,
    "actor": actor,
    "critic": critic,
}


def counts(data: list[Example]) -> Tensor:
    """[3]: response tokens, those of the PTX demonstrations, preferences."""
    return torch.tensor([sum(sum(e.row[1]) for e in data), sum(sum(e.ptx[1]) for e in data), len(data)])


@cache
def load(folders: Folders, is_scalar: bool) -> nn.Module:
    model = (load_scalar_model if is_scalar else load_causal_lm)(ModelConfig(path=folders[is_scalar]), torch.float32)
    return model.train()


def as_trained(name: str, folders: Folders, layout: Layout, mean_of_means: bool = False) -> Result:
    """Loss and gradients as a stage adds them up over micro-batches.

    With `mean_of_means` in the way that is wrong: each micro-batch is divided by its own count.
    """
    model = load(folders, name in SCALAR)
    model.zero_grad()
    data = [examples(folders)[index] for index in layout.order]
    loss = torch.zeros(())
    for start, end in pairwise(accumulate(layout.sizes, initial=0)):
        part = data[start:end]
        denominators = counts(part) * len(layout.sizes) if mean_of_means else counts(data)
        part_loss = LOSSES[name](model, part, denominators, layout)
        part_loss.backward()
        loss = loss + part_loss.detach()
    return loss, gradients(model)


def left_padded(
    forward: Forward, rows: Sequence[Row], with_mask: bool = True, with_positions: bool = True
) -> list[Tensor]:
    """What the model says of each row, [its time, ...], all rows in one batch that is padded on the left."""
    time = max(len(ids) for ids, _ in rows)
    inputs = {"input_ids": torch.tensor([[PAD] * (time - len(ids)) + ids for ids, _ in rows])}
    mask = torch.tensor([[0] * (time - len(ids)) + [1] * len(ids) for ids, _ in rows])
    inputs |= {"attention_mask": mask} if with_mask else {}
    inputs |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if with_positions else {}
    return [output[time - len(ids) :] for output, (ids, _) in zip(forward(**inputs), rows, strict=True)]


@pytest.fixture
def folders(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], str], tiny_reward_model: Callable[[str], str]
) -> Folders:
    """Models of the architecture that a test asks for, else of Llama's."""
    architecture = getattr(request, "param", "llama")
    return Folders(tiny_model(architecture), tiny_reward_model(architecture))


each_loss = pytest.mark.parametrize("name", LOSSES)
each_architecture = pytest.mark.parametrize("folders", sorted(CONFIGS), indirect=True)

LAYOUTS = {
    "no needless padding": Layout(),
    "padded to 128 with EOS": Layout(pad_id=EOS, pad_to_multiple=128),
    "padded to 58 with a word": Layout(pad_id=99, pad_to_multiple=29),
    "another order": Layout(order=(4, 2, 0, 7, 1, 6, 5, 3)),
    "micro-batches of 1": Layout(sizes=(1,) * 8),
    "micro-batches of 2, another order": Layout(sizes=(2,) * 4, order=(5, 4, 3, 2, 1, 0, 7, 6)),
    "micro-batches of 3, uneven": Layout(sizes=(3, 3, 2), pad_to_multiple=8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_loss
@each_architecture
def test_padding_order_and_micro_batches_change_nothing(folders: Folders, name: str, layout: str) -> None:
    """F1, F2, F4, K3, L5, R1, R5: loss and every gradient, to 1e-5."""
    assert_same(as_trained(name, folders, LAYOUTS[layout]), by_definition(name, folders))


@each_loss
@each_architecture
def test_right_padding_equals_left_padding_in_plain_transformers(folders: Folders, name: str) -> None:
    """F1, F2: with an attention mask and positions that count the tokens, loss and every gradient, to 1e-5."""
    assert_same(as_trained(name, folders, Layout(pad_to_multiple=8)), by_definition(name, folders, left_padded))


def padding_as_text(batch: Batch) -> Batch:
    padding = ~batch.attention_mask
    return Batch(batch.input_ids, batch.attention_mask | padding, batch.response_mask | padding)


def ids_without_their_masks(batch: Batch) -> Batch:
    return replace(batch, input_ids=batch.input_ids.flip(0))


@pytest.mark.parametrize("change", [padding_as_text, ids_without_their_masks])
@each_loss
def test_a_batch_that_is_put_together_wrongly_would_show(
    folders: Folders, name: str, change: Callable[[Batch], Batch]
) -> None:
    """F1, F4, R1: padding that counts, or rows in another order than their masks, miss by more than 1e-3."""
    wrong = as_trained(name, folders, Layout(pad_id=EOS, change=change))
    assert_visible(wrong, by_definition(name, folders))


@each_loss
def test_left_padding_without_an_attention_mask_would_show(folders: Folders, name: str) -> None:
    """F1"""
    assert_visible(by_definition(name, folders, partial(left_padded, with_mask=False)), by_definition(name, folders))


@each_loss
@pytest.mark.parametrize("folders", ["gpt2"], indirect=True)
def test_left_padding_without_positions_would_show_where_they_are_absolute(folders: Folders, name: str) -> None:
    """F2"""
    wrong = by_definition(name, folders, partial(left_padded, with_positions=False))
    assert_visible(wrong, by_definition(name, folders))


@pytest.mark.parametrize("sizes", [(3, 3, 2), (1, 7), (1,) * 8, (2,) * 4])
@each_loss
def test_the_mean_of_micro_batches_means_would_show(folders: Folders, name: str, sizes: Sequence[int]) -> None:
    """L5: of preferences only where micro-batches hold unequal numbers of them."""
    wrong = as_trained(name, folders, Layout(sizes=sizes), mean_of_means=True)
    if name == "reward" and len(set(sizes)) == 1:
        assert_same(wrong, by_definition(name, folders))
    else:
        assert_visible(wrong, by_definition(name, folders))


@each_architecture
def test_without_its_adapter_a_trained_actor_is_a_separate_reference(process_group: None, folders: Folders) -> None:
    """F9: log-probabilities to 1e-6, after a step that moved those with the adapter by more than 1e-3."""
    adapter_off_is_the_reference(folders, EngineConfig(zero_stage=0, precision="fp32"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `distributed_checks.main` gives to its checks."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny_model(folder / "model", hidden_scale=1.5)
    (folder / "deepspeed.json").write_text(json.dumps(SPLIT_EVERYTHING))
    return folder


@pytest.mark.parametrize("check", CHECKS)
def test_one_rank_gives_the_gradients_at_any_zero_stage(process_group: None, run_folder: Path, check: str) -> None:
    """L5, L14, L10, F9: gradients as the optimizer gets them, taken before the step; loss as it is logged."""
    CHECKS[check](run_folder)


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What went wrong in each check on two ranks, all run in one launch."""
    return failures_of(under_torchrun("tests.invariance_checks"), timeout_seconds=240)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks_give_the_same_gradients_at_any_zero_stage(failures: dict[str, str], check: str) -> None:
    """L5, L14, L10, F9: as on one rank, with unequal numbers of tokens and of examples on the ranks."""
    assert failures[check] == ""
