"""jaxtrain from Python: what `train` and `evaluate` take, return and raise, and what they leave as they found it."""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
import logging
import random
import re
import signal
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from runs import SMALL, command_line
from runs import arguments as words_of

import jaxtrain
from jaxtrain import evaluate, load_config, train
from jaxtrain.config import CheckpointConfig, Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.errors import (
    REPORT_THIS,
    CheckpointError,
    ConfigError,
    DataError,
    JaxtrainError,
    NumericError,
    WorkdirError,
)
from jaxtrain.recipes import resolve
from jaxtrain.training.jax_settings import no_implicit_transfers
from jaxtrain.training.layout_report import describe_layout

ROOT = Path(__file__).parents[2]


def config(*, data=(), model=(), optim=(), train=(), seed=0) -> Config:
    """A run of two steps of a small MLP on the digits, with fields of it replaced."""
    return Config(
        seed=seed,
        data=DataConfig(**{"name": "digits", "global_batch": 16, **dict(data)}),
        model=ModelConfig(**{"name": "mlp", "width": 8, **dict(model)}),
        optim=OptimConfig(**{"schedule": "constant", "lr_scaling": "none", **dict(optim)}),
        train=TrainConfig(**{"steps": 2, "log_every": 1, "eval_every": "0", **dict(train)}),
        checkpoint=CheckpointConfig(every="0"),
    )


def fit(workdir, devices=1, **fields):
    return train(config(**fields), workdir, num_devices=devices, quiet=True)


# -------------------------------------------------------------------------------------------------- what is returned


def test_the_three_functions_are_functions():
    for name in ("train", "evaluate", "load_config"):
        function = getattr(jaxtrain, name)
        assert callable(function)
        assert function.__name__ == name
        assert name in jaxtrain.__all__
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = jaxtrain.trian


def test_train_returns_state_history_result_and_paths(tmp_path):
    chosen = load_config(
        ROOT / "configs" / "quickstart.py", {"model.name": "mlp", "model.width": 8, "model.depths": ()}
    )
    chosen.train.steps = 3
    chosen.train.log_every = 1
    chosen.data.global_batch = 64
    found = train(chosen, tmp_path / "run", num_devices=2, quiet=True)
    assert int(found.state.step) == 3
    assert found.result["steps"] == 3
    assert found.result["examples"] == 3 * 64
    assert found.result["devices"] == 2
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(found.state)} == {2}

    assert re.fullmatch(
        rf"TrainResult\({found.result['steps']} steps, best step \d+: validation [\d.]+ %, test [\d.]+ %; {tmp_path}.*\)",
        repr(found),
    )
    steps = [row for row in found.history if row["phase"] == "train"]
    assert "loss_scale" not in steps[0], "only fp16 has one"
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert {"loss", "accuracy", "learning_rate", "grad_norm", "throughput", "data_wait", "epoch"} <= set(steps[0])
    assert [row["phase"] for row in found.history[3:]] == ["val", "test"]
    assert found.history[-1]["accuracy"] == found.result["last"]["test"]["accuracy"]

    assert found.workdir.path == tmp_path / "run"
    stored = [json.loads(line) for line in found.workdir.metrics_jsonl.read_text().splitlines()]
    assert [row["loss"] for row in stored if row["phase"] == "train"] == [
        row["loss"] for row in steps
    ]  # full precision
    assert json.loads(found.workdir.result.read_text()) == found.result
    assert json.loads(found.workdir.config.read_text())["train"]["steps"] == 3
    with open(found.workdir.metrics_csv) as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "phase", "loss", "accuracy", "throughput"]
    assert {row["phase"] for row in rows} == {"train", "val", "test"}
    for path in (
        found.workdir.checkpoints / "3",
        found.workdir.tensorboard,
        found.workdir.manifest,
        found.workdir.log(0),
    ):
        assert path.exists()


