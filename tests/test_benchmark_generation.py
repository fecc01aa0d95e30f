"""The generation benchmark: its floor by hand and by torch's own counter, its workloads, and a run of the command."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from scripts.benchmark import generation
from scripts.benchmark.backends import BACKENDS, Workload
from scripts.benchmark.ceilings import Ceilings, PeakMemory
from scripts.benchmark.costs import SHAPES, Cost, decode_steps, iteration_floor, rollout_costs
from scripts.benchmark.generation import BenchmarkConfig, Measurement, draw_workload, figures, load_model, take
from tests.tiny_models import CONFIGS
from training.costs import DecoderShape

CPU = torch.device("cpu")
SERVED = ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"]
RATES: dict[str, Any] = {"number_bytes": 2, "flops_per_second": 1000.0, "bytes_per_second": 100.0}

# Per layer: queries 4 x 4, keys and values 4 x 2 each, output 4 x 4, and three 4 x 6 matrices of the MLP: 120 numbers.
# The head has 10 x 4 = 40. A cached token is a key and a value of 2 numbers: 4. A token that attends to one other
# computes two products of 2 numbers in 2 heads: 16 FLOPs.
TOY = DecoderShape(body=120, head=40, heads=2, kv_heads=1, head_dim=2, windows=(None,))
# Two rows together; the second response is done with its first token, and the third prompt takes its place.
# Prompts: 4 distinct tokens, which see 1 + 2 + 3 and 1. Steps: 1 row that sees 3 + 1; 2 rows that see 3 + 2 and 1 + 1.
TOY_PROMPTS, TOY_RESPONSES = [[1, 2, 3], [1, 2, 3], [4]], [3, 1, 2]


def tiny(architecture: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture], attn_implementation="eager").eval()


# The floor


def test_costs_of_a_toy_model_that_memory_bounds() -> None:
    costs = rollout_costs(TOY, TOY_PROMPTS, TOY_RESPONSES, batch_size=2, **RATES)
    # FLOPs: 2 * (120 * 4 + 40 * 2) + 16 * 7. Bytes: 2 * (120 + 40) + 2 * 4 * 4. 100 bytes a second.
    assert (costs["prefill"].flops, costs["prefill"].bytes) == (1120 + 112, 320 + 32)
    assert costs["prefill"].seconds == pytest.approx(3.2 + 0.32)
    # FLOPs: 2 * 160 * 1 + 16 * 4, then 2 * 160 * 2 + 16 * 7. Bytes: 320 + 2 * 4 * 4, then 320 + 2 * 4 * 7.
    assert (costs["decode"].flops, costs["decode"].bytes) == (384 + 752, 352 + 376)
    assert costs["decode"].seconds == pytest.approx(3.2 + 0.32 + 3.2 + 0.56)


def test_costs_of_a_toy_model_that_arithmetic_bounds() -> None:
    rates = RATES | {"flops_per_second": 10.0, "bytes_per_second": 1e9}
    costs = rollout_costs(TOY, TOY_PROMPTS, TOY_RESPONSES, batch_size=2, **rates)
    assert costs["prefill"].seconds == pytest.approx(123.2)
    assert costs["decode"].seconds == pytest.approx(113.6)


def test_each_part_of_a_phase_has_its_own_bound() -> None:
    """At 400 FLOP/s the products of the prefill (2.8 s) wait for weights (3.2 s), at 300 the other way round."""
    for flops_per_second, seconds in ((400.0, 3.2), (300.0, 1120 / 300)):
        rates = RATES | {"flops_per_second": flops_per_second}
        costs = rollout_costs(TOY, TOY_PROMPTS, TOY_RESPONSES, batch_size=2, **rates)
        # Attention: 112 FLOPs, 32 bytes.
        assert costs["prefill"].seconds == pytest.approx(seconds + max(112 / flops_per_second, 0.32))


def test_fixed_lengths_cost_the_closed_form() -> None:
    rows, prompt, response = 5, 7, 4
    costs = rollout_costs(TOY, [[row] * prompt for row in range(rows)], [response] * rows, batch_size=rows, **RATES)
    steps = [prompt + number for number in range(1, response)]  # tokens that a row sees
    weights = max(2 * 160 * rows / 1000, 160 * 2 / 100)
    assert costs["decode"].seconds == pytest.approx(sum(weights + rows * seen * 4 * 2 / 100 for seen in steps))
    assert costs["decode"].flops == sum(2 * 160 * rows + 16 * rows * seen for seen in steps)


def test_with_room_for_all_a_step_holds_the_rows_that_are_not_done() -> None:
    prompts, responses = [3, 9, 1, 5], [6, 1, 3, 3]
    expected = []
    for step in range(1, max(responses)):
        seen = [prompt + step for prompt, length in zip(prompts, responses, strict=True) if length > step]
        expected.append((len(seen), sum(seen)))
    assert list(decode_steps(prompts, responses, batch_size=4)) == expected


def test_one_row_at_a_time_takes_a_step_for_each_token_after_the_first() -> None:
    steps = list(decode_steps([3, 9, 1], [3, 1, 2], batch_size=1))
    assert steps == [(1, 4), (1, 5), (1, 2)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_every_schedule_draws_the_same_tokens(batch_size: int) -> None:
    prompts, responses = [3, 9, 1, 5, 2], [6, 1, 3, 3, 8]
    steps = list(decode_steps(prompts, responses, batch_size))
    assert sum(rows for rows, _ in steps) == sum(length - 1 for length in responses)
    every_token = [p + number for p, r in zip(prompts, responses, strict=True) for number in range(1, r)]
    assert sum(seen for _, seen in steps) == sum(every_token)
    assert max(rows for rows, _ in steps) <= batch_size


@pytest.mark.parametrize(
    "change",
    [
        {"responses": [3, 1, 3]},
        {"prompts": [[1, 2, 3], [1, 2, 3], [4, 4]]},
        {"prompts": [[1, 2, 3], [1, 2, 5], [4]]},
        {"flops_per_second": 90.0, "bytes_per_second": 90.0},
        {"number_bytes": 4},
        {"batch_size": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_more_work_or_a_slower_machine_takes_longer(change: dict[str, Any]) -> None:
    def seconds(**options: Any) -> float:
        prompts, responses = options.pop("prompts", TOY_PROMPTS), options.pop("responses", TOY_RESPONSES)
        costs = rollout_costs(TOY, prompts, responses, **({"batch_size": 2} | RATES | options))
        return sum(cost.seconds for cost in costs.values())

    assert seconds(**change) > seconds() + 0.01


@pytest.mark.parametrize("architecture", SERVED)
def test_a_decode_step_costs_what_torch_counts(architecture: str) -> None:
    """One token behind 6 others in each of 3 rows: FLOPs by torch's counter, numbers in the cache of transformers."""
    model = tiny(architecture)
    shape = DecoderShape.of(model)
    ids = torch.arange(18).view(3, 6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, :1], past_key_values=cache)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kept == 3 * 7 * shape.cached
    cost = rollout_costs(shape, ids.tolist(), [2, 2, 2], batch_size=3, **RATES)["decode"]
    # Some versions of transformers compute the angles of rotary positions as a product of their own.
    angles = sum(2 * module.inv_freq.numel() for module in model.modules() if hasattr(module, "inv_freq"))
    assert counter.get_total_flops() - cost.flops in (0, angles)


