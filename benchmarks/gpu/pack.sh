#!/usr/bin/env bash
# Carry what a machine without a network lacks beside torch: wheels of everything that Frugal and its
# tests need, in the versions of constraints.txt, without torch and what belongs to it.
#
#   benchmarks/gpu/pack.sh FOLDER [PYTHON_VERSION]
#
# Takes PYTHON_VERSION from the machine that packs; there is no wheel of DeepSpeed, which is built.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
fi
folder=$1
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: there is no $python; run make setup, or set PYTHON to one with pip" >&2
    exit 2
fi
version=${2:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
ours='^(torch|torchvision|triton|nvidia-.*|cuda-.*|numpy|setuptools|deepspeed|mypy.*|ruff)=='
grep -vE "^#|$ours" constraints.txt >"$folder.txt" || true
mkdir -p "$folder"
"$python" -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" \
    --dest "$folder" --requirement "$folder.txt"
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" \
    "$(grep '^deepspeed==' constraints.txt)"
rm "$folder.txt"
du -sh "$folder"
