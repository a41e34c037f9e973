"""Runs that begin with weights from a file, on every layout; what does not fit is refused; export gives the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
import runs
import safetensors.numpy

from jaxtrain import load_config
from jaxtrain.config import Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, from_dict, nested_dicts
from jaxtrain.data import registry
from jaxtrain.errors import ConfigError, WeightsError, WorkdirError
from jaxtrain.step.train_state import create_state, state_shapes
from jaxtrain.training.inference import load_trained
from jaxtrain.training.initial_weights import initial_weights, weights_of
from jaxtrain.training.setup import load_data, make_run_spec, resolve_for_machine
from jaxtrain.trees import path_of
from jaxtrain.weights.architecture import Architecture
from jaxtrain.weights.fetching import fetch
from jaxtrain.weights.file import open_weights
from jaxtrain.weights.matching import architecture_in, recognised
from jaxtrain.weights.naming import NAMINGS
from jaxtrain.weights.reading import resized_table
from jaxtrain.weights.writing import rows_for

MODELS = {
    "vgg": ModelConfig("vgg11_bn", width=8, stem="imagenet"),
    "resnet": ModelConfig("resnet50", width=8, depths=(1, 2, 1, 1), stem="imagenet"),
    "swin": ModelConfig("swin_tiny", width=32, depths=(1, 1, 1, 1), patch=4, window=2),
}


def config_for(model: ModelConfig, **layout) -> Config:
    data = DataConfig("synthetic", global_batch=8, image_size=64, examples=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    return Config(data=data, model=model, optim=OptimConfig(ema=0.9), layout=LayoutConfig(**layout))


def run_for(config: Config, devices: int = 1):
    devices = jax.devices()[:devices]
    config = resolve_for_machine(config, None, devices)
    run = make_run_spec(config, registry.outline(config.data, image_size=64), devices)
    return run, state_shapes(run.init, run.layout)


@functools.cache
def shapes_for(model: ModelConfig) -> dict:
    _, shapes = run_for(config_for(model))
    return {path: leaf.shape for path, leaf in weights_of(shapes).items()}


def tensors_for(model: ModelConfig, label: str = "torchvision", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors as a file with these names has them."""
    ours, rng = shapes_for(model), np.random.default_rng(seed)
    rows, _ = rows_for(label, model.name, model.depths, ours)
    return {
        name: np.abs(rng.standard_normal(row.form_of(ours[row.ours]).theirs)).astype(np.float32)
        for row in rows
        for name in row.theirs
    }


def written(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> str:
    (np.savez(path, **tensors) if path.suffix == ".npz" else safetensors.numpy.save_file(tensors, path, metadata))
    return str(path)


def begun(config: Config, devices: int = 1):
    """The first state of a run, and what it records of its weights."""
    run, shapes = run_for(config, devices)
    given, record = initial_weights(run, shapes)
    return create_state(run.init, run.layout, config.seed, given), record


def numbers(state) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in weights_of(state).items()}


def with_weights(model: ModelConfig, path: str, **more) -> ModelConfig:
    return ModelConfig(**{**vars(model), "init_from": path, **more})


# -------------------------------------------------------------------------------------------------------------- layouts

# Devices, and the layout.
BOTH = (4, {"stages": 2, "zero": 3})
LAYOUTS = (BOTH, (4, {"zero": 3}), (2, {}), (2, {"tensor": 2}))


