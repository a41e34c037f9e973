#!/usr/bin/env bash
# Starts the P processes of one run on this machine, joined over loopback:
#
#     launch/local.sh P --config FILE [more arguments of `python -m jaxtrain.main`]
#
# Meant for trying what several machines will do: on one machine a single process drives all devices. Process 0 prints as
# usual, the others only warnings. When one process fails, the rest are stopped, and the exit code is that of the first to fail.
set -euo pipefail
set -m # children get process groups of their own: Ctrl-C reaches this script, which passes it on

if ! [[ ${1-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 P --config FILE [arguments]" >&2
  exit 64
fi
count=$1
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=()
stop() { # a signal to all that still run; those that ignore it for 10 s are killed
  kill -s "$1" "${pids[@]}" 2>/dev/null || true
  for _ in {1..50}; do
    kill -0 "${pids[@]}" 2>/dev/null || return 0
    sleep 0.2
  done
  kill -s KILL "${pids[@]}" 2>/dev/null || true
}
trap 'stop INT; exit 130' INT
trap 'stop INT; exit 143' TERM

for ((id = 0; id < count; id++)); do
  "$python" -m jaxtrain.main "$@" --coordinator "127.0.0.1:$port" --num-processes "$count" --process-id "$id" &
  pids+=($!)
done
running=("${pids[@]}")
while ((${#running[@]})); do
  sleep 0.2
  for i in "${!running[@]}"; do
    kill -0 "${running[i]}" 2>/dev/null && continue
    code=0
    wait "${running[i]}" || code=$?
    unset "running[i]"
    if ((code)); then
      stop INT
      exit "$code"
    fi
  done
done
