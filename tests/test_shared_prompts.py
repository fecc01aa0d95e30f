"""A prompt that several rows begin with is computed once: the numbers and gradients are those of padded rows."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from step3_ppo.scoring import OwnRows
from tests.test_packing import (
    KNOWN,
    assert_same_gradients,
    compare_values_and_scores,
    loaded,
    numbers_and_gradients,
    tokens_of_linear_layers,
)
from tests.tiny_models import CONFIGS
from tests.tiny_tokenizers import NUM_SPECIAL, PAD, VOCAB_SIZE
from training import distributed, head
from training.attention import AttentionRule, Branching, SideBySide
from training.config import LoraConfig
from training.data import Batch, collate
from training.forward import response_logprobs
from training.packing import SHARED_TOKENS, Group, PackedBatch, groups_of

TinyModel = Callable[[str], str]


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(NUM_SPECIAL, VOCAB_SIZE, (count,), generator=generator).tolist()


def rows_of(*rows: tuple[list[int], list[int]]) -> Batch:
    """Prompts with their responses."""
    return collate([(p + r, [False] * len(p) + [True] * len(r)) for p, r in rows], PAD)


A, B, C, D = ids(20, 1), ids(31, 2), ids(17, 3), ids(25, 4)
R = [ids(length, 10 + length) for length in range(12)]

# Batches, and how many tokens of them are to be computed.
BATCHES = {
    "8 samples": (rows_of(*((A, R[n]) for n in (5, 3, 1, 7, 2, 4, 6, 11))), 20 + 39),
    "groups of 1, 2 and 3": (
        rows_of((D, R[4]), (A, R[5]), (A, R[2]), (B, R[3]), (B, R[9]), (B, R[1]), (C, R[6])),
        (25 + 4) + (20 + 7) + (31 + 13) + (17 + 6),
    ),
    "not consecutive": (rows_of((A, R[5]), (B, R[4]), (A, R[3]), (B, R[2])), 2 * 20 + 2 * 31 + 14),
    "equal rows": (rows_of((A, R[5]), (A, R[5]), (B, R[3])), 20 + 5 + 31 + 3),
    # The last two go on as the first one ends, or end before it does.
    "responses that begin with others": (rows_of((A, R[5]), (A, R[5] + R[3]), (A, R[5][:2])), 20 + 2 + 3 + 6 + 0),
    "empty responses": (rows_of((A, R[0]), (A, R[4]), (A, R[0]), (B, R[0]), (B, R[0])), 20 + 4 + 31),
    # Of all four rows the first 20 tokens are alike, of two and two the first 40.
    "a common beginning of different prompts": (
        rows_of((A + C, R[3]), (A + C, R[4]), (A + D, R[5]), (A + D, R[6])),
        37 + 7 + 45 + 11,
    ),
}


def flat_tokens(batch: Batch) -> int:
    return PackedBatch(batch.input_ids, batch.attention_mask).inputs["input_ids"].numel()


@pytest.mark.parametrize("name", BATCHES)
def test_what_consecutive_rows_begin_with_is_computed_once(name: str) -> None:
    batch, tokens = BATCHES[name]
    assert flat_tokens(batch) == tokens


@pytest.mark.parametrize("common", [1, SHARED_TOKENS - 1, SHARED_TOKENS])
def test_a_short_beginning_is_computed_for_each_row(common: int) -> None:
    """Such as one BOS; and what has nothing to share attends as before."""
    batch = rows_of(*((A[:common] + ids(9, seed), R[3]) for seed in range(50, 54)))
    packed = PackedBatch(batch.input_ids, batch.attention_mask)
    is_shared = common == SHARED_TOKENS
    assert flat_tokens(batch) == batch.num_tokens - 3 * common * is_shared
    assert isinstance(packed.sequences, Branching if is_shared else SideBySide)


def test_padding_is_not_taken_for_a_common_beginning() -> None:
    """The ids behind the end of a row go on as the row before does."""
    batch = rows_of((A + B, R[3]), (A[:18], []))
    batch.input_ids[1] = batch.input_ids[0]
    assert flat_tokens(batch) == len(A + B) + 3


def test_groups_save_as_many_tokens_as_any_cut_into_consecutive_rows() -> None:
    def saved(common: Sequence[int], cuts: Sequence[int]) -> int:
        bounds = [0, *cuts, len(common) + 1]
        runs = [common[start : end - 1] for start, end in itertools.pairwise(bounds)]
        return sum(len(run) * min(run) for run in runs if run and min(run) >= SHARED_TOKENS)

    for common in itertools.product((0, SHARED_TOKENS - 1, SHARED_TOKENS, 20, 70), repeat=4):
        best = max(saved(common, cuts) for n in range(5) for cuts in itertools.combinations(range(1, 5), n))
        groups = groups_of(common)
        assert sum((len(rows) - 1) * shared for rows, shared in groups) == best
        assert all(min(common[rows.start : rows.stop - 1]) == shared for rows, shared in groups)
    assert groups_of([]) == []
    assert groups_of([20, 70]) == [Group(range(1, 3), 70)]
    assert groups_of([20, 20, 0, 70]) == [Group(range(3, 5), 70), Group(range(3), 20)]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_shared_logprobs_entropy_and_gradients_are_the_padded_ones(
    tiny_model: TinyModel, architecture: str, name: str
) -> None:
    """F1; the window of mistral, 8 tokens, begins within the prompt or behind it."""
    compare_with_padded(tiny_model(architecture), BATCHES[name][0])


@pytest.mark.parametrize("architecture", sorted({*KNOWN} - {"llama", "mistral"}))
def test_every_known_architecture_shares_prompts(tiny_model: TinyModel, architecture: str) -> None:
    compare_with_padded(tiny_model(architecture), BATCHES["groups of 1, 2 and 3"][0])


def compare_with_padded(path: str, batch: Batch) -> None:
    (expected, gradients), (found, own) = (
        numbers_and_gradients(loaded(path, packing), batch) for packing in (False, True)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_same_gradients(own, gradients)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["whole", "adapters"])
def test_a_checkpointed_layer_finds_its_branches_again(tiny_model: TinyModel, lora: LoraConfig) -> None:
    """Also after batches with other branches, and none, have been through the model."""
    gradients = []
    for packing, checkpointing in ((False, False), (True, True)):
        model = loaded(tiny_model("llama"), packing, gradient_checkpointing=checkpointing, lora=lora).train()
        names = ("8 samples", "groups of 1, 2 and 3", "not consecutive")
        sums = [response_logprobs(model, BATCHES[name][0])[0].sum() for name in names]
        (sums[0] + 2 * sums[1] + 3 * sums[2]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same_gradients(*gradients[::-1])


def test_a_chunked_head_reads_the_state_behind_the_prompt_for_each_sample(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "TRAINED_BYTES_CPU", 3 * VOCAB_SIZE * 4)  # 3 tokens in float32
    compare_with_padded(tiny_model("qwen2"), BATCHES["8 samples"][0])


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_shared_values_and_scores_are_the_padded_ones(tiny_reward_model: TinyModel, architecture: str) -> None:
    parts = [BATCHES[name][0] for name in ("groups of 1, 2 and 3", "empty responses")]
    compare_values_and_scores(tiny_reward_model(architecture), parts)


def test_layers_compute_the_prompt_once_and_the_head_each_response(tiny_model: TinyModel) -> None:
    model: Any = loaded(tiny_model("llama"), packing=True)
    batch, tokens = BATCHES["8 samples"]
    seen = tokens_of_linear_layers(model, batch)
    assert seen.pop("lm_head") == batch.num_response_tokens
    assert set(seen.values()) == {tokens}


def test_scoring_puts_the_samples_of_a_prompt_that_meet_in_a_micro_batch_side_by_side() -> None:
    """Where rows are shared out by length, longest first, those of other prompts would stand between them."""
    batch = rows_of(*((prompt, R[n]) for prompt in (A, ids(20, 5)) for n in (1, 5, 9)))
    sizes: Any = SimpleNamespace(micro_batch_size=1, micro_batch_tokens=1000)
    own = OwnRows(batch, sizes)
    assert [rows.tolist() for rows in own.rows] == [[0, 1, 2, 3, 4, 5]]
    assert [flat_tokens(micro_batch) for micro_batch in own.micro_batches] == [2 * (20 + 15)]
    assert own.sizes == [[(20 + n, n) for n in (1, 5, 9, 1, 5, 9)]]


@pytest.mark.parametrize(
    ("tokens", "micro_batches"),
    [
        (180, [[0, 1, 2], [3, 4, 5, 6, 7]]),  # of 195 tokens: two forwards, each of whole groups
        (90, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (60, [[0, 1], [2, 5], [3, 4], [6, 7]]),  # a group that is too long is cut
    ],
)
def test_samples_of_a_prompt_are_computed_together_as_far_as_the_budget_allows(
    tokens: int, micro_batches: list[list[int]]
) -> None:
    samples = [(prompt, R[n]) for prompt in (A, ids(20, 5)) for n in (9, 5, 7)]
    batch = rows_of(*samples, (ids(10, 6), R[3]), (ids(10, 7), R[10]))
    sizes: Any = SimpleNamespace(micro_batch_size=1, micro_batch_tokens=tokens)
    assert sorted(rows.tolist() for rows in OwnRows(batch, sizes).rows) == micro_batches


def test_a_system_prompt_does_not_keep_all_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a rank would have two micro-batches where another has one."""
    batch = rows_of(*((A + ids(4, 30 + n), R[n]) for n in range(1, 9)))
    sizes: Any = SimpleNamespace(micro_batch_size=1, micro_batch_tokens=100)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    tokens = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own = OwnRows(batch, sizes)
        assert all(own.counts)
        tokens.append(sum(size for part in own.sizes for size, _ in part))
    assert sum(tokens) == batch.num_tokens
    assert max(tokens) < 1.1 * batch.num_tokens / 2


