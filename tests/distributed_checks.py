"""What must hold over several ranks, in one launch: each check below is run by every rank, for `test_distributed.py`.

The expected side is plain torch on the whole batch, which every rank computes for itself.
"""

import contextlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from step1_sft.train import demonstration_loss, held_out_loss
from step2_reward.evaluate import compare_held_out
from step2_reward.train import preference_loss
from step3_ppo.config import PpoConfig, PpoRunConfig, RewardModelConfig
from step3_ppo.ema import MovingAverage
from step3_ppo.ppo import actor_loss, critic_loss, update
from step3_ppo.rollout import Experience, sample_responses
from step3_ppo.scoring import OwnRows, model_scorer
from tests.launching import tell
from tests.tiny_models import save_tiny_model
from tests.tiny_runs import SPLIT_EVERYTHING
from tests.tiny_tokenizers import build_tokenizer
from training import distributed
from training.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from training.data import collate, collate_pairs, train_batches
from training.engine import backward_and_step, generation_mode, loading_options, train_engine
from training.examples import PreferenceDataset, PreferenceRows, PromptExample, TokenizedDataset
from training.export import export, whole
from training.forward import response_logprobs, reward_scores
from training.generation.hf import HuggingFaceGenerator
from training.generation.interface import Endings, SamplingConfig
from training.generation.native import NativeGenerator
from training.loop import fit
from training.metrics import MetricsLogger
from training.models import load_causal_lm, load_scalar_model
from training.optim import lr_lambda

OPTIM = OptimConfig(lr=1e-3, schedule="linear")
STEPS, TRAIN_BATCH, MICRO_BATCH = 4, 8, 2
PAD = 2
RAW_OPTIONS = "deepspeed.json"


def engine_config(zero_stage: int, folder: Path) -> EngineConfig:
    raw = folder / RAW_OPTIONS
    return EngineConfig(zero_stage=zero_stage, precision="fp32", deepspeed_config=str(raw))  # type: ignore[arg-type]


def build_engine(loader: Callable[..., nn.Module], zero_stage: int, folder: Path) -> Any:
    config = engine_config(zero_stage, folder)
    model = loader(ModelConfig(path=str(folder / "model")), torch.float32, loading_options(config, zero_stage))
    return train_engine(model, config, OPTIM, train_batch_size=TRAIN_BATCH, total_steps=STEPS)


causal_lm = load_causal_lm
scalar_model = partial(load_scalar_model, head="normal")


def plain(loader: Callable[..., nn.Module], folder: Path) -> nn.Module:
    return loader(ModelConfig(path=str(folder / "model")), torch.float32)