def test_a_window_is_refused_where_a_row_is_longer() -> None:
    window = DecoderShape.of(tiny("mistral"))  # of 8 tokens
    with pytest.raises(ValueError, match="costs of a sliding window are not known"):
        rollout_costs(window, [[1] * 5, [2]], [4, 1], batch_size=2, **RATES)
    whole = replace(window, windows=(None, None))
    prompts, responses = [[1] * 5, [2]], [3, 1]
    costs = rollout_costs(window, prompts, responses, batch_size=2, **RATES)
    assert costs == rollout_costs(whole, prompts, responses, batch_size=2, **RATES)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_rollout_has_the_flops_of_its_phases_whatever_decodes_together(batch_size: int) -> None:
    prompts, responses = [[1, 2, 3], [4] * 9, [1, 2, 3], [5]], [6, 2, 1, 8]
    costs = rollout_costs(TOY, prompts, responses, batch_size=batch_size, **RATES)
    assert TOY.rollout_flops(prompts, responses) == sum(cost.flops for cost in costs.values())


def test_the_floor_of_an_iteration_by_hand() -> None:
    """Rows of 3 + 3, 3 + 1 and 1 + 2 tokens: 13 in all, 6 of responses, and 21 + 10 + 6 pairs."""
    actor = replace(TOY, trained=120, trained_head=40, trained_parameters=200)
    critic = replace(actor, head=0, trained_head=0, trained_parameters=150)
    floor = iteration_floor(
        [actor, critic],
        [TOY, replace(TOY, head=0)],
        TOY_PROMPTS,
        TOY_RESPONSES,
        batch_size=2,
        epochs=2,
        optimizer_steps=3,
        **RATES,
    )
    body, head, attention = 2 * 120 * 13, 2 * 40 * 6, 16 * 37
    scoring = 3 * (body + attention) + head  # reference, reward model and critic
    training = 2 * 3 * (2 * (body + attention) + head)  # three forwards in each of two epochs
    rollout = rollout_costs(TOY, TOY_PROMPTS, TOY_RESPONSES, batch_size=2, **RATES)
    assert floor["prefill"] == rollout["prefill"] and floor["decode"] == rollout["decode"]
    assert (floor["score"].flops, floor["train"].flops) == (scoring, training)
    assert floor["score"].seconds == pytest.approx(scoring / 1000)
    assert floor["train"].seconds == pytest.approx(training / 1000)
    assert floor["optimizer"].bytes == 3 * 30 * 350
    assert floor["optimizer"].seconds == pytest.approx(3 * 30 * 3.5)


