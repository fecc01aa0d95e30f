#!/usr/bin/env bash
# Makes .venv at the repository's root and installs what constraints.txt pins. Does nothing when that is already so.
#
#   bash scripts/setup.sh
#
# PYTHON=/path/to/python chooses the interpreter (3.11 or 3.12). pip's own settings are respected: where there is no GPU, the
# much smaller CPU build of torch comes from the index that pytorch.org/get-started names, set as PIP_EXTRA_INDEX_URL.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/.installed"
log="$venv/setup.log"
triton=3.9.0

fail() {
    printf 'set-up: %s\n' "$@" >&2
    exit 1
}

# What the environment was made from and where: a changed pin or a moved folder needs a new installation.
fingerprint() {
    { cat -- "$root/constraints.txt" "$root/pyproject.toml"; printf '%s\n' "$root"; } | sha256sum | cut -d ' ' -f 1
}

is_installed() {
    [[ -f "$stamp" && "$(<"$stamp")" == "$(fingerprint)" ]] && "$venv/bin/python" -c '' 2>/dev/null
}

# Prints the first interpreter that is new enough and can make environments; else says what each one lacks.
find_python() {
    local candidate version candidates=(python3 python3.12 python3.11 python) refused=()
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
        if [[ "$version" != 3.11 && "$version" != 3.12 ]]; then
            refused+=("$candidate is Python $version")
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            refused+=("$candidate ($version) has no venv module: on Debian or Ubuntu, apt-get install python$version-venv")
        else
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed. Install one, or name it: PYTHON=/path/to/python bash scripts/setup.sh" \
        "${refused[@]:-no Python was found under the names: ${candidates[*]}}"
}

# phase NAME COMMAND...: runs the command into the log and prints one line with its time.
phase() {
    local name="$1" started="$SECONDS"
    shift
    printf 'set-up: %s ... ' "$name"
    if ! "$@" >>"$log" 2>&1; then
        printf 'failed after %d s\n' "$((SECONDS - started))"
        explain_failure "$name"
    fi
    printf '%d s\n' "$((SECONDS - started))"
}

explain_failure() {
    tail -n 20 -- "$log" >&2
    # Nothing that is pinned needs a compiler where its wheel exists; without a wheel pip builds from source.
    if grep -qE "(gcc|cc|c\+\+|g\+\+|clang).*(not found|No such file)|CMAKE_C(XX)?_COMPILER|No such file.*'(cc|gcc|c\+\+)'" "$log"; then
        printf 'set-up: a C compiler is missing: on Debian or Ubuntu, apt-get install build-essential\n' >&2
    fi
    fail "\"$1\" did not work; the whole output is in $log. The same command starts again where it stopped."
}

install_packages() {
    local python pip torch
    python="$(find_python)"
    if ! "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
        # The log lies inside the environment, which this makes.
        printf 'set-up: Python environment in %s, from %s\n' "$venv" "$(command -v -- "$python")"
        "$python" -m venv --clear -- "$venv" || fail "$python could not make an environment in $venv"
    fi
    rm -f -- "$stamp"
    : >"$log"
    pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
    torch="$(grep -E '^torch==' "$root/constraints.txt")"
    # torch brings the GPU libraries of its own build; everything after it comes without dependencies, from a list that is
    # complete, so that nothing can replace that build. DeepSpeed is built from source, but not its C++ parts.
    phase "$torch (the largest part)" "${pip[@]}" -c "$root/constraints.txt" "$torch" setuptools wheel
    DS_BUILD_OPS=0 phase "the other packages" \
        "${pip[@]}" --no-deps --no-build-isolation -r "$root/constraints.txt"
    # torch's GPU builds bring the Triton that they were made with. Its interpreter tests the GPU kernels without a GPU.
    "$venv/bin/python" -c 'import triton' 2>>"$log" || phase "Triton, for tests" "${pip[@]}" --no-deps "triton==$triton"
    phase "a first import" "$venv/bin/python" -W ignore -c 'import torch, transformers, deepspeed'
    fingerprint >"$stamp"
}

if is_installed; then
    exit 0
fi
command -v flock >/dev/null || fail "the program flock is missing: on Debian or Ubuntu, apt-get install util-linux"
exec 9>"$root/.setup.lock"
if ! flock --nonblock 9; then
    printf 'set-up: waiting for another set-up of this folder to end\n'
    flock 9
fi
if ! is_installed; then
    started="$SECONDS"
    install_packages
    printf 'set-up: done in %d s\n' "$((SECONDS - started))"
fi
