"""The three steps for real, on tiny models: every ZeRO stage on two processes, one process, the staged run."""

import importlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from scripts import run_all
from tests.launching import alone, run_well, under_deepspeed
from tests.tiny_models import save_tiny_model, write_jsonl, write_tiny_data
from tests.tiny_runs import STAGES, depends_on_machine, results_of, tiny_configs, with_lora, write_configs
from training import distributed

Configs = dict[str, dict[str, Any]]

Launched = Callable[[int], tuple[dict[str, Configs], str]]

KINDS = ("full", "lora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, model: str, data: dict[str, str]) -> Launched:
    """Runs the three steps with all weights and again with adapters, on two processes of DeepSpeed's launcher.

    Takes the ZeRO stage; returns the configs of both kinds, and what was printed. Each stage is launched once.
    """
    done: dict[int, tuple[dict[str, Configs], str]] = {}

    def launch(zero_stage: int) -> tuple[dict[str, Configs], str]:
        if zero_stage not in done:
            folder = tmp_path_factory.mktemp(f"zero{zero_stage}")
            full, lora = (tiny_configs(folder / kind, model, data, zero_stage=zero_stage) for kind in KINDS)
            kinds = {"full": full, "lora": with_lora(lora)}
            for configs in kinds.values():
                # What else holds weights or gradients, so that it too must agree over the stages.
                configs["step3_ppo"] |= {
                    "ema_decay": 0.5,
                    "entropy_coefficient": 0.01,
                    "ptx": {"coefficient": 0.1, "paths": [data["demonstrations"]]},
                }
            arguments = [argument for configs in kinds.values() for argument in write_configs(configs)]
            done[zero_stage] = kinds, run_well(under_deepspeed("tests.run_stages", *arguments), timeout_seconds=240)
        return done[zero_stage]

    return launch


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Configs], None]]:
    """Runs stages in this very process, one by one as without a launcher."""

    def run(configs: Configs) -> None:
        arguments = write_configs(configs)
        for module, path in zip(arguments[::2], arguments[1::2], strict=True):
            monkeypatch.setattr(sys, "argv", [module, "--config", path])
            importlib.import_module(module).main()

    yield run
    distributed.stop()


