#!/usr/bin/env bash
# One stage on N GPUs of this machine, or in N processes on the CPU where there is none.
#
#   bash scripts/launch/one_node.sh 8 step3_ppo.train --config my.yaml [--optim.lr 1e-6 ...]
#
# CUDA_VISIBLE_DEVICES=2,3 chooses the GPUs; else they are the first N.
set -euo pipefail
# shellcheck source=../environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../environment.sh"
[[ "${1:-}" =~ ^[1-9][0-9]*$ && -n "${2:-}" && "$2" != -* ]] || { usage "${BASH_SOURCE[0]}" >&2 && exit 2; }
processes="$1"
shift
use_cpu_settings "$processes"
devices=(--num_gpus "$processes")
if has_gpu && [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    # With --num_gpus the launcher would pass over CUDA_VISIBLE_DEVICES; without it, it takes all that are visible.
    visible="$(cut -d , -f "1-$processes" <<<"$CUDA_VISIBLE_DEVICES")"
    export CUDA_VISIBLE_DEVICES="$visible"
    devices=()
fi
exec "$python" -m deepspeed.launcher.runner -q "${devices[@]}" --no_local_rank --master_port "$(free_port)" --module "$@"