@pytest.mark.parametrize(
    ("family", "layouts"),
    [parity.case("resnet", [BOTH], default=True), *(parity.case(f, LAYOUTS, default=False) for f in MODELS)],
)
def test_every_layout_begins_with_the_weights_of_the_file(family, layouts, tmp_path):
    """Also the moving average; a head of another size is drawn, as the run without weights draws it."""
    model = MODELS[family]
    tensors = tensors_for(ModelConfig(**{**vars(model), "num_classes": 12}))
    path = written(tmp_path / "weights.npz", tensors)
    drawn = numbers(begun(config_for(model))[0])
    first, record = begun(config_for(with_weights(model, path)))
    expected = numbers(first)
    assert len(record["new"]) == 2
    assert record["loaded"] == len(drawn) - 2
    assert record["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    for leaf, values in expected.items():
        assert np.array_equal(values, drawn[leaf]) == (leaf in record["new"])
    for devices, layout in layouts:
        state, _ = begun(config_for(with_weights(model, path), **layout), devices)
        for found in (numbers(state), numbers(type(first)(**{**vars(state), **state.ema}))):
            for leaf, values in expected.items():
                np.testing.assert_array_equal(found[leaf], values, leaf)


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: f"{naming.family}, {naming.label}")
def test_a_file_is_recognised_and_holds_what_was_written(naming, tmp_path):
    """Each leaf is written by the table and read back; a ResNet's names are those of two programs."""
    model, ours = MODELS[naming.family], shapes_for(MODELS[naming.family])
    rows = naming.rows(architecture_of(model))
    assert sorted(row.ours for row in rows) == sorted(ours)
    names = [name for row in rows for name in row.theirs]
    assert len(set(names)) == len(names)
    tensors = {name: np.ones(row.form_of(ours[row.ours]).theirs, np.float32) for row in rows for name in row.theirs}
    with open_weights(written(tmp_path / "w.safetensors", tensors)) as file:
        found = recognised(file.tensors)
        assert found is not None
        assert found.rows is naming.rows or (naming.family, naming.label) == ("resnet", "timm")
        assert architecture_in(file, found) == architecture_of(model)


def architecture_of(model: ModelConfig):
    _, architecture = rows_for("torchvision", model.name, model.depths, shapes_for(model))
    return architecture


# ------------------------------------------------------------------------------------------------------ what is refused


def without(model: ModelConfig, name: str) -> dict[str, np.ndarray]:
    tensors = tensors_for(model)
    del tensors[name]
    return tensors


def misspelt(model: ModelConfig) -> dict[str, np.ndarray]:
    return {name.replace("layer1.0.bn1.", "layer1.0.bn_1."): value for name, value in tensors_for(model).items()}


