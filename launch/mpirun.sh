#!/usr/bin/env bash
# Starts a run with mpirun: OpenMPI, or another MPI with PMI (MPICH, Intel). Options of mpirun, then --, then the run:
#
#     launch/mpirun.sh -n 2 --hostfile HOSTS --map-by ppr:1:node -- --config FILE [more arguments of `jaxtrain train`]
#
# A process that is alone on its host drives all its GPUs; of several on a host each drives the GPU of its number there.
# All hosts must have this directory, the interpreter and the work directory under the same paths.
#
# SIGTERM or Ctrl-C to this script makes the run save and stop (75). Variables: PORT (default 61440; 8 ports from there on
# are tried), JAXTRAIN_COORDINATOR (HOST:PORT, where the script's own finding is wrong), PYTHON, MPIRUN (default mpirun).
set -euo pipefail

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
if (($# < 2)); then
  echo "usage: $0 OPTIONS OF MPIRUN -- --config FILE [arguments of jaxtrain train]" >&2
  exit 64
fi
shift
mpirun=${MPIRUN:-mpirun}
python=$(command -v "${PYTHON:-python}")

# Where mpirun puts the first process; loopback if all are on one host.
# shellcheck disable=SC2016
where='id=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-}}
count=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-}}
here=${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-}}
if [ "$id" = 0 ]; then if [ "$here" = "$count" ]; then echo 127.0.0.1; else hostname; fi; fi'
coordinator=${JAXTRAIN_COORDINATOR-}
if [[ -z $coordinator ]]; then
  host=$("$mpirun" "${options[@]}" bash -c "$where" </dev/null)
  if [[ -z $host || $host == *[[:space:]]* ]]; then
    echo "$0: $mpirun does not say where the first process runs (it said '$host')" >&2
    exit 78
  fi
  coordinator=$host:${PORT:-61440}
fi

# shellcheck disable=SC2016
worker='coordinator=$1 here=$2; shift 2
if [ -d "$here" ]; then : >"$here/$(hostname):$$"; fi
id=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
count=${OMPI_COMM_WORLD_SIZE:-$PMI_SIZE}
if [ "${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-}}" = 1 ]; then
  unset OMPI_MCA_orte_hnp_uri SLURM_LOCALID  # JAX would take one GPU
else
  export JAX_LOCAL_DEVICE_IDS="${JAX_LOCAL_DEVICE_IDS:-${OMPI_COMM_WORLD_LOCAL_RANK:-$MPI_LOCALRANKID}}"
fi
"$@" --coordinator "$coordinator" --num-processes "$count" --process-id "$id" &
process=$! stops=0
trap "stops=\$((stops + 1)); kill -TERM $process 2>/dev/null" TERM
while :; do
  seen=$stops
  wait "$process"
  code=$?
  [ "$stops" = "$seen" ] && break
done
[ "$code" = 0 ] || sleep 10
exit "$code"'

# mpirun kills all processes one second after it got SIGTERM, and as soon as one has ended with another code than 0: too soon
# to save. So a worker keeps its bad news for 10 s, and SIGTERM goes past mpirun to the workers on this host, whose processes
# tell the others. mpirun is in a process group of its own: Ctrl-C reaches this script alone.
scratch=$(mktemp -d) # where the workers of this host leave their process numbers
trap 'rm -rf "$scratch"' EXIT
set -m
"$mpirun" "${options[@]}" bash -c "$worker" jaxtrain "$coordinator" "$scratch" "$python" -m jaxtrain train "$@" </dev/null &
job=$!
set +m
stopping=0
stop() {
  local workers=("$scratch/$(hostname):"*)
  stopping=$((stopping + 1))
  if ((stopping > 1)) || ! kill -TERM "${workers[@]##*:}" 2>/dev/null; then # a second time: at once
    kill -TERM "$job"
  fi
}
trap stop TERM INT

code=0
while :; do
  seen=$stopping
  wait "$job" && code=0 || code=$?
  ((stopping > seen)) || break # else it was the signal that ended `wait`
done
exit "$code"
