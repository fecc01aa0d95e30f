"""Losses and gradients by definition; and, run by every rank, that engines give the same: for `test_invariance.py`.

By definition means: plain transformers on each row alone, without padding, and a formula over the tokens of all rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from step1_sft.train import demonstration_loss
from step2_reward.train import preference_loss
from step3_ppo.config import CriticConfig, KlConfig, PtxConfig, RewardModelConfig
from step3_ppo.models import load_models
from step3_ppo.ppo import update
from step3_ppo.rollout import Experience
from tests import distributed_checks
from tests.distributed_checks import MICRO_BATCH, OPTIM, TRAIN_BATCH, engine_config, ppo_config
from tests.tiny_models import save_tiny_reward_model
from tests.tiny_tokenizers import EOS, NUM_SPECIAL, PAD, VOCAB_SIZE, build_tokenizer
from training import distributed
from training.config import EngineConfig, LoraConfig, ModelConfig, OptimConfig
from training.data import PairBatch, collate, collate_pairs
from training.engine import loading_options, train_engine
from training.examples import PreferenceRows
from training.forward import response_logprobs
from training.generation.interface import SamplingConfig
from training.loop import fit
from training.models import ScalarModel, load_causal_lm, load_scalar_model

Row = tuple[list[int], list[bool]]
Forward = Callable[..., Tensor]
Outputs = Callable[[Sequence[Row]], list[Tensor]]
Result = tuple[Tensor, dict[str, Tensor]]

BOUND = 1e-5  # of what `deviations` measures
VISIBLE = 1e-3  # what a wrong gradient must miss by, or the data could not tell it from the right one

# Tokens of prompt and response of each example, and what the micro-batches hold of them: ranks get an equal number.
LENGTHS = [(12, 1), (1, 30), (7, 2), (3, 9), (20, 1), (5, 40), (2, 3), (9, 17)]
PARTS = [[0], [1, 2], [3, 4, 5], [6, 7]]

MARGIN, CENTRING, TEMPERATURE = 0.1, 0.01, 0.7
ENTROPY, KL_LOSS, PTX, CLIP = 0.1, 0.3, 0.5, 0.2
PPO = replace(
    ppo_config(Path("unused"), clip_low=CLIP, clip_high=CLIP, value_clip=CLIP, entropy_coefficient=ENTROPY),
    sampling=SamplingConfig(temperature=TEMPERATURE),
    kl=KlConfig(loss_coefficient=KL_LOSS),
    ptx=PtxConfig(coefficient=PTX, paths=("unused",)),
    reward=RewardModelConfig(function="builtins:len"),
)
SCALAR = ("reward", "critic")  # losses of models with a score head


class Folders(NamedTuple):
    """Where a language model and one with a score head are saved."""

    causal: str
    scalar: str


class Example(NamedTuple):
    """What the losses read: a row that is demonstration, best of a preference, and sampled response."""

    row: Row
    worse: list[Row]
    ptx: Row
    numbers: Tensor
    """[5, response]: log-probabilities when sampled and of the reference, advantages, values when sampled, returns."""


@cache
def plain(folders: Folders, is_scalar: bool) -> Any:
    """By transformers alone, without dropout."""
    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    return kind.from_pretrained(folders[is_scalar], dtype=torch.float32)


def forward(folders: Folders, is_scalar: bool, **inputs: Tensor) -> Tensor:
    """Logits [batch, time, vocab], or values [batch, time]."""
    model = plain(folders, is_scalar)
    if not is_scalar:
        return model(**inputs).logits
    return model.score(model.base_model(**inputs).last_hidden_state)[..., 0]


def unpadded(forward: Forward, rows: Sequence[Row]) -> list[Tensor]:
    """What the model says of each row by itself, [its time, ...]."""
    return [forward(input_ids=torch.tensor([ids]))[0] for ids, _ in rows]


def of_responses(outputs: Outputs, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """The response tokens of all rows [tokens], and the outputs that they were chosen by [tokens, ...], float64."""
    ids = [torch.tensor(ids)[torch.tensor(mask)] for ids, mask in rows]
    found = [output[:-1][torch.tensor(mask)[1:]] for output, (_, mask) in zip(outputs(rows), rows, strict=True)]
    return torch.cat(ids), torch.cat(found).double()


def logprobs_of(outputs: Outputs, rows: Sequence[Row], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens of all rows [tokens], and of all that could be [tokens, vocab]."""
    ids, logits = of_responses(outputs, rows)
    every = (logits / temperature).log_softmax(-1)
    return every.gather(-1, ids[:, None])[:, 0], every


