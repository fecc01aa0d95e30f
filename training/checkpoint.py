"""Save and resume all that a run must remember, so that a run that was stopped ends as one that was not.

OUTPUT/checkpoints/step-000100/
    MANIFEST.json                        files with their hashes, versions, number of ranks, options
    state.json, state.safetensors        what the stage remembers beside its engines
    rng-00000.json                       random numbers of each rank
    ENGINE/engine.json, ENGINE/rank-00000.safetensors
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import durable, engine_state, storage
from training.config_files import as_plain
from training.distributed import announce, gather_objects, is_main, max_over_ranks, rank, seed_everything, world_size
from training.manifest import MANIFEST, FileRecord, Manifest, checkpoint_name, read_manifest
from training.supervision import EXIT_STOPPED, Supervisor

FOLDER = "checkpoints"
STATE_FILE, TENSORS_FILE = "state.json", "state.safetensors"
PACKAGES = ("torch", "deepspeed", "transformers", "peft")
# They decide how fast a run is, how much memory it needs and what it reports, but what it learns only to rounding.
FREE_OPTIONS = {
    *("output_dir", "log_every", "eval_every", "tensorboard", "wandb_project", "samples_shown"),
    *("timeout_minutes", "function_minutes", "function_early"),
    *("save_every", "save_minutes", "keep_checkpoints", "resume", "allow_changes", "max_skipped_steps"),
    *("zero_stage", "offload_optimizer", "offload_parameters", "gradient_checkpointing", "attention", "packing"),
    *("compile_layers", "activation_budget"),
    *("micro_batch_size", "micro_batch_tokens", "generator", "generation_batch_size", "kv_cache_gib", "keep_kv_cache"),
}


@dataclass(frozen=True)
class RunState:
    """What a stage remembers beside its engines; the same on every rank."""

    step: int
    values: dict[str, Any] = field(default_factory=dict)
    """Fit for JSON."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metric: float | None = None
    """The last evaluation of these very weights, larger is better; None without one. The best checkpoint is kept."""


@dataclass
class _Saving:
    """A checkpoint that a thread of this rank writes."""

    name: str
    facts: dict[str, Any]
    staging: Path
    thread: threading.Thread
    pause_seconds: float
    seconds: float = 0.0
    """Until all of this rank's part was on the disk."""
    records: list[FileRecord] = field(default_factory=list)
    error: Exception | None = None


class Checkpoints:
    """The checkpoints of one run. Every rank makes all calls."""

    def __init__(
        self,
        config: Any,
        engines: Mapping[str, deepspeed.DeepSpeedEngine],
        supervisor: Supervisor,
        data: str,
    ) -> None:
        """
        Args:
            config: of the stage; `config.run` says where and when to save.
            engines: those that are trained, by name.
            supervisor: knows whether the run was asked to stop.
            data: digest of what is trained on, which must stay the same.
        """
        self._config, self._run = config, config.run
        self._engines, self._supervisor, self._data = dict(engines), supervisor, data
        self._root = Path(self._run.output_dir) / FOLDER
        self._saving: _Saving | None = None
        self._saved_at = time.monotonic()

    def restore(self) -> RunState | None:
        """Put the newest good checkpoint into the engines and the random numbers; None if there is none to go on from.

        Raises:
            ValueError: the run that saved it had other options, which `run.allow_changes` does not permit.
        """
        manifest = self._newest()
        if manifest is None:
            return None
        saved, own = manifest.facts["options"], self._options()
        refuse_changes(saved, own, manifest.folder, allowed=self._run.allow_changes)
        for name, engine in self._engines.items():
            engine_state.load(engine, manifest.folder / name)
        _restore_random_numbers(manifest.folder, self._run.seed + manifest.facts["step"])
        values = json.loads((manifest.folder / STATE_FILE).read_text())
        tensors = load_file(manifest.folder / TENSORS_FILE) if (manifest.folder / TENSORS_FILE).exists() else {}
        announce(f"resumed from {manifest.folder}")
        return RunState(manifest.facts["step"], values, tensors, manifest.facts["metric"])

    def after_step(self, step: int, state: Callable[[], RunState], *, may_save: bool = True) -> None:
        """Save if it is time, or if the run was asked to stop; to be called after every optimizer step.

        Args:
            step: of `run.save_every`.
            state: called for what to save.
            may_save: whether it may be time; a run that is asked to stop saves in any case.

        Raises:
            SystemExit: the run was asked to stop, and has saved. The same on all ranks.
            OSError: the checkpoint could not be written. The last good one is untouched.
        """
        self._supervisor.progress("train", step)  # a run of which it hears nothing is taken for hung
        seconds = time.monotonic() - self._saved_at
        by_time = is_main() and 0 < 60 * self._run.save_minutes <= seconds
        writing = self._saving is not None and self._saving.thread.is_alive()
        by_time, writing = max_over_ranks(torch.tensor([by_time, writing], dtype=torch.int32)).bool().tolist()
        if self._saving is not None and not writing:
            self._finish()
        stop = self._supervisor.should_stop()
        by_step = self._run.save_every > 0 and step % self._run.save_every == 0
        if stop or (may_save and (by_time or by_step)):
            self._begin(state())
        if stop:
            self._finish()
            raise SystemExit(EXIT_STOPPED)

    def close(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        self._finish()

    def _options(self) -> dict[str, Any]:
        return as_plain(self._config) | {"digest of the training data": self._data}

    def _newest(self) -> Manifest | None:
        found = None
        with _on_all_ranks():
            if is_main() and self._run.resume == "auto":
                there_were = storage.checkpoint_names(self._root)
                found = storage.newest_good(self._root, announce)
                if there_were and found is None:
                    raise ValueError(
                        f"no checkpoint in {self._root} is good: set run.resume never to begin anew, or put one back"
                    )
            elif is_main():
                for name in storage.checkpoint_names(self._root):
                    storage.set_aside(self._root / name, "old")
        return gather_objects(found)[0]

    def _begin(self, state: RunState) -> None:
        self._finish()  # at most one at a time: it has the memory of a second copy
        started = time.monotonic()
        name = checkpoint_name(state.step)
        engines = {name: engine_state.snapshot(engine) for name, engine in self._engines.items()}
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.tensors.items()}
        num_bytes = sum(engine_state.size(engine) for engine in self._engines.values())
        staging = self._root / (storage.SAVING + name)
        with _on_all_ranks():
            if is_main():
                with durable.explained_disk_errors(self._root, num_bytes):
                    storage.begin(self._root, name)
                    durable.require_space(self._root, num_bytes)
                    for engine in engines:
                        durable.make_folder(staging / engine)
        random_numbers = _random_numbers()

        def write() -> None:
            try:
                with durable.explained_disk_errors(self._root, num_bytes):
                    files = _write(staging, state, tensors, engines, random_numbers)
                    saving.records = storage.seal(staging, files)
                saving.seconds = time.monotonic() - started
            except Exception as error:  # told to all ranks by `_finish`
                saving.error = error

        facts = {
            "step": state.step,
            "metric": state.metric,
            "ranks": world_size(),
            "versions": {package: version(package) for package in PACKAGES},
            "options": self._options(),
        }
        thread = threading.Thread(target=write, name="checkpoint")
        saving = _Saving(name, facts, staging, thread, time.monotonic() - started)
        thread.start()
        self._saving, self._saved_at = saving, started

    def _finish(self) -> None:
        """Make a checkpoint of what the threads of all ranks have written."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.thread.join()
        with _on_all_ranks():
            if saving.error is not None:
                raise saving.error
        records = [record for records in gather_objects(saving.records) for record in records]
        with _on_all_ranks():
            if is_main():
                num_bytes = sum(record.size for record in records)
                with durable.explained_disk_errors(self._root, num_bytes):
                    folder = storage.publish(saving.staging, records, saving.facts)
                    storage.prune(self._root, self._run.keep_checkpoints, self._best())
                announce(
                    f"saved {folder} ({num_bytes / 2**20:.1f} MiB): training paused for {saving.pause_seconds:.2f} s, "
                    f"on the disk after {saving.seconds:.2f} s"
                )

    def _best(self) -> set[str]:
        """The name of the checkpoint with the best metric, or nothing."""
        metrics = {}
        for name in storage.checkpoint_names(self._root):
            with suppress(ValueError):  # a damaged one is found, and set aside, on resuming
                metric = read_manifest(self._root / name / MANIFEST).facts["metric"]
                if metric is not None:
                    metrics[name] = metric
        return {max(metrics, key=metrics.__getitem__)} if metrics else set()


@contextmanager
def _on_all_ranks() -> Iterator[None]:
    """What fails on one rank fails on all of them, after the block."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    found = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for number, text in enumerate(found):
        if text is not None:
            raise durable.CannotWrite(f"rank {number}: {text}")


