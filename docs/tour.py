# %% [markdown]
# # A tour of distributed training
#
# Eight devices train one small network on handwritten digits. The devices are simulated on your CPU: their programs and
# messages are real, and only their speed is not that of GPUs. You need to know a little PyTorch, no JAX, and no GPU.
#
# Each section says what is true, shows what you would write, and then **computes the claim**: an `assert` compares it with a
# formula or with the training on one device. What you read here was true when the page was made, and a test runs it again.
#
# | | |
# |--|--|
# | 1 | one device, as the reference |
# | 2 | data parallelism: gradients are averaged |
# | 3 | the ring that adds them up |
# | 4 | ZeRO: nobody keeps what another one has |
# | 5 | tensor parallelism: a matrix on two devices |
# | 6 | pipeline stages: schedules and the bubble |
# | 7 | compression: fewer bytes, and error feedback |
# | 8 | scaling: latency, bandwidth, Amdahl, large batches |
#
# Figures are of four kinds, and a sentence says which: *counted* (bytes on devices or in compiled programs), *measured* (a
# clock), *simulated* (a schedule is played through), *modelled* (a formula).
#
# Run it with `pip install -e ".[notebook]"` and Jupyter, or as a script: `python docs/tour.py`. The notebook is made from the
# script by `python docs/notebook.py`.

# %%
import itertools
import re
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import SVG
from jax.sharding import PartitionSpec as P
from matplotlib.colors import ListedColormap
from sklearn.datasets import load_digits

from jaxtrain import load_config, plan, train

# Before JAX uses its first device. `jaxtrain train --simulate-devices 8` does the same.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
assert len(jax.devices()) == 8

FOLDER = tempfile.TemporaryDirectory()  # the runs' directories; gone at the end
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"  # Okabe and Ito 2008: told apart by all eyes
plt.rcParams.update({
    "figure.figsize": (8, 3), "figure.dpi": 80, "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PINK]),
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
})  # fmt: skip

# %% [markdown]
# ## 1. One device
#
# The run that all others are compared with: a perceptron with two hidden layers, AdamW, 60 steps of 64 images. In
# jaxtrain a run is a config and a directory. A recipe (here `quickstart`) has the config, and its fields can be changed
# by name. We compute in 64 bits, so that "the same" can mean twelve digits and not three.

# %%
NETWORK = {
    "model.name": "mlp", "model.width": 64, "model.depths": (), "optim.name": "adamw", "optim.learning_rate": 0.01,
    "optim.warmup": "5 steps", "train.steps": 60, "train.log_every": 1, "train.precision": "f64", "data.global_batch": 64,
}  # fmt: skip


def run(name, devices=8, **fields):
    """Trains on the first `devices`; a field `layout__zero=2` stands for `layout.zero`."""
    changes = {key.replace("__", "."): value for key, value in fields.items()}
    config = load_config("quickstart", NETWORK | changes)
    return train(config, Path(FOLDER.name) / name, num_devices=devices, quiet=True)


def losses(result):
    """The training loss of every step."""
    return np.array([row["loss"] for row in result.history if row["phase"] == "train"])


def same(result, tolerance=1e-10):
    """Whether every step had the loss that it has on one device."""
    return np.allclose(losses(result), losses(one), rtol=tolerance, atol=0)


one = run("one device", devices=1)
assert len(losses(one)) == 60
accuracy = one.result["last"]["test"]["accuracy"]
assert accuracy > 0.85
print(f"test accuracy after 60 steps: {accuracy:.1%}")

# %% [markdown]
# ## 2. Data parallelism
#
# Each device has all weights, and a part of the batch. It computes the gradients of its own images. Then the devices
# **average their gradients**, and all make the same update. This is PyTorch's `DistributedDataParallel` (Li 2020,
# *PyTorch Distributed: Experiences on Accelerating Data Parallel Training*, https://arxiv.org/abs/2006.15704).
#
# Why is that the same as one large batch? The loss is a mean over images, and the gradient of a mean is the mean of the
# gradients. Here it is without jaxtrain: `shard_map` runs a function on each device with its own part of the arrays,
# and `pmean` is the average over the devices.

# %%
pixels, digits = load_digits(return_X_y=True)
images = jnp.asarray(np.asarray(pixels)[:1024] / 16 - 0.3, jnp.float32)
labels = jnp.asarray(np.asarray(digits)[:1024])