@pytest.mark.parametrize(
    ("name", "short", "long", "step"), [("1b", 3.7, 10.8, 1.80), ("3b", 10.5, 30.9, 5.58), ("8b", 24.7, 67.2, 8.86)]
)
def test_the_floors_of_llama_3_on_an_h200(name: str, short: float, long: float, step: float) -> None:
    """Worked out apart from this code at 790 TFLOP/s and 4.3 TB/s, to 0.1 s and 0.01 ms: 256 prompts of 256 tokens with
    responses of 256 and of 1024, and a decode step of 256 rows that see 512 tokens each. There a response takes as many
    steps as it has tokens; here the prefill draws the first one.
    """
    with torch.device("meta"):
        actor = DecoderShape.of(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[name])))
    critic = replace(actor, head=0, trained_head=0)
    machine: dict[str, Any] = {"batch_size": 256, "number_bytes": 2, "flops_per_second": 790e12}
    machine |= {"bytes_per_second": 4.3e12}

    def step_that_sees(tokens: int) -> float:
        prompts = [[row] * (tokens - 1) for row in range(256)]
        return rollout_costs(actor, prompts, [2] * 256, **machine)["decode"].seconds

    for response, seconds in ((256, short), (1024, long)):
        prompts = [[row] * 256 for row in range(256)]
        floor = iteration_floor([actor, critic], [actor, critic], prompts, [response] * 256, **machine)
        found = sum(cost.seconds for cost in floor.values()) + step_that_sees(256 + response)
        assert found == pytest.approx(seconds, rel=0, abs=0.05)
    assert step_that_sees(512) * 1000 == pytest.approx(step, rel=0, abs=0.005)


# Workloads


