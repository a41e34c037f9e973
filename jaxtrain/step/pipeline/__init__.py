"""The step and the evaluation of a model in pipeline stages: ordinary programs, each on its stage's devices, run by a schedule.

A stage's forward program returns what its backward program needs, so that nothing is computed twice. What crosses from one
to the other holds no parameter, neither whole nor cast: a microbatch in execution costs its activations alone.

The host only dispatches. On a CPU each stage has a dispatching thread of its own, since XLA:CPU runs a program of several
devices in the thread that calls it; on an accelerator one thread dispatches everything in the schedule's total order.
"""
