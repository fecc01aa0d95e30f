"""Configs of the three stages for tiny models and data: a whole run takes seconds."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

STAGES = ("step1_sft", "step2_reward", "step3_ppo")

# Without it DeepSpeed splits no parameter of a tiny model.
SPLIT_EVERYTHING = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


MACHINE = (
    "seconds",
    "tokens_per_second",
    "gemm_share",
    "mfu",
    "memory/",
    "peak_memory_gib",
    "rollout/kv_cache",
    "config",
)


def depends_on_machine(name: str) -> bool:
    """Whether a number in metrics.jsonl or results.json tells of the machine, or of where the run lies."""
    return name.startswith(MACHINE)


def tiny_configs(folder: Path, model: str, data: Mapping[str, str], **engine: Any) -> dict[str, dict[str, Any]]:
    """The options of each stage, of which a test may change some. Each stage starts from what the one before leaves.

    Args:
        folder: of the run.
        model: folder of the pretrained model.
        data: files as `write_tiny_data` names them.
        engine: options of every engine; fp32 unless told otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "deepspeed.json"
    raw.write_text(json.dumps(SPLIT_EVERYTHING))
    engine = {"precision": "fp32", "deepspeed_config": str(raw)} | engine
    common = {"engine": engine, "micro_batch_size": 2, "train_batch_size": 8}
    reads = {"template": "plain", "eval_size": 9}

    def options(stage: str, file: str, format: str) -> dict[str, Any]:
        run = {"output_dir": str(folder / stage), "log_every": 1}
        return copy.deepcopy(common) | {"run": run, "data": {"paths": [data[file]], "format": format} | reads}

    sft = options("step1_sft", "demonstrations", "prompt_response")
    reward = options("step2_reward", "pairs", "chosen_rejected")
    ppo = options("step3_ppo", "prompts", "prompt")
    sft |= {"model": {"path": model}, "optim": {"lr": 1e-3}}
    reward |= {"model": {"path": str(folder / "step1_sft" / "final")}, "optim": {"lr": 1e-3}}
    ppo |= {
        "actor": {"path": str(folder / "step1_sft" / "final")},
        "reward": {"path": str(folder / "step2_reward" / "final")},
        "actor_optim": {"lr": 1e-3},
        "critic_optim": {"lr": 1e-3},
        "sampling": {"max_new_tokens": 8},
        "iterations": 2,
        "rollout_batch_size": 8,
        "train_batch_size": 4,
        "ppo_epochs": 2,
    }
    return {"step1_sft": sft, "step2_reward": reward, "step3_ppo": ppo}


def with_lora(configs: dict[str, dict[str, Any]], rank: int = 4) -> dict[str, dict[str, Any]]:
    """The same with adapters on every model that is trained."""
    for stage, name in (("step1_sft", "model"), ("step2_reward", "model"), ("step3_ppo", "actor")):
        configs[stage][name]["lora"] = {"rank": rank}
    configs["step3_ppo"]["critic"] = {"lora": {"rank": rank}}
    return configs


def write_configs(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Writes each stage's file; returns the arguments of `tests.run_stages`, for the stages in order."""
    arguments = []
    for stage, options in configs.items():
        path = Path(options["run"]["output_dir"]).with_suffix(".yaml")
        path.write_text(yaml.safe_dump(options))
        arguments += [f"{stage}.train", str(path)]
    return arguments


def results_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage has left in results.json."""
    return json.loads((Path(options["run"]["output_dir"]) / "results.json").read_text())
