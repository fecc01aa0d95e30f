#!/usr/bin/env bash
# Sets the environment up, then runs every check: lint, format, types, tests. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_losses.py -k ppo
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
bash "$here/setup.sh"
# shellcheck source=environment.sh
source "$here/environment.sh"
use_cpu_settings 2 # the tests of several ranks start two
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg

# check NAME COMMAND...: one line with its time; a failure ends the script after the tool's own message.
check() {
    local name="$1" started="$SECONDS"
    shift
    "$@" || {
        local code=$?
        printf 'test: %s failed\n' "$name" >&2
        exit "$code"
    }
    printf 'test: %s passed in %d s\n' "$name" "$((SECONDS - started))"
}

cd -- "$root"
check "ruff check" "$python" -m ruff check --quiet .
check "ruff format" "$python" -m ruff format --check .
check "mypy" "$python" -m mypy --no-error-summary
check "pytest" "$python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
