"""The machine that a process runs on: CPUs, GPUs, files, flags."""