def test_a_config_may_be_dataclasses_a_configdict_or_plain_dicts(tmp_path):
    whole = config()
    plain = {
        name: dataclasses.asdict(getattr(whole, name)) for name in ("data", "model", "optim", "train", "checkpoint")
    }
    plain["optim"] |= {"step_at": [0.3, 0.6, 0.8], "learning_rate": 0.1}
    losses = [
        [row["loss"] for row in train(each, tmp_path / str(i), num_devices=1, quiet=True).history]
        for i, each in enumerate([whole, plain])
    ]
    assert losses[0] == losses[1]


def test_evaluate_from_python(tmp_path):
    found = fit(tmp_path, devices=2, optim={"ema": 0.5})
    for split, key in (("val", "validation"), ("validation", "validation"), ("test", "test")):
        for ema in (False, True):
            outcome = evaluate(tmp_path, split, checkpoint="latest", ema=ema, num_devices=3)
            assert outcome.step == 2
            assert outcome.result.accuracy == found.result["last"][key + ("_ema" if ema else "")]["accuracy"]
            assert len(outcome.class_names) == len(outcome.result.per_class) == 10


# ----------------------------------------------------------------------------------------------------- what is raised


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (ConfigError, {"model": {"name": "resnet19"}}),
        (ConfigError, {"optim": {"name": "math:nothing"}}),
        (ConfigError, {"optim": {"class_weights": "1,2"}}),
        (ConfigError, {"data": {"global_batch": 18}}),
        (DataError, {"data": {"name": "folder:/no/such/folder", "image_size": 8}}),
        (NumericError, {"optim": {"learning_rate": 1e30}, "train": {"steps": 20}}),
    ],
)
def test_errors_are_typed_and_leave_jax_as_it_was(tmp_path, error, fields):
    before, handlers = dict(jax.config.values), logging.getLogger("jaxtrain").handlers[:]
    with pytest.raises(error) as caught:
        fit(tmp_path, devices=4, **fields)
    assert isinstance(caught.value, JaxtrainError)
    assert "\n" not in str(caught.value)
    assert dict(jax.config.values) == before
    assert logging.getLogger("jaxtrain").handlers == handlers


def test_values_set_on_a_configdict_are_checked_by_train(tmp_path):
    chosen = load_config(ROOT / "configs" / "quickstart.py")
    chosen.optim.ema = 3.0
    with pytest.raises(ConfigError, match=r"config\.optim\.ema=3\.0"):
        train(chosen, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="a file is in its way"):
        train(config(), tmp_path / "file")


