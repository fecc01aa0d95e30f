"""The PPO and supervised benchmarks: that both sides are asked for the same work, and how times are compared."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts.benchmark import growth, peers
from scripts.benchmark.ceilings import Ceilings
from scripts.benchmark.floors import floor_of
from scripts.benchmark.peers import halves, tune
from scripts.benchmark.ppo_check import Compared, pairs
from scripts.benchmark.ppo_sides import PpoBenchmark, check_lengths, job_of, make_job
from scripts.benchmark.sft_reward import SupervisedBenchmark, check_tokens
from scripts.benchmark.sides import Measured, figures, ratio_text, take_turns
from scripts.benchmark.supervised import SupervisedJob, draw_examples
from scripts.benchmark.turns import Worker, WorkerFailed
from scripts.benchmark.workers import ours_ppo
from scripts.benchmark.workers.forced import ForcedLengths
from scripts.benchmark.workers.ours_supervised import write_records
from scripts.benchmark.workloads import (
    END,
    FIRST_WORD,
    PAD,
    WORKLOADS,
    PpoJob,
    Workload,
    draw_lengths,
    draw_prompts,
    exponential_scale,
    word_tokenizer,
    write_models,
)
from step3_ppo.config import PpoConfig
from training.config import DataConfig
from training.config_files import load_config
from training.examples import build_demonstrations, build_preferences
from training.generation.interface import SamplingConfig

WORK = Workload(prompts=4, samples_per_prompt=1, min_prompt=3, max_prompt=8, mean_response=5, max_response=12)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folders of actor, reference and reward model. Not to be changed."""
    return write_models(tmp_path_factory.mktemp("models"), None, "tiny", None, seed=1, scale=3.0)


@pytest.fixture(scope="module")
def job(models: dict[str, Any]) -> PpoJob:
    prompts, responses = draw_lengths(WORK, seed=1)
    return PpoJob(
        **models,
        precision="fp32",
        prompt_ids=draw_prompts(prompts, 64, seed=1),
        response_lengths=responses,
        micro_batch_size=2,
    )


# The work


@pytest.mark.parametrize(("mean", "cap"), [(32, 64), (370, 1024), (5, 12)])
def test_a_capped_exponential_has_the_mean_that_was_asked_for(mean: float, cap: float) -> None:
    quantiles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = (-exponential_scale(mean, cap) * torch.log1p(-quantiles)).clamp(max=cap)
    assert float(drawn.mean()) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_have_the_mean_and_the_bounds_of_their_workload(name: str) -> None:
    work = WORKLOADS[name]
    prompts, responses = draw_lengths(work, seed=3)
    flat = [length for lengths in responses for length in lengths]
    assert sum(flat) / len(flat) == pytest.approx(work.mean_response, rel=0.01)
    assert min(flat) >= 1 and max(flat) == work.max_response
    assert min(prompts) >= work.min_prompt and max(prompts) <= work.max_prompt
    assert [len(lengths) for lengths in responses] == [work.samples_per_prompt] * work.prompts


def test_prompts_hold_no_special_tokens_and_differ() -> None:
    prompts = draw_prompts([1, 2, 3], vocab_size=4, seed=0)
    assert {index for ids in prompts for index in ids} <= {2, 3}
    with pytest.raises(ValueError, match="two prompts are equal"):
        draw_prompts([1, 1], vocab_size=3, seed=0)


def test_text_and_tokens_say_the_same() -> None:
    tokenizer = word_tokenizer(20)
    ids = [2, 19, 7, 7]
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, END)


def test_options_change_the_workload_in_proportion() -> None:
    work = PpoBenchmark(shape="tiny", workload="B", prompts=3, prompt_tokens=128, response_tokens=512).work
    assert work == Workload(3, 1, 32, 128, 185, 512)


def test_a_model_or_a_shape_is_asked_for() -> None:
    with pytest.raises(ValueError, match="model and shape are both given or both missing"):
        PpoBenchmark()
    with pytest.raises(ValueError, match="layers belongs to a shape"):
        PpoBenchmark(model="folder", layers=2)
    with pytest.raises(ValueError, match="write name=value"):
        PpoBenchmark(shape="tiny", ours=("micro_batch_tokens",))
    with pytest.raises(ValueError, match="choose a multiple"):
        SupervisedBenchmark(shape="tiny", sequences=24)