@cache
def examples(folders: Folders) -> list[Example]:
    """Rows of very unequal lengths. PPO's numbers lie about those of the models, inside and outside the clips."""
    draw = np.random.default_rng(0)

    def row(prompt: int, response: int) -> Row:
        ids = draw.integers(NUM_SPECIAL, VOCAB_SIZE, prompt + response).tolist()
        ids[len(ids) // 2] = ids[-1] = EOS  # also inside, as after the turns of a chat
        return ids, [False] * prompt + [True] * response

    result = []
    for index, (prompt, response) in enumerate(LENGTHS):
        own, ptx = row(prompt, response), row(*LENGTHS[-1 - index])
        worse = [row(prompt, int(draw.integers(1, 25))) for _ in range(1 + index % 2)]
        with torch.no_grad():
            logprobs, _ = logprobs_of(partial(unpadded, partial(forward, folders, False)), [own], TEMPERATURE)
            _, values = of_responses(partial(unpadded, partial(forward, folders, True)), [own])
        centres = torch.stack([logprobs, logprobs, torch.ones(response), values, torch.ones(response)])
        spread = torch.tensor([0.3, 0.5, 2.0, 0.3, 1.0])[:, None]
        numbers = centres + spread * torch.from_numpy(draw.normal(size=(5, response)))
        result.append(Example(own, worse, ptx, numbers.float()))
    return result


def sft_by_definition(outputs: Outputs, data: Sequence[Example]) -> Tensor:
    return -logprobs_of(outputs, [example.row for example in data])[0].mean()


def reward_by_definition(outputs: Outputs, data: Sequence[Example]) -> Tensor:
    every = iter(outputs([row for example in data for row in (example.row, *example.worse)]))
    preferences = []
    for example in data:
        scores = [next(every)[-1].double() for _ in (example.row, *example.worse)]
        pairs = [
            (1 + (worse + MARGIN - better).exp()).log() + CENTRING * (better + worse) ** 2
            for better, worse in combinations(scores, 2)
        ]
        preferences.append(torch.stack(pairs).mean())
    return torch.stack(preferences).mean()


def actor_by_definition(outputs: Outputs, data: Sequence[Example]) -> Tensor:
    logprobs, every = logprobs_of(outputs, [example.row for example in data], TEMPERATURE)
    old, reference, advantages, _, _ = torch.cat([example.numbers for example in data], 1).double()
    ratio = (logprobs - old).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    entropy, kl = -(every.exp() * every).sum(-1).mean(), (ratio.detach() * (logprobs - reference) ** 2 / 2).mean()
    ptx = -logprobs_of(outputs, [example.ptx for example in data])[0].mean()
    return policy - ENTROPY * entropy + KL_LOSS * kl + PTX * ptx


def critic_by_definition(outputs: Outputs, data: Sequence[Example]) -> Tensor:
    _, values = of_responses(outputs, [example.row for example in data])
    *_, old, returns = torch.cat([example.numbers for example in data], 1).double()
    clipped = old + (values - old).clamp(-CLIP, CLIP)
    return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean() / 2


DEFINITIONS: dict[str, Callable[[Outputs, Sequence[Example]], Tensor]] = {
    "sft": sft_by_definition,
    "reward": reward_by_definition,
    "actor": actor_by_definition,
    "critic": critic_by_definition,
}


def gradients(model: nn.Module, read: Callable[[nn.Parameter], Tensor | None] = lambda p: p.grad) -> dict[str, Tensor]:
    """Of every weight, by the name that it has in transformers."""
    model = model.model if isinstance(model, ScalarModel) else model
    return {name: gradient.clone() for name, p in model.named_parameters() if (gradient := read(p)) is not None}


@cache
def by_definition(
    name: str,
    folders: Folders,
    outputs: Callable[[Forward, Sequence[Row]], list[Tensor]] = unpadded,
    shares: Sequence[Sequence[int]] = (range(len(LENGTHS)),),
) -> Result:
    """Loss and gradients over all examples; of more than one share of them the mean of their means, which is wrong."""
    model = plain(folders, name in SCALAR)
    model.zero_grad()
    of_rows = partial(outputs, partial(forward, folders, name in SCALAR))
    means = [DEFINITIONS[name](of_rows, [examples(folders)[index] for index in share]) for share in shares]
    loss = torch.stack(means).mean()
    loss.backward()
    return loss.detach(), gradients(model)


def deviations(found: Result, wanted: Result) -> tuple[float, float]:
    """Of the loss, relative to it, and of the gradient: of a weight's entries, relative to its largest one.

    A weight whose gradient is below a hundredth of the largest is measured by that: OPT's key biases have none.
    """
    assert found[1].keys() == wanted[1].keys()
    largest = {name: float(gradient.abs().max()) for name, gradient in wanted[1].items()}
    floor = 0.01 * max(largest.values())
    of_weights = [(found[1][name] - g).abs().max() / max(largest[name], floor) for name, g in wanted[1].items()]
    return float((found[0] / wanted[0] - 1).abs()), float(torch.stack(of_weights).max())


def assert_same(found: Result, wanted: Result) -> None:
    loss, gradient = deviations(found, wanted)
    assert loss <= BOUND and gradient <= BOUND, f"loss {loss:.1e}, gradient {gradient:.1e}"


def assert_visible(wrong: Result, right: Result) -> None:
    """A wrong formula shows; less in the loss, which these models keep near log(vocabulary) for every token."""
    loss, gradient = deviations(wrong, right)
    assert loss > 10 * BOUND and gradient > VISIBLE, f"loss {loss:.1e}, gradient {gradient:.1e}"


def pairs_of(data: Sequence[Example], pad_id: int = PAD, pad_to_multiple: int = 1) -> PairBatch:
    items = [PreferenceRows([example.row, *example.worse], MARGIN) for example in data]
    return collate_pairs(items, pad_id, pad_to_multiple)


def experience_of(data: Sequence[Example], pad_id: int = PAD, pad_to_multiple: int = 1) -> Experience:
    batch = collate([example.row for example in data], pad_id, pad_to_multiple)
    numbers = torch.full((5, *batch.input_ids.shape), -7.0)  # garbage where there is no response
    numbers[:, batch.response_mask] = torch.cat([example.numbers for example in data], 1)
    return Experience(batch, *numbers)


def recorded(engine: Any) -> dict[str, Tensor]:
    """Will hold the whole gradients that the engine's optimizer is given."""
    found: dict[str, Tensor] = {}
    take_step = engine.step

    def step() -> None:
        if engine.is_gradient_accumulation_boundary():
            found.update(gradients(engine.module, safe_get_full_grad))
        take_step()

    engine.step = step
    are_split = {parameter.numel() == 0 for parameter in engine.module.parameters()}
    assert are_split == {engine.zero_optimization_stage() == 3}
    return found


def fit_has_the_gradient(name: str, folders: Folders, config: EngineConfig) -> None:
    """Of SFT or the reward model, with 3 examples on the first of two ranks and 5 on the other."""
    is_reward = name == "reward"
    load: Any = load_scalar_model if is_reward else load_causal_lm
    model = load(ModelConfig(path=folders[is_reward]), torch.float32, loading_options(config, config.zero_stage))
    engine = train_engine(model, config, OPTIM, train_batch_size=TRAIN_BATCH, total_steps=1)
    found = recorded(engine)
    share = len(PARTS) // distributed.world_size()
    parts = [[examples(folders)[i] for i in part] for part in PARTS[distributed.rank() * share :][:share]]
    batches: Any = [pairs_of(part) if is_reward else collate([e.row for e in part], PAD) for part in parts]
    loss_fn = partial(preference_loss, centring=CENTRING, use_margins=True) if is_reward else demonstration_loss
    logged: dict[str, float] = {}
    logger: Any = SimpleNamespace(log=lambda step, metrics, tokens: logged.update(metrics))

    def count(batch: Any) -> Tensor:
        return batch.weights.sum() if is_reward else batch.response_mask.sum()

    fit(engine, [batches], loss_fn, count, logger, log_every=1, evaluate=dict)
    right = by_definition(name, folders)
    assert_same((torch.tensor(logged["train/loss"]), found), right)
    assert_visible(by_definition(name, folders, shares=(range(3), range(3, 8))), right)


def update_has_the_gradients(folders: Folders, engine: EngineConfig) -> None:
    """Of actor and critic, with unequally many response tokens on the ranks."""
    actor, critic = ModelConfig(path=folders.causal), CriticConfig(path=folders.scalar)
    config = replace(PPO, engine=engine, actor=actor, critic=critic)
    models = load_models(config, build_tokenizer(eos="<eos>"))
    found = {"actor": recorded(models.actor), "critic": recorded(models.critic)}
    own = own_share(folders)
    ptx = [collate([e.ptx for e in own[i : i + MICRO_BATCH]], PAD) for i in range(0, len(own), MICRO_BATCH)]
    metrics = update(models, experience_of(examples(folders)), config, 0, iter([ptx]), None)
    ppo = {name: metrics[f"ppo/{name}"] for name in ("policy_loss", "entropy", "kl_loss", "ptx_loss", "value_loss")}
    actor_loss = ppo["policy_loss"] - ENTROPY * ppo["entropy"] + KL_LOSS * ppo["kl_loss"] + PTX * ppo["ptx_loss"]
    for name, loss in (("actor", actor_loss), ("critic", ppo["value_loss"])):
        right = by_definition(name, folders)
        assert_same((torch.tensor(loss), found[name]), right)
        assert_visible(by_definition(name, folders, shares=(range(4), range(4, 8))), right)


def adapter_off_is_the_reference(folders: Folders, engine: EngineConfig) -> None:
    """After a step of the adapter, log-probabilities are those of a model loaded apart, to 1e-6."""
    actor = ModelConfig(path=folders.causal, lora=LoraConfig(rank=4))
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup_fraction=0.0)
    config = replace(PPO, actor=actor, engine=engine, actor_optim=optim, estimator="reinforce_pp")
    models = load_models(config, build_tokenizer(eos="<eos>"))
    experience = experience_of(examples(folders))
    update(models, experience, config, 0, None, None)
    with torch.no_grad():
        trained, _ = response_logprobs(models.actor, experience.batch)
        with models.reference() as reference:
            found, _ = response_logprobs(reference, experience.batch)
        expected, _ = response_logprobs(plain(folders, False), experience.batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float((trained - expected).abs().max()) > VISIBLE


def own_share(folders: Folders) -> list[Example]:
    share = len(LENGTHS) // distributed.world_size()
    return examples(folders)[distributed.rank() * share :][:share]


def at_stage(zero_stage: int, check: Callable[[Folders, EngineConfig], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        if distributed.is_main() and not (folder / "scalar").exists():
            save_tiny_reward_model(folder / "scalar", hidden_scale=1.5)
        distributed.barrier()
        check(Folders(str(folder / "model"), str(folder / "scalar")), engine_config(zero_stage, folder))

    return run


KINDS: dict[str, Callable[[Folders, EngineConfig], None]] = {
    "sft": partial(fit_has_the_gradient, "sft"),
    "reward": partial(fit_has_the_gradient, "reward"),
    "ppo": update_has_the_gradients,
    "lora": adapter_off_is_the_reference,
}
CHECKS = {f"{kind}_zero{stage}": at_stage(stage, check) for kind, check in KINDS.items() for stage in range(4)}

if __name__ == "__main__":
    distributed_checks.CHECKS = CHECKS  # what its `main` runs
    distributed_checks.main()
