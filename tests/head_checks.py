"""Run by every rank, for `test_head.py`: with weights split over ranks, chunks give the gradients of whole logits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from tests import distributed_checks
from tests.distributed_checks import OPTIM, PAD, TRAIN_BATCH, engine_config, rows
from tests.invariance_checks import gradients
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE
from training import distributed, head
from training.config import LoraConfig, ModelConfig
from training.data import Batch, collate
from training.engine import loading_options, train_engine
from training.forward import response_logprobs
from training.models import load_causal_lm


def chunks_have_the_gradients(folder: Path, architecture: str, lora: LoraConfig) -> None:
    """Of whole logits of padded rows, by plain torch. One rank has more tokens than the other, which then has none."""
    path = folder / f"head_{architecture}"
    if distributed.is_main() and not path.exists():
        save_tiny_model(path, architecture, hidden_scale=1.5)
    distributed.barrier()
    every = rows(4)
    one, other = collate(every[:3], PAD), collate(every[3:], PAD)
    for batches in ([one, other], [one, other.as_filler()]):
        loss, found = at_zero_3(folder, path, lora, batches[distributed.rank()])
        right, expected = in_plain_torch(path, lora, batches)
        assert abs(loss - right) <= 1e-5 * abs(right)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            bound = 1e-5 * float(gradient.abs().max()) + 1e-7
            assert float((found[name] - gradient).abs().max()) <= bound, name


def at_zero_3(folder: Path, path: Path, lora: LoraConfig, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    config = engine_config(3, folder)
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(path=str(path), lora=lora), torch.float32, loading_options(config, 3))
    engine = train_engine(model, config, OPTIM, train_batch_size=TRAIN_BATCH, total_steps=1)
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "TRAINED_BYTES_CPU", 4 * VOCAB_SIZE * 3)  # 3 tokens at a time
        loss = loss_of(engine, batch)
        engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
    return float(distributed.sum_over_ranks(loss.detach())), gradients(engine.module, safe_get_full_grad)


def in_plain_torch(path: Path, lora: LoraConfig, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(path=str(path), packing=False, lora=lora), torch.float32)
    loss = torch.stack([loss_of(model, batch) for batch in batches]).sum()
    loss.backward()
    return float(loss.detach()), gradients(model)


def loss_of(model: Any, batch: Batch) -> Tensor:
    logprobs, entropy = response_logprobs(model, batch, 0.7, with_entropy=True)
    assert entropy is not None
    weights = torch.linspace(-1, 2, logprobs.numel()).view(logprobs.shape)
    return (weights * logprobs + 0.3 * entropy).sum()


CHECKS: dict[str, Callable[[Path], None]] = {
    "tied": partial(chunks_have_the_gradients, architecture="llama", lora=LoraConfig()),
    "untied": partial(chunks_have_the_gradients, architecture="qwen2", lora=LoraConfig()),
    "frozen": partial(chunks_have_the_gradients, architecture="qwen2", lora=LoraConfig(rank=4)),
}

if __name__ == "__main__":
    distributed_checks.CHECKS = CHECKS  # what its `main` runs
    distributed_checks.main()