def refuse_changes(saved: Any, own: Any, where: Path, *, allowed: bool) -> None:
    """Raises a ValueError that lists the options in which two runs differ, but for those that change nothing learnt.

    Args:
        saved, own: options as `as_plain` gives them.
        where: what the saved ones belong to, for the message.
        allowed: whether to leave it at that.
    """
    before, now = dict(_flat(saved)), dict(_flat(own))
    changed = [
        f"  {name}: {before.get(name, 'not there')} then, {now.get(name, 'not there')} now"
        for name in sorted(before.keys() | now.keys())
        if name.rpartition(".")[2] not in FREE_OPTIONS and before.get(name) != now.get(name)
    ]
    if changed and not allowed:
        raise ValueError(
            f"{where} comes from a run with other options:\n" + "\n".join(changed) + "\n"
            "give those again; or set run.allow_changes True to go on with these, run.resume never to begin anew, or "
            "another run.output_dir"
        )


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    dot = "." if prefix else ""
    return [item for name, part in value.items() for item in _flat(part, f"{prefix}{dot}{name}")]


def _write(
    staging: Path,
    state: RunState,
    tensors: dict[str, Tensor],
    engines: Mapping[str, engine_state.EngineState],
    random_numbers: dict[str, Any],
) -> list[Path]:
    """Writes this rank's part of a checkpoint and returns its files."""
    files = [staging / f"rng-{rank():05d}.json"]
    files[0].write_text(json.dumps(random_numbers))
    for name, engine in engines.items():
        for key, values in engine.tensors.items():
            if not torch.isfinite(values).all():
                raise RuntimeError(f"not saved: {key} of {name} is not finite. The last good checkpoint is untouched")
        files += engine_state.write(engine, staging / name, rank(), is_main())
    if is_main():
        files.append(staging / STATE_FILE)
        files[-1].write_text(json.dumps(state.values))
        if tensors:
            files.append(staging / TENSORS_FILE)
            save_file(tensors, files[-1])
    return files


def _random_numbers() -> dict[str, Any]:
    """The states of all generators of random numbers that this process has, fit for JSON."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def _restore_random_numbers(folder: Path, seed: int) -> None:
    """Those of this rank; a rank that there was none of gets new ones, from `seed`."""
    file = folder / f"rng-{rank():05d}.json"
    if not file.exists():
        seed_everything(seed, rank())
        return
    saved = json.loads(file.read_text())
    variant, keys, gauss = saved["python"]
    random.setstate((variant, tuple(keys), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.tensor(saved["torch"], dtype=torch.uint8))
    if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.tensor(state, dtype=torch.uint8) for state in saved["cuda"]])