@pytest.mark.parametrize(
    ("device", "prompts", "mean", "cap"), [("cpu", (32, 64), 48, 128), ("cuda", (64, 256), 370, 1024)]
)
def test_chat_lengths_have_the_mean_and_the_bounds_that_are_promised(
    device: str, prompts: tuple[int, int], mean: int, cap: int
) -> None:
    drawn = draw_workload(BenchmarkConfig(shape="1b", prompts=1000), 100, torch.device(device))
    lengths = [len(ids) for ids in drawn.prompt_ids]
    assert (min(lengths), max(lengths)) == prompts
    assert statistics.mean(drawn.limits) == pytest.approx(mean, rel=0.06)  # 2 standard errors are 5%
    assert max(drawn.limits) == cap and min(drawn.limits) >= 1
    assert statistics.median(drawn.limits) < mean


def test_a_fixed_workload_has_one_length_and_distinct_prompts() -> None:
    config = BenchmarkConfig(shape="1b", workload="fixed", prompts=5, prompt_tokens=9, response_tokens=4)
    drawn = draw_workload(config, 100, CPU)
    assert [len(ids) for ids in drawn.prompt_ids] == [9] * 5 and drawn.limits == [4] * 5
    assert len(set(map(tuple, drawn.prompt_ids))) == 5


def test_a_workload_depends_on_its_seed_and_its_lengths_not_on_the_model() -> None:
    config = BenchmarkConfig(shape="1b", prompts=5)
    one, other = draw_workload(config, 100, CPU), draw_workload(config, 50000, CPU)
    assert one == draw_workload(config, 100, CPU)
    assert one.limits == other.limits and list(map(len, one.prompt_ids)) == list(map(len, other.prompt_ids))
    assert one.limits != draw_workload(replace(config, seed=2), 100, CPU).limits


# Backends


