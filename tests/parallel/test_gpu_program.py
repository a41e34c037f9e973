"""Programs for GPUs that are not there: what is read of them, and that the layouts are in them."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from runs import command_line

from jaxtrain import recipes
from jaxtrain.errors import ConfigError
from jaxtrain.host.targets import GPUS, parse_target
from jaxtrain.parallel import topology
from jaxtrain.parallel.gpu_program import read_program
from jaxtrain.step.train_step import NO_COMMAND_BUFFERS
from jaxtrain.training.jax_settings import no_compile_cache

CONFIGS = Path(__file__).parents[2] / "configs"

HLO = """HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias) }

%gathered (param_0: u8[1000,4], param_1: s32[8]) -> u8[8,4] {
  %param_0 = u8[1000,4]{1,0} parameter(0)
  %param_1 = s32[8]{0} parameter(1)
  ROOT %gather.1 = u8[8,4]{1,0} gather(%param_0, %param_1), offset_dims={1}, metadata={op_name="jit(step)/augmentation/gather"}
}

%products (param_0: f32[8,4], param_1: f32[4,2]) -> f32[8,2] {
  %param_0.1 = f32[8,4]{1,0} parameter(0)
  %param_1.1 = f32[4,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,2]{1,0} dot(%param_0.1, %param_1.1), metadata={op_name="transpose(jvp(layers_01))/Head/dot_general"}
}

%body (state: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
  %state = (s32[], f32[8,2]{1,0}) parameter(0)
  %gte = f32[8,2]{1,0} get-tuple-element(%state), index=1
  %copy.1 = f32[8,2]{0,1} copy(%gte)
  ROOT %tuple = (s32[], f32[8,2]{1,0}) tuple(%gte, %copy.1)
}

