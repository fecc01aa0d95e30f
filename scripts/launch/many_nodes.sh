#!/usr/bin/env bash
# One stage on the GPUs of several machines, named in a hostfile with one line each: `worker-1 slots=8`.
#
#   bash scripts/launch/many_nodes.sh hostfile step3_ppo.train --config my.yaml [--optim.lr 1e-6 ...]
#
# Every machine holds this folder, its .venv, the data and the output folder at the same path, and lets this one in by ssh
# without a password. Needs the program pdsh here. MASTER_PORT chooses the port of the first machine (29500).
set -euo pipefail
# shellcheck source=../environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../environment.sh"
[[ -n "${1:-}" && -n "${2:-}" && "$2" != -* ]] || { usage "${BASH_SOURCE[0]}" >&2 && exit 2; }
[[ -f "$1" ]] || { printf 'there is no hostfile %s: write one line per machine, as `worker-1 slots=8`\n' "$1" >&2 && exit 2; }
command -v pdsh >/dev/null || { printf 'the program pdsh is missing: on Debian or Ubuntu, apt-get install pdsh\n' >&2 && exit 2; }
hostfile="$(realpath -- "$1")"
shift
exec "$python" -m deepspeed.launcher.runner -q --hostfile "$hostfile" --no_local_rank \
    --master_port "${MASTER_PORT:-29500}" --module "$@"