def test_ours_in_bf16_and_tuned_trl_change_nothing_else(job: PpoJob) -> None:
    assert job_of("ours-bf16", job) == replace(job, precision="bf16")
    assert job_of("trl-tuned", job) == replace(job, tuned=True)
    assert job_of("ours", job) == job_of("trl", job) == job


def test_other_lengths_than_asked_for_are_no_result(job: PpoJob) -> None:
    lengths = [length for row in job.response_lengths for length in row]
    check_lengths(job, {"response_tokens": lengths[::-1]})
    with pytest.raises(WorkerFailed, match="were asked for"):
        check_lengths(job, {"response_tokens": [lengths[0] + 1, lengths[1] - 1, *lengths[2:]]})


# TRL's side: transformers' own `generate`


def generate(job: PpoJob, end_id: int | None, seed: int) -> tuple[Any, Any, ForcedLengths]:
    """The model, what it drew in one call, and the wrapper. All 64 tokens are about as likely, special ones too."""
    model = AutoModelForCausalLM.from_pretrained(job.actor, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(0.05)
    forced = ForcedLengths(model, job, end_id)
    forced.start()
    width = max(map(len, job.prompt_ids))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in job.prompt_ids])
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=ids, attention_mask=ids != PAD, do_sample=True, top_k=0, max_new_tokens=job.max_response,
        pad_token_id=PAD, eos_token_id=None, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    return model, output, forced


def test_a_forced_row_ends_at_its_length_and_nowhere_else(job: PpoJob) -> None:
    long = replace(job, response_lengths=[[120], [70], [1], [120]])
    _, output, forced = generate(long, END, seed=0)
    responses = output.sequences[:, max(map(len, long.prompt_ids)) :]
    for row, (length,), ids in zip(responses.tolist(), long.response_lengths, long.prompt_ids, strict=True):
        assert row[length - 1] == END
        assert set(row[length:]) <= {PAD}
        assert not {PAD, END} & set(row[: length - 1])
        assert forced.drawn[tuple(ids)] == [row[:length]]


def test_a_forced_row_goes_on_with_the_token_that_stands_in_it(job: PpoJob) -> None:
    long = replace(job, response_lengths=[[120]] * 4)
    model, output, _ = generate(long, None, seed=0)
    width = max(map(len, long.prompt_ids))
    for row, ids in enumerate(long.prompt_ids):
        response = output.sequences[row, width:]
        assert not (response == PAD).any()
        with torch.no_grad():
            expected = model(torch.cat([torch.tensor(ids), response])[None]).logits[0, len(ids) - 1 : -1]
        torch.testing.assert_close(torch.stack(output.scores, 1)[row], expected, rtol=0, atol=1e-5)


# Our side


class FakeTurns:
    """Asks `count` times and keeps the answers."""

    def __init__(self, count: int) -> None:
        self.count, self.answers = count, list[dict[str, Any]]()

    def begin(self, phase: str) -> bool:
        return len(self.answers) < self.count

    def end(self, **figures: Any) -> None:
        self.answers.append(figures)


def test_step_3_draws_responses_of_the_forced_lengths_in_every_turn(job: PpoJob) -> None:
    turns: Any = FakeTurns(2)
    ours_ppo.run(turns, job)
    assert len(turns.answers) == 2
    for answer in turns.answers:
        check_lengths(job, answer)
        assert answer["within"].keys() >= {"generate", "score", "train"}
        assert answer["metrics"]["ppo/steps"] == 1


def test_given_responses_are_taken_as_they_are_with_their_log_probabilities(job: PpoJob) -> None:
    given = replace(job, responses=[[[5] * lengths[0]] for lengths in job.response_lengths])
    actor = AutoModelForCausalLM.from_pretrained(job.actor, dtype=torch.float32).eval()
    generator = ours_ppo.GivenResponses(actor, given)
    prompts = [*job.prompt_ids, [FIRST_WORD]]
    found = generator.generate(prompts, SamplingConfig(max_new_tokens=12), [0] * 5)
    assert [one.response_ids for one in found] == [*(rows[0] for rows in given.responses or []), [FIRST_WORD]]
    for ids, one in zip(prompts, found, strict=True):
        with torch.no_grad():
            logprobs = actor(torch.tensor([ids + one.response_ids])).logits[0].log_softmax(-1)
        own = [float(logprobs[len(ids) - 1 + t, token]) for t, token in enumerate(one.response_ids)]
        assert one.logprobs == pytest.approx(own, abs=1e-5)


