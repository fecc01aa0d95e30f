#!/usr/bin/env bash
# All that is to be measured on a GPU, in one go: the tests that need one, the kernels, and rollouts, PPO and steps 1 and 2
# at the sizes of Llama-3.2-1B and 3B and Llama-3.1-8B with random weights; PPO and the steps beside TRL, if it is
# installed (scripts/benchmark/peers.sh, or in the Python of this project). Writes JSON files and a log:
#
#   bash scripts/benchmark/on_gpu.sh [FOLDER]     default: scripts/benchmark/results
#
# SHAPES and WORKLOADS choose a part of it, as in SHAPES=1b WORKLOADS="B C".
set -euo pipefail
# shellcheck source=../environment.sh
source "$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)/../environment.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}" && exit ;; esac
folder="${1:-$root/scripts/benchmark/results}"
has_gpu || {
    printf 'on_gpu: nvidia-smi shows no GPU here\n' >&2
    exit 1
}
mkdir -p -- "$folder"
cd -- "$root"
name="$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')"
export HF_HUB_OFFLINE=1
{
    "$python" -m pytest -q -m gpu || printf 'on_gpu: tests failed, figures follow all the same\n'
    "$python" -m scripts.benchmark.kernels --output "$folder/kernels-$name.json"
    for shape in ${SHAPES:-1b 3b 8b}; do
        for workload in fixed chat; do
            "$python" -m scripts.benchmark.generation --shape "$shape" --workload "$workload" \
                --output "$folder/generation-$shape-$workload-$name.json"
        done
    done
    for shape in ${SHAPES:-1b 3b 8b}; do
        lora=0 # four models of 1B and two optimizers fit onto one GPU, larger ones only with adapters
        [[ "$shape" == 1b ]] || lora=16
        for workload in ${WORKLOADS:-A B C}; do
            "$python" -m scripts.benchmark.ppo --shape "$shape" --workload "$workload" --lora_rank "$lora" \
                --output "$folder/ppo-$shape-$workload-$name.json"
        done
    done
    "$python" -m scripts.benchmark.sft_reward --shape 1b --output "$folder/sft-reward-1b-$name.json"
    "$python" -m scripts.benchmark.ppo --grow True --shape 1b --sides ours --output "$folder/growth-1b-$name.json"
} 2>&1 | tee "$folder/$name.log"
