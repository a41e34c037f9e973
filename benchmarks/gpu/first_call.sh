#!/usr/bin/env bash
# The first of two calls on a machine with one GPU and no network. benchmarks/README.md says what to send, and what comes back.
#   OUT=DIR bash benchmarks/gpu/first_call.sh [seconds in all: 530]          SMOKE=1 rehearses it on a CPU with tiny shapes
cd "$(dirname "$0")/../.." || exit 1
. benchmarks/gpu/call.sh

item ceilings 10 python3 -m benchmarks.gpu.suite probe
item quickstart 18 python3 -m benchmarks.gpu.quickstart
item resnet18_32 24 python3 -m benchmarks.gpu.suite resnet18_32
item resnet50_224 45 python3 -m benchmarks.gpu.suite resnet50_224
item flags 100 python3 -m benchmarks.gpu.suite flags --case resnet18_32
exit "$failed"