def test_settings_win_over_what_the_job_says(job: PpoJob, tmp_path: Path) -> None:
    config = load_config(PpoConfig, ours_ppo.options_of(replace(job, settings=["--micro_batch_size", "4"]), tmp_path))
    assert (config.micro_batch_size, config.train_batch_size, config.engine.precision) == (4, 4, "fp32")
    assert (config.estimator, config.actor.lora.rank, config.reference_path) == ("gae", 0, None)


def test_groups_are_trained_without_a_critic(job: PpoJob, tmp_path: Path) -> None:
    groups = replace(job, response_lengths=[[3, 4]] * 4)
    config = load_config(PpoConfig, ours_ppo.options_of(groups, tmp_path))
    assert (config.estimator, config.samples_per_prompt, config.train_batch_size) == ("rloo", 2, 8)
    rates = Ceilings(1e9, 1e9, 1e9, 1e9)
    alone, both, adapters = (
        floor_of(one, "fp32", rates)["optimizer"].bytes for one in (groups, job, replace(groups, lora_rank=1))
    )
    # An optimizer moves 30 bytes for each number: those of the actor, of the critic as well, or of adapters alone.
    # Adapters of rank 1 have rows + columns: 32 + 32 of q and o, 32 + 16 of k and v, 32 + 48 of 3 in the MLP, twice.
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(job.actor).parameters())
    assert alone == 30 * numbers
    assert both == 30 * (2 * numbers + 32)  # the score's head
    assert adapters == 30 * 2 * (2 * 64 + 2 * 48 + 3 * 80)


@pytest.mark.parametrize(("stage", "per_example"), [("sft", 1), ("reward", 2)])
def test_steps_1_and_2_read_the_very_ids_that_trl_gets(tmp_path: Path, stage: str, per_example: int) -> None:
    examples = draw_examples(6, per_example, mean_tokens=10, mixed=True, vocab_size=64, seed=2)
    job = SupervisedJob(stage, "model", "fp32", examples, 2, 1, 10)
    data = DataConfig(
        paths=(write_records(tmp_path / "train.jsonl", job.records),),
        eval_paths=(write_records(tmp_path / "held_out.jsonl", job.held_out),),
        format="prompt_response" if stage == "sft" else "chosen_rejected",
        template="plain",
    )
    tokenizer = word_tokenizer(64)
    if stage == "sft":
        texts = build_demonstrations(data, tokenizer, loss_on="all")[0]
        found = [[texts[row][0].tolist()] for row in range(len(texts))]
    else:
        compared = build_preferences(data, tokenizer)[0]
        found = [[list(map(int, ids)) for ids, _ in compared[row].rows] for row in range(len(compared))]  # type: ignore
    assert sorted(found) == sorted(job.with_ends(example) for example in examples)
    check_tokens(job, {"tokens": sum(len(ids) for example in found for ids in example)})


def test_mixed_texts_have_about_the_mean_of_equal_ones() -> None:
    equal, mixed = (draw_examples(64, 1, 100, mixed, 64, seed=1) for mixed in (False, True))
    assert {len(ids) + 1 for (ids,) in equal} == {100}
    lengths = [len(ids) + 1 for (ids,) in mixed]
    # What a log-normal with a deviation of 0.8 loses to its cap of 4 means is 3%, by its cumulative distribution.
    assert sum(lengths) / len(lengths) == pytest.approx(100, rel=0.05)
    assert max(lengths) <= 400 and max(lengths) > 2 * 100


