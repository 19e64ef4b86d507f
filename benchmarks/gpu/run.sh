#!/usr/bin/env bash
# Everything that wants a GPU, in one command: the tests marked gpu, training steps against
# open_clip's, the loss up to 262,144 pairs, and memory against the plan. At most 8 minutes on one
# H100 or H200. Needs python with torch 2.11 or later and CUDA, and no network.
#
#   benchmarks/gpu/run.sh [--wheels FOLDER] [--device cuda|cpu] [--small] [--out FOLDER]
#
# --wheels  a folder of wheels, as benchmarks/gpu/pack.sh fills one: those whose distribution is not
#           installed are installed for this run alone
# --small   sizes that a CPU takes in minutes, to see that everything runs
# --out     results.json, results.txt and the logs (default: runs/benchmarks/gpu)
set -euo pipefail
cd "$(dirname "$0")/../.."

refuse() { echo "error: $1" >&2; exit 2; }
wheels="" out="runs/benchmarks/gpu" words=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --wheels | --out | --device) [ -n "${2:-}" ] || refuse "$1 needs a value; --help tells which" ;;&
        --wheels) wheels="$2"; shift 2 ;;
        --out) out="$2"; shift 2 ;;
        --device) words+=("$1" "$2"); shift 2 ;;
        --small) words+=("$1"); shift ;;
        *) refuse "there is no option $1; --help lists those that there are" ;;
    esac
done
python=${PYTHON:-python3}
command -v "$python" >/dev/null || refuse "there is no $python; set PYTHON to one with torch and CUDA"
if [ -n "$wheels" ] && ! compgen -G "$wheels/*.whl" >/dev/null; then
    refuse "there is no wheel in $wheels; fill a folder with benchmarks/gpu/pack.sh"
fi
mkdir -p "$out" || refuse "$out cannot be made; choose another --out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

if [ -n "$wheels" ]; then
    # without dependencies: torch and what it brought stay as they are
    "$python" - "$wheels" <<'PYTHON' | xargs -r "$python" -m pip install --quiet --no-index --no-deps \
        --target "$site"
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    try:
        version(wheel.name.split("-")[0])
    except PackageNotFoundError:
        print(wheel)
PYTHON
fi

path="$PWD/benchmarks:$site"
for package in packages/*/src; do path="$PWD/$package:$path"; done
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$python" benchmarks/gpu/measure.py --out "$out" "${words[@]}"