def test_a_directory_of_another_run_is_refused_and_kept(tmp_path):
    fit(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    with pytest.raises(WorkdirError, match=r"config\.model\.width: 8 -> 12"):
        fit(tmp_path, model={"width": 12})
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json*")} == before


def test_evaluate_raises_typed_errors_too(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluate(tmp_path)
    fit(tmp_path)
    for arguments, said in [
        ({"split": "tset"}, "'tset'"),
        ({"ema": True}, "no moving average"),
        ({"num_devices": 9}, "has 8"),
    ]:
        with pytest.raises(ConfigError, match=said):
            evaluate(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optim": {"name": "adamw", "nesterov": True}}, "config.optim.nesterov=True has no effect: adamw has no such"),
        ({"optim": {"name": "lion", "eps": 1e-6}}, "config.optim.eps=1e-06 has no effect: lion has no such setting"),
        ({"optim": {"schedule": "cosine", "decay_share": 0.5}}, "config.optim.decay_share=0.5 has no effect"),
        ({"optim": {"schedule": "constant", "final_scale": 0.5}}, "config.optim.final_scale=0.5 has no effect"),
        (
            {"data": {"crop_padding": 3}},
            "config.data.crop_padding=3 has no effect: data.augmentation='none' does not pad",
        ),
        ({"data": {"flip": False}}, "config.data.flip=False has no effect: data.augmentation='none' does not flip"),
        (
            {"data": {"augmentation": "tiny:speckle", "flip": False}},
            "config.data.flip=False has no effect: data.augmentation='tiny:speckle' does not flip",
        ),
        (
            {"data": {"dir": "/elsewhere"}},
            "config.data.dir='/elsewhere' has no effect: digits is not in the data directory",
        ),
        ({"model": {"bn_groups": 2}}, "config.model.bn_groups=2 has no effect: mlp has no BatchNorm"),
        ({"layout": {"balance": "time"}}, "config.layout.balance='time' has no effect: there is one stage"),
        (
            {"data": {"validation": 0.0}, "checkpoint": {"best": "val_loss"}},
            "config.checkpoint.best='val_loss' has no effect: there is no validation split",
        ),
        (
            {"data": {"validation": 0.0}, "train": {"eval_every": "2 steps"}},
            "config.train.eval_every='2 steps' has no effect",
        ),
    ],
)
def test_a_setting_without_effect_is_said(fields, said):
    """Of each part that can have one; what has an effect, or its default, is not."""
    values = config(**{name: part for name, part in fields.items() if name not in ("layout", "checkpoint")})
    layout, checkpoint = LayoutConfig(**fields.get("layout", {})), CheckpointConfig(**fields.get("checkpoint", {}))
    changed = dataclasses.replace(values, layout=layout, checkpoint=checkpoint)
    before, after = (describe_layout(each, jax.devices()[:1])["warnings"] for each in (config(), changed))
    assert before == []
    assert [text for text in after if text.startswith(said)] == after
    assert len(after) == 1


@pytest.mark.parity
@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_no_recipe_has_a_setting_without_effect(recipe):
    resolved = resolve(str(ROOT / "configs" / f"{recipe}.py")).config
    devices = 4 if recipe == "transformer_pipeline_zero" else 1
    assert describe_layout(resolved, jax.devices()[:devices])["warnings"] == []


# ------------------------------------------------------------------------------------------------- a user's own parts


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    """Writes a module `name` into an otherwise empty working directory, and makes that the current one."""
    here = tmp_path / "project"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))

    def write(name: str, text: str) -> None:
        (here / f"{name}.py").write_text(textwrap.dedent(text))

    return write