# Turns


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """Answers as often as its job says, then dies."""
    (tmp_path / "fake_worker.py").write_text(
        "import os, time\n"
        "os.write(1, b'[noise of an import]\\n')\n"
        "from scripts.benchmark.turns import Turns\n"
        "turns = Turns()\n"
        "print('noise, and not an answer')\n"
        "for number in range(turns.job['answers']):\n"
        "    assert turns.begin('first')\n"
        "    time.sleep(0.05)\n"
        "    turns.phase('second')\n"
        "    time.sleep(0.1)\n"
        "    turns.end(number=number, within={'inner': 0.02})\n"
        "turns.begin('first')\n"
        "raise RuntimeError('out of\\n   luck')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker(sys.executable, "fake_worker", {"answers": 2}, tmp_path / "log")
    yield worker
    worker.close()


def test_a_worker_answers_each_turn_until_it_dies_of_what_it_says(fake_worker: Worker) -> None:
    for number in range(2):
        answer = fake_worker.turn()
        assert answer["number"] == number
        assert answer["seconds"] == pytest.approx(sum(answer["phases"].values()))
        assert 0.05 <= answer["phases"]["first"] < 0.1
        assert answer["phases"]["second"] >= 0.08 and answer["phases"]["inner"] == 0.02
        assert answer["peak_memory_bytes"] > 2**25
    with pytest.raises(WorkerFailed, match=r"^RuntimeError: out of$"):
        fake_worker.turn()


class Scripted:
    """In place of a Worker: says the seconds that it was given, or fails with a text."""

    def __init__(self, *script: float | str, log: list[str] | None = None, name: str = "") -> None:
        self.script, self.log, self.name = list(script), log, name

    def turn(self) -> dict[str, Any]:
        if self.log is not None:
            self.log.append(self.name)
        said = self.script.pop(0)
        if isinstance(said, str):
            raise WorkerFailed(said)
        return {"seconds": said, "phases": {"all": said}, "peak_memory_bytes": 1}

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("interleaved", "order"), [(True, "ab ab ab"), (False, "aaa bbb")])
def test_sides_take_turns_and_the_first_is_not_counted(interleaved: bool, order: str) -> None:
    log: list[str] = []
    starts: dict[str, Any] = {
        name: partial(Scripted, 9.0, seconds, seconds, log=log, name=name) for name, seconds in (("a", 1.0), ("b", 2.0))
    }
    measured = take_turns(starts, 2, interleaved=interleaved, look=lambda answer: None)
    assert "".join(log) == order.replace(" ", "")
    assert {name: one.seconds for name, one in measured.items()} == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


def test_a_side_that_fails_does_not_stop_the_others() -> None:
    starts: dict[str, Any] = {"a": partial(Scripted, 1.0, "out of memory"), "b": partial(Scripted, 1.0, 2.0, 3.0)}
    found = figures(take_turns(starts, 2, interleaved=True, look=lambda answer: None), ["a", "b"])
    assert found["a"] == {"failure": "out of memory"}
    assert found["b"]["seconds"] == [2.0, 3.0] and list(found["b"]["ratios"]) == ["b"]


def test_ratios_are_taken_within_each_repeat() -> None:
    def measured(*seconds: float) -> Measured:
        return Measured([{"seconds": s, "phases": {"train": s / 2}, "peak_memory_bytes": int(s)} for s in seconds])

    found = figures({"ours": measured(2, 4, 5), "trl": measured(4, 12, 10)}, ["trl"])
    # Medians of 4 and 10 would give 2.5.
    assert found["ours"]["ratios"]["trl"] == [2.0, 3.0, 2.0]
    assert ratio_text(found["ours"]["ratios"]["trl"]) == "2.00 (2.00-3.00)"
    assert found["ours"]["median_seconds"] == 4 and found["ours"]["spread"] == 0.75
    assert found["ours"]["phases"] == {"train": 2.0} and found["trl"]["peak_memory_bytes"] == 12
    assert ratio_text(found["ours"]["ratios"].get("trl-tuned")) == "-"


# TRL's fastest batches


def scripted_tuning(outcomes: Mapping[tuple[int, int], float | str]) -> Any:
    """`tune` over 8 rows and prompts, where (parts, micro-batch) have these seconds or failures."""

    def start(choice: Mapping[str, int]) -> Any:
        assert choice["chunk_size"] == 8 // choice["parts"]
        outcome = outcomes[choice["parts"], choice["micro_batch_size"]]
        return Scripted(outcome if isinstance(outcome, str) else 99.0, outcome)

    return tune(start, 8, 8, lambda answer: None)


