"""Proves that a run cannot be lost: `python -m scripts.torture --kills 200`.

Starts tiny runs of the three steps on two ranks, does them harm, goes on, and compares their final weights and metrics
to the bit with those of runs that nothing happened to. Ends with code 1 where something was lost.

    --kills N         kill -9 of the whole process group, at random moments and while checkpoints are written
    --rank-deaths N   kill -9 of one rank
    --stops N         SIGTERM or SIGUSR1 to one rank or both, which then save
    --resizes N       runs that go on with other numbers of ranks and at other ZeRO stages, which agree to 1e-4
    --disk-full N     no room for a file, on one rank
    --bit-flips N     a bit flipped in a random file of a checkpoint, or the file cut
    --soak N          iterations of PPO in one process, whose memory may not grow
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

# Before torch is imported: two ranks of one thread each.
os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}

from scripts.torture import faults
from scripts.torture.ranks import load_stages
from scripts.torture.runs import STAGES, Workshop

FAULTS = {
    "kills": faults.kills,
    "rank_deaths": faults.rank_deaths,
    "stops": faults.stops,
    "resizes": faults.resizes,
    "disk_full": faults.full_disks,
    "bit_flips": faults.bit_flips,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*FAULTS, "soak"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=0, metavar="N")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=2)
    parser.add_argument("--lora", action="store_true", help="train adapters")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    options = parser.parse_args()
    if options.resizes and options.precision != "fp32":
        parser.error("--resizes compares numbers to 1e-4, which takes --precision fp32")
    load_stages()
    draw = random.Random(options.seed)
    print(f"ZeRO {options.zero_stage}, {'adapters' if options.lora else 'all weights'}, {options.precision}, 2 ranks")
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder), zero_stage=options.zero_stage, lora=options.lora, precision=options.precision)
        failed = False
        for name, harm in FAULTS.items():
            count = getattr(options, name)
            for number, stage in enumerate(options.stages if count else ()):
                share = count * (number + 1) // len(options.stages) - count * number // len(options.stages)
                if share == 0:
                    continue
                started = time.monotonic()
                outcome = harm(workshop, stage, share, draw)
                outcome.seconds = time.monotonic() - started
                failed |= outcome.bitwise is False
                print(f"{name.replace('_', ' ')}: {outcome.line()}", flush=True)
        if options.soak:
            for line in faults.soak(workshop, options.soak):
                print(line, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
