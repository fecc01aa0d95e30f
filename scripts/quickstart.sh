#!/usr/bin/env bash
# From nothing to a report: sets up, makes the model folder and the data, runs all three steps, builds report.html.
#
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --seed 2 --output_dir runs/second
#
# Further arguments go to scripts.run_all and override scripts/recipes/quickstart/recipe.yaml. The same command again
# continues where the last one stopped.
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
seed=1
output_dir=""
overrides=()
while (($#)); do
    case "$1" in
        -h | --help)
            sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --seed=*) seed="${1#*=}" ;;
        --output_dir=*) output_dir="${1#*=}" ;;
        --seed | --output_dir)
            (($# > 1)) || { printf '%s needs a value\n' "$1" >&2 && exit 2; }
            if [[ "$1" == --seed ]]; then seed="$2"; else output_dir="$2"; fi
            shift
            ;;
        *) overrides+=("$1") ;;
    esac
    shift
done
[[ "$seed" =~ ^[0-9]+$ ]] || { printf -- '--seed is %s, not a whole number\n' "$seed" >&2 && exit 2; }
output_dir="$(realpath -m -- "${output_dir:-$here/../runs/quickstart-seed$seed}")"

bash "$here/setup.sh"
# shellcheck source=environment.sh
source "$here/environment.sh"
cd -- "$root"
model="$("$python" -m scripts.recipes.smollm2 | tail -n 1)"
data="$output_dir/data"
"$python" -m scripts.recipes.quickstart.prepare --output_dir "$data" --seed "$seed"
"$python" -m scripts.run_all --config scripts/recipes/quickstart/recipe.yaml \
    --output_dir "$output_dir" --model "$model" --seed "$seed" \
    --step1_sft.data.paths "$data/demonstrations.jsonl" --step2_reward.data.paths "$data/pairs.jsonl" \
    --step3_ppo.data.paths "$data/prompts.jsonl" --step3_ppo.ptx.paths "$data/demonstrations.jsonl" "${overrides[@]}"
printf 'The report is %s\n' "$output_dir/report.html"