def test_the_fastest_micro_batch_is_taken_and_smaller_ones_left_out() -> None:
    found = scripted_tuning({(1, 8): 5.0, (1, 4): 4.0, (1, 2): 4.5})
    assert found["chosen"] == {"micro_batch_size": 4, "chunk_size": 8, "parts": 1}
    assert [one["seconds"] for one in found["tried"]] == [5.0, 4.0, 4.5]


def test_a_batch_that_does_not_fit_is_cut_into_parts() -> None:
    full = "torch.OutOfMemoryError: CUDA out of memory."
    found = scripted_tuning({(1, m): full for m in (8, 4, 2, 1)} | {(2, 4): full, (2, 2): 3.0, (2, 1): 6.0})
    assert found["chosen"] == {"micro_batch_size": 2, "chunk_size": 4, "parts": 2}


def test_any_other_failure_ends_the_search() -> None:
    with pytest.raises(WorkerFailed, match="no such option"):
        scripted_tuning({(1, 8): "TypeError: no such option"})
    assert list(halves(12)) == [12, 6, 3]


def test_an_interpreter_without_trl_is_found_out(tmp_path: Path) -> None:
    assert not peers.has_trl(str(tmp_path / "python"))


# The comparison of losses


def test_the_check_tells_what_differs() -> None:
    assert Compared("a", 1.00005, 1.0).agrees and not Compared("a", 1.0002, 1.0).agrees
    ours = {"rollout/score_mean": 1.0, "rollout/kl": 2.0, "rollout/sequence_logprob": -3.0}
    ours |= {"ppo/policy_loss": 5.0, "ppo/value_loss": 7.0}
    theirs = {"objective/scores": 1.0, "objective/kl": 2.0, "objective/entropy": 3.0}
    # A variance over n - 1 = 24 in place of 25 makes whitened advantages smaller by the root of 24 / 25.
    theirs |= {"loss/policy_avg": 5.0 * (24 / 25) ** 0.5, "loss/value_avg": 7.0}
    found = pairs("full", ours, theirs, 25)
    assert len(found) == 5 and all(row.agrees for row in found)
    assert len(pairs("unequal", ours, theirs, 25)) == 3


# Growth


def test_growth_is_drawn_for_every_axis(tmp_path: Path) -> None:
    point = {"floor_seconds": 0.1, "seconds": {"ours": 1.0, "trl": 3.0}}
    sizes = [{"samples": n, "context": n, "parameters": n * 10**6, **point} for n in (1, 2, 4, 8)]
    growth.draw(dict.fromkeys(growth.AXES, sizes), tmp_path / "new" / "growth.json")
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".svg", ".png"}
    assert "seconds of an iteration" in (tmp_path / "new" / "growth.svg").read_text()


def test_growth_varies_one_size_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int, int]] = []

    def no_turns(starts: Any, *args: Any, **options: Any) -> dict[str, Measured]:
        return {name: Measured([{"seconds": 1.0, "peak_memory_bytes": 1}]) for name in starts}

    def note(config: PpoBenchmark, folder: Path) -> PpoJob:
        asked.append((config.work.prompts, config.work.max_prompt, config.work.max_response, config.layers or 0))
        return make_job(config, folder)

    monkeypatch.setattr(growth, "take_turns", no_turns)
    monkeypatch.setattr(growth, "make_job", note)
    monkeypatch.setattr(growth, "BASE", {"cpu": (2, 8, 8)})
    monkeypatch.setattr(growth, "FACTORS", (1, 2))
    config = PpoBenchmark(shape="tiny", sides=("ours",), grow=True)
    rates = Ceilings(1e9, 1e9, 1e9, 1e9)
    points = [growth.measure(config, axis, 2, torch.device("cpu"), rates) for axis in growth.AXES]
    assert asked == [(4, 8, 8, 1), (2, 16, 16, 1), (2, 8, 8, 2)]
    assert [point["samples"] for point in points] == [4, 2, 2]
    assert json.dumps(points)
