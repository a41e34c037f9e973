#!/usr/bin/env bash
# Starts a run on this host, and again from its last checkpoint when it dies (`jaxtrain launch`):
#
#     launch/local.sh [P] --config FILE [more arguments of `jaxtrain train`]
#
# One process drives all GPUs. With P it is P processes, which share the GPUs out evenly; without GPUs that is for trying
# what several hosts will do. PYTHON names another interpreter. Exit codes: docs/deploy.md.
set -euo pipefail

count=1
if [[ ${1-} =~ ^[1-9][0-9]*$ ]]; then
  count=$1
  shift
fi
if (($# == 0)); then
  echo "usage: $0 [P] --config FILE [arguments of jaxtrain train]" >&2
  exit 64
fi
exec "${PYTHON:-python}" -m jaxtrain launch --nproc "$count" -- train "$@"
