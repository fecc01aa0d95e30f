import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from scripts import run_all
from scripts.processes import ROOT, Stopped, run_group, stage_command, stage_environment
from scripts.run_all import RecipeConfig, load_recipe, run
from tests.fake_run import fake_results
from training.durable import OutputLock

STEPS = {"step1_sft": "step1", "step2_reward": "step2", "step3_ppo": "step3"}

# Stands in for a stage: notes that it ran, and writes the results that it is given.
FAKE_STAGE = """
import json, pathlib, sys, yaml
module, config_path, results, code = sys.argv[1:]
folder = pathlib.Path(yaml.safe_load(open(config_path))["run"]["output_dir"])
with open(folder.parent / "ran.txt", "a") as log:
    print(module, file=log)
if results:
    (folder / "results.json").write_text(results)
sys.exit(int(code))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """Arguments of a small recipe, whose data files exist."""
    files = {
        "demonstrations": {"prompt": "2+2?", "response": "4"},
        "pairs": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        "prompts": {"prompt": "3+3?"},
    }
    for name, record in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": "some/model",
        "step1_sft": {"data": {"paths": [str(tmp_path / "demonstrations.jsonl")], "format": "prompt_response"}},
        "step2_reward": {"data": {"paths": [str(tmp_path / "pairs.jsonl")], "format": "chosen_rejected"}},
        "step3_ppo": {"data": {"paths": [str(tmp_path / "prompts.jsonl")], "format": "prompt"}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "recipe.yaml")]


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, int]]:
    """What each step writes as its results, and its exit code; a test may change both."""
    outcomes = {step: (json.dumps(fake_results()[key]), 0) for step, key in STEPS.items()}

    def command(module: str, config_path: Path, num_processes: int) -> list[str]:
        results, code = outcomes[module.removesuffix(".train")]
        return [sys.executable, "-c", FAKE_STAGE, module, str(config_path), results, str(code)]

    monkeypatch.setattr(run_all, "stage_command", command)
    return outcomes


def steps_run(folder: Path) -> list[str]:
    return (folder / "ran.txt").read_text().split()


def test_three_steps_run_in_order_and_leave_a_summary_and_a_report(tmp_path, recipe, fake_stages, capsys):
    assert run(recipe) == 0
    folder = tmp_path / "run"
    assert steps_run(folder) == [f"{step}.train" for step in STEPS]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step1"]["loss_after"] == 1.25
    assert summary["step2"]["accuracy_after"] == 0.93
    assert summary["step3"]["win_rate"]["low"] == 0.91
    spent = summary["seconds"]
    assert set(spent) == {"step1", "step2", "step3", "total"} and 0 < spent["total"] < 60
    assert (folder / "report.html").exists()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["cpu_cores"] >= 1
    assert "Step 3 helped" in capsys.readouterr().out


def test_saved_recipe_loads_back_equal(tmp_path, recipe, fake_stages):
    run(recipe)
    assert load_recipe(["--config", str(tmp_path / "run" / "config.yaml")]) == load_recipe(recipe)


def test_finished_steps_are_skipped(tmp_path, recipe, fake_stages, capsys):
    run(recipe)
    capsys.readouterr()
    summary = (tmp_path / "run" / "summary.json").read_text()
    assert run(recipe) == 0
    assert len(steps_run(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    assert capsys.readouterr().out.count("skipped") == 3


def test_a_step_that_fails_ends_the_run_with_its_code_and_is_where_the_next_run_starts(
    tmp_path, recipe, fake_stages, capsys
):
    whole = fake_stages["step2_reward"]
    fake_stages["step2_reward"] = ("", 7)
    assert run(recipe) == 7
    message = capsys.readouterr().err
    assert "step2_reward failed with exit code 7" in message and "same command" in message
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == {"step1", "seconds"}
    fake_stages["step2_reward"] = whole
    assert run(recipe) == 0
    assert steps_run(tmp_path / "run") == [
        "step1_sft.train",
        "step2_reward.train",
        "step2_reward.train",
        "step3_ppo.train",
    ]


def test_a_step_that_ends_without_results_is_a_failure(recipe, fake_stages, capsys):
    fake_stages["step1_sft"] = ("", 0)
    assert run(recipe) == 1
    assert "step1_sft ended before it was finished" in capsys.readouterr().err


def test_a_finished_step_is_not_mixed_with_other_options(tmp_path, recipe, fake_stages):
    run(recipe)
    saved = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"optim\.lr: it was 2e-05, now 0\.001\n.*--output_dir") as refused:
        run([*recipe, "--step1_sft.optim.lr", "1e-3"])
    assert "step1_sft is finished, but with other options" in str(refused.value)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == saved


def test_options_of_an_unfinished_step_may_change(tmp_path, recipe, fake_stages):
    fake_stages["step3_ppo"], whole = ("", 1), fake_stages["step3_ppo"]
    run(recipe)
    fake_stages["step3_ppo"] = whole
    assert run([*recipe, "--step3_ppo.iterations", "5"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "step3_ppo" / "config.yaml").read_text())
    assert saved["iterations"] == 5


def test_a_finished_step_is_not_kept_when_what_it_was_made_from_runs_anew(tmp_path, recipe, fake_stages):
    run(recipe)
    (tmp_path / "run" / "step1_sft" / "results.json").unlink()
    with pytest.raises(ValueError) as refused:
        run(recipe)
    assert str(refused.value) == (
        "what is finished was made from a step that is to run now (step2_reward from step1_sft, step3_ppo from "
        f"step1_sft): choose another --output_dir, or delete {tmp_path}/run/step2_reward and {tmp_path}/run/step3_ppo "
        "as well"
    )


def test_folders_model_and_seed_are_passed_along(tmp_path, recipe):
    config = load_recipe([*recipe, "--seed", "7"])
    folder = tmp_path / "run"
    assert config.step1_sft.model.path == "some/model"
    assert config.step2_reward.model.path == config.step3_ppo.actor.path
    assert config.step3_ppo.actor.path == str(folder / "step1_sft" / "final")
    assert config.step3_ppo.reward.path == str(folder / "step2_reward" / "final")
    for name, step in config.steps().items():
        assert (step.run.output_dir, step.run.seed) == (str(folder / name), 7)


def test_what_the_user_says_wins_over_what_is_passed_along(recipe):
    config = load_recipe([*recipe, "--step2_reward.model.path", "small/model", "--step3_ppo.run.seed", "3"])
    assert config.step2_reward.model.path == "small/model"
    assert (config.step1_sft.run.seed, config.step3_ppo.run.seed) == (1, 3)


def test_a_score_function_takes_the_place_of_the_reward_model(recipe):
    config = load_recipe([*recipe, "--step3_ppo.reward.function", "my_task:score"])
    assert config.step3_ppo.reward.path == ""


ONE_BASE = ["--step3_ppo.share_base", "True"]
ONE_BASE += ["--step3_ppo.actor.lora.rank", "4", "--step3_ppo.critic.lora.rank", "4"]


def test_what_one_base_needs_is_left_by_the_steps_before(recipe):
    whole = load_recipe([*recipe, *ONE_BASE, "--step2_reward.model.lora.rank", "4"])
    adapters = ["--step1_sft.model.lora.rank", "4", "--step1_sft.model.lora.merge_on_save", "True"]
    merged = load_recipe([*recipe, *ONE_BASE, "--step2_reward.model.lora.rank", "4", *adapters])
    for config in (whole, merged):
        run_all.check_shared_base(config.step1_sft, config.step2_reward, config.step3_ppo)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ONE_BASE, "--step1_sft.model.lora.rank", "4"], "set step1_sft.model.lora.merge_on_save to True"),
        (ONE_BASE, "share_base needs adapters of a reward model: set step2_reward.model.lora.rank above 0"),
        ([*ONE_BASE, "--step2_reward.model.lora.rank", "8"], "set step3_ppo.critic.lora.rank to 8"),
        (
            ["--step3_ppo.micro_batch_size", "7"],
            "train_batch_size is 64, not a multiple of micro_batch_size x GPUs (7)",
        ),
        (["--num_gpus", "3"], "step1_sft: train_batch_size is 64, not a multiple of micro_batch_size x GPUs (24)"),
        (["--num_gpus", "0"], "num_gpus is 0: it needs at least 1"),
        (["--step2_reward.data.paths", "nowhere.jsonl"], "step2_reward: nowhere.jsonl:1: there is no such file"),
        (["--step2_reward.data.columns", "chosen", "best"], "pairs.jsonl:1: no column 'best'"),
        (["--step1_sft.data.format", "poem"], "format is 'poem', but this stage needs a demonstration"),
        (["--step3_ppo.ptx.format", "poem"], "format is 'poem'"),
        (["--step1_sft.run.output_dir", "elsewhere"], "step1_sft.run.output_dir is elsewhere: leave it out"),
        (["--step1_sft.optim.learning_rate", "1"], "there is no option step1_sft.optim.learning_rate"),
    ],
)
def test_bad_input_of_any_step_is_refused_before_the_first_starts(
    tmp_path, recipe, fake_stages, arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["run_all", *recipe, *arguments])
    with pytest.raises(SystemExit) as stop:
        run_all.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_more_gpus_than_there_are_is_refused(recipe, fake_stages, monkeypatch):
    monkeypatch.setattr(run_all, "count_gpus", lambda: 1)
    with pytest.raises(ValueError, match="num_gpus is 2, but this machine has 1"):
        run([*recipe, "--num_gpus", "2"])


def test_a_recipe_without_a_folder_says_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        load_recipe([])
    assert "output_dir" in capsys.readouterr().err


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(recipe, fake_stages, tmp_path):
    with OutputLock(tmp_path / "run"), pytest.raises(ValueError, match=f"run is in use by pid {os.getpid()} on"):
        run(recipe)


def test_the_recipe_has_a_step_for_each_stage():
    assert list(STEPS) == [name for name in RecipeConfig.__dataclass_fields__ if name.startswith("step")]


# --- processes --------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_run_group_returns_the_exit_code():
    assert run_group([sys.executable, "-c", "raise SystemExit(5)"], os.environ) == 5
    assert run_group(["bash", "-c", "kill -9 $$"], os.environ) == 137


def test_processes_that_a_launcher_leaves_behind_are_ended(tmp_path):
    code = run_group(["bash", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; exit 3"], os.environ)
    assert code == 3
    assert wait_for(lambda: not is_running(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_of_the_step(tmp_path, number):
    """The launcher dies at once and its ranks are slow to go: all must be gone when run_group returns."""
    program = textwrap.dedent(f"""
        import os
        from scripts.processes import Stopped, run_group
        rank = "trap 'sleep 0.3; exit 1' TERM; echo $BASHPID >> {tmp_path}/pids; while :; do sleep 0.05; done"
        try:
            run_group(["bash", "-c", f"({{rank}}) & ({{rank}}) & wait"], os.environ)
        except Stopped as stopped:
            raise SystemExit(stopped.exit_code)
    """)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    pids = tmp_path / "pids"
    assert wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
    assert not any(is_running(int(pid)) for pid in pids.read_text().split())


def test_ranks_that_do_not_heed_the_signal_are_killed(tmp_path):
    started = time.monotonic()
    command = [
        "bash",
        "-c",
        f"(trap '' TERM; echo $BASHPID > {tmp_path}/pid; while :; do sleep 0.05; done) & sleep 0.5",
    ]
    assert run_group(command, os.environ, stop_seconds=0.5) == 0
    assert wait_for(lambda: not is_running(int((tmp_path / "pid").read_text())))
    assert time.monotonic() - started < 15


def test_stopped_names_the_signal():
    stopped = Stopped(signal.SIGTERM)
    assert (str(stopped), stopped.exit_code) == ("SIGTERM", 143)


def test_stages_start_under_the_launcher_with_a_port_of_their_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = (stage_command("step1_sft.train", Path("config.yaml"), 2) for _ in range(2))
    assert first[1:5] == ["-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"]
    assert first[first.index("--num_gpus") + 1] == "2"
    assert first[first.index("--master_port") + 1] != second[second.index("--master_port") + 1]
    assert first[-4:] == ["--module", "step1_sft.train", "--config", "config.yaml"]


def test_processes_on_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    environment = stage_environment(2, num_gpus_here=0)
    assert (environment["OMP_NUM_THREADS"], environment["DS_ACCELERATOR"]) == ("4", "cpu")
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert stage_environment(2, num_gpus_here=0)["OMP_NUM_THREADS"] == "1"