ENTRY %main (a: u8[1000,4], b: s32[8], c: f32[8,4], d: f32[4,2]) -> (f32[8,2], f32[4,2]) {
  %a = u8[1000,4]{1,0} parameter(0)
  %b = s32[8]{0} parameter(1)
  %c = f32[8,4]{1,0} parameter(2)
  %d = f32[4,2]{1,0} parameter(3)
  %fusion.1 = u8[8,4]{1,0} fusion(%a, %b), kind=kLoop, calls=%gathered
  %fusion.2 = f32[8,2]{1,0} fusion(%c, %d), kind=kCustom, calls=%products, backend_config={"kind":"__triton_gemm"}
  %loop = (s32[], f32[8,2]{1,0}) while(%fusion.2), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %ar = f32[8,2]{1,0} all-reduce-start(%fusion.2), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %ar.done = f32[8,2]{1,0} all-reduce-done(%ar)
  %ag = (f32[4,2]{1,0}, f32[8,2]{1,0}) all-gather-start(%d), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %rs = f32[2,2]{1,0} reduce-scatter(%fusion.2), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %cp = f32[8,2]{1,0} collective-permute(%fusion.2), source_target_pairs={{0,4},{1,5}}
  %aa = ((f32[8,2]{1,0}), f32[8,2]{1,0}) all-to-all-start(%fusion.2), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %aa.done = f32[8,2]{1,0} all-to-all-done(%aa)
  ROOT %out = (f32[8,2]{1,0}, f32[4,2]{1,0}) tuple(%ar.done, %d)
}
"""


def test_a_programs_text_is_read():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    program = read_program(HLO, mesh)
    assert program.donated == 2
    assert [(k.kind, k.times, k.bytes) for k in program.kernels] == [
        ("fusion: loop", 1, 32 + 32 + 32),  # of the gathered array what is taken of it
        ("fusion: triton_gemm", 1, 64 + 128 + 32),
        ("copy", 5, 64 + 64),
    ]
    assert [(k.layer, k.operation, k.products) for k in program.kernels[:2]] == [
        ("augmentation", "gather", ()),
        ("layers_01 backward", "dot_general", ("f32", "f32")),
    ]
    assert (program.count, program.small, program.gigabytes) == (7, 7, pytest.approx(960e-9))
    assert [(c.kind, c.axes, c.bytes) for c in program.collectives] == [
        ("all-reduce", ("tensor",), 64),
        ("all-gather", ("data",), 64),
        ("reduce-scatter", ("tensor",), 16),
        ("collective-permute", ("data",), 64),
        ("all-to-all", ("tensor",), 64),
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("8xh1000", "there is no GPU 'h1000'; known are a100-40, a100, "),
        ("0xh100", "must be GPU, COUNTxGPU or HOSTSxCOUNTxGPU"),
        ("8x", "must be GPU, COUNTxGPU"),
        (f"2x{__file__}", "has no device_memory_size"),
    ],
)
def test_a_target_that_is_none_is_said(name, said):
    with pytest.raises(ConfigError, match="--target") as error:
        parse_target(name)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["/proc/programs", __file__], ids=["cannot be made", "a file"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_compiled(name, capsys):
    words = ["compile", "--config", str(CONFIGS / "mlp_synthetic.py"), "--target", "h100", "--hlo", name]
    assert command_line(words) == 73
    assert f"{name} cannot be written (" in capsys.readouterr().err


def test_a_file_may_be_a_target(tmp_path):
    file = tmp_path / "mine.txtpb"
    file.write_text(GPUS["h200"].text())
    target = parse_target(f"2x8x{file}")
    assert (target.hosts, target.per_host, target.memory) == (2, 8, GPUS["h200"].memory)


# ----------------------------------------------------------------------------- compiled, where XLA's GPU compiler is there


def has_compiler() -> bool:
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return any(found.get(f"jax-cuda{cuda}-pjrt") == found["jaxlib"] for cuda in (12, 13))


# 480 MB, which are in no environment but that of .ci/run's own step: there `jaxtrain compile` must have worked before.
compiles = pytest.mark.skipif(not has_compiler(), reason="needs XLA's GPU compiler: pip install -e '.[gpu-compiler]'")

TINY = {"model.depths": "(1,1,1,1)", "model.width": "32", "data.global_batch": "64", "model.bn_groups": "8"}


def report(capfd, recipe: str, target: str, **fields: str) -> dict:
    """What `jaxtrain compile --json` prints."""
    changed = [f"--config.{name}={value}" for name, value in fields.items()]
    file, colon, layout = recipe.partition(":")
    code = command_line(
        ["compile", "--config", f"{CONFIGS / file}.py{colon}{layout}", "--target", target, "--json", *changed]
    )
    printed = capfd.readouterr()
    assert code == 0, printed.err
    assert "cudart" not in printed.err
    return json.loads(printed.out)


ALL_REDUCE, GATHER, SCATTER = ("all-reduce", "data"), ("all-gather", "data"), ("reduce-scatter", "data")
SHALLOW = {"model.depths": "(1,1,1,1)", "model.width": "32", "data.global_batch": "32"}
DEEP = SHALLOW | {"model.depths": "(2,1,1,1)"}
FLAT = {"model.depths": "(1,1,1,1,1)", "model.width": "16", "data.global_batch": "32"}
TWICE = {"layout.microbatches": "2"}
# Collectives that a layout's programs must have, and those that they must not have.
LAYOUTS = {
    "dp": ("quickstart:dp", "8xh100", TINY, {ALL_REDUCE}, {GATHER, SCATTER}),
    "zero1": ("quickstart:zero1", "8xh100", TINY, {ALL_REDUCE, GATHER}, set()),
    "zero2": ("quickstart:zero2", "8xh100", TINY | TWICE, {SCATTER, GATHER}, set()),
    "zero3 on two hosts": ("quickstart:zero3", "2x4xh200", TINY | TWICE, {SCATTER, GATHER}, set()),
    "hybrid": ("quickstart:hybrid", "8xh100", TINY, {("all-reduce", "replica"), GATHER}, set()),
    "tensor2": ("quickstart:tensor2", "8xa100", TINY, {("all-reduce", "tensor"), ALL_REDUCE}, {SCATTER, GATHER}),
    "pipeline2": ("quickstart:pipeline2", "8xh100", TINY, {ALL_REDUCE}, {GATHER}),
    "pipeline2 with zero2": ("mlp_synthetic:pipeline2,zero2", "8xh100", {}, {SCATTER, GATHER}, set()),
    "pipeline4 with zero1": ("quickstart:pipeline4,zero1", "8xh100", TINY, {ALL_REDUCE, GATHER}, set()),
    "ring": (
        "quickstart:dp",
        "8xh100",
        TINY | {"layout.reduce": "ring"},
        {("collective-permute", "data")},
        {GATHER, SCATTER},
    ),
    "int8": ("mlp_synthetic:dp", "8xh100", {"optim.compress": "int8"}, {("all-to-all", "data"), GATHER}, {SCATTER}),
    "microbatches": ("mlp_synthetic:dp", "8xh100", TWICE, {ALL_REDUCE}, {GATHER, SCATTER}),
    "several steps a call": ("mlp_synthetic:dp", "8xh100", {"train.steps_per_call": "4"}, {ALL_REDUCE}, {GATHER}),
    "ema": ("mlp_synthetic:zero2", "8xh100", {"optim.ema": "0.99"}, {ALL_REDUCE, GATHER}, set()),
    "fp16": ("mlp_synthetic:dp", "8xh100", {"train.precision": "fp16"}, {ALL_REDUCE}, {GATHER}),
    "f32": ("mlp_synthetic:zero3", "8xh100", {"train.precision": "f32"}, {GATHER}, set()),
    "tf32": ("mlp_synthetic:zero1", "8xh100", {"train.precision": "tf32"}, {ALL_REDUCE, GATHER}, set()),
    "vgg": ("vgg19_cifar10:dp", "8xh100", FLAT, {ALL_REDUCE}, {GATHER}),
    "vgg, tensor2": ("vgg19_cifar10:tensor2", "2xh100", FLAT, {("all-reduce", "tensor")}, {SCATTER}),
    "resnet18": ("resnet18_cifar100:zero3", "8xh100", SHALLOW, {GATHER}, set()),
    "resnet50": ("resnet50_cifar100:zero1", "8xh100", SHALLOW, {ALL_REDUCE, GATHER}, set()),
    "resnet101": ("resnet101_cifar100", "8xh100", SHALLOW, {ALL_REDUCE}, set()),
    "resnet fast": ("resnet_fast_cifar10:dp", "h100", {"data.global_batch": "64"}, set(), {ALL_REDUCE}),
    "swin": ("swin_tiny_cifar10:zero3", "8xb200", DEEP, {GATHER}, set()),
    "swin in stages": ("transformer_pipeline_zero", "4xh100", SHALLOW, {ALL_REDUCE, GATHER}, set()),
}


@compiles
@pytest.mark.gpu_program
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_in_the_gpus_program(name, capfd):
    """With the evaluation: XLA:GPU has aborted there."""
    recipe, target, fields, wanted, unwanted = LAYOUTS[name]
    found = report(capfd, recipe, target, **fields)
    programs = found["programs"]
    assert found["audit"] == {"passed": True, "error": "", "notes": found["audit"]["notes"]}
    assert found["fits"]
    kinds = {(c["kind"], axis) for p in programs.values() for c in p["collectives"] for axis in c["axes"]}
    assert wanted <= kinds
    assert not unwanted & kinds
    assert any(program.startswith("evaluation") for program in programs)
    donated = sum(p["donated_bytes"] for program, p in programs.items() if "update" in program or program == "step")
    assert donated >= found["state_bytes"]
    assert not any(program["host_callbacks"] for program in programs.values())
    # Parameters are gathered, forward and again backward; activations never.
    gathered = max(sum(c["bytes"] for c in p["collectives"] if c["kind"] == "all-gather") for p in programs.values())
    assert gathered <= 2 * 4 * found["parameters"] * (4 if name == "several steps a call" else 1) + 100_000
    if found["precision"] == "bf16":  # the head alone is in f32, and Muon's update
        wide = {layer.removesuffix(" backward") for p in programs.values() for layer in p["f32_products"]}
        assert len(wide - {"update"}) == 1, wide
        assert "update" not in wide or name == "resnet fast"


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("argument", recipes.LAYOUTS)
@pytest.mark.parametrize("recipe", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_every_recipe_has_every_layout_on_gpus(recipe, argument, capfd):
    """As they are, for eight H100s: over an hour."""
    target = "8xh100"
    if (recipe, argument) == ("mlp_synthetic", "pipeline4"):
        assert command_line(["compile", "--config", f"{recipe}:{argument}", "--target", target]) == 64, "three layers"
        return
    assert report(capfd, f"{recipe}:{argument}", target)["audit"]["passed"]


# Kernels and gigabytes of a small step. Fewer are welcome; more are a regression (benchmarks/NOTES.md).
SWIN = {"model.depths": "(2,1,1,1)", "data.image_size": "224", "data.global_batch": "32"}
COUNTS = {
    "resnet": ("resnet50_cifar100:dp", SHALLOW | {"model.stem": "imagenet", "data.image_size": "64"}, 245, 0.346),
    "vgg": ("vgg19_cifar10:dp", FLAT | {"model.depths": "(2,2,1,1,1)", "data.global_batch": "2048"}, 181, 2.94),
    "swin": ("swin_tiny_cifar10:dp", SWIN, 599, 12.8),
    "swin, pallas": ("swin_tiny_cifar10:dp", SWIN | {"model.attention": "pallas"}, 480, 8.57),
}


@compiles
@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="these are the counts of jax 0.10's compiler")
@pytest.mark.gpu_program
@pytest.mark.parametrize("name", COUNTS)
def test_a_step_has_no_more_kernels_and_bytes_than_it_had(name, capfd):
    recipe, fields, kernels, gigabytes = COUNTS[name]
    step = report(capfd, recipe, "h100", **fields)["programs"]["step"]
    assert step["kernels"] <= 1.05 * kernels
    assert step["gigabytes"] <= 1.05 * gigabytes


@compiles
@pytest.mark.gpu_program
def test_a_run_that_does_not_fit_is_said(capfd):
    fields = {
        "data.global_batch": "16384",
        "data.image_size": "224",
        "data.residency": "stream",
        "model.depths": "(1,1,1,1)",
        "model.bn_groups": "64",
    }
    changed = [f"--config.{name}={value}" for name, value in fields.items()]
    words = ["compile", "--config", f"{CONFIGS / 'resnet18_cifar10.py'}:dp", "--target", "a100-40", *changed]
    assert command_line(words) == 1
    said = capfd.readouterr().out
    assert "does not fit the 29.6 GiB that JAX takes of the GPU's 39.4 GiB" in " ".join(said.split())
    # The first is enough: it divides what the activations take by more than they are too large.
    assert re.findall(r"--config\.(\S+)", said) == ["layout.microbatches=4", "train.remat=dots", "train.remat=full"]


@compiles
@pytest.mark.gpu_program
def test_without_a_driver_the_plugin_says_nothing_at_a_start():
    command = ["-m", "jaxtrain", "layout", "--config", str(CONFIGS / "mlp_synthetic.py")]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    started = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=True)
    assert started.stderr == ""


@pytest.mark.parametrize(
    ("plugin", "problem"), [("nowhere", "is not installed"), ("numpy", "does not fit jaxlib ")], ids=["none", "another"]
)
def test_a_compiler_that_does_not_fit_is_said_with_the_command(plugin, problem, monkeypatch, capsys):
    monkeypatch.setattr(topology, "_PLUGINS", (plugin,))
    assert command_line(["compile", "--config", str(CONFIGS / "mlp_synthetic.py"), "--target", "8xh100"]) == 78
    said = capsys.readouterr().err
    assert f"a part of JAX's CUDA plugin, {problem}" in said
    assert "It needs no GPU: pip install 'jax[cuda1" in said


@compiles
@pytest.mark.gpu_program
def test_the_options_of_a_profiled_step_compile():
    """On a GPU the window of a profile runs programs without command buffers (docs/profiling.md)."""
    device, *_ = topology.target_devices(parse_target("h100"))
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((256, 256), np.float32, sharding=sharding)
    with topology.lowering_for(device), no_compile_cache():
        lowered = jax.jit(lambda x: np.float32(2) * (x @ x)).lower(x)
        assert "ENTRY" in (lowered.compile(dict(NO_COMMAND_BUFFERS)).as_text() or "")
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_command_buffers"):
            lowered.compile({"xla_gpu_enable_command_buffers": ""})