def test_a_users_optimizer_loss_augmentation_and_data_by_dotted_name(tmp_path, user_code):
    """The same as jaxtrain's own, so that the numbers are."""
    user_code(
        "own_parts",
        """
        import dataclasses

        import jax
        import jax.numpy as jnp
        import numpy as np
        import optax

        from jaxtrain.data import registry

        CALLS = set()
        ONES = np.ones(10, np.float32)  # a constant of the program, no transfer in the loop

        def optimizer(config, rate, mask):
            CALLS.add("optimizer")
            decay = optax.add_decayed_weights(config.weight_decay, mask)
            return optax.chain(decay, optax.trace(config.momentum), optax.scale_by_learning_rate(rate))

        def loss(logits, targets):
            CALLS.add("loss")
            return -jnp.sum(ONES * targets * jax.nn.log_softmax(logits), -1)

        def augmentation(images, keys):
            CALLS.add("augmentation")
            assert keys.shape == images.shape[:1]
            return images

        def data(config, *, image_size):
            CALLS.add("data")
            return registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
        """,
    )
    shared = {"weight_decay": 0.01, "momentum": 0.5}
    own = fit(
        tmp_path / "own",
        devices=2,
        data={"name": "own_parts:data", "augmentation": "own_parts:augmentation"},
        optim=shared | {"name": "own_parts:optimizer", "loss": "own_parts:loss"},
    )
    built_in = fit(tmp_path / "built-in", devices=2, optim=shared)
    import own_parts  # noqa: PLC0415

    assert sorted(own_parts.CALLS) == ["augmentation", "data", "loss", "optimizer"]
    losses = [[row["loss"] for row in each.history] for each in (own, built_in)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 4


FAILING = """
    import dataclasses, numpy as np
    from own_helper import fail
    from jaxtrain.data import registry
    from jaxtrain.data.base import Subset
    from jaxtrain.models.classifier import Classifier
    from jaxtrain.models.layers import Layer

    class Net(Layer):
        def __call__(self, x, context): return fail()

    def model(config, *, image_shape, num_classes, dtype, param_dtype): return Classifier((Net(dtype, param_dtype),))
    def build(config, **kinds): return fail()
    def loss(logits, targets): return fail()
    def optimizer(config, rate, mask): return fail()
    def data(config, *, image_size): return fail()

    class Source(Subset):
        def read(self, indices): return fail()

    def source(config, *, image_size):
        found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
        return dataclasses.replace(found, train=Source(found.train, np.arange(len(found.train))))
"""


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("model.name", "model"), ("model.name", "build"), ("optim.loss", "loss"), ("optim.name", "optimizer"),
        ("data.name", "data"), ("data.name", "source"),
    ],
)  # fmt: skip
def test_an_error_in_a_users_own_code_is_said_to_be_theirs(tmp_path, user_code, capfd, field, name):
    user_code("own_helper", "def fail(): raise KeyError('mine')")
    user_code("own_failing", FAILING)
    fields = SMALL | {"train.steps": 1, field: f"own_failing:{name}"}
    assert command_line(["train", *words_of(tmp_path / "run", fields, "--devices", "1")]) == 70
    said = capfd.readouterr().err
    assert REPORT_THIS not in said
    assert "jaxtrain: Your own code failed (KeyError: 'mine'), at " in said
    assert "own_helper.py:1, in fail; this is its traceback." in said
    assert "Traceback" in said


def test_a_users_model_by_dotted_name(tmp_path):
    found = train(
        dataclasses.replace(
            config(model={"name": "vit_plugin:ViT", "width": 8, "depths": (1,)}, data={"global_batch": 8}),
            layout=LayoutConfig(zero=3),
        ),
        tmp_path,
        num_devices=2,
        quiet=True,
    )
    assert int(found.state.step) == 2
    assert "position" in found.state.params["layers_00"]
    assert evaluate(tmp_path, num_devices=1, trust=True).result.examples == 359  # which finds the model by its name too


