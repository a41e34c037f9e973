#!/usr/bin/env bash
# Starts the P processes of one run on this machine, joined over loopback:
#
#     launch/local.sh P --config FILE [more arguments of `python -m jaxtrain.main`]
#
# Meant for trying what several machines will do: on one machine a single process drives all devices. Process 0 prints as
# usual, the others only warnings. SIGTERM saves and stops the run, Ctrl-C stops it at once. When one process fails, the
# rest are stopped too; the exit code is that of the first to fail.
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
end() { # sends each of the signals to those that still run, and waits up to 10 s for all to end (signal 0 only waits)
  local signal
  for signal in "$@"; do
    kill -s "$signal" "${pids[@]}" 2>/dev/null || return 0
    for _ in {1..50}; do
      kill -s 0 "${pids[@]}" 2>/dev/null || return 0
      sleep 0.2
    done
  done
}
trap 'end INT KILL; exit 130' INT
trap 'kill -s TERM "${pids[@]}" 2>/dev/null || true' TERM

for ((id = 0; id < count; id++)); do
  "$python" -m jaxtrain.main "$@" --coordinator "127.0.0.1:$port" --num-processes "$count" --process-id "$id" &
  pids+=($!)
done

running=("${pids[@]}")
while ((${#running[@]})); do
  sleep 0.2
  for i in "${!running[@]}"; do
    kill -s 0 "${running[i]}" 2>/dev/null && continue
    code=0
    wait "${running[i]}" || code=$?
    unset "running[i]"
    if ((code)); then
      end 0 INT KILL
      exit "$code"
    fi
  done
done
