#!/usr/bin/env bash
# Starts one process of a run on each host of a list over ssh, with the coordinator on the first:
#
#     launch/ssh.sh HOSTS --config FILE [more arguments of `jaxtrain train`]
#
# HOSTS is a file with one host a line (# begins a comment; what follows the name is ignored). All hosts must have this
# directory, the interpreter and the work directory under the same paths, and let you in without a password. Each process
# drives all GPUs of its host.
#
# SIGTERM or Ctrl-C to this script, and its death, make the run save and stop (75). Otherwise it ends with the exit code of
# the first process that failed for a reason of its own. Variables: PORT (default 61440; 8 ports from there on are tried),
# PYTHON. JAXTRAIN_*, JAX_*, XLA_*, NCCL_* and OMP_NUM_THREADS go along to the hosts.
set -euo pipefail

if (($# < 2)) || ! [[ -r $1 ]]; then
  echo "usage: $0 HOSTS --config FILE [arguments of jaxtrain train]; HOSTS is a file with one host a line" >&2
  exit 64
fi
hosts=()
while read -r host _ || [[ -n $host ]]; do
  host=${host%%#*}
  [[ -z $host ]] || hosts+=("$host")
done <"$1"
shift
if ((${#hosts[@]} == 0)); then
  echo "$0: there is no host in the list" >&2
  exit 64
fi
python=$(command -v "${PYTHON:-python}")

quote() { # each word as any shell reads it
  local word
  for word in "$@"; do
    printf "'%s' " "${word//\'/\'\\\'\'}"
  done
}

setting=""
for name in ${!JAXTRAIN_@} ${!JAX_@} ${!XLA_@} ${!NCCL_@} ${OMP_NUM_THREADS+OMP_NUM_THREADS}; do
  setting+="export $name=$(quote "${!name}"); "
done

# On each host: the process, and a reader that sends it SIGTERM when ssh's standard input ends. exec 3: a background job's
# own standard input is /dev/null.
# shellcheck disable=SC2016
there='exec 3<&0
"$@" </dev/null 3<&- & process=$!
{ cat <&3; kill -TERM "$process"; } >/dev/null 2>&1 & reader=$!
exec 3<&-
code=0; wait "$process" || code=$?
kill -KILL "$reader" 2>/dev/null
exit "$code"'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkfifo "$scratch/hold"
exec 9<>"$scratch/hold" # while this is open, standard input does not end

stopping=0
stop() { # a second time: at once
  if ((stopping++)); then
    kill -KILL "${running[@]}" 2>/dev/null || true
  fi
  exec 9>&-
}
trap stop TERM INT

running=()
for id in "${!hosts[@]}"; do
  command="cd $(quote "$PWD") && { ${setting}exec bash -c $(quote "$there" jaxtrain "$python" -m jaxtrain train "$@" \
    --coordinator "${hosts[0]#*@}:${PORT:-61440}" --num-processes "${#hosts[@]}" --process-id "$id"); }"
  # ssh must not die of the signals that this script gets: the processes' last words and exit codes come through it.
  (
    trap '' TERM INT
    exec ssh -o BatchMode=yes "${hosts[id]}" "$command" <"$scratch/hold" 9>&-
  ) &
  running+=($!)
done

result=0
while ((${#running[@]})); do
  sleep 0.2 || true
  for id in "${!running[@]}"; do
    kill -0 "${running[id]}" 2>/dev/null && continue
    code=0
    wait "${running[id]}" || code=$?
    unset "running[id]"
    ((code == 0)) && continue
    echo "$0: process $id on ${hosts[id]} ended with exit code $code" >&2
    if ((result == 0 || (result == 70 && code != 70))); then # 70 may only say that another process is gone
      result=$code
    fi
    if ((code == 255)); then # ssh itself failed: the others need not wait for this host
      stop
    fi
  done
done
exit "$result"
