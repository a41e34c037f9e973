#!/usr/bin/env bash
# Trains under PBS (OpenPBS, PBS Pro, Torque), one process per node, each with all its GPUs. As it stands it trains VGG-19:
#
#     qsub launch/pbs.sh                                                              # from the repository's root
#     JAXTRAIN_ARGS="--config FILE --workdir DIR" qsub -V -l select=2:ncpus=32:ngpus=4 launch/pbs.sh     # any other run
#
# Several nodes are started over ssh (launch/ssh.sh), so the nodes of a job must let its owner in. 5 minutes before the time
# limit the run saves and the job ends with 75; so does `qsig -s SIGTERM JOB`. A chain of jobs goes on from there:
#
#     first=$(qsub launch/pbs.sh); qsub -W depend=afternotok:"$first" launch/pbs.sh
#
# Variables (with qsub -V): JAXTRAIN_ARGS (words separated by spaces), VENV (default .venv), MODULES (default "cuda"),
# TRAIN_MINUTES (default 115: 5 less than the walltime below).
#
#PBS -N jaxtrain-vgg19
#PBS -l select=1:ncpus=32:ngpus=4
#PBS -l walltime=02:00:00
#PBS -j oe
#PBS -r y
set -euo pipefail

cd "${PBS_O_WORKDIR:-.}"
if command -v module >/dev/null; then
  for name in ${MODULES-cuda}; do
    module load "$name" || echo "pbs.sh: there is no module $name; going on without it" >&2
  done
fi
venv=${VENV:-.venv}
if [[ -f $venv/bin/activate ]]; then
  # shellcheck disable=SC1091
  . "$venv/bin/activate"
fi
export OMP_NUM_THREADS=8 PYTHONUNBUFFERED=1

if [[ -n ${JAXTRAIN_ARGS-} ]]; then
  read -ra arguments <<<"$JAXTRAIN_ARGS"
else
  arguments=(--config configs/vgg19_cifar10.py --config.train.epochs=30 --config.data.global_batch=512
    --config.data.workers=8 --config.checkpoint.milestone_every=5epochs)
fi

hosts=$(mktemp)
trap 'rm -f "$hosts"' EXIT
awk '!seen[$1]++ { print $1 }' "$PBS_NODEFILE" >"$hosts" # PBS names a node once for each of its slots
if (($(wc -l <"$hosts") > 1)); then
  number=${PBS_JOBID%%[!0-9]*} # jobs that share a node get ports of their own
  export PORT=$((61440 + ${number:-0} % 500 * 8))
  command=(launch/ssh.sh "$hosts")
else
  command=("${PYTHON:-python}" -m jaxtrain train --standalone)
fi

# `timeout` sends SIGTERM to the command alone (--foreground) and passes on what it gets itself.
timeout --foreground --preserve-status "${TRAIN_MINUTES:-115}m" "${command[@]}" "${arguments[@]}" &
job=$!
signals=0
trap 'signals=$((signals + 1)); kill -TERM "$job" 2>/dev/null || true' TERM
code=0
while :; do
  seen=$signals
  wait "$job" && code=0 || code=$?
  ((signals > seen)) || break # else it was the signal that ended `wait`
done
exit "$code"
