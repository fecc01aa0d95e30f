"""The processes of a run: how they start, who is who, sums over them, how they stop.

A process that no launcher started is a run of one: the same code, with rank 0 of 1.
"""

import logging
import os
import random
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from training.cpu_memory import reuse_memory
from training.durable import CannotWrite
from training.untrusted import check_versions

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OUT_OF_MEMORY = (
    "The GPU's memory is full. For activations, lower micro_batch_tokens or micro_batch_size, or set "
    "gradient_checkpointing; for rollouts, lower generation_batch_size or kv_cache_gib, or set keep_kv_cache False; "
    "for weights and optimizer, raise engine.zero_stage, set engine.offload_optimizer, or train adapters with "
    "lora.rank and share_base"
)
# DeepSpeed reads these as long as it runs, so `stop` takes back what `start` has set: a child would join this group.
_set_by_start: list[str] = []


def run(main: Callable[[], None]) -> None:
    """Runs a program.

    A ValueError or `CannotWrite` that this project raises is a sentence for the user: the program ends with it and with
    code 2. Every other exception, also a ValueError of a library, keeps its traceback.
    """
    try:
        main()
    except torch.OutOfMemoryError as error:
        error.add_note(OUT_OF_MEMORY)
        raise
    except (ValueError, CannotWrite) as error:
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        package = innermost.f_globals["__package__"] or ""
        if package.partition(".")[0] not in (__package__, main.__globals__["__package__"]):
            raise
        if _is_first_to_fail():
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def start(timeout_minutes: float) -> None:
    """Joins the process group through DeepSpeed: NCCL on GPUs, gloo on CPUs.

    Under a launcher once in a process: what the first group left at the launcher's port would confuse a second one.

    Args:
        timeout_minutes: how long a rank waits for the others before it gives up with an error.
    """
    check_versions()
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # One line per rank and call site, about names that DeepSpeed uses and the user cannot change.
    warnings.filterwarnings("ignore", message=".*(all_gather|reduce_scatter).*deprecated", category=FutureWarning)
    if device().type == "cuda":
        torch.cuda.set_device(device())
    else:
        reuse_memory()
        # Else DeepSpeed compiles a C++ all-reduce that training never calls: it takes minutes, and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        _become_a_run_of_one()
    deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), verbose=False)


def stop() -> None:
    """Waits for the other ranks and leaves the process group; does nothing when there is none.

    For a run that ends well: a rank that left while others still used the group would take them down.
    """
    if torch.distributed.is_initialized():
        barrier()
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()
    while _set_by_start:
        os.environ.pop(_set_by_start.pop(), None)


def rank() -> int:
    """Number of this process among all, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes, which is the number of GPUs where there are any."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def announce(sentence: str) -> None:
    """Prints a line for a person, on the main process."""
    if is_main():
        print(sentence, flush=True)


def free_port() -> int:
    """A port that nothing on this machine listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def device() -> torch.device:
    """This process's GPU; the CPU where there is none, or where DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def barrier() -> None:
    """Waits until every rank is here."""
    if world_size() > 1:
        torch.distributed.barrier(device_ids=[local_rank()] if device().type == "cuda" else None)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise sum of a tensor over all ranks, as a new tensor of the same shape, dtype and device."""
    return _reduce_over_ranks(tensor, torch.distributed.ReduceOp.SUM)


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise maximum of a tensor over all ranks, as a new tensor of the same shape, dtype and device."""
    return _reduce_over_ranks(tensor, torch.distributed.ReduceOp.MAX)


def own_share(count: int) -> slice:
    """This rank's part of so many things in a row: as many on every rank as on the others, or one more."""
    first, last = (count * part // world_size() for part in (rank(), rank() + 1))
    return slice(first, last)


def gather_objects(value: Any) -> list[Any]:
    """One picklable object per rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def seed_everything(seed: int, rank: int) -> None:
    """Seeds Python, numpy and torch on all devices, differently on every rank."""
    # numpy takes 32 bits; the step between ranks is a prime, so that seeds 1, 2, 3 on several ranks do not meet.
    seed = (seed + rank * 100003) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _is_first_to_fail() -> bool:
    """True on the one rank that tells what all may have met."""
    if not torch.distributed.is_initialized():
        return local_rank() == 0
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the rank that kept the count is gone, after it has told
        return False


def _become_a_run_of_one() -> None:
    for name, value in zip(LAUNCHER_VARIABLES, ("0", "0", "1", "127.0.0.1", str(free_port())), strict=True):
        os.environ[name] = value
        _set_by_start.append(name)


def _reduce_over_ranks(tensor: Tensor, operation: Any) -> Tensor:
    # NCCL adds up what is on the GPU only.
    result = tensor.detach().to(device(), copy=True)
    if world_size() > 1:
        torch.distributed.all_reduce(result, op=operation)
    return result.to(tensor.device)