RULES = [
    AttentionRule(),
    AttentionRule(scaling=0.3, softcap=2.0),
    AttentionRule(sliding_window=5),
    AttentionRule(sliding_window=9, softcap=1.5),
]


def brute_force(rows: list[list[int]], query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    """[tokens, heads, head_dim] float64, one product at a time; the tokens of each row, by their number."""
    heads, tokens, head_dim = query.shape
    found: dict[int, Tensor] = {}
    for row in rows:
        for place, token in enumerate(row):
            seen = row[: place + 1][-(rule.sliding_window or tokens) :]
            each = []
            for number in range(heads):
                shared = number * key.shape[0] // heads
                scores = key[shared, seen] @ query[number, token] * (rule.scaling or head_dim**-0.5)
                if rule.softcap is not None:
                    scores = rule.softcap * torch.tanh(scores / rule.softcap)
                each.append(scores.softmax(0) @ value[shared, seen])
            found[token] = torch.stack(each)
    return torch.stack([found[token] for token in range(tokens)])


def branching() -> tuple[Branching, list[list[int]]]:
    """Of 7, 5, 3 and 2 tokens the first go on for 2, 0 and 4, the third for 3, 1 and 1, the last for 2 and 5."""
    first, alone, third, last = list(range(7)), list(range(7, 12)), [12, 13, 14], [15, 16]
    rows = [[*first, 17, 18], first, [*first, 19, 20, 21, 22], alone]
    rows += [[*third, 23, 24, 25], [*third, 26], [*third, 27]]
    rows += [[*last, 28, 29], [*last, 30, 31, 32, 33, 34]]
    branches = [
        (torch.tensor([0, 2]), torch.tensor([[2, 0, 4], [3, 1, 1]])),
        (torch.tensor([3]), torch.tensor([[2, 5]])),
    ]
    return Branching(torch.tensor([7, 5, 3, 2]), branches, "cpu"), rows


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_branches_attend_as_whole_rows_do(rule: AttentionRule) -> None:
    """And their gradients add up in what they share."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(count, 35, 8, generator=generator, dtype=torch.float64) * 2 for count in (4, 2, 2)]
    weights = torch.randn(35, 4, 8, generator=generator, dtype=torch.float64)
    sequences, rows = branching()
    outcomes = []
    for attend in (sequences.attend, partial(brute_force, rows)):
        query, key, value = inputs = [draw.clone().requires_grad_() for draw in draws]
        attended = attend(query, key, value, rule)
        (attended * weights).sum().backward()
        outcomes.append([attended.detach(), *(part.grad for part in inputs)])
    # The products of a softcap are in float32.
    torch.testing.assert_close(*outcomes, rtol=0, atol=1e-10 if rule.softcap is None else 1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("short_tokens", [1, 192])
def test_branches_in_16_bits_differ_by_rounding(
    rule: AttentionRule, short_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By matrix products and by torch's attention: numbers of 8 bits between -3 and 3."""
    monkeypatch.setattr("training.attention.SHORT_TOKENS", short_tokens)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(count, 35, 8, generator=generator).bfloat16() for count in (4, 2, 2))
    sequences, rows = branching()
    expected = brute_force(rows, query.double(), key.double(), value.double(), rule)
    torch.testing.assert_close(sequences.attend(query, key, value, rule).double(), expected, rtol=0, atol=2e-2)
