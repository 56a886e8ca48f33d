#!/usr/bin/env bash
# What this machine's GPU does with vgm: bash tests/gpu/run.sh OUT [--budget 470] [--only peak,dit] [--dry-run]
# Nothing needs to be installed beside torch, accelerate, safetensors, pluggy, typer, rich, pillow, pyyaml, numpy and
# pytest; wheels of pydantic in .wheels/ (make gpu-wheels) are unpacked where it is missing. See docs/gpu.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=${1:?usage: tests/gpu/run.sh OUT [options]}
shift
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$root/vgm_cli" "$site/vgm_cli"
ln -s "$root/plugins" "$site/vgm_plugins"
ln -s "$root/recipes" "$site/vgm_recipes"
ln -s "$root/docs/papers" "$site/vgm_papers"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" VGM_PLUGINS="" VGM_CACHE="$site/cache" PYTHONUNBUFFERED=1
if ! "$python" -c 'import pydantic' 2>/dev/null; then
  for wheel in "$root"/.wheels/*.whl; do
    [ -e "$wheel" ] || { echo "error: pydantic is missing and .wheels/ is empty: make gpu-wheels" >&2; exit 4; }
    "$python" -m zipfile -e "$wheel" "$site"
  done
  "$python" -c 'import pydantic'
fi
"$python" "$root/tests/gpu/run.py" "$out" "$@"
