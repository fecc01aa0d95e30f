# Sourced by the other scripts: the repository's root, its Python, and settings for the processes that they start.
# Every setting is a default: one that the user has set stays.
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python3)"

# The modules are found from any directory.
[[ "${PYTHONPATH:-}" == "$root"* ]] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONWARNINGS="${PYTHONWARNINGS-ignore::FutureWarning}" # torch repeats the same one in every process
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM-false}"

# Prints the comment at the head of a script, which is its usage message.
usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$1"
}

has_gpu() {
    nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# use_cpu_settings PROCESSES: where there is no NVIDIA GPU, shares the cores among the processes.
use_cpu_settings() {
    has_gpu && return
    local threads="$(($(nproc) / $1))"
    export DS_ACCELERATOR="${DS_ACCELERATOR-cpu}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS-$((threads > 0 ? threads : 1))}"
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