@pytest.fixture(scope="module")
def ending_model(tiny_model: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model to which every token is an end of sequence, so that whoever minds that draws one token."""
    folder = tmp_path_factory.mktemp("ending")
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model.config.eos_token_id = model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", [name for name in BACKENDS if "compiled" not in name])
def test_every_backend_draws_the_forced_lengths(name: str, ending_model: str) -> None:
    model = load_model(BenchmarkConfig(model=ending_model, dtype="fp32"), CPU)
    workload = Workload([[5, 6, 7], [8], [9, 10, 11, 12, 13]], [5, 1, 9], 9, seed=1)
    seconds, responses = BACKENDS[name](model, 2)(workload)
    assert [len(response) for response in responses] == [5, 1, 9]
    assert all(0 <= token < model.config.vocab_size for response in responses for token in response)
    assert seconds > 0


def test_a_response_of_another_length_is_no_measurement() -> None:
    workload = Workload([[5], [6]], [3, 2], 3, seed=1)
    assert take(lambda _: (0.5, [[1, 2, 3], [4, 5]]), workload) == 0.5
    with pytest.raises(RuntimeError, match="drew 5 tokens where 5"):
        take(lambda _: (0.5, [[1, 2], [3, 4, 5]]), workload)


# Measuring


def test_figures_by_hand() -> None:
    """10 useful tokens; floors of 0.5 and 1 s."""
    costs = {"prefill": Cost(seconds=0.5), "decode": Cost(seconds=1.0)}
    baseline = Measurement(seconds=[4.0, 8.0, 6.0], prefill_seconds=[1.0, 1.0, 1.0])
    one = Measurement(seconds=[2.0, 5.0, 3.0], prefill_seconds=[1.0, 2.0, 1.0], peak_memory_bytes=7)
    assert figures(one, baseline, costs, Workload([[1], [2]], [4, 6], 6, seed=1)) == {
        "seconds": [2.0, 5.0, 3.0],
        "prefill_seconds": [1.0, 2.0, 1.0],
        "tokens_per_second": pytest.approx(10 / 3),
        "spread": pytest.approx(1.0),
        "floor_share": pytest.approx(0.5),
        "prefill_floor_share": pytest.approx(0.5),
        "decode_floor_share": pytest.approx(0.5),  # decoding took 1, 3 and 2 s
        "peak_memory_bytes": 7,
        "ratios": pytest.approx([2.0, 1.6, 2.0]),
        "ratio": pytest.approx(2.0),
    }


def test_peak_memory_sees_what_was_held_and_freed() -> None:
    with PeakMemory(CPU) as memory:
        torch.ones(40 * 2**20).sum()  # 160 MiB
    assert 150 * 2**20 < memory.bytes < 240 * 2**20


def test_backends_run_in_turns_and_a_broken_one_says_why(
    tiny_model: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def recording(name: str, model: Any, batch_size: int) -> Any:
        def run(workload: Workload) -> tuple[float, list[list[int]]]:
            calls.append((name, sum(workload.limits)))
            if name == "hf" and len(calls) > 4:
                raise MemoryError("no room\nfor this")
            return 1.0 + len(calls), [[0] * limit for limit in workload.limits]

        return run

    for name in ("native", "hf"):
        monkeypatch.setitem(BACKENDS, name, partial(recording, name))
    monkeypatch.setattr(generation, "measure_ceilings", lambda *_: Ceilings(1e9, 2e9, 1e12, 1e11))
    config = BenchmarkConfig(
        model=tiny_model("llama"),
        dtype="fp32",
        workload="fixed",
        prompts=3,
        response_tokens=4,
        repeats=2,
        backends=("native", "hf"),
    )
    result = generation.run(config)
    # To warm up once, then again and, for the prefill alone, with 1 token a row.
    warm_up, first = [("native", 12), ("hf", 12)], [("native", 12), ("native", 3), ("hf", 12)]
    assert calls == [*warm_up, *first, ("native", 12), ("native", 3)]
    assert result["backends"]["native"]["seconds"] == [4.0, 7.0]
    assert result["backends"]["hf"] == {"failure": "MemoryError: no room"}
    table = capsys.readouterr().out
    assert any(line.split() == ["hf", "MemoryError:", "no", "room"] for line in table.splitlines())


def test_the_command_measures_every_backend(tiny_model: Callable[[str], str], tmp_path: Path) -> None:
    """Without the libraries that only training needs."""
    program = """
import runpy, sys
import scripts.benchmark.generation
assert not {"datasets", "deepspeed"} & set(sys.modules)
runpy.run_module("scripts.benchmark.generation", run_name="__main__")
assert "datasets" not in sys.modules
"""
    output = tmp_path / "folder" / "figures.json"
    options = ["--model", tiny_model("llama"), "--dtype", "fp32", "--prompts", "3", "--repeats", "2"]
    options += ["--prompt_tokens", "9", "--response_tokens", "6", "--batch_size", "2", "--output", str(output)]
    finished = subprocess.run(
        [sys.executable, "-c", program, *options],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads(output.read_text())
    assert set(result) == {
        *("command", "device", "versions", "commit", "config", "model", "workload", "ceilings", "floor", "backends")
    }
    assert result["versions"]["torch"] == version("torch")
    assert result["config"]["prompts"] == 3 and result["model"]["architecture"] == "llama"
    assert len(result["workload"]["response_tokens"]) == 3 and max(result["workload"]["response_tokens"]) <= 6
    assert all(rate > 1e6 for rate in result["ceilings"].values())
    # Neither what runs on a GPU only, nor float32 beside itself.
    assert set(result["backends"]) == set(BACKENDS) - {"generate-static-compiled", "generate-dynamic-fp32"}
    rows = {line.split()[0]: line for line in finished.stdout.splitlines() if line}
    for name, one in result["backends"].items():
        assert "failure" not in one, one
        assert len(one["seconds"]) == len(one["prefill_seconds"]) == len(one["ratios"]) == 2
        assert 0 < one["floor_share"] < 1 and one["tokens_per_second"] > 0
        assert f"{one['tokens_per_second']:.0f}" in rows[name]
    assert result["backends"]["generate-dynamic"]["ratios"] == [1.0, 1.0]
    assert "floor share" in finished.stdout
