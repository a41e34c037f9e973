#!/usr/bin/env bash
# The second of two calls on a machine with one GPU and no network. benchmarks/README.md says what to send, and what comes back.
#   OUT=DIR bash benchmarks/gpu/second_call.sh [seconds in all: 530]         SMOKE=1 rehearses it on a CPU with tiny shapes
cd "$(dirname "$0")/../.." || exit 1
. benchmarks/gpu/call.sh

item ceilings 10 python3 -m benchmarks.gpu.suite probe
item swin_tiny_224 42 python3 -m benchmarks.gpu.suite swin_tiny_224
item vgg19_224 24 python3 -m benchmarks.gpu.suite vgg19_224
item accuracy 100 python3 -m benchmarks.gpu_runs run resnet_fast_cifar10 --packs "$KEEP/packs"
exit "$failed"