def metrics_of(options: dict[str, Any]) -> list[dict[str, float]]:
    lines = (Path(options["run"]["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def iterations_of(options: dict[str, Any]) -> list[dict[str, float]]:
    """The lines of step 3's iterations, without those of the held-out prompts."""
    return [line for line in metrics_of(options) if "rollout/kl" in line]


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 29).view(2, 12)).logits


def final(options: dict[str, Any], name: str = "") -> Path:
    return Path(options["run"]["output_dir"]) / "final" / name


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_three_steps_run_under_the_launcher(launched: Launched, zero_stage: int) -> None:
    kinds, printed = launched(zero_stage)
    assert printed.count("ratio 1.0000, kl 0.0000") == len(kinds), printed
    for configs in kinds.values():
        for options in configs.values():
            assert results_of(options)["peak_memory_gib"] > 0
            for line in metrics_of(options):
                assert {"step", "seconds", "tokens"} <= line.keys()
        assert [line["step"] for line in iterations_of(configs["step3_ppo"])] == [1, 2]
        assert [line["step"] for line in metrics_of(configs["step3_ppo"]) if "eval/kl" in line] == [0, 2]
        assert (Path(configs["step3_ppo"]["run"]["output_dir"]) / "samples.jsonl").exists()
        assert results_of(configs["step1_sft"])["loss_after"] < results_of(configs["step1_sft"])["loss_before"]
        assert results_of(configs["step2_reward"])["accuracy_after"] > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_zero_stage(launched: Launched, kind: str) -> None:
    """L14"""
    expected = launched(0)[0][kind]
    for zero_stage in (1, 2, 3):
        configs = launched(zero_stage)[0][kind]
        for stage in STAGES:
            ours, theirs = results_of(configs[stage]), results_of(expected[stage])
            for name in ("loss_before", "loss_after", "accuracy_after", "scores_chosen", "kl", "distinct_2_after"):
                assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4), (zero_stage, stage, name)
            for name in ("score_before", "score_after"):
                if name in theirs:
                    assert ours[name]["values"] == pytest.approx(theirs[name]["values"], abs=1e-4), (zero_stage, name)
            for line, other in zip(metrics_of(configs[stage]), metrics_of(expected[stage]), strict=True):
                for name in other:
                    if not depends_on_machine(name) and "grad_norm" not in name:  # ZeRO 0 keeps no norm in fp32
                        assert line[name] == pytest.approx(other[name], abs=1e-4), (zero_stage, stage, name)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_exported_folders_load_with_transformers_alone(launched: Launched, zero_stage: int) -> None:
    """O5, L11: the moving average was taken shard by shard."""
    configs = launched(zero_stage)[0]["full"]
    expected = launched(0)[0]["full"]
    sft, reward, ppo = (configs[stage] for stage in STAGES)
    folders = {
        AutoModelForCausalLM: (final(sft), final(ppo, "actor")),
        AutoModelForSequenceClassification: (final(reward), final(ppo, "critic")),
    }
    for auto_class, paths in folders.items():
        for path in paths:
            assert len(AutoTokenizer.from_pretrained(path)) > 0
            loaded, info = auto_class.from_pretrained(path, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            # ZeRO 0 on the same data ends with the same weights.
            base = Path(configs["step1_sft"]["run"]["output_dir"]).parent
            twin = Path(expected["step1_sft"]["run"]["output_dir"]).parent / path.relative_to(base)
            torch.testing.assert_close(
                logits_of(loaded), logits_of(auto_class.from_pretrained(twin)), atol=2e-3, rtol=0
            )
    assert json.loads((final(reward) / "score_normalization.json").read_text()).keys() == {"gain", "bias"}


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_exported_adapters_load_with_peft_alone(launched: Launched, zero_stage: int) -> None:
    """O5"""
    configs = launched(zero_stage)[0]["lora"]
    sft = AutoPeftModelForCausalLM.from_pretrained(final(configs["step1_sft"]))
    whole = logits_of(sft)
    with sft.disable_adapter():
        assert not torch.allclose(logits_of(sft), whole, atol=1e-3)
    torch.testing.assert_close(logits_of(sft.merge_and_unload()), whole, atol=1e-5, rtol=0)
    # Adapters on top of adapters have no name for what they stand on, so these are whole.
    actor = AutoModelForCausalLM.from_pretrained(final(configs["step3_ppo"], "actor"))
    assert not torch.allclose(logits_of(actor), whole, atol=1e-3)
    AutoModelForSequenceClassification.from_pretrained(final(configs["step2_reward"]))
    AutoModelForSequenceClassification.from_pretrained(final(configs["step3_ppo"], "critic"))


def test_adapters_of_a_reward_model_load_with_peft_alone(
    tmp_path: Path, model: str, data: dict[str, str], run_here: Callable[[Configs], None]
) -> None:
    """O5, R8: the head is saved beside the adapters"""
    configs = with_lora(tiny_configs(tmp_path, model, data))
    configs["step2_reward"]["model"]["path"] = model
    del configs["step1_sft"], configs["step3_ppo"]
    run_here(configs)
    folder = final(configs["step2_reward"])
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    first = logits_of(loaded)
    assert first.shape == (2, 1)
    again = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert torch.equal(logits_of(again), first)


def test_bf16_offload_and_gradient_checkpointing_run_under_the_launcher(
    tmp_path: Path, model: str, data: dict[str, str], launched: Launched
) -> None:
    """L14: offload and checkpointing give the numbers of ZeRO 3 without them."""
    offload = {"offload_optimizer": True, "offload_parameters": True}
    runs = {
        "bf16_zero2": tiny_configs(tmp_path / "bf16_zero2", model, data, zero_stage=2, precision="bf16"),
        "bf16_zero3": with_lora(tiny_configs(tmp_path / "bf16_zero3", model, data, zero_stage=3, precision="bf16")),
        "offload": tiny_configs(tmp_path / "offload", model, data, zero_stage=3, **offload),
        "checkpointing": tiny_configs(tmp_path / "checkpointing", model, data, zero_stage=3),
    }
    for stage, name in (("step1_sft", "model"), ("step2_reward", "model"), ("step3_ppo", "actor")):
        runs["checkpointing"][stage][name]["gradient_checkpointing"] = True
    arguments = [argument for configs in runs.values() for argument in write_configs(configs)]
    printed = run_well(under_deepspeed("tests.run_stages", *arguments), timeout_seconds=240)
    checks = re.findall(r"ratio (\S+), kl (\S+),", printed)
    assert len(checks) == 4
    assert all(abs(float(ratio) - 1) < 0.02 and float(kl) < 0.02 for ratio, kl in checks)
    expected = launched(3)[0]["full"]
    for name, configs in runs.items():
        assert results_of(configs["step2_reward"])["accuracy_after"] > 0.8, name
        assert math.isfinite(results_of(configs["step3_ppo"])["score_after"]["mean"]), name
        exported = AutoModelForCausalLM.from_pretrained(final(configs["step3_ppo"], "actor"))
        assert exported.dtype == (torch.bfloat16 if "bf16" in name else torch.float32)
        if "bf16" not in name:
            for stage, result in (("step1_sft", "loss_after"), ("step2_reward", "scores_chosen")):
                ours, theirs = results_of(configs[stage])[result], results_of(expected[stage])[result]
                assert ours == pytest.approx(theirs, abs=1e-4), name


def test_a_stage_runs_without_a_launcher(tmp_path: Path, model: str, data: dict[str, str]) -> None:
    configs = tiny_configs(tmp_path, model, data)
    _, config = write_configs({"step1_sft": configs["step1_sft"]})
    printed = run_well(alone("step1_sft.train", "--config", config, "--max_steps", "2"))
    assert "step 2/2" in printed
    assert results_of(configs["step1_sft"])["steps"] == 2


def test_models_may_differ_in_size_and_architecture(
    tmp_path: Path, data: dict[str, str], run_here: Callable[[Configs], None], capfd: pytest.CaptureFixture[str]
) -> None:
    actor = save_tiny_model(tmp_path / "gpt2", "gpt2", seed=1)
    critic = save_tiny_model(tmp_path / "llama", "llama", seed=2)
    reward_base = save_tiny_model(tmp_path / "qwen2", "qwen2", seed=3)
    reference = save_tiny_model(tmp_path / "reference", "opt", seed=4)
    configs = tiny_configs(tmp_path / "run", actor, data)
    # Named, because transformers reads any tokenizer in a Qwen2 folder as Qwen2's and adds its special token.
    configs["step2_reward"]["model"] = {"path": reward_base, "tokenizer": actor}
    configs["step3_ppo"]["reward"]["tokenizer"] = actor
    configs["step3_ppo"]["critic"] = {"path": critic}
    configs["step3_ppo"]["reference_path"] = reference
    run_here(configs)
    assert "ratio 1.0000" in capfd.readouterr().out
    assert iterations_of(configs["step3_ppo"])[0]["rollout/kl"] > 0.1  # the reference is another model
    kinds = {"actor": AutoModelForCausalLM, "critic": AutoModelForSequenceClassification}
    loaded = {name: kind.from_pretrained(final(configs["step3_ppo"], name)) for name, kind in kinds.items()}
    assert loaded["actor"].config.model_type == "gpt2"
    assert loaded["critic"].config.model_type == "llama"
    rewarding = AutoModelForSequenceClassification.from_pretrained(final(configs["step2_reward"]))
    assert rewarding.config.model_type == "qwen2"


def count_vowels(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    """A score function as a user writes one."""
    assert all(record["prompt"] == prompt for record, prompt in zip(records, prompts, strict=True))
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_pp", "gae"])
def test_a_function_may_give_the_score(
    tmp_path: Path, model: str, data: dict[str, str], run_here: Callable[[Configs], None], estimator: str
) -> None:
    configs = tiny_configs(tmp_path, model, data)
    ppo = configs["step3_ppo"]
    ppo |= {
        "actor": {"path": model},
        "reward": {"function": "tests.test_pipeline:count_vowels"},
        "estimator": estimator,
        "samples_per_prompt": 4,
        "rollout_batch_size": 2,
    }
    run_here({"step3_ppo": ppo})
    results = results_of(ppo)
    assert results["score_before"]["values"] == [float(int(score)) for score in results["score_before"]["values"]]
    assert results["logit_before"]["mean"] == results["score_before"]["mean"]
    assert all(math.isfinite(value) for value in metrics_of(ppo)[0].values() if value is not None)
    assert final(ppo, "critic").exists() == (estimator == "gae")


def test_a_function_that_is_called_early_gives_the_same_scores(
    tmp_path: Path, model: str, data: dict[str, str], run_here: Callable[[Configs], None]
) -> None:
    runs = []
    for early in (False, True):
        ppo = tiny_configs(tmp_path / str(early), model, data)["step3_ppo"]
        ppo |= {
            "actor": {"path": model},
            "reward": {"function": "tests.test_pipeline:count_vowels", "function_early": early},
        }
        run_here({"step3_ppo": ppo})
        runs.append([{n: v for n, v in line.items() if not depends_on_machine(n)} for line in metrics_of(ppo)])
    assert runs[0] == runs[1]


def test_an_adaptive_kl_coefficient_follows_the_kl_of_the_run(
    tmp_path: Path, model: str, data: dict[str, str], run_here: Callable[[Configs], None]
) -> None:
    """K4: 8 responses an iteration; before the first update the KL is 0 and the coefficient falls."""
    ppo = tiny_configs(tmp_path, model, data)["step3_ppo"]
    ppo |= {
        "actor": {"path": model},
        "reward": {"function": "tests.test_pipeline:count_vowels"},
        "kl": {"coefficient": 0.1, "adaptive": True, "target": 0.05, "horizon": 100},
        "iterations": 4,
    }
    run_here({"step3_ppo": ppo})
    coefficient = 0.1
    for line in iterations_of(ppo):
        assert line["rollout/kl_coefficient"] == pytest.approx(coefficient, rel=1e-9)
        coefficient *= 1 + min(max(line["rollout/kl"] / 0.05 - 1, -0.2), 0.2) * 8 / 100
    assert iterations_of(ppo)[1]["rollout/kl_coefficient"] == pytest.approx(0.1 * (1 - 0.2 * 0.08))


def test_step_2_learns_from_rankings(tmp_path: Path, model: str, run_here: Callable[[Configs], None]) -> None:
    rows = [
        {
            "prompt": f"{number}:",
            "responses": [" a" * (1 + number % 3), " e b", " b" * (2 + number % 2)][: 2 + number % 2],
        }
        for number in range(40)
    ]
    files = {"pairs": write_jsonl(tmp_path / "rankings.jsonl", rows), "demonstrations": "", "prompts": ""}
    reward = tiny_configs(tmp_path / "run", model, files)["step2_reward"]
    reward["model"]["path"] = model
    reward["data"]["format"] = "ranking"
    run_here({"step2_reward": reward})
    results = results_of(reward)
    assert results["data"]["kept"] == 40
    # Rankings of three make three pairs each, those of two one.
    held_out = len(results["scores_chosen"])
    assert results["data"]["held_out"] < held_out <= 3 * results["data"]["held_out"]
    assert results["accuracy_after"] > 0.8


def test_chats_run_through_steps_1_and_3(tmp_path: Path, model: str, run_here: Callable[[Configs], None]) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": f"{number}!"},
            ]
        }
        for number in range(40)
    ]
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    configs = tiny_configs(tmp_path / "run", model, {"demonstrations": file, "pairs": "", "prompts": file})
    del configs["step2_reward"]
    for options in configs.values():
        options["data"] |= {"format": "messages", "template": "chat"}
    configs["step3_ppo"] |= {"reward": {"function": "tests.test_pipeline:length"}}
    run_here(configs)
    assert results_of(configs["step1_sft"])["data"]["kept"] == 40
    samples = (Path(configs["step3_ppo"]["run"]["output_dir"]) / "samples.jsonl").read_text().splitlines()
    prompt = json.loads(samples[0])["prompt"]
    assert prompt.startswith("<|im_start|>system\nBe short.<|im_end|>") and prompt.endswith("<|im_start|>assistant\n")


