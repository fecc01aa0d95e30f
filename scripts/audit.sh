#!/usr/bin/env bash
# Asks whether a vulnerability is known of any pinned package: pip-audit on constraints.txt, in an environment of its own.
#
#   bash scripts/audit.sh [REQUIREMENTS]
#
# Needs the network: the packages' names and versions are sent to pypi.org. Ends with code 0 where nothing is known of any
# package, 1 where something is, which it lists, and 3 where nobody could be asked, be it about one package.
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=environment.sh
source "$here/environment.sh"
requirements="${1:-$root/constraints.txt}"
service=https://pypi.org

# end CODE MESSAGE
end() {
    printf 'audit: %s\n' "$2" >&2
    exit "$1"
}

[[ -f "$requirements" ]] || end 2 "$requirements is not a file: name a list of pinned packages"
folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT
"$python" -c "import urllib.request; urllib.request.urlopen('$service/pypi/pip/json', timeout=20)" 2>"$folder/log" ||
    end 3 "$service, which knows the vulnerabilities, cannot be reached ($(tail -n 1 -- "$folder/log")): nothing was checked"
"$python" -m venv -- "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input pip-audit==2.10.1 >"$folder/log" 2>&1 ||
    end 3 "pip-audit cannot be installed ($(tail -n 1 -- "$folder/log")): nothing was checked"
code=0
# Every package is pinned together with what it needs, so nothing is resolved. --strict: a package of which the service does
# not know is no package of which nothing is known.
"$folder/venv/bin/pip-audit" --strict --requirement "$requirements" --no-deps --disable-pip --progress-spinner off \
    --output "$folder/found" >"$folder/log" 2>&1 || code=$?
[[ -f "$folder/found" ]] || end 3 "pip-audit did not come to its end ($(tail -n 1 -- "$folder/log"))"
cat -- "$folder/found"
((code == 0)) || end "$code" "packages with known vulnerabilities: raise their pins"
end 0 "no vulnerability is known of the $(grep -c == -- "$requirements") packages in $requirements"