def loss(weights, images, labels):
    """Of a linear classifier: the mean over the images."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(images @ weights), labels[:, None], 1))


four = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
weights = jax.random.normal(jax.random.key(0), (64, 10)) / 8


@jax.jit
@partial(jax.shard_map, mesh=four, in_specs=(P(), P("data"), P("data")), out_specs=(P("data"), P()), check_vma=False)
def gradients_of_shards(weights, images, labels):
    mine = jax.grad(loss)(weights, images, labels)  # of this device's 256 images
    return mine[None], jax.lax.pmean(mine, "data")


whole_batch = jax.grad(loss)(weights, images, labels)
of_shards, averaged = gradients_of_shards(weights, images, labels)
np.testing.assert_allclose(averaged, whole_batch, rtol=1e-4, atol=1e-7)  # computed in 32 bits
np.testing.assert_allclose(np.mean(of_shards, 0), whole_batch, rtol=1e-4, atol=1e-7)


def distance(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


alone, together = [distance(each, whole_batch) for each in of_shards], distance(averaged, whole_batch)
assert min(alone) > 100 * together
print(f"a device alone is off by {min(alone):.0%} to {max(alone):.0%}, the average by {together:.0e}")

# %% [markdown]
# In jaxtrain data parallelism is not a setting: it is what happens when there are several devices. The model, the
# optimizer and the loop do not know it. So the loss of each of the 60 steps is that of one device.

# %%
data_parallel = run("data parallel")
assert same(data_parallel)

kernel = data_parallel.state.params["layers_00"]["linear"]["kernel"]
assert len(kernel.addressable_shards) == 8
assert all(shard.data.shape == kernel.shape for shard in kernel.addressable_shards)  # a whole copy on each

figure, (left, right) = plt.subplots(1, 2)
left.plot(losses(one), lw=5, alpha=0.4, label="1 device")
left.plot(losses(data_parallel), lw=1.5, color="black", label="8 devices")
left.set(xlabel="step", ylabel="training loss", title="the same curve")
left.legend()
difference = np.abs(losses(data_parallel) / losses(one) - 1)
right.semilogy(np.maximum(difference, 1e-17), ".", color=ORANGE)
right.set(xlabel="step", title="relative difference of the loss", ylim=(1e-17, 1e-9))
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 3. The ring
#
# How do n devices add up S bytes? If all send theirs to one, that one receives (n - 1) S and must send the sum back: it
# is as slow as there are devices. A **ring** cuts the array into n parts. In n - 1 turns, each device passes a part to
# its neighbour, which adds its own. Then each has the sum of one part. In n - 1 more turns the sums go around. Each
# device sends **2 (n - 1) / n S** bytes, less than 2 S however many there are (Patarasuk and Yuan 2009, *Bandwidth
# optimal all-reduce algorithms for clusters of workstations*, https://doi.org/10.1016/j.jpdc.2008.09.002). No way to do
# it sends less.
#
# NCCL does that for you. jaxtrain has the ring in JAX as well (`layout.reduce=ring`), so we can look: below, the bytes are
# *counted* in the compiled program, where each message is a `collective-permute`.

# %%
from jaxtrain.parallel.reduce import ring

SIZE = 840 * 4  # bytes of the array: 840 numbers divide by 2, 3, ..., 8


def ring_program(n):
    mesh = jax.make_mesh((n,), ("data",), devices=jax.devices()[:n], axis_types=(jax.sharding.AxisType.Auto,))
    add = jax.shard_map(lambda row: ring(row[0], "data")[None], mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    rows = jax.random.normal(jax.random.key(n), (n, SIZE // 4))
    compiled = jax.jit(add).lower(rows).compile()
    np.testing.assert_allclose(compiled(rows), np.broadcast_to(np.sum(rows, 0), rows.shape), rtol=1e-4, atol=1e-5)
    messages = re.findall(r"= f32\[(\d+)\]\S* collective-permute\(", str(compiled.as_text()))
    return len(messages), sum(4 * int(numbers) for numbers in messages)


counts = range(2, 9)
counted = [ring_program(n) for n in counts]
for n, (messages, sent) in zip(counts, counted, strict=True):
    assert messages == 2 * (n - 1)
    assert sent == 2 * (n - 1) / n * SIZE
assert same(run("ring", layout__reduce="ring"))  # a training with it: the same losses

figure, axes = plt.subplots()
axes.plot(counts, [2 * (n - 1) for n in counts], color=ORANGE, label="all to one and back: that one, 2 (n - 1)")
axes.plot(counts, [2 * (n - 1) / n for n in counts], label="ring: each, 2 (n - 1) / n")
axes.plot(counts, [sent / SIZE for _, sent in counted], "o", color=BLUE, label="counted in the compiled ring")
axes.set(xlabel="devices", ylabel="bytes moved / size of the array", ylim=(0, 8))
axes.legend()
plt.show()

# %% [markdown]
# ## 4. ZeRO
#
# With data parallelism each device keeps all weights, all gradients, and all of the optimizer's state (for Adam two
# numbers a weight). That is 1 + 1 + 2 = 4 copies on every device, and eight devices keep the same ones. **ZeRO** shards
# them (Rajbhandari 2020, *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*,
# https://arxiv.org/abs/1910.02054). It has stages, and PyTorch's FSDP is the third (Zhao 2023,
# https://arxiv.org/abs/2304.11277):
#
# | `layout.zero` | sharded over n devices | copies of the weights on a device, Adam |
# |--|--|--|
# | 0 | nothing | 4 |
# | 1 | the optimizer's state | 2 + 2 / n |
# | 2 | and the gradients | 1 + 3 / n |
# | 3 | and the weights, which are gathered when a layer needs them | 4 / n |
#
# Let us count. The weights and the optimizer's state are arrays that we hold: we ask each device for its bytes. The gradients
# are gone at the end of a step, so their bytes are those of jaxtrain's layout table, which a run compares with its compiled
# programs (`jaxtrain layout` prints it). Two microbatches make the step keep an accumulator of gradients.

# %%
from jaxtrain.config import from_dict, nested_dicts
from jaxtrain.training.layout_report import describe_layout


def stored(tree, device):
    """Bytes of the tree that lie on the device."""
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def gradient_bytes(zero):
    config = load_config("quickstart", NETWORK | {"layout.zero": zero, "layout.microbatches": 2})
    return describe_layout(from_dict(nested_dicts(config)), jax.devices())["bytes_per_device"]["gradients"]


def share(leaf, n):
    """Bytes of a leaf on each of n devices: it is sharded if one of its dims divides by n."""
    return leaf.nbytes // n if any(size % n == 0 for size in leaf.shape) else leaf.nbytes


zero = {stage: run(f"zero {stage}", layout__zero=stage, layout__microbatches=2) for stage in range(4)}
rows = []
for stage, result in zero.items():
    assert same(result)  # the losses do not know where things lie
    state, leaves = result.state, jax.tree.leaves(result.state.params)
    whole, sharded = sum(leaf.nbytes for leaf in leaves), sum(share(leaf, 8) for leaf in leaves)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 0]  # Adam's two; not its count of steps
    bytes_of = (stored(state.params, jax.devices()[0]), gradient_bytes(stage), stored(moments, jax.devices()[0]))
    assert bytes_of == (
        sharded if stage >= 3 else whole,
        sharded if stage >= 2 else whole,
        2 * (sharded if stage >= 1 else whole),
    )
    assert all(stored(state.params, device) == bytes_of[0] for device in jax.devices())  # all devices are alike
    paper = [4, 2 + 2 / 8, 1 + 3 / 8, 4 / 8][stage]
    copies = sum(bytes_of) / whole
    assert 0 <= copies - paper < 0.01  # the last bias, 10 numbers, does not divide by 8: it stays whole
    rows.append(np.array(bytes_of) / whole)
    print(f"ZeRO-{stage}: {copies:.3f} copies of the weights on each device; the paper's formula: {paper}")

figure, axes = plt.subplots()
bottom = np.zeros(4)
for at, (name, colour) in enumerate((("weights", BLUE), ("gradients", ORANGE), ("Adam's state", GREEN))):
    height = np.array([row[at] for row in rows])
    axes.bar([f"ZeRO-{stage}" for stage in zero], height, bottom=bottom, color=colour, label=name)
    bottom += height
axes.set(ylabel="copies of the weights", title="what each of 8 devices keeps")
axes.legend()
plt.show()

# %% [markdown]
# With more state to split, the picture is this one: what each of eight devices stores with stages and tensor parallelism too.
# jaxtrain drew it from the same table (`python docs/pictures.py`).
#
# ![What each of 8 devices stores](layouts.svg)

# %% [markdown]
# ## 5. Tensor parallelism
#
# A single layer may be too large or too slow for one device. Then its **matrix is split**. Megatron
# (Shoeybi 2019, *Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism*,
# https://arxiv.org/abs/1909.08053) splits two layers together: the first by columns, the second by rows. Each device then has
# half of the hidden units from beginning to end, and ReLU needs no one else. The halves are added up once, behind the second:
#
# relu(x [A1 A2]) [B1; B2] = relu(x A1) B1 + relu(x A2) B2

# %%
two = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
A = jax.random.normal(jax.random.key(1), (64, 64)) / 8
B = jax.random.normal(jax.random.key(2), (64, 32)) / 8


@jax.jit
@partial(jax.shard_map, mesh=two, in_specs=(P(), P(None, "tensor"), P("tensor", None)), out_specs=P())
def split_layers(x, my_columns, my_rows):
    assert (my_columns.shape, my_rows.shape) == ((64, 32), (32, 32))
    return jax.lax.psum(jax.nn.relu(x @ my_columns) @ my_rows, "tensor")


np.testing.assert_allclose(split_layers(images, A, B), jax.nn.relu(images @ A) @ B, rtol=1e-4, atol=1e-4)
program = str(split_layers.lower(images, A, B).compile().as_text())
assert len(re.findall(r" all-reduce\(", program)) == 1  # one sum for two layers

# %% [markdown]
# In jaxtrain: `layout.tensor=2`. The model has the rules that say which dim of which matrix is split; the other axis of
# the mesh is still data parallel, here 4 x 2.

# %%
tensor = run("tensor", layout__tensor=2)
assert same(tensor)
first, second = (tensor.state.params[layer]["linear"]["kernel"] for layer in ("layers_00", "layers_01"))
assert {shard.data.shape for shard in first.addressable_shards} == {(64, 32)}  # half of the columns
assert {shard.data.shape for shard in second.addressable_shards} == {(32, 32)}  # half of the rows

figure, panels = plt.subplots(1, 2)
for axes, kernel, title in zip(panels, (first, second), ("first: by columns", "second: by rows"), strict=True):
    owners = np.zeros(kernel.shape)
    for shard in kernel.addressable_shards:
        owners[shard.index] = shard.device.id % 2  # neighbours on the axis `tensor` are neighbouring devices
    axes.imshow(owners, cmap=ListedColormap([BLUE, ORANGE]), aspect="auto")
    axes.set(title=title, xlabel="outputs", ylabel="inputs")
    axes.grid(False)
figure.suptitle("which device of a pair has what (blue 0, orange 1)")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 6. Pipeline stages
#
# The third way to split: **by layers**. Device 0 has the first layers, device 1 the next. Only activations go from a
# stage to the next, and their gradients back. But stage 1 must wait for stage 0. So the batch is cut into M
# **microbatches** that follow one another through S stages. What is left of the waiting is the **bubble**: (S - 1) / (M
# + S - 1) of the time.
#
# - *GPipe*, all forwards, then all backwards
#   (Huang 2019, *GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism*, https://arxiv.org/abs/1811.06965).
# - *1F1B*, a forward and a backward in turn: the same bubble, but stage s keeps the activations of only S - s microbatches.
#   *Interleaved*, each stage has C chunks of layers: (S - 1) / (C M + S - 1)
#   (Narayanan 2021, *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM*,
#   https://arxiv.org/abs/2104.04473).
# - *Zero bubble* cuts the backward pass in two and fills the gaps with one half
#   (Qi 2023, *Zero Bubble Pipeline Parallelism*, https://arxiv.org/abs/2401.10241). jaxtrain does not have it.
#
# A schedule is data: for each stage a list of forwards (F) and backwards (B). We play it through (*simulated*: a
# backward takes twice a forward) and compare its idle time with the formulas.

# %%
from jaxtrain.step.pipeline.plot import svg
from jaxtrain.step.pipeline.schedule import in_flight, make_pipeline_schedule
from jaxtrain.step.pipeline.timeline import simulate


def timeline(name, stages, microbatches, chunks=1):
    schedule = make_pipeline_schedule(name, stages, microbatches, chunks)
    parts = schedule.model_chunks
    return schedule, simulate(schedule, [1 / parts] * parts, [2 / parts] * parts)


for S, M in itertools.product((2, 4, 8), (8, 16, 32)):
    for name, C in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)):
        schedule, played = timeline(name, S, M, C)
        assert np.isclose(played.bubble, (S - 1) / (C * M + S - 1))
        if name == "gpipe":
            assert in_flight(schedule) == (M,) * S  # microbatches whose activations each stage keeps
        if name == "1f1b":
            assert in_flight(schedule) == tuple(min(M, S - s) for s in range(S))

SVG(svg([(name, timeline(name, 4, 8, C)[1]) for name, C in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2))]))

# %% [markdown]
# More microbatches make the bubble small, more stages make it large. Lines are the formula, dots the simulated schedules.

# %%
figure, axes = plt.subplots()
microbatches = [1, 2, 4, 8, 16, 32, 64]
for S, colour in ((2, BLUE), (4, ORANGE), (8, GREEN)):
    axes.plot(microbatches, [(S - 1) / (M + S - 1) for M in microbatches], color=colour, label=f"{S} stages")
    axes.plot(microbatches, [timeline("1f1b", S, M)[1].bubble for M in microbatches], "o", color=colour)
axes.set(xlabel="microbatches", ylabel="idle share", title="the bubble of 1F1B", xticks=microbatches)
axes.set_xscale("log", base=2)
axes.legend()
plt.show()

# %% [markdown]
# Now train with it: two stages of four devices each, eight microbatches. One step is recorded. Each stage must have run its
# operations in the order of the schedule, and the losses must be those of one device.
#
# In the drawing, compare the order and not the lengths: the stages are threads that share the cores of your machine.

# %%
from jaxtrain.training.layout_report import read_trace

stages = run("stages", layout__stages=2, layout__microbatches=8, layout__trace_step=5)
assert same(stages)

recorded = read_trace(stages.workdir.path)
schedule, _ = timeline("1f1b", 2, 8)
for stage in range(2):
    events = sorted((event for event in recorded.events if event.stage == stage), key=lambda event: event.start)
    assert tuple(event.op for event in events) == schedule.ops[stage]

kernels = (stages.state.params[layer]["linear"]["kernel"] for layer in ("layers_00", "layers_02"))
on_first, on_second = (set(kernel.devices()) for kernel in kernels)
assert on_first | on_second == set(jax.devices())
assert not on_first & on_second  # no device has both
SVG(svg([("step 5, recorded on simulated devices", recorded)]))

# %% [markdown]
# ## 7. Compression
#
# On slow links the gradients take longer than the computation. So send less. There are ways that **round** (`bf16`,
# `int8`: QSGD, Alistarh 2017, https://arxiv.org/abs/1610.02132), that send **some values** (`topk`, `randomk`), or a
# **low-rank** product (PowerSGD: Vogels 2019, *PowerSGD: Practical Low-Rank Gradient Compression for Distributed
# Optimization*, https://arxiv.org/abs/1905.13727). Bytes are *counted* in the compiled programs, for 4 devices. The
# errors are those of one sum of random numbers, which have no structure: gradients are kinder, above all to PowerSGD.

# %%
from jaxtrain.parallel.bench.methods import METHODS
from jaxtrain.parallel.bench.programs import Case, compile_case

NUMBERS = 1 << 14
given = np.random.default_rng(0).standard_normal((4, NUMBERS)).astype(np.float32)
exact, found = given.astype(np.float64).sum(0), {}
for name in ("auto", "bf16", "int8", "topk", "randomk", "powersgd"):
    program = compile_case(Case(METHODS[name], replica=1, data=4, numbers=NUMBERS), jax.devices())
    sums = program.compiled(jax.device_put(given, program.sharding))
    found[name] = program.sent, distance(sums[0], exact)

full = 2 * 3 / 4 * 4 * NUMBERS  # the ring's formula
tenth = NUMBERS // 10
assert found["auto"][0] == full
assert found["bf16"][0] == full / 2
assert np.isclose(found["int8"][0], full / 4, rtol=0.01)  # and a scale for each part
assert np.isclose(found["randomk"][0], full / 10, rtol=0.01)  # positions are drawn alike everywhere, and not sent
assert np.isclose(found["topk"][0], 2 * 3 * 4 * tenth, rtol=0.01)  # value and position, from each to all others
assert found["auto"][1] < found["bf16"][1] < found["int8"][1] < found["topk"][1] < found["randomk"][1] < 4

figure, axes = plt.subplots()
for name, (sent, error) in found.items():
    axes.loglog(sent / full, error, "o", color=BLUE)
    at, side = ((-6, 4), "right") if name == "powersgd" else ((6, 4), "left")
    axes.annotate(name, (sent / full, error), xytext=at, ha=side, textcoords="offset points")
axes.set(
    xlabel="bytes sent / bytes without compression", ylabel="relative error of one sum", xlim=(0.01, 2), ylim=(1e-8, 20)
)
plt.show()

# %% [markdown]
# An error like that of `topk` would ruin a training, if it were lost. It is not: what a device did not send, it **adds
# to its next gradient**. This is **error feedback** (Seide 2014, *1-Bit Stochastic Gradient Descent and its Application
# to Data-Parallel Distributed Training of Speech DNNs*,
# https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html; Karimireddy 2019, *Error Feedback Fixes
# SignSGD and other Gradient Compression Schemes*, https://arxiv.org/abs/1901.09847).
#
# In a few lines, for the linear classifier: four devices, each sends the largest 1 % of its numbers.

# %%
KEPT = 7  # of 640 numbers
shards = list(zip(images.reshape(4, 256, 64), labels.reshape(4, 256), strict=True))
gradient = jax.jit(jax.grad(loss))


def largest(values):
    """The `KEPT` largest values, 0 elsewhere."""
    limit = np.sort(np.abs(values), axis=None)[-KEPT]
    return np.where(np.abs(values) >= limit, values, 0)


def descend(compress, feedback, steps=150, rate=1.0):
    """The losses of SGD; the sums of all gradients and of all that was sent; and what is still held."""
    weights, curve = np.zeros((64, 10), np.float32), []
    held, total, arrived = np.zeros((4, 64, 10)), np.zeros((64, 10)), np.zeros((64, 10))
    for _ in range(steps):
        for device, (some, their) in enumerate(shards):
            mine = np.asarray(gradient(weights, some, their), np.float64)
            wanted = mine + held[device] if feedback else mine
            sent = compress(wanted)
            held[device] = wanted - sent
            total, arrived = total + mine, arrived + sent
            weights = weights - rate * sent.astype(np.float32) / 4
        curve.append(float(loss(weights, images, labels)))
    return curve, total, arrived, held


plain, *_ = descend(lambda values: values, feedback=False)
without, *_ = descend(largest, feedback=False)
with_feedback, total, arrived, held = descend(largest, feedback=True)
np.testing.assert_allclose(arrived + held.sum(0), total, atol=1e-9)  # sent + held = all gradients: nothing is lost
assert abs(with_feedback[-1] - plain[-1]) < 0.5 * abs(without[-1] - plain[-1])

figure, axes = plt.subplots()
axes.semilogy(plain, label="all numbers")
axes.semilogy(without, label="1 % of them, the rest is lost")
axes.semilogy(with_feedback, label="1 % of them, with error feedback")
axes.set(xlabel="step", ylabel="loss")
axes.legend()
plt.show()

# %% [markdown]
# In jaxtrain: `optim.compress`. It is not under `layout`, since it changes the numbers of a run. Another way is to send less
# often: with **local SGD** each device trains weights of its own, and every k steps they become their mean
# (Stich 2018, *Local SGD Converges Fast and Communicates Little*, https://arxiv.org/abs/1805.09767; with an outer momentum:
# Douillard 2023, *DiLoCo: Distributed Low-Communication Training of Language Models*, https://arxiv.org/abs/2311.08105).
#
# Four devices, 150 steps. The test accuracy may cost three points, and does not.

# %%
ways = {
    "none": {},
    "topk, 10 %": {"optim__compress": "topk"},
    "powersgd, rank 4": {"optim__compress": "powersgd"},
    "local SGD, every 10 steps": {"optim__sync_every": 10},
}
compressed = {name: run(name, 4, train__steps=150, **fields) for name, fields in ways.items()}

figure, axes = plt.subplots()
for name, result in compressed.items():
    test = result.result["last"]["test"]
    print(f"{name:26} test accuracy {test['accuracy']:.1%}, test loss {test['loss']:.3f}")
    assert test["accuracy"] > compressed["none"].result["last"]["test"]["accuracy"] - 0.03
    axes.plot(losses(result), label=name)
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
plt.show()

held = jax.tree.leaves(compressed["topk, 10 %"].state.communication)
assert any(np.any(np.asarray(leaf)) for leaf in held)  # what the devices hold back is in the state, and so is saved

# %% [markdown]
# ## 8. Scaling
#
# **Latency and bandwidth.** A message of b bytes takes alpha + b / beta. A ring of n devices sends 2 (n - 1) messages
# of S / n bytes, one after the other. A *tree* (recursive halving and doubling) sends as many bytes, but in 2 log2(n)
# messages. So for small arrays the latency decides, and the tree wins; for large ones they are alike. *Modelled*, for
# 64 GPUs and the figures that jaxtrain has for InfiniBand:

# %%
from jaxtrain.host.links import parse_link
from jaxtrain.parallel.collective_cost import reduce_seconds

link, n = parse_link("infiniband-ndr"), 64
sizes = np.logspace(3, 9, 25)
modelled = {
    way: np.array([reduce_seconds(way, size, n, 1, 1, link, link) for size in sizes]) for way in ("ring", "tree")
}
alpha, beta = link.latency, link.bandwidth
bandwidth_part = 2 * (n - 1) / n * sizes / beta
np.testing.assert_allclose(modelled["ring"], 2 * (n - 1) * alpha + bandwidth_part)
np.testing.assert_allclose(modelled["tree"], 2 * np.log2(n) * alpha + bandwidth_part)
assert modelled["ring"][0] / modelled["tree"][0] > 9
assert modelled["ring"][-1] / modelled["tree"][-1] < 1.02

figure, axes = plt.subplots()
for way, seconds in modelled.items():
    axes.loglog(sizes, 1e3 * seconds, label=way)
axes.loglog(sizes, 1e3 * bandwidth_part, "k:", label="the bytes alone")
axes.set(xlabel="bytes", ylabel="ms", title="modelled: an all-reduce of 64 GPUs")
axes.legend()
plt.show()

# %% [markdown]
# On real links one fits alpha and beta to measured times: `jaxtrain bench comm` does that. Here is the same in small,
# *measured* on your machine. A message between simulated devices is a copy in memory. The figures say something about
# your CPU, and the fit is rough; no claim rests on them.

# %%
eight = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
add_up = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=eight, in_specs=P("data"), out_specs=P()))
measured = []
for power in range(10, 23, 2):
    x = jax.device_put(np.ones((8, (1 << power) // 4), np.float32), jax.NamedSharding(eight, P("data")))
    jax.block_until_ready(add_up(x))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(add_up(x))
        times.append(time.perf_counter() - began)
    measured.append((1 << power, float(np.median(times))))
S, seconds = np.array(measured).T
columns = np.stack([np.full_like(S, 2 * 7), 2 * 7 / 8 * S], 1)
# Least squares of the relative errors.
fitted, *_ = np.linalg.lstsq(columns / seconds[:, None], np.ones_like(S), rcond=None)
print(f"fitted: {1e6 * fitted[0]:.0f} microseconds a message, {1e-9 / fitted[1]:.2f} GB/s")

# %% [markdown]
# **Amdahl's law.** If a share s of the work is not made faster by more devices, n devices are 1 / (s + (1 - s) / n) times as
# fast, and never more than 1 / s. Communication is such a part: it does not shrink with n, as we saw. *Modelled* by
# `jaxtrain plan`: VGG-19 on CIFAR, a batch of 1,024 shared by n H100s. No GPU is needed for that, and none was measured.

# %%
devices = [1, 2, 4, 8]
config = load_config("vgg19_cifar10", {
    "data.name": "synthetic", "data.image_size": 32, "data.global_batch": 1024, "layout.keep": ("zero", "stages", "tensor"),
})  # fmt: skip
step_seconds = np.array([plan(config, f"{n}xh100", compiled=0)["best"]["step_seconds"] for n in devices])
speedup = step_seconds[0] / step_seconds

# Amdahl in its other form: 1 / speedup = s + (1 - s) / n, a line in 1 / n.
per_device = 1 / np.array(devices)
s = float(np.sum((1 / speedup - per_device) * (1 - per_device)) / np.sum((1 - per_device) ** 2))
assert 0 < s < 1
assert np.all(speedup <= np.array(devices) * (1 + 1e-9))
assert np.allclose(1 / (s + (1 - s) * per_device), speedup, rtol=0.1)  # the law fits the model within 10 %
print(f"serial share {s:.1%}: no number of GPUs is more than {1 / s:.1f} times as fast, at this batch")

figure, axes = plt.subplots()
many = np.arange(1, 33)
axes.plot(many, many, "k:", label="ideal")
axes.plot(many, 1 / (s + (1 - s) / many), label=f"Amdahl, s = {s:.1%}")
axes.plot(devices, speedup, "o", color=ORANGE, label="jaxtrain plan")
axes.set(xlabel="GPUs", ylabel="speed-up", title="modelled: the same batch on more GPUs", xlim=(0, 32), ylim=(0, 8))
axes.legend()
plt.show()

# %% [markdown]
# **Where a step goes.** `jaxtrain scale` trains on several numbers of devices in turns, and profiles the steps. With real
# GPUs, or processes on cores of their own, that is *measured*. Here it is *simulated*: the devices share your cores, so
# eight of them gain nothing, and what a step takes longer is what the layout costs.

# %%
from jaxtrain import scale

(table,) = scale(load_config("quickstart"), [1, 8], how="simulated", modes=["strong"], repeats=1, steps=10)["tables"]
one, on_eight = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
parts = ("compute %", "communication %", "input %", "host %")
assert table["kind"] == "simulated"
assert one["communication %"] == 0 < on_eight["communication %"]
for found in (one, on_eight):
    assert np.isclose(sum(found[name] for name in parts), 100)

figure, axes = plt.subplots()
for row, found in enumerate((one, on_eight)):
    left = 0.0
    for name, colour in zip(parts, (BLUE, ORANGE, GREEN, "0.6"), strict=True):
        width = found[name] / 100 * found["step ms"]
        axes.barh(row, width, left=left, color=colour, label=name.removesuffix(" %") if row == 0 else None)
        left += width
axes.set(yticks=[0, 1], yticklabels=["1 device", "8 devices"], xlabel="ms", title="simulated: the parts of a step")
axes.legend()
plt.show()

# %% [markdown]
# **Larger batches.** The way out is to give each device more to do: a batch of k n images. Then there are k times fewer
# steps, so each must go k times as far: the **linear scaling rule** (Goyal 2017, *Accurate, Large Minibatch SGD:
# Training ImageNet in 1 Hour*, https://arxiv.org/abs/1706.02677). jaxtrain applies it by itself:
# `optim.lr_reference_batch` says for which batch the rate is meant. The rule holds as long as the gradient hardly
# changes within k steps, so for small rates. Halve the rate, and the two ways are about four times closer:

# %%
from jaxtrain.optim.schedules import peak_learning_rate

rates = from_dict(nested_dicts(load_config("quickstart"))).optim
assert peak_learning_rate(rates, 256) == 4 * peak_learning_rate(
    rates, 64
)  # what jaxtrain makes of `optim.learning_rate`

gaps = []
for rate in (0.4, 0.2, 0.1, 0.05):
    small_steps = weights
    for some, their in shards:
        small_steps = small_steps - rate * gradient(small_steps, some, their)  # four steps of 256 images
    large_step = weights - 4 * rate * gradient(weights, images, labels)  # one of 1,024, four times as far
    gaps.append(float(jnp.linalg.norm(small_steps - large_step)))
print("apart by", ", ".join(f"{gap:.4f}" for gap in gaps))
assert all(3 < larger / smaller < 5 for larger, smaller in itertools.pairwise(gaps))

# %% [markdown]
# ## Where to go on
#
# - [concepts.md](concepts.md): each of these ideas with its paper, its setting, and the file that has it.
# - [communication.md](communication.md), [pipeline.md](pipeline.md), [planning.md](planning.md), [scaling.md](scaling.md): the
#   same in depth, with what was measured.
# - Your own run: `jaxtrain train --config quickstart:zero3,tensor2 --simulate-devices 8`.

# %%
FOLDER.cleanup()
print("every claim on this page was computed")