def test_balanced_weights_need_labels_that_are_known(tmp_path, user_code):
    """Those of a source whose images would have to be decoded are not; those of an outline need not be."""
    user_code(
        "opaque",
        """
        import dataclasses

        from jaxtrain.data import registry

        class Opaque:
            def __init__(self, source): self.source, self.shape = source, source.shape
            def __len__(self): return len(self.source)
            def read(self, indices): return self.source.read(indices)

        def data(config, *, image_size):
            found = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
            return dataclasses.replace(found, train=Opaque(found.train))
        """,
    )
    balanced = {"class_weights": "balanced"}
    with pytest.raises(
        ConfigError, match=r"class_weights='balanced': the labels of digits are only known once .*'1,2\.5,0\.5'"
    ):
        fit(tmp_path / "run", data={"name": "opaque:data"}, optim=balanced)
    fit(tmp_path / "digits", data={"name": "digits"}, optim=balanced)
    assert evaluate(tmp_path / "digits", "train", data="opaque:data").result.examples > 0  # which weighs no class
    for name in ("cifar10", "synthetic"):
        assert describe_layout(config(data={"name": name}, optim=balanced), jax.devices()[:1])["warnings"] == []


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("model.name", "broken:Net", "importing 'broken' .* failed with ZeroDivisionError"),
        ("optim.name", "wrong:optimizer", "must return an optax.GradientTransformation"),
        ("data.name", "wrong:data", "returned dict, not a Dataset"),
        ("model.name", "wrong:Model", "must return a jaxtrain.models.classifier.Classifier"),
        ("model.name", "wrong:Empty", r"none of its layers \(1\) has parameters"),
        ("optim.loss", "wrong:los", "has no 'los'.*Did you mean 'loss'"),
        (
            "optim.loss",
            "wrong:loss",
            r"returned float32 \[16, 10\] for .*; it must return a float for each example, \[16\]",
        ),
        ("optim.loss", "wrong:mean", r"returned float32 \[\] for logits of \[16, 10\]; it must"),
        ("optim.loss", "wrong:nothing", "returned a NoneType for logits"),
        (
            "data.augmentation",
            "wrong:floats",
            r"returned float32 \[16, 8, 8, 1\]; it must return uint8 \[16, 8, 8, 1\]",
        ),
        ("data.augmentation", "wrong:cut", r"returned uint8 \[16, 8, 7, 1\]; it must return uint8 \[16, 8, 8, 1\]"),
        ("data.augmentation", "wrong:nothing", "returned a NoneType; it must return uint8"),
        ("data.augmentation", "wrong:NUMBER", "is a int; it must be a function"),
    ],
)
def test_what_is_wrong_with_a_users_part_is_said(tmp_path, user_code, field, text, said):
    user_code("broken", "1 / 0")
    user_code(
        "wrong",
        """
        def optimizer(config, rate, mask): return 3
        def data(config, *, image_size): return {}
        def Model(config, *, image_shape, num_classes, dtype, param_dtype): return "a model"
        def loss(logits, targets): return logits
        def mean(logits, targets): return (logits * targets).mean()
        def floats(images, keys): return images / 255
        def cut(images, keys): return images[:, :, 1:]
        def nothing(images, keys): pass
        NUMBER = 3

        from jaxtrain.models.classifier import Classifier
        from jaxtrain.models.layers import Layer

        class Flat(Layer):
            def __call__(self, x, context): return x.reshape(x.shape[0], -1)[:, :10]

        def Empty(config, *, image_shape, num_classes, dtype, param_dtype):
            return Classifier((Flat(dtype, param_dtype),))
        """,
    )
    section, _, key = field.partition(".")
    with pytest.raises(ConfigError, match=said) as caught:
        fit(tmp_path / "run", **{section: {key: text}})
    assert f"config.{field}={text!r}" in str(caught.value)


# ------------------------------------------------------------------------------------------------ never block the loop


def test_implicit_transfers_raise_on_every_thread():
    caught = []

    def transfers():
        try:
            jnp.add(ones, np.ones(3, np.float32))
        except Exception as error:
            caught.append(str(error))

    ones = jnp.ones(3)
    with no_implicit_transfers():
        transfers()
        thread = threading.Thread(target=transfers)
        thread.start()
        thread.join()
        jnp.add(ones, jax.device_put(np.ones(3, np.float32)))  # said explicitly, it may
    transfers()
    assert len(caught) == 2
    assert all("host-to-device" in text for text in caught)


def test_the_guard_is_on_in_the_loop(tmp_path, user_code):
    """Of a source that computes with JAX by the way, the first batch is still read before the loop starts."""
    user_code(
        "careless",
        """
        import dataclasses

        import jax.numpy as jnp
        import numpy as np

        from jaxtrain.data import registry

        class Source:
            def __init__(self, source):
                self.source, self.shape = source, source.shape
            def __len__(self):
                return len(self.source)
            def read(self, indices):
                images, labels = self.source.read(indices)
                return np.asarray(jnp.flip(images, 2)), labels

        def data(config, *, image_size):
            digits = registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
            return dataclasses.replace(digits, train=Source(digits.train))
        """,
    )
    fields = {"name": "careless:data", "workers": 0}
    with pytest.raises(Exception, match="host-to-device"):
        fit(tmp_path / "stream", data=fields | {"residency": "stream"})
    # read once, before the loop, it does no harm
    assert int(fit(tmp_path / "device", data=fields | {"residency": "device"}).state.step) == 2