def length(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_plain_text_is_learnt_from_an_empty_prompt(
    tmp_path: Path, model: str, run_here: Callable[[Configs], None]
) -> None:
    rows = [{"text": f"Film {number} was long.", "label": number % 2} for number in range(40)]
    file = write_jsonl(tmp_path / "reviews.jsonl", rows)
    sft = tiny_configs(tmp_path / "run", model, {"demonstrations": file, "pairs": "", "prompts": ""})["step1_sft"]
    sft["data"]["format"] = "text"
    run_here({"step1_sft": sft})
    results = results_of(sft)
    assert results["data"]["kept"] == 40
    assert results["loss_after"] < results["loss_before"]


def test_the_staged_run_goes_from_model_to_report_and_on_where_it_stopped(
    tmp_path: Path, model: str, data: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """O4: steps that run again with the same seed give the same numbers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "run"
    steps = tiny_configs(folder, model, data)
    for options in steps.values():
        del options["run"]["output_dir"]
    del steps["step2_reward"]["model"], steps["step3_ppo"]["actor"], steps["step3_ppo"]["reward"]
    recipe = {"output_dir": str(folder), "model": model, "num_gpus": 1, **steps}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--config", str(tmp_path / "recipe.yaml")]

    assert run_all.run(arguments) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert {"loss_before", "loss_after"} <= summary["step1"].keys()
    assert {"accuracy_before", "accuracy_after"} <= summary["step2"].keys()
    for name in ("score_before", "score_after"):
        assert {"mean", "median"} <= summary["step3"][name].keys()
    assert math.isfinite(summary["step3"]["kl"])
    win_rate = summary["step3"]["win_rate"]
    assert 0 <= win_rate["low"] <= win_rate["value"] <= win_rate["high"] <= 1
    assert all(summary["seconds"][name] > 0 for name in ("step1", "step2", "step3", "total"))
    report = (folder / "report.html").read_text()
    assert report.startswith("<!doctype html>") and "<svg" in report
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", report)
    assert not re.findall(r"@import|url\((?!['\"]?(?:data:|#))", report)
    for name in ("config.yaml", "environment.json"):
        assert (folder / name).exists()
    capfd.readouterr()

    assert run_all.run(arguments) == 0
    assert capfd.readouterr().out.count("is finished: skipped") == 3

    for name in ("step2_reward", "step3_ppo"):
        shutil.rmtree(folder / name)
    before = (folder / "step1_sft" / "results.json").stat().st_mtime_ns
    assert run_all.run(arguments) == 0
    printed = capfd.readouterr().out
    assert "[1/3] step1_sft is finished: skipped" in printed and printed.count("is finished: skipped") == 1
    assert (folder / "step1_sft" / "results.json").stat().st_mtime_ns == before
    again = json.loads((folder / "summary.json").read_text())
    assert again["step3"]["score_after"] == summary["step3"]["score_after"]
