"""The train step and the evaluation step of a model with pipeline stages.

Each stage's programs are ordinary XLA programs on that stage's devices. A schedule gives their order. The host only
dispatches them. On a CPU each stage has a thread for that, since XLA:CPU runs a program of several devices in the
thread that calls it. On an accelerator one thread dispatches everything, in the schedule's total order.

A chunk's forward program returns what its backward program needs, so nothing is computed twice. That contains no
parameter, neither gathered nor cast: each microbatch on its way costs only its activations.
"""
