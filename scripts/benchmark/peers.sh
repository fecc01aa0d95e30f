#!/usr/bin/env bash
# Makes .venv-peers at the repository's root and installs what scripts/benchmark/peers.txt names, with the versions of
# constraints.txt for all that it shares with this project. Does nothing when that is already so.
#
#   bash scripts/benchmark/peers.sh
set -euo pipefail
# shellcheck source=../environment.sh
source "$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)/../environment.sh"
case "${1:-}" in -h | --help) usage "${BASH_SOURCE[0]}" && exit ;; esac
venv="$root/.venv-peers"
stamp="$venv/.installed"
wanted="$(cat -- "$root/constraints.txt" "$root/scripts/benchmark/peers.txt" | sha256sum | cut -d ' ' -f 1)"
if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    exit 0
fi
started="$SECONDS"
"$python" -m venv --clear -- "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    -c "$root/constraints.txt" -r "$root/scripts/benchmark/peers.txt"
"$venv/bin/python" -W ignore -c 'import trl, trl.experimental.ppo'
printf '%s\n' "$wanted" >"$stamp"
printf 'peers: .venv-peers made in %d s\n' "$((SECONDS - started))"