def rows(count: int, seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """Sequences of very unequal lengths: 3 to 40 tokens."""
    draw = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        prompt, response = int(draw.integers(1, 20)), int(draw.integers(2, 21))
        ids = draw.integers(5, 261, prompt + response).tolist()
        result.append((ids, [False] * prompt + [True] * response))
    return result


def preferences(count: int) -> PreferenceDataset:
    """Pairs and rankings of three by turns."""
    draw = np.random.default_rng(1)
    sizes = [2 + index % 2 for index in range(count)]
    return PreferenceDataset([PreferenceRows(rows(size, int(draw.integers(1 << 30))), 0.1) for size in sizes])  # type: ignore[arg-type]


def whole_weights(engine: Any) -> dict[str, Tensor]:
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with whole(parameter):
            weights[name] = parameter.detach().clone()
    return weights


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = float((ours[name] - theirs[name].detach()).abs().max())
        assert difference <= atol, f"{name} differs by {difference}"


def fit_like_plain_torch(
    folder: Path, zero_stage: int, loader: Any, dataset: Any, collate_fn: Any, loss_fn: Any, count_fn: Any
) -> None:
    """`fit` on all ranks ends with the weights of a plain loop over whole batches."""
    batches = partial(train_batches, dataset, collate_fn, train_batch_size=TRAIN_BATCH, seed=3, num_steps=STEPS)
    engine = build_engine(loader, zero_stage, folder)
    own = batches(micro_batch_size=MICRO_BATCH, rank=distributed.rank(), world_size=distributed.world_size())
    config = RunConfig(output_dir=str(folder / "run"))
    logger = MetricsLogger(folder / "run", STEPS, config, is_main=distributed.is_main())
    fit(engine, own, loss_fn, count_fn, logger, log_every=1, evaluate=dict)

    model = plain(loader, folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda(OPTIM, STEPS))
    for (batch,) in batches(micro_batch_size=TRAIN_BATCH, rank=0, world_size=1):
        loss, _ = loss_fn(model, batch, count_fn(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert_same(whole_weights(engine), dict(model.named_parameters()), atol=2e-5)


def sft_on_two_ranks_equals_one(folder: Path, zero_stage: int) -> None:
    dataset = TokenizedDataset(rows(21))
    fit_like_plain_torch(
        folder,
        zero_stage,
        causal_lm,
        dataset,
        partial(collate, pad_id=PAD),
        demonstration_loss,
        lambda batch: batch.response_mask.sum(),
    )


def reward_model_on_two_ranks_equals_one(folder: Path, zero_stage: int) -> None:
    loss_fn = partial(preference_loss, centring=0.01, use_margins=True)
    fit_like_plain_torch(
        folder,
        zero_stage,
        scalar_model,
        preferences(13),
        partial(collate_pairs, pad_id=PAD),
        loss_fn,
        lambda pairs: pairs.weights.sum(),
    )


def ppo_config(folder: Path, **changes: Any) -> PpoConfig:
    options: dict[str, Any] = {
        "actor": ModelConfig(path="unused"),
        "data": DataConfig(paths=("unused.jsonl",), format="prompt"),
        "run": PpoRunConfig(output_dir=str(folder)),
        "reward": RewardModelConfig(function="unused:unused"),
        "rollout_batch_size": TRAIN_BATCH,
        "train_batch_size": TRAIN_BATCH,
        "micro_batch_size": MICRO_BATCH,
    }
    return PpoConfig(**options | changes)


def experience(seed: int, count: int, width: int) -> Experience:
    """Made-up experience whose response tokens number between 1 and `width` in each row."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (count,), generator=draw).tolist()
    sequences = [([7 + i for i in range(3 + n)], [False] * 3 + [True] * n) for n in lengths]
    batch = collate(sequences, pad_id=PAD)
    values = [torch.randn(batch.input_ids.shape, generator=draw) for _ in range(5)]
    return Experience(batch, values[0] - 5, values[1] - 5, values[2], values[3], values[4])


def losses_do_not_depend_on_how_tokens_fall_to_ranks(folder: Path, zero_stage: int) -> None:
    share = TRAIN_BATCH // distributed.world_size()
    shares = [experience(0, share, width=2), experience(1, share, width=30)]
    config = ppo_config(folder, entropy_coefficient=0.1, value_clip=None)
    denominator = torch.stack([part.batch.response_mask.sum() for part in shares]).sum()
    cases: list[tuple[Any, Any]] = [(causal_lm, actor_loss), (scalar_model, critic_loss)]
    for loader, loss_of in cases:
        engine = build_engine(loader, zero_stage, folder)
        take_step, engine.step = engine.step, lambda: None
        models = SimpleNamespace(actor=engine, critic=engine)
        own = shares[distributed.rank()]
        for part in torch.arange(share).split(MICRO_BATCH):
            loss, _ = loss_of(models, own.rows(part), config, denominator)
            backward_and_step(engine, loss, last=bool(part[-1] == share - 1))
        gradients = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        engine.step = take_step

        model = plain(loader, folder)
        models = SimpleNamespace(actor=model, critic=model)
        torch.stack([loss_of(models, part, config, denominator)[0] for part in shares]).sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same(gradients, expected, atol=2e-5)


def generation_under_zero_3_does_not_wait_for_other_ranks(folder: Path) -> None:
    draw = np.random.default_rng(distributed.rank())
    lengths = [[3], [60, 1, 33, 7, 2]][distributed.rank()]
    prompts = [draw.integers(5, 261, length).tolist() for length in lengths]
    sampling = SamplingConfig(max_new_tokens=24)
    seeds = list(range(len(prompts)))
    engine = build_engine(causal_lm, 3, folder)
    eos_ids = list(range(5, 30))  # so that rows end early, and at different times
    generator = NativeGenerator(partial(generation_mode, engine), Endings.of(eos_ids), batch_size=2)
    found = generator.generate(prompts, sampling, seeds)
    model = plain(causal_lm, folder).eval().requires_grad_(False)
    alone = HuggingFaceGenerator(lambda: contextlib.nullcontext(model), Endings.of(eos_ids), batch_size=8)
    expected = alone.generate(prompts, sampling, seeds)
    assert [row.response_ids for row in found] == [row.response_ids for row in expected]
    counts = distributed.gather_objects([len(row.response_ids) for row in found])
    assert len({count for own in counts for count in own}) > 1, counts
    # A rank without prompts holds nobody up.
    idle = distributed.rank() == 0
    again = generator.generate([] if idle else prompts, sampling, [] if idle else seeds)
    assert [row.response_ids for row in again] == ([] if idle else [row.response_ids for row in found])
    # Training goes on as if nothing had been generated.
    batch = collate(rows(2), pad_id=PAD)
    ours, _ = response_logprobs(engine, batch)
    theirs, _ = response_logprobs(model, batch)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def a_rollout_on_two_ranks_equals_one(folder: Path) -> None:
    """Five prompts, so that one rank has more than the other; rows shared out by number and by tokens."""
    prompts = [PromptExample(list(range(5, 6 + n * n)), str(n), {}, f"line {n}") for n in range(1, 6)]
    for zero_stage, micro_batch_tokens in ((2, None), (3, 600)):
        engine = build_engine(causal_lm, zero_stage, folder)
        critic = build_engine(scalar_model, zero_stage, folder)
        sampling = SamplingConfig(max_new_tokens=24)
        config = ppo_config(folder, sampling=sampling, micro_batch_tokens=micro_batch_tokens)
        models: Any = SimpleNamespace(
            tokenizer=build_tokenizer(eos="<eos>"),
            actor=engine,
            critic=critic,
            reference=lambda: contextlib.nullcontext(engine),  # noqa: B023
            scorer=model_scorer(critic),
            generator=NativeGenerator(partial(generation_mode, engine), Endings.of(list(range(5, 30))), batch_size=2),
        )
        seeds = list(range(10))
        found = sample_responses(models, prompts, config, seeds, 2)
        with mock.patch.multiple(distributed, rank=lambda: 0, world_size=lambda: 1):
            expected = sample_responses(models, prompts, config, seeds, 2)
        assert [row.response_ids for row in found.completions] == [row.response_ids for row in expected.completions]
        assert torch.equal(found.batch.input_ids, expected.batch.input_ids)
        for name in ("sampler_logprobs", "logprobs", "ref_logprobs", "values", "scores"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            if name == "values":  # what they are outside of responses is undefined
                ours, theirs = (torch.where(found.mask, values, 0.0) for values in (ours, theirs))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=name)


def every_held_out_example_counts_once(folder: Path) -> None:
    examples = rows(7)
    engine = build_engine(causal_lm, 3, folder)
    found = held_out_loss(
        engine, TokenizedDataset(examples), partial(collate, pad_id=PAD), micro_batch_size=MICRO_BATCH
    )
    batch = collate(examples, pad_id=PAD)
    logprobs, _ = response_logprobs(plain(causal_lm, folder), batch)
    assert abs(found["loss"] + float(logprobs[batch.response_mask].detach().mean())) < 1e-5

    data = preferences(5)
    engine = build_engine(scalar_model, 3, folder)
    compared = compare_held_out(engine, data, partial(collate_pairs, pad_id=PAD), micro_batch_size=MICRO_BATCH)
    pairs = collate_pairs([data[index] for index in range(5)], pad_id=PAD)
    scores = reward_scores(plain(scalar_model, folder), pairs.batch)
    expected = sorted((scores[pairs.better] - scores[pairs.worse]).tolist())
    assert np.allclose(sorted(compared.differences), expected, atol=1e-5)


def a_moving_average_over_shards_is_that_of_the_weights(folder: Path) -> None:
    decay = 0.8
    for zero_stage in (0, 3):
        engine = build_engine(causal_lm, zero_stage, folder)
        average = MovingAverage(engine.module, decay)
        expected = whole_weights(engine)
        data = TokenizedDataset(rows(16))
        share = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        batches = train_batches(
            data,
            partial(collate, pad_id=PAD),
            train_batch_size=TRAIN_BATCH,
            micro_batch_size=MICRO_BATCH,
            seed=0,
            num_steps=3,
            **share,
        )
        for micro_batches in batches:
            for batch in micro_batches:
                loss, _ = demonstration_loss(engine, batch, torch.tensor(100.0))
                backward_and_step(engine, loss, last=batch is micro_batches[-1])
            average.update()
            weights = whole_weights(engine)
            expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in expected}
        found = average.whole_weights()
        if distributed.is_main():
            assert_same(found, expected, atol=1e-6)
        else:
            assert found == {}


def all_ranks_stop_when_one_has_moved_too_far(folder: Path) -> None:
    actor = build_engine(causal_lm, 2, folder)
    own = experience(0, TRAIN_BATCH, width=6)
    with torch.no_grad():
        now, _ = response_logprobs(actor, own.batch)
    # In one row alone, which one of the ranks trains on, the policy is far from where it sampled.
    far = torch.zeros(TRAIN_BATCH, 1)
    far[0] = 3.0
    own = Experience(own.batch, now - far, now, own.advantages, None, own.returns)
    models: Any = SimpleNamespace(actor=actor, critic=None, trained={"actor": actor})
    config = ppo_config(folder, estimator="reinforce_pp", ppo_epochs=3, target_kl=0.1)
    metrics = update(models, own, config, 0, None, None)
    assert (metrics["ppo/steps"], metrics["ppo/stopped_early"]) == (1, 1.0)
    config = ppo_config(folder, estimator="reinforce_pp", ppo_epochs=3, target_kl=100.0)
    metrics = update(models, own, config, 0, None, None)
    assert (metrics["ppo/steps"], metrics["ppo/stopped_early"]) == (3, 0.0)


def groups_that_do_not_come_out_even_are_trained_on_once(folder: Path, zero_stage: int) -> None:
    """Three prompts with samples that are computed together, in micro-batches of one prompt: two for each rank."""
    draw = np.random.default_rng(4)
    rows = []
    for samples in (3, 3, 2):
        prompt = draw.integers(5, 261, 24).tolist()
        responses = [draw.integers(5, 261, 4 + n).tolist() for n in range(samples)]
        rows += [(prompt + response, [False] * 24 + [True] * len(response)) for response in responses]
    batch = collate(rows, pad_id=PAD)
    noise = torch.Generator().manual_seed(1)
    values = [torch.randn(batch.input_ids.shape, generator=noise) for _ in range(3)]
    whole = Experience(batch, values[0] - 5, values[1] - 5, values[2], None, values[2])
    data = DataConfig(paths=("unused.jsonl",), format="prompt", max_prompt_tokens=24)
    limits = {"data": data, "sampling": SamplingConfig(max_new_tokens=8), "micro_batch_tokens": 95}
    config = ppo_config(folder, estimator="reinforce_pp", entropy_coefficient=0.1, **limits)
    own = OwnRows(batch, config)
    counts = [rows.tolist() for rows, is_counted in zip(own.rows, own.counts, strict=True) if is_counted]
    found = distributed.gather_objects(counts)
    assert sorted(rows for counts in found for rows in counts) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert len(own.rows) == 2

    actor = build_engine(causal_lm, zero_stage, folder)
    models: Any = SimpleNamespace(actor=actor, critic=None, trained={"actor": actor})
    update(models, whole, config, 0, None, None)
    model = plain(causal_lm, folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=0.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda(OPTIM, STEPS))
    actor_loss(SimpleNamespace(actor=model), whole, config, batch.response_mask.sum())[0].backward()  # type: ignore[arg-type]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert_same(whole_weights(actor), dict(model.named_parameters()), atol=2e-5)


def tied_embeddings_are_exported_from_shards(folder: Path) -> None:
    engine = build_engine(causal_lm, 3, folder)
    target = folder / "exported"
    export(engine, target, build_tokenizer(eos="<eos>"), ModelConfig(path=str(folder / "model")))
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(dict(loaded.named_parameters()), dict(plain(causal_lm, folder).named_parameters()), atol=0)


def compiled(check: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same with compiled layers, as far as that needs no C++ compiler."""

    def with_compiled_layers(folder: Path) -> None:
        torch.compiler.reset()
        counters["stats"].clear()
        options = mock.patch(f"{__name__}.EngineConfig", partial(EngineConfig, compile_layers=True))
        with options, mock.patch("training.compiling.BACKEND", "aot_eager"):
            check(folder)
        assert counters["stats"]["unique_graphs"] > 0

    return with_compiled_layers


CHECKS: dict[str, Callable[[Path], None]] = {
    "sft_zero0": partial(sft_on_two_ranks_equals_one, zero_stage=0),
    "sft_zero3": partial(sft_on_two_ranks_equals_one, zero_stage=3),
    "reward_zero0": partial(reward_model_on_two_ranks_equals_one, zero_stage=0),
    "reward_zero2": partial(reward_model_on_two_ranks_equals_one, zero_stage=2),
    "compiled_zero3": compiled(partial(sft_on_two_ranks_equals_one, zero_stage=3)),
    "rollout": a_rollout_on_two_ranks_equals_one,
    "losses_zero0": partial(losses_do_not_depend_on_how_tokens_fall_to_ranks, zero_stage=0),
    "losses_zero3": partial(losses_do_not_depend_on_how_tokens_fall_to_ranks, zero_stage=3),
    "generation": generation_under_zero_3_does_not_wait_for_other_ranks,
    "held_out": every_held_out_example_counts_once,
    "moving_average": a_moving_average_over_shards_is_that_of_the_weights,
    "early_stop": all_ranks_stop_when_one_has_moved_too_far,
    "groups_zero0": partial(groups_that_do_not_come_out_even_are_trained_on_once, zero_stage=0),
    "groups_zero3": partial(groups_that_do_not_come_out_even_are_trained_on_once, zero_stage=3),
    "tied_export": tied_embeddings_are_exported_from_shards,
}


def outcomes(folder: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    """Each check with the tracebacks of the ranks that it failed on, or nothing."""
    for name in names:
        failure = ""
        try:
            CHECKS[name](folder)
        except Exception:  # a failed check must not keep the others from running
            failure = f"rank {distributed.rank()}: {traceback.format_exc()}"
            print(failure, file=sys.stderr, flush=True)  # in case the other ranks now wait for this one
        yield name, "".join(distributed.gather_objects(failure))


def main() -> None:
    """Tells how each check went. Arguments: names of checks, none for all."""
    distributed.start(timeout_minutes=1)
    own = tempfile.TemporaryDirectory()
    folder = Path(distributed.gather_objects(own.name)[0])
    if distributed.is_main():
        save_tiny_model(folder / "model", hidden_scale=1.5)
        (folder / RAW_OPTIONS).write_text(json.dumps(SPLIT_EVERYTHING))
    distributed.barrier()
    for name, failure in outcomes(folder, sys.argv[1:] or list(CHECKS)):
        if distributed.is_main():
            tell(name, failure)
    distributed.stop()
    own.cleanup()


if __name__ == "__main__":
    main()
