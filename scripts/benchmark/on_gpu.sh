#!/usr/bin/env bash
# All that is to be measured on a GPU, in one go: the tests that need one, the kernels, and rollouts at the sizes of
# Llama-3.2-1B and 3B and Llama-3.1-8B with random weights. Writes JSON files and a log:
#
#   bash scripts/benchmark/on_gpu.sh [FOLDER]     default: scripts/benchmark/results
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
    for shape in 1b 3b 8b; do
        for workload in fixed chat; do
            "$python" -m scripts.benchmark.generation --shape "$shape" --workload "$workload" \
                --output "$folder/generation-$shape-$workload-$name.json"
        done
    done
} 2>&1 | tee "$folder/$name.log"