REFUSED = {
    "another depth": (tensors_for, "resnet", {"depths": (1, 1, 1, 1)}, "--config.model.depths='(1, 2, 1, 1)'"),
    "another family": (tensors_for, "resnet", {"name": "vgg11", "depths": ()}, "--config.model.name=resnet50"),
    "another width": (tensors_for, "resnet", {"width": 16}, "--config.model.width=8"),
    "another stem": (tensors_for, "resnet", {"stem": "cifar"}, "--config.model.stem=imagenet"),
    "another map": (tensors_for, "vgg", {"stem": "cifar"}, "--config.model.stem=imagenet"),
    "no BatchNorm": (tensors_for, "vgg", {"name": "vgg11"}, "--config.model.name=vgg11_bn"),
    "another patch": (tensors_for, "swin", {"patch": 2}, "--config.model.patch=4"),
    "no such model": (tensors_for, "swin", {"name": "mlp", "width": 0, "depths": (), "patch": 0, "window": 0}, "is no swin"),
    "lacks a tensor": (lambda m: without(m, "layer1.0.bn1.weight"), "resnet", {}, "lacks layer1.0.bn1.weight."),
    "another spelling": (misspelt, "resnet", {}, "lacks layer1.0.bn1.weight (nearest: layer1.0.bn_1.weight)"),
    "no bias of the head": (lambda m: without(m, "fc.bias"), "resnet", {}, "lacks fc.bias."),
    "lacks statistics": (lambda m: without(m, "bn1.running_var"), "resnet", {}, "lacks bn1.running_var"),
    "has one more": (lambda m: tensors_for(m) | {"layer1.0.se.weight": np.ones(3)}, "resnet", {}, "layer1.0.se.weight ("),
    "another shape": (lambda m: tensors_for(m) | {"bn1.weight": np.ones(9)}, "resnet", {}, "bn1.weight is [9]"),
    "whole numbers": (lambda m: tensors_for(m) | {"bn1.weight": np.ones(8, int)}, "resnet", {}, "weights are floats"),
    "not a number": (lambda m: tensors_for(m) | {"bn1.bias": np.full(8, np.nan)}, "resnet", {}, "bn1.bias holds"),
    "too large": (lambda m: tensors_for(m) | {"bn1.bias": np.full(8, 1e300)}, "resnet", {}, "not finite in float32"),
    "a bad variance": (lambda m: tensors_for(m) | {"bn1.running_var": -np.ones(8)}, "resnet", {}, "variances below 0"),
    "a prefix": (lambda m: {f"module.{n}": v for n, v in tensors_for(m).items()}, "resnet", {}, "all names begin with module."),
    "unknown names": (lambda m: {"a.b": np.ones(3)}, "resnet", {}, "holds no model that is known"),
    "another file": (tensors_for, "resnet", {"init_sha256": "0" * 64}, "it is another file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_does_not_fit_is_refused_in_a_sentence(case, tmp_path):
    make, family, fields, said = REFUSED[case]
    path = written(tmp_path / "w.safetensors", make(MODELS[family]))
    run, shapes = run_for(config_for(with_weights(MODELS[family], path, **fields)))
    with pytest.raises(WeightsError) as refusal:
        initial_weights(run, shapes)
    text = str(refusal.value)
    assert said in text
    assert "\n" not in text
    assert text.endswith(".")


def test_a_table_of_another_window_is_resized_and_said_to_be(tmp_path):
    model = MODELS["swin"]
    path = written(tmp_path / "w.safetensors", tensors_for(model))
    name = "params/layers_01/attn/bias_table"
    state, record = begun(config_for(with_weights(model, path, window=4)))
    assert record["resized"][name] == "3 x 3 to 7 x 7"
    with open_weights(path) as file:
        table = file.array("features.1.0.attn.relative_position_bias_table")
        expected = resized_table(table, 49)
    np.testing.assert_allclose(numbers(state)[name], expected, rtol=1e-6)
    flat = resized_table(np.full((9, 1), 3.0), 49)
    np.testing.assert_allclose(flat, 3.0)


# ------------------------------------------------------------------------------------------------- a run, there and back

TINY = runs.SMALL | {"model.name": "resnet18", "model.width": 4, "model.depths": "(1,1,1,1)", "train.steps": 2,
                     "optim.ema": 0.5, "checkpoint.every": "1"}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps from weights of five classes: its directory, and the file."""
    folder = tmp_path_factory.mktemp("trained")
    config = ModelConfig("resnet18", width=4, depths=(1, 1, 1, 1), stem="imagenet")
    tensors = tensors_for(config) | {"fc.weight": np.ones((5, 32), np.float32), "fc.bias": np.ones(5, np.float32)}
    tensors["conv1.weight"] = np.ones((4, 1, 3, 3), np.float32)
    tensors["bn1.num_batches_tracked"] = np.array(7)
    metadata = {"pretrained_cfg": json.dumps({"mean": [0.25], "std": [0.5]})}
    path = written(folder / "weights.safetensors", tensors, **metadata)
    runs.here(folder / "run", TINY, model__init_from=path)
    return folder / "run", path


def test_a_run_records_its_weights_and_does_not_read_them_again(trained, tmp_path):
    run, path = trained
    copy, moved = shutil.copytree(run, tmp_path / "run"), tmp_path / "moved"
    record = json.loads((copy / "manifest.json").read_text())["starts"][0]["weights"]
    assert (record["file"], record["names"]) == (path, "torchvision")
    assert set(record["new"]) == {"params/layers_05/linear/kernel", "params/layers_05/linear/bias"}
    assert record["left_over"] == ["bn1.num_batches_tracked"]
    stored = json.loads((copy / "config.json").read_text())
    assert (stored["data"]["mean"], stored["data"]["std"]) == ([0.25], [0.5])
    shutil.move(path, moved)
    try:
        runs.here(copy, TINY, model__init_from=path, train__steps=3, optim__schedule="constant")
    finally:
        shutil.move(moved, path)
    manifest = json.loads((copy / "checkpoints" / "3" / "manifest.json").read_text())
    assert manifest["position"]["weights"] == record
    with pytest.raises(WorkdirError, match=r"model\.init_from"):
        runs.here(copy, TINY, model__init_from="other.safetensors")
    runs.here(copy, TINY, model__init_from="required", train__steps=4, optim__schedule="constant")
    assert json.loads((copy / "config.json").read_text())["model"]["init_from"] == path
    with pytest.raises(ConfigError, match="never begins from scratch"):  # and before the data, which are not there
        runs.here(tmp_path / "new", TINY, model__init_from="required", data__name=f"folder:{tmp_path / 'absent'}")


def test_the_flags_of_a_model():
    """Of two Swins of the same depths the width decides; a model without a name is a kind of one that has."""
    for found, title, flags in (
        (Architecture("swin", (2, 2, 18, 2), 128), "a Swin-B", ["name=swin_base"]),
        (Architecture("swin", (2, 2, 18, 2), 96), "a Swin-S", ["name=swin_small"]),
        (Architecture("swin", (2, 2, 18, 2), 32), "a Swin-S of width 32", ["name=swin_small", "width=32"]),
        (Architecture("vgg", (1, 1, 1, 1, 1), 64, batch_norm=True), "a VGG of depths (1, 1, 1, 1, 1) with BatchNorm",
         ["name=vgg16_bn", "depths='(1, 1, 1, 1, 1)'"]),
        (Architecture("resnet", (1, 2, 1, 1), 8, bottleneck=True),
         "a ResNet of depths (1, 2, 1, 1) of bottleneck blocks of width 8",
         ["name=resnet50", "depths='(1, 2, 1, 1)'", "width=8"]),
    ):  # fmt: skip
        assert (found.title, found.flags) == (title, [f"--config.model.{flag}" for flag in flags])


def test_weights_that_do_not_say_how_images_were_normalized(tmp_path):
    """ImageNet's for what others publish, in colour; the data set's own for the rest; what a user says comes first."""
    model = MODELS["resnet"]
    grey = tensors_for(model) | {"conv1.weight": np.ones((8, 1, 7, 7), np.float32)}
    own = {path: np.ones(shape, np.float32) for path, shape in shapes_for(model).items()}
    for name, tensors, given, wanted in (
        ("colour", tensors_for(model), (), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("grey", grey, (), ((), ())),
        ("own", own, (), ((), ())),
        ("said", tensors_for(model), (0.1, 0.2, 0.3), ((0.1, 0.2, 0.3),) * 2),
    ):
        path = written(tmp_path / f"{name}.safetensors", tensors)
        data = DataConfig("synthetic", global_batch=8, image_size=64, mean=given, std=given)
        config = Config(data=data, model=with_weights(model, path))
        resolved = resolve_for_machine(config, None, jax.devices()[:1]).data
        assert (resolved.mean, resolved.std) == wanted, name


@pytest.mark.parametrize("naming", ["torchvision", "timm", "transformers", "jaxtrain"])
def test_export_and_import_give_the_same_bits(naming, trained, tmp_path, capsys):
    run, _ = trained
    out = tmp_path / "out.safetensors"
    command = ["export", str(run), "--naming", naming, "--out", str(out), "--checkpoint", "latest", "--no-ema"]
    assert runs.command_line(command) == 0
    assert runs.command_line(command) == 64
    assert "--force" in capsys.readouterr().err
    assert runs.command_line([*command, "--force"]) == 0
    assert runs.command_line(["weights", "inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert (found["config"]["mean"], found["config"]["class_names"][0]) == ([0.25], "0")
    again, record = begun_on(runs_config(init_from=str(out)))
    expected = stored_numbers(run, ema=False)
    assert not record["new"]
    for leaf, values in numbers(again).items():
        np.testing.assert_array_equal(values, expected[leaf], leaf)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def runs_config(**model) -> Config:
    values = {f"model.{name}": value for name, value in model.items()}
    return from_dict(nested_dicts(load_config(runs.RECIPE, TINY | values)))


def begun_on(config: Config, devices: int = 1):
    """As `begun`, on the run's own data."""
    chosen = jax.devices()[:devices]
    config = resolve_for_machine(config, None, chosen)
    run = make_run_spec(config, load_data(config.data), chosen)
    given, record = initial_weights(run, state_shapes(run.init, run.layout))
    return create_state(run.init, run.layout, config.seed, given), record


def stored_numbers(run: Path, *, ema: bool) -> dict[str, np.ndarray]:
    """The weights of a run's latest checkpoint."""
    stored = load_trained(run, checkpoint="latest", ema=ema, devices=jax.devices()[:1])
    leaves = jax.tree_util.tree_leaves_with_path(stored.variables)
    return {path_of(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize(("devices", "layout"), [(1, {}), (2, {"zero": 3}), (2, {"stages": 2})])
def test_a_checkpoint_gives_its_average_to_another_run(devices, layout, trained):
    """With a head for other classes, on other devices."""
    run, _ = trained
    config = runs_config(init_from=str(run / "checkpoints" / "latest"), num_classes=12)
    config = dataclasses.replace(config, layout=LayoutConfig(**layout))
    state, record = begun_on(config, devices)
    assert (record["names"], len(record["new"])) == ("jaxtrain", 2)
    expected = stored_numbers(run, ema=True)
    for leaf, values in numbers(state).items():
        if leaf not in record["new"]:
            np.testing.assert_array_equal(values, expected[leaf], leaf)


# ---------------------------------------------------------------------------------------------------------------- fetch

CONTENT = bytes(range(256)) * 64
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        to = {"/loop": "/loop", "/away": "http://example.invalid/x", "/file": "file:///etc/passwd", "/moved": "/good"}
        if self.path in to:
            self.send_response(302)
            self.send_header("Location", to[self.path])
            self.end_headers()
            return
        if self.path == "/none":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(CONTENT) * (2 if self.path == "/cut" else 1)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(1000 if self.path == "/endless" else 1):
                self.wfile.write(CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_fetch_keeps_only_the_file_that_was_asked_for(server, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    out = tmp_path / "w.safetensors"
    for path, said in {
        "/none": "404", "/loop": "redirect", "/away": "https only", "/file": "not allowed", "/cut": "ended after",
        "/endless": "more than 1,000,000 bytes",
    }.items():  # fmt: skip
        with pytest.raises(WeightsError, match=said):
            fetch(server + path, SHA256, out, most_bytes=1_000_000)
        assert not list(tmp_path.iterdir()), path
    with pytest.raises(WeightsError, match="nothing was kept"):
        fetch(f"{server}/good", "0" * 64, out)
    for url in ("http://example.com/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "x", "https://"):
        with pytest.raises(WeightsError, match="https only"):
            fetch(url, SHA256, out)
    assert not list(tmp_path.iterdir())
    assert (
        runs.command_line(["weights", "fetch", f"{server}/moved", "--sha256", SHA256.upper(), "--out", str(out)]) == 0
    )
    assert out.read_bytes() == CONTENT
    assert fetch("https://example.invalid/x", SHA256, out) == out  # it is there
    with pytest.raises(WeightsError, match="another SHA-256"):
        fetch(f"{server}/good", "0" * 64, out)
    assert runs.command_line(["weights", "fetch", f"{server}/good", "--out", str(out)]) == 64
    assert runs.command_line(["weights", "fetch", "http://127.0.0.1:9/x", "--sha256", SHA256]) == 66
    assert "put it at" in capsys.readouterr().err
