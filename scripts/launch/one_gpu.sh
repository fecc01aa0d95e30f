#!/usr/bin/env bash
# One stage on one GPU, or in one process on the CPU where there is none.
#
#   bash scripts/launch/one_gpu.sh step1_sft.train --config my.yaml [--optim.lr 1e-5 ...]
#
# CUDA_VISIBLE_DEVICES=3 chooses the GPU; else it is the first.
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=../environment.sh
source "$here/../environment.sh"
[[ -n "${1:-}" && "$1" != -* ]] || { usage "${BASH_SOURCE[0]}" >&2 && exit 2; }
exec bash "$here/one_node.sh" 1 "$@"
