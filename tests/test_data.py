"""From examples to batches: which tokens, which masks, who is left out and why, and in what order."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny_tokenizers import BOS, CHATML, EOS, IM_END, IM_START, PAD, build_tokenizer, byte_ids
from training.config import DataConfig
from training.data import (
    Batch,
    PairBatch,
    collate,
    collate_pairs,
    eval_batches,
    num_steps,
    num_tokens,
    sample_index,
    share_out,
    train_batches,
)
from training.examples import (
    PreferenceDataset,
    PreferenceRows,
    TokenizedDataset,
    build_demonstrations,
    build_preferences,
    build_prompts,
)
from training.formats import DataError, Demonstration, Message, Prompt
from training.tokenization import tokenize_demonstration, tokenize_examples, tokenize_prompt

# The same cases on every machine, however slow it is.
REPEATABLE = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def chat_turn(role: str, content: str) -> list[int]:
    """A turn of ChatML up to its end token."""
    return [IM_START, *byte_ids(f"{role}\n{content}"), IM_END]


NEWLINE = byte_ids("\n")
ANSWER_STARTS = [IM_START, *byte_ids("assistant\n")]
DIALOGUE = (turn("system", "s"), turn("user", "a"), turn("assistant", "b"), turn("user", "c"))


# Tokens and masks


def test_plain_text_is_prompt_then_response_then_eos() -> None:
    """F5"""
    ids, mask = tokenize_demonstration(Demonstration("ab", "c", "f:1"), build_tokenizer(eos="<eos>"), "plain")
    assert ids == [*byte_ids("abc"), EOS]
    assert mask == [False, False, True, True]


def test_bos_is_written_only_by_tokenizers_that_add_one() -> None:
    example = Demonstration("a", "b", "f:1")
    ids, mask = tokenize_demonstration(example, build_tokenizer(eos="<eos>", adds_bos=True), "plain")
    assert ids == [BOS, *byte_ids("ab"), EOS]
    assert mask == [False, False, True, True]
    for tokenizer in (build_tokenizer(eos="<eos>", adds_bos=False), build_tokenizer(eos="<eos>", has_bos=False)):
        assert tokenize_demonstration(example, tokenizer, "plain")[0] == [*byte_ids("ab"), EOS]


@pytest.mark.parametrize(("options", "first"), [({}, BOS), ({"adds_bos": True}, BOS), ({"has_bos": False}, EOS)])
def test_an_empty_prompt_has_a_token_to_predict_the_first_one_from(options: dict[str, Any], first: int) -> None:
    tokenizer = build_tokenizer(eos="<eos>", **options)
    ids, mask = tokenize_demonstration(Demonstration("", "a", "f:1"), tokenizer, "plain")
    assert ids == [first, *byte_ids("a"), EOS]
    assert mask == [False, True, True]
    assert tokenize_prompt(Demonstration("", "a", "f:1"), tokenizer, "plain") == [first]


def test_loss_on_all_tokens_leaves_out_only_the_first() -> None:
    tokenizer = build_tokenizer()
    assert tokenize_demonstration(Demonstration("ab", "c", "f:1"), tokenizer, "plain", "all")[1] == [
        False,
        True,
        True,
        True,
    ]
    _, mask = tokenize_demonstration(Demonstration(DIALOGUE, "d", "f:1"), tokenizer, "chat", "all")
    assert mask == [False] + [True] * (len(mask) - 1)


@pytest.mark.parametrize("pad", ["own", "eos", None])
def test_eos_is_learnt_whatever_the_pad_token_is(pad: Any) -> None:
    """F4"""
    for template in ("plain", "chat"):
        ids, mask = tokenize_demonstration(Demonstration("a", "b", "f:1"), build_tokenizer(pad), template)  # type: ignore[arg-type]
        assert (ids[-1], mask[-1]) == (IM_END, True)


def test_a_response_that_ends_with_eos_gets_no_second_one() -> None:
    ids, _ = tokenize_demonstration(Demonstration("a", "b<eos>", "f:1"), build_tokenizer(eos="<eos>"), "plain")
    assert ids == [*byte_ids("ab"), EOS]


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token, so no response could end"):
        tokenize_prompt(Prompt("a", "f:1", {}), tokenizer, "plain")


def test_a_chat_ends_with_the_end_token_of_the_answer() -> None:
    ids, mask = tokenize_demonstration(Demonstration("a", "b", "f:1"), build_tokenizer(), "chat")
    prompt = [*chat_turn("user", "a"), *NEWLINE, *ANSWER_STARTS]
    assert ids == [*prompt, *byte_ids("b"), IM_END]
    assert mask == [False] * len(prompt) + [True, True]


def test_every_turn_of_the_assistant_is_learnt_with_its_end_token() -> None:
    ids, mask = tokenize_demonstration(Demonstration(DIALOGUE, "d", "f:1"), build_tokenizer(), "chat")
    expected = [
        (chat_turn("system", "s") + NEWLINE + chat_turn("user", "a") + NEWLINE + ANSWER_STARTS, False),
        ([*byte_ids("b"), IM_END], True),
        (NEWLINE + chat_turn("user", "c") + NEWLINE + ANSWER_STARTS, False),
        ([*byte_ids("d"), IM_END], True),
    ]
    assert ids == [token for piece, _ in expected for token in piece]
    assert mask == [learnt for piece, learnt in expected for _ in piece]


def test_a_chat_template_without_eos_gets_one_at_the_end() -> None:
    ids, mask = tokenize_demonstration(Demonstration("a", "b", "f:1"), build_tokenizer(eos="<eos>"), "chat")
    assert ids[-4:] == [*byte_ids("b"), IM_END, *NEWLINE, EOS]
    assert mask[-4:] == [True] * 4


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        *((template, text) for template in ("plain", "chat") for text in ("", "a", "ab ", "<|im_end|>")),
        ("chat", DIALOGUE),
    ],
)
def test_the_prompt_of_a_demonstration_has_the_tokens_of_the_prompt_alone(
    template: Any, prompt: Any, adds_bos: bool
) -> None:
    tokenizer = build_tokenizer(adds_bos=adds_bos)
    prompt_ids = tokenize_prompt(Prompt(prompt, "f:1", {}), tokenizer, template)
    ids, mask = tokenize_demonstration(Demonstration(prompt, "xy", "f:1"), tokenizer, template)
    assert ids == [*prompt_ids, *byte_ids("xy"), IM_END]
    assert mask[len(prompt_ids) :] == [True] * 3


def test_tokenizing_together_equals_tokenizing_apart() -> None:
    tokenizer = build_tokenizer(adds_bos=True)
    examples = [Demonstration("a", "bc", "f:1"), Demonstration("", "d", "f:2"), Demonstration("e", "", "f:3")]
    together = tokenize_examples(examples, tokenizer, "plain")
    assert together == [tokenize_examples([example], tokenizer, "plain")[0] for example in examples]


def test_turns_need_the_chat_template() -> None:
    with pytest.raises(DataError, match=r"^f:1: a chat of several turns .*: use template chat$"):
        tokenize_prompt(Prompt(DIALOGUE, "f:1", {}), build_tokenizer(), "plain")


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template: use template plain"):
        tokenize_prompt(Prompt("a", "f:1", {}), build_tokenizer(chat_template=None), "chat")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match=r"^f:1: the chat template writes the first turns differently"):
        tokenize_demonstration(Demonstration("a", "b", "f:1"), build_tokenizer(chat_template=template), "chat")


def test_a_template_that_refuses_the_turns_is_quoted() -> None:
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"^f:1: the chat template refuses these turns: System role not supported"):
        tokenize_prompt(Prompt(DIALOGUE, "f:1", {}), build_tokenizer(chat_template=template), "chat")


# Building data sets


def write(folder: Path, records: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config(path: str, format: str, **options: Any) -> DataConfig:
    return replace(DataConfig(paths=(path,), format=format, template="plain", eval_size=0), **options)


def items_of(dataset: Any) -> list[Any]:
    return [dataset[index] for index in range(len(dataset))]


def texts_of(dataset: TokenizedDataset) -> list[str]:
    return [bytes(int(token) - 5 for token in ids if token >= 5).decode() for ids, _ in items_of(dataset)]


def check_conservation(counts: dict[str, int], records: int) -> None:
    skipped = sum(count for name, count in counts.items() if name.startswith("skipped_"))
    assert counts["records"] == records == counts["kept"] + skipped
    assert counts["kept"] == counts["train"] + counts["held_out"]


def test_demonstrations_are_built_with_their_masks(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "ab", "response": "c"}])
    train, held_out, counts = build_demonstrations(config(path, "prompt_response"), build_tokenizer(eos="<eos>"))
    ids, mask = train[0]
    assert ids.tolist() == [*byte_ids("abc"), EOS]
    assert mask.tolist() == [False, False, True, True]
    assert (len(train), len(held_out), counts["kept"]) == (1, 0, 1)
    train, _, _ = build_demonstrations(config(path, "prompt_response"), build_tokenizer(eos="<eos>"), loss_on="all")
    assert train[0][1].tolist() == [False, True, True, True]


def test_preferences_are_built_best_first_with_their_margin(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "cd", "margin": 2}])
    train, _, _ = build_preferences(config(path, "chosen_rejected"), build_tokenizer(eos="<eos>"))
    item = train[0]
    assert item.margin == 2.0
    assert [np.asarray(ids).tolist() for ids, _ in item.rows] == [[*byte_ids("ab"), EOS], [*byte_ids("acd"), EOS]]
    assert [np.asarray(mask).tolist() for _, mask in item.rows] == [[False, True, True], [False, True, True, True]]


def test_the_mask_of_a_preference_is_true_on_its_last_turn_alone(tmp_path: Path) -> None:
    chats = {name: [*DIALOGUE, turn("assistant", name)] for name in ("chosen", "rejected")}
    train, _, _ = build_preferences(
        config(write(tmp_path, [chats]), "chosen_rejected", template="chat"), build_tokenizer()
    )
    assert [int(np.sum(mask)) for _, mask in train[0].rows] == [len("chosen") + 1, len("rejected") + 1]


def test_prompts_are_built_with_their_text_and_record(tmp_path: Path) -> None:
    record = {"prompt": "2+2=", "answer": "4"}
    path = write(tmp_path, [record])
    train, _, _ = build_prompts(config(path, "prompt"), build_tokenizer())
    assert (train[0].prompt_ids, train[0].text) == (byte_ids("2+2="), "2+2=")
    assert (train[0].record, train[0].source) == (record, f"{path}:1")
    train, _, _ = build_prompts(config(path, "prompt", template="chat"), build_tokenizer())
    assert train[0].text == "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_of_just_the_limit_is_kept_and_a_longer_one_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": text, "response": "x"} for text in ("abcd", "abcde")])
    train, _, counts = build_demonstrations(config(path, "prompt_response", max_prompt_tokens=4), build_tokenizer())
    assert texts_of(train) == ["abcdx"]
    assert counts["skipped_long_prompt"] == 1
    check_conservation(counts, 2)


@pytest.mark.parametrize(("adds_bos", "kept"), [(False, "bcde"), (True, "cde")])
def test_a_truncated_prompt_keeps_its_end_and_bos(tmp_path: Path, adds_bos: bool, kept: str) -> None:
    path = write(tmp_path, [{"prompt": "abcde"}])
    options = config(path, "prompt", max_prompt_tokens=4, truncate_prompts=True)
    train, _, counts = build_prompts(options, build_tokenizer(adds_bos=adds_bos))
    assert train[0].prompt_ids == [BOS] * adds_bos + byte_ids(kept)
    assert train[0].text == "<bos>" * adds_bos + kept
    assert counts["truncated_prompts"] == 1
    check_conservation(counts, 1)


def test_a_mask_starts_false_even_if_truncation_cuts_into_a_turn_of_the_assistant(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [{"messages": [turn("user", "a"), turn("assistant", "b" * 50), turn("user", "c"), turn("assistant", "d")]}],
    )
    options = config(path, "messages", template="chat", max_prompt_tokens=40, truncate_prompts=True)
    train, _, _ = build_demonstrations(options, build_tokenizer())
    ids, mask = train[0]
    assert (ids[0], ids[1]) == (byte_ids("b")[0], byte_ids("b")[0])
    assert (mask[0], mask[1]) == (False, True)
    assert len(ids) == 40 + 2


def test_a_response_of_just_the_limit_is_kept_and_a_longer_one_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "abc"}, {"text": "abcd"}])
    train, _, counts = build_demonstrations(config(path, "text", max_response_tokens=4), build_tokenizer())
    assert texts_of(train) == ["abc"]
    assert counts["skipped_long_response"] == 1
    check_conservation(counts, 2)


def test_a_truncated_response_has_no_eos(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "x", "response": "abcd"}])
    options = config(path, "prompt_response", max_response_tokens=4, truncate_responses=True)
    train, _, counts = build_demonstrations(options, build_tokenizer())
    assert train[0][0].tolist() == byte_ids("xabcd")
    assert counts["truncated_responses"] == 1


def test_responses_that_truncation_makes_equal_are_skipped_and_counted(tmp_path: Path) -> None:
    records = [{"chosen": "abcX", "rejected": "abcY"}, {"chosen": "abX", "rejected": "abY"}]
    options = config(write(tmp_path, records), "chosen_rejected", max_response_tokens=3, truncate_responses=True)
    train, _, counts = build_preferences(options, build_tokenizer())
    assert len(train) == 1
    assert counts["skipped_equal_responses"] == 1
    check_conservation(counts, 2)


def test_a_chat_without_a_prompt_is_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "", "response": "a"}, {"prompt": "b", "response": "c"}])
    train, _, counts = build_demonstrations(config(path, "prompt_response", template="chat"), build_tokenizer())
    assert (len(train), counts["skipped_empty_prompt"]) == (1, 1)
    check_conservation(counts, 2)


def test_when_nothing_is_left_the_error_says_why(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [{"prompt": "abc", "response": "x"}, {"prompt": "abcd", "response": "x"}, {"prompt": "a", "response": ""}],
    )
    with pytest.raises(DataError) as caught:
        build_demonstrations(config(path, "prompt_response", max_prompt_tokens=2), build_tokenizer())
    assert str(caught.value) == (
        f"{path}:1: none of the 3 records is left to use: 1 x a response is empty; "
        "2 x the prompt has more than max_prompt_tokens: raise it or set truncate_prompts"
    )


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match="2 x held out: lower eval_size, or name a file in eval_paths"):
        build_demonstrations(config(path, "text", eval_size=2), build_tokenizer())


def test_nothing_left_in_the_eval_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "a"}])
    eval_path = write(tmp_path, [{"text": ""}], "eval.jsonl")
    with pytest.raises(
        DataError, match=r"eval\.jsonl:1: none of the 1 records is left to use: 1 x a response is empty"
    ):
        build_demonstrations(config(path, "text", eval_paths=(eval_path,)), build_tokenizer())


def test_the_held_out_part_has_eval_size_examples_that_are_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": f"text {n}"} for n in range(3000)] + [{"text": ""}])
    train, held_out, counts = build_demonstrations(config(path, "text", eval_size=100), build_tokenizer())
    assert (len(train), len(held_out)) == (2900, 100)
    assert sorted(texts_of(train) + texts_of(held_out)) == sorted(f"text {n}" for n in range(3000))
    check_conservation(counts, 3001)


def test_the_held_out_part_depends_on_the_texts_and_the_seed_alone(tmp_path: Path) -> None:
    records = [{"text": f"text {n}"} for n in range(50)]
    path, reversed_path = write(tmp_path, records), write(tmp_path, records[::-1], "reversed.jsonl")

    def held_out(path: str, **options: Any) -> list[str]:
        return texts_of(build_demonstrations(config(path, "text", eval_size=10, **options), build_tokenizer())[1])

    assert held_out(path) == held_out(path) == held_out(reversed_path) == held_out(path, max_examples=3)
    assert held_out(path) != held_out(path, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_are_never_on_both_sides(tmp_path: Path, seed: int) -> None:
    path = write(tmp_path, [{"prompt": f"prompt {n % 10}", "n": n} for n in range(100)])
    train, held_out, counts = build_prompts(config(path, "prompt", eval_size=25, seed=seed), build_tokenizer())
    assert len(held_out) == 25
    assert not {example.text for example in train} & {example.text for example in held_out}
    # Two prompts are held out wholly, the third by half.
    assert (len(train), counts["skipped_same_as_held_out"]) == (70, 5)
    check_conservation(counts, 100)


def test_eval_paths_are_held_out_whole_and_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "a"}, {"text": "b"}])
    eval_path = write(tmp_path, [{"text": "c"}, {"text": "d"}, {"text": ""}], "eval.jsonl")
    options = config(path, "text", eval_paths=(eval_path,), eval_size=1)
    train, held_out, counts = build_demonstrations(options, build_tokenizer())
    assert (sorted(texts_of(train)), texts_of(held_out)) == (["a", "b"], ["c", "d"])
    check_conservation(counts, 5)


def test_max_examples_limits_training_and_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": f"text {n}"} for n in range(30)])
    train, held_out, counts = build_demonstrations(
        config(path, "text", eval_size=5, max_examples=10), build_tokenizer()
    )
    assert (len(train), len(held_out), counts["skipped_over_max_examples"]) == (10, 5, 15)
    check_conservation(counts, 30)


@REPEATABLE
@given(
    pairs=st.lists(st.tuples(*[st.text("ab ", max_size=6)] * 3), min_size=1, max_size=12),
    limits=st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans()),
    eval_size=st.integers(0, 4),
    max_examples=st.none() | st.integers(1, 4),
    template=st.sampled_from(["plain", "chat"]),
)
def test_kept_and_skipped_add_up_to_the_records(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, str, str]],
    limits: tuple[int, int, bool, bool],
    eval_size: int,
    max_examples: int | None,
    template: str,
) -> None:
    records = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    options = config(
        write(tmp_path_factory.mktemp("data"), records),
        "chosen_rejected",
        template=template,
        eval_size=eval_size,
        max_examples=max_examples,
        max_prompt_tokens=limits[0] + (40 if template == "chat" else 0),
        max_response_tokens=limits[1],
        truncate_prompts=limits[2],
        truncate_responses=limits[3],
    )
    try:
        train, held_out, counts = build_preferences(options, build_tokenizer())
    except DataError as error:
        assert "records is left to use: " in str(error)
    else:
        check_conservation(counts, len(pairs))
        assert (len(train), len(held_out)) == (counts["train"], counts["held_out"])


# Storage and batches


def test_a_dataset_gives_back_its_rows() -> None:
    rows = [([1, 2, 3], [False, True, True]), ([4], [False]), ([70_000, 6], [False, True])]
    dataset = TokenizedDataset(rows)
    assert [(ids.tolist(), mask.tolist()) for ids, mask in items_of(dataset)] == rows
    assert dataset[-1][0].tolist() == [70_000, 6]
    assert (len(dataset), len(TokenizedDataset([]))) == (3, 0)
    with pytest.raises(IndexError):
        dataset[3]


def test_a_dataset_of_preferences_gives_back_its_items() -> None:
    first = PreferenceRows([([1, 2], [False, True]), ([1, 3], [False, True])], margin=0.5)
    second = PreferenceRows([([4, n], [False, True]) for n in range(3)], margin=0.0)
    dataset = PreferenceDataset([first, second])
    assert len(dataset) == 2
    for expected, item in zip((first, second), items_of(dataset), strict=True):
        assert item.margin == expected.margin
        assert [np.asarray(ids).tolist() for ids, _ in item.rows] == [ids for ids, _ in expected.rows]


def test_collate_pads_on_the_right_and_masks_by_position() -> None:
    """F4, F5"""
    # The pad id also stands inside the rows, as it does where EOS is the pad token.
    batch = collate([([7, PAD], [False, True]), ([PAD, 8, 9], [False, False, True])], PAD, pad_to_multiple=4)
    assert batch.input_ids.tolist() == [[7, PAD, PAD, PAD], [PAD, 8, 9, PAD]]
    assert batch.attention_mask.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert batch.response_mask.tolist() == [[False, True, False, False], [False, False, True, False]]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.long, torch.bool)
    assert (len(batch), batch.num_response_tokens) == (2, 2)


@pytest.mark.parametrize(("length", "multiple", "width"), [(8, 8, 8), (9, 8, 16), (1, 8, 8), (5, 1, 5)])
def test_collate_rounds_the_length_up(length: int, multiple: int, width: int) -> None:
    assert collate([([1] * length, [True] * length)], PAD, multiple).input_ids.shape == (1, width)


def test_collate_pairs_compares_each_response_with_all_worse_ones() -> None:
    """R5"""
    pair = PreferenceRows([([1, 2], [False, True]), ([1], [False])], margin=0.5)
    ranking = PreferenceRows([([n], [True]) for n in (4, 5, 6)], margin=0.0)
    pairs = collate_pairs([pair, ranking], PAD)
    assert pairs.batch.input_ids[:, 0].tolist() == [1, 1, 4, 5, 6]
    assert pairs.better.tolist() == [0, 2, 2, 3]
    assert pairs.worse.tolist() == [1, 3, 4, 4]
    assert pairs.weights.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert pairs.margins.tolist() == [0.5, 0, 0, 0]
    assert len(pairs) == 4


def test_batches_move_to_a_device() -> None:
    batch = collate([([1], [True])], PAD).to("meta")
    assert {batch.input_ids.device.type, batch.attention_mask.device.type, batch.response_mask.device.type} == {"meta"}
    pairs = collate_pairs([PreferenceRows([([1], [True]), ([2], [True])], 0.0)], PAD).to("meta")
    assert {pairs.batch.input_ids.device.type, pairs.better.device.type, pairs.margins.device.type} == {"meta"}


# Order


def numbered(size: int) -> TokenizedDataset:
    return TokenizedDataset(([number], [True]) for number in range(size))


def numbers_in(batches: list[Batch]) -> list[int]:
    return [number for batch in batches for number in batch.input_ids[:, 0].tolist()]


def collate_numbers(rows: list[Any]) -> Batch:
    return collate(rows, pad_id=0, pad_to_multiple=1)


@REPEATABLE
@given(st.integers(1, 50), st.integers(0, 2**31), st.integers(0, 5))
def test_every_epoch_has_each_example_once(size: int, seed: int, epoch: int) -> None:
    order = [sample_index(position, size, seed) for position in range(epoch * size, (epoch + 1) * size)]
    assert sorted(order) == list(range(size))


def test_the_order_changes_with_the_epoch_and_the_seed() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return [sample_index(position, 100, seed) for position in range(number * 100, (number + 1) * 100)]

    orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2), list(range(100))]
    assert all(first != second for n, first in enumerate(orders) for second in orders[:n])


@REPEATABLE
@given(
    size=st.integers(1, 30),
    micro_batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    world_size=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 9),
    resume_at=st.integers(0, 6),
)
def test_the_training_order_survives_a_resume_on_another_number_of_ranks(
    size: int, micro_batch_size: int, accumulation: int, world_size: int, seed: int, resume_at: int
) -> None:
    total, num_steps = 4 * micro_batch_size * accumulation, 6

    def steps(world_size: int, start_step: int) -> list[list[int]]:
        ranks = [
            train_batches(
                numbered(size),
                collate_numbers,
                train_batch_size=total,
                micro_batch_size=micro_batch_size,
                rank=rank,
                world_size=world_size,
                seed=seed,
                start_step=start_step,
                num_steps=num_steps,
            )
            for rank in range(world_size)
        ]
        numbers = []
        for shares in zip(*ranks, strict=True):
            assert [len(share) for share in shares] == [total // micro_batch_size // world_size] * world_size
            assert {len(batch) for batch in chain(*shares)} == {micro_batch_size}
            numbers.append(numbers_in(list(chain(*shares))))
        return numbers

    # By definition: whole permutations, one after the other, cut into steps.
    expected = [[sample_index(step * total + n, size, seed) for n in range(total)] for step in range(num_steps)]
    assert steps(1, 0)[:resume_at] + steps(world_size, resume_at) == expected
    counts = Counter(chain(*expected))
    assert max(counts.values()) - min(counts[number] for number in range(size)) <= 1


@REPEATABLE
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world_size=st.integers(1, 5),
    micro_batch_size=st.integers(1, 5),
    micro_batch_tokens=st.none() | st.integers(1, 120),
)
def test_every_row_is_computed_once_in_equally_many_forwards_within_the_budget(
    lengths: list[int], world_size: int, micro_batch_size: int, micro_batch_tokens: int | None
) -> None:
    shares = share_out(lengths, world_size, micro_batch_size, micro_batch_tokens)
    assert len(shares) == world_size
    assert len({len(share) for share in shares}) == 1
    parts = [part for share in shares for part in share]
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    if micro_batch_tokens is None:
        assert all(len(part) <= micro_batch_size for part in parts)
        assert [row for part in parts for row in part] == list(range(len(lengths)))
    else:
        assert all(len(part) <= 1 or sum(lengths[row] for row in part) <= micro_batch_tokens for part in parts)
        if len(lengths) % world_size == 0:
            assert all(parts)  # filler would be trained on


def test_ranks_get_about_as_many_tokens_in_as_few_forwards_as_the_budget_allows() -> None:
    """Lengths as of a chat: 64 rows of 20 to 1,024 tokens, 4 ranks."""
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 64).clip(20, 1024).astype(int).tolist()
    shares = share_out(lengths, 4, 8, micro_batch_tokens=2048)
    per_rank = [sum(lengths[row] for part in share for row in part) for share in shares]
    assert len(shares[0]) <= -(-sum(lengths) // (4 * 2048)) + 1
    assert max(per_rank) < 1.05 * sum(lengths) / 4
    # In the order in which they come, the ranks would differ by more than twice that.
    assert max(sum(lengths[start : start + 16]) for start in range(0, 64, 16)) > 1.1 * sum(lengths) / 4
    # Rows of like length stand together, so little is computed for nothing where padding is not left out.
    computed = sum(len(part) * max(lengths[row] for row in part) for share in shares for part in share)
    assert computed < 1.25 * sum(lengths)


def test_a_budget_leaves_the_rows_of_each_step_as_they_are() -> None:
    options: dict[str, Any] = {"train_batch_size": 8, "micro_batch_size": 2, "seed": 0, "num_steps": 3}
    steps = []
    for tokens in (None, 3):
        sizes = options | {"world_size": 2, "micro_batch_tokens": tokens}
        steps.append([list(train_batches(numbered(20), collate_numbers, rank=rank, **sizes)) for rank in (0, 1)])
    for step in range(3):
        by_rows, by_tokens = (sorted(numbers_in(list(chain(*(rank[step] for rank in ranks))))) for ranks in steps)
        assert by_rows == by_tokens


def test_a_preference_is_as_long_as_all_its_responses() -> None:
    assert num_tokens(([1, 2, 3], [False, True, True])) == 3
    assert num_tokens(PreferenceRows([([1, 2], [True] * 2), ([3], [True])], 0.0)) == 3


@REPEATABLE
@given(st.integers(0, 30), st.integers(1, 5), st.integers(1, 5))
def test_evaluation_counts_each_example_once_in_equally_many_batches(
    size: int, micro_batch_size: int, world_size: int
) -> None:
    def batches(rank: int) -> list[Batch]:
        options = {"micro_batch_size": micro_batch_size, "rank": rank, "world_size": world_size}
        return list(eval_batches(numbered(size), collate_numbers, **options))

    ranks = [batches(rank) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = [batch.input_ids[batch.response_mask] for batch in chain(*ranks)]
    assert sorted(number for numbers in counted for number in numbers.tolist()) == list(range(size))


def test_filler_pairs_weigh_nothing() -> None:
    items = [PreferenceRows([([n], [True]), ([n + 1], [True])], 0.0) for n in range(3)]
    collate_fn: Callable[[list[Any]], PairBatch] = lambda rows: collate_pairs(rows, PAD)  # noqa: E731
    batches = [
        list(eval_batches(PreferenceDataset(items), collate_fn, micro_batch_size=2, rank=rank, world_size=4))
        for rank in range(4)
    ]
    assert [len(batches[rank]) for rank in range(4)] == [1] * 4
    assert [batches[rank][0].weights.tolist() for rank in range(4)] == [[1, 1], [1], [0], [0]]
    assert batches[3][0].batch.num_response_tokens == 0
    assert batches[3][0].batch.attention_mask.any()


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "max_steps", "steps"),
    [
        (8, 4, 1.0, None, 2),
        (9, 4, 1.0, None, 3),  # the ninth is seen, and the step filled up
        (9, 4, 2.0, None, 5),  # 18 places of 20
        (9, 4, 0.5, None, 2),
        (3, 8, 1.0, None, 1),
        (9, 4, 2.0, 3, 3),
        (9, 4, 2.0, 99, 5),
    ],
)
def test_steps_are_as_many_as_show_every_example(
    examples: int, batch: int, epochs: float, max_steps: int | None, steps: int
) -> None:
    assert num_steps(examples, batch, epochs, max_steps) == steps