def test_the_loop_reads_each_steps_metrics_once_and_nothing_else(tmp_path, monkeypatch):
    """CPU never catches a read from the device, so they are counted: those of 16 steps beyond those of 4."""
    counts: collections.Counter[str] = collections.Counter()
    value, get = ArrayImpl._value, jax.device_get

    def counted_value(self):
        counts["values"] += 1
        return value.fget(self)

    def counted_get(tree):
        counts["device_get"] += 1
        counts["expected"] += len(jax.tree.leaves(tree))
        return get(tree)

    monkeypatch.setattr(ArrayImpl, "_value", property(counted_value))
    monkeypatch.setattr(jax, "device_get", counted_get)

    def reads(steps):
        counts.clear()
        fit(tmp_path / str(steps), devices=2, train={"steps": steps, "log_every": 2}, optim={"ema": 0.9})
        return counts.copy()

    few, many = reads(4), reads(16)
    assert many["device_get"] - few["device_get"] == 12
    assert many["values"] - few["values"] == many["expected"] - few["expected"] > 0


# ------------------------------------------------------------------------------------------- what is left as it was


def test_jax_and_the_process_are_left_as_they_were(tmp_path):
    before, signals = dict(jax.config.values), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    root, own = logging.getLogger().handlers[:], logging.getLogger("jaxtrain").handlers[:]
    found = fit(tmp_path, train={"precision": "f64"})
    assert {leaf.dtype for leaf in jax.tree.leaves(found.state.params)} == {np.dtype("float64")}
    assert dict(jax.config.values) == before
    assert not before["jax_enable_x64"]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == signals
    assert logging.getLogger().handlers == root
    assert logging.getLogger("jaxtrain").handlers == own


def test_a_callers_own_setting_is_for_its_thread_alone(tmp_path):
    with jax.enable_x64(True):
        fit(tmp_path)
        assert jax.config.jax_enable_x64
    assert not jax.config.jax_enable_x64


def test_quiet_prints_nothing(tmp_path, capfd):
    fit(tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    assert "step" in (tmp_path / "quiet" / "logs" / "process_0.log").read_text()
    train(config(), tmp_path / "loud", num_devices=1)
    said = capfd.readouterr()
    assert said.out == ""
    assert f"work directory: {tmp_path / 'loud'}" in said.err.replace("\n", "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said.err), "a pipe gets lines"
    lines = said.err.splitlines()
    header = next(i for i, line in enumerate(lines) if "val acc %" in line)
    assert re.match(r"[\d:]{8} +[\d.]+/1 +\d\.\d{4} .* s  best$", lines[header + 1])
    assert "done in " in lines[header + 2]


def test_python_and_numpy_are_seeded(tmp_path, user_code):
    user_code(
        "drawing",
        """
        import dataclasses, random
        import numpy as np
        from jaxtrain.data import registry

        DRAWN = []

        def data(config, *, image_size):
            DRAWN.append((random.random(), np.random.rand()))
            return registry.load(dataclasses.replace(config, name="digits"), image_size=image_size)
        """,
    )
    for number, seed in enumerate((5, 5, 6)):
        random.seed(number)
        np.random.seed(number)
        fit(tmp_path / str(number), data={"name": "drawing:data"}, seed=seed)
    import drawing  # noqa: PLC0415

    first, second, third = drawing.DRAWN
    assert first == second == (random.Random(5).random(), np.random.RandomState(5).rand())
    assert first[0] != third[0]
    assert first[1] != third[1]


def test_train_works_outside_the_main_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(tmp_path)))
    thread.start()
    thread.join()
    assert int(found[0].state.step) == 2


def test_a_run_that_is_complete_returns_its_result_again(tmp_path):
    first, again = fit(tmp_path), fit(tmp_path)
    assert again.result["last"] == first.result["last"]
    assert int(again.state.step) == 2
    assert [row["phase"] for row in again.history] == ["test"]
