# shellcheck shell=bash
# What the two calls share; sourced by them in the root of the repository. Sets `item` and `failed`.
set -u
: "${OUT:?is the folder for what comes back}"
# What stays on the machine, if the next call comes to the same one: packages, data, caches.
export KEEP=${KEEP:-/tmp/jaxtrain-gpu}
export CALL_BEGAN CALL_SECONDS=${1:-530}
CALL_BEGAN=$(date +%s)
export OUT PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$KEEP/site"
export JAXTRAIN_DATA_DIR=${JAXTRAIN_DATA_DIR:-$KEEP/data}
mkdir -p "$OUT" "$KEEP/packs"
failed=0

# shellcheck disable=SC2034  # the calls exit with `failed`
item() { # its name, the percentage of the call's seconds that it may take, its command
  python3 -m benchmarks.gpu.item "$@" || failed=1
}

# What was sent along: the missing packages, a half of the images, caches of an earlier call.
if [ -d .wheels ]; then item wheels 10 python3 -m benchmarks.gpu_runs install .wheels "$KEEP/site"; fi
if [ -d .packs ]; then cp -R .packs/. "$KEEP/packs/"; fi
for caches in .caches/*.tar.gz; do
  if [ -f "$caches" ]; then tar -xzf "$caches" -C "$KEEP"; fi
done
