"""Using a trained model: the answers of `load_model`, `predict`, StableHLO and the report are those of the evaluation."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from runs import SMALL, here

from jaxtrain import cli, evaluate, load_model, train
from jaxtrain.config import CheckpointConfig, Config, DataConfig, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from jaxtrain.data import registry
from jaxtrain.data.augment import Preprocess, eval_inputs
from jaxtrain.data.folder import file_of
from jaxtrain.data.spec import data_dir
from jaxtrain.errors import CheckpointError, ConfigError, DataError, WeightsError
from jaxtrain.models import registry as models
from jaxtrain.models.layers import Context
from jaxtrain.parallel.layout import Layout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.training.evaluate import evaluate_weights
from jaxtrain.training.evaluation_report import calibration
from jaxtrain.training.inference import load_trained
from jaxtrain.training.prediction import image_files, predict
from jaxtrain.training.stablehlo import to_stablehlo
from jaxtrain.training.trained import Preprocessor, Trained

HOSTILE = "<script>alert(1)<|script>"  # "/" is in no folder's name
FORMULA = "=1+2"
CLASSES = (HOSTILE, FORMULA, "plain")
SIDE = 16  # `resize_crop` stores 18 pixels


class Made(NamedTuple):
    """A run with BatchNorm, an average and a centre crop; `files` and `labels` are its test split."""

    run: Path
    data: Path
    files: list[str]
    labels: np.ndarray


def draw(top: Path, count: int) -> Path:
    """Images of three classes, none of them square, each with its class's channel brighter on the left, and noise."""
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (top / name).mkdir(parents=True)
        for k in range(count):
            pixels = random.integers(0, 160, (20 + k % 5, 26, 3), np.uint8)
            pixels[:, :13, label] += 95
            Image.fromarray(pixels).save(top / name / f"{k:03d}.png")
    return top


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    top = tmp_path_factory.mktemp("inference")
    data = DataConfig(
        name=f"folder:{draw(top / 'data', 40)}", global_batch=16, image_size=SIDE, augmentation="resize_crop"
    )
    config = Config(
        data=data,
        model=ModelConfig(name="resnet18", width=4, depths=(1, 1, 1, 1)),
        optim=OptimConfig(learning_rate=0.02, lr_scaling="none", schedule="constant", ema=0.8),
        train=TrainConfig(steps=24, eval_every="8 steps"),
        checkpoint=CheckpointConfig(every="0"),
    )
    train(config, top / "run", num_devices=1, quiet=True)
    test = registry.load(data, image_size=SIDE).test
    labels = test.read(np.arange(len(test)))[1]
    files = [os.path.normpath(top / "data" / file_of(test, index)) for index in range(len(test))]
    return Made(top / "run", top / "data", files, labels)


def losses(logits: Any, labels: np.ndarray) -> np.ndarray:
    return np.asarray(-jax.nn.log_softmax(logits)[np.arange(len(labels)), labels])


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ----------------------------------------------------------------------------------------------------------- load_model


@pytest.mark.parametrize("ema", [None, False])
def test_a_loaded_model_answers_as_the_evaluation_does(made, ema):
    wanted = evaluate(made.run, num_devices=2, ema=ema)
    before = contents(made.run)
    apply, variables, preprocess, class_names = load_model(made.run, ema=ema)
    inputs = preprocess(made.files)
    assert inputs.shape == (len(made.files), SIDE, SIDE, 3)
    logits = jax.jit(apply)(variables, inputs)
    assert losses(logits, made.labels).mean() == pytest.approx(wanted.result.loss, rel=1e-5)
    right = np.asarray(logits).argmax(-1) == made.labels
    assert right.mean() == pytest.approx(wanted.result.accuracy)
    assert tuple(right[made.labels == k].mean() for k in range(3)) == pytest.approx(wanted.result.per_class)
    assert class_names == wanted.class_names == CLASSES
    np.testing.assert_allclose(apply(variables, inputs[3:4]), logits[3:4], atol=1e-5)  # no example sees another
    assert contents(made.run) == before


def test_a_checkpoint_is_a_model_too_and_needs_no_data(made, tmp_path):
    moved = made.data.rename(made.data.with_name("elsewhere"))
    try:
        best = load_model(made.run)
        step = evaluate(made.run, data=moved, num_devices=1).step
        for path in (made.run / "checkpoints" / str(step), made.run / "checkpoints/best"):
            found = load_model(path)
            same = jax.tree.map(lambda a, b: bool((a == b).all()), found.variables, best.variables)
            assert jax.tree.all(same)
        raw = load_model(made.run, checkpoint="latest", ema=False).variables
        assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), raw, best.variables))
    finally:
        moved.rename(made.data)
    for path in (tmp_path, tmp_path / "none", made.run / "logs"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            load_model(path)


def test_images_of_every_kind_become_the_models_inputs(made, tmp_path):
    _, _, preprocess, _ = load_model(made.run)
    pixels = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)
    colour = Image.fromarray(pixels)
    colour.save(tmp_path / "x.png")
    square = np.asarray(colour.resize((18, 18), Image.Resampling.BILINEAR, box=(5, 0, 35, 30)))[1:17, 1:17]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = (square / 255 - mean) / std
    turned = colour.copy()
    turned.getexif()[274] = 6  # as of a camera that was held upright: an evaluation reads the pixels as they are stored
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    same = [
        str(tmp_path / "x.png"),
        tmp_path / "x.png",
        colour,
        pixels,
        colour.convert("RGBA"),
        tmp_path / "turned.png",
    ]
    for image in preprocess(same):
        np.testing.assert_allclose(image, wanted, atol=1e-5)
    grey = pixels[:, :, 0]
    for image in preprocess([grey, grey[:, :, None], Image.fromarray(grey), np.stack([grey] * 3, -1)]):
        np.testing.assert_array_equal(image, preprocess([grey])[0])
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(preprocess([tmp_path / "cmyk.jpg"])[0] - wanted).mean() < 0.2
    assert preprocess([np.zeros((1, 300, 3), np.uint8), np.zeros((2, 2), np.uint8)]).shape == (2, SIDE, SIDE, 3)
    deep = Image.fromarray(grey.astype(np.uint16) << 8)
    for image in (deep, np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 5), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(DataError, match="image 0 is not a readable image"):
            preprocess([image])
    for images in ([], colour, "x.png"):
        with pytest.raises(ConfigError, match="a list of one image or more"):
            preprocess(images)


def test_code_that_a_run_names_is_not_run(tmp_path, capsys, monkeypatch):
    """Its model's only with `trust`; its data set's never, since it is not needed."""
    here(tmp_path / "model", SMALL | {"model.name": "tiny:resnet", "model.width": 4, "train.steps": 2})
    here(tmp_path / "data", SMALL | {"train.steps": 2})  # of tiny:digits
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    assert load_model(tmp_path / "model", checkpoint="latest", trust=True).class_names[3] == "3"

    def never(*_: object) -> None:
        raise AssertionError("a name was looked for")

    monkeypatch.setattr("jaxtrain.models.registry.load_dotted", never)
    monkeypatch.setattr("jaxtrain.plugins.importlib.import_module", never)
    apply, variables, preprocess, _ = load_model(tmp_path / "data", checkpoint="latest")
    assert apply(variables, preprocess([tmp_path / "x.png"])).shape == (1, 10)
    with pytest.raises(ConfigError, match=r"code that a directory names is not run.*--trust"):
        load_model(tmp_path / "model", checkpoint="latest")
    capsys.readouterr()
    words = [str(tmp_path / "model"), str(tmp_path / "x.png"), "--checkpoint", "latest"]
    assert cli.main(["predict", *words]) == 64
    assert "use --trust" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- predict


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("devices", [1, 3])
def test_predictions_are_those_of_the_evaluation(made, devices):
    wanted = evaluate(made.run, num_devices=1, report=True)
    model = load_trained(made.run, devices=jax.devices()[:devices])
    found = list(predict(model, made.files, top=9, features=True))
    assert [each.file for each in found] == made.files
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (made.labels, [each.classes[0] for each in found]), 1)
    assert wanted.report is not None
    np.testing.assert_array_equal(confusion, wanted.report.confusion)
    assert all(sorted(each.classes) == [0, 1, 2] and sum(each.probabilities) == pytest.approx(1) for each in found)
    head = {name: jax.device_get(leaf) for name, leaf in model.variables["params"]["layers_05"]["linear"].items()}
    for each in found[:3]:
        assert each.features is not None
        logits = each.features @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(jax.nn.softmax(logits)[np.array(each.classes)], each.probabilities, rtol=1e-4)


def test_a_table_a_csv_and_json_of_hostile_names(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    (pictures / "below").mkdir(parents=True)
    shown = ["+a.png", "-b.png", "<b>.png", "@c.png", "\x1b[2J.png"]
    for name, file in zip(shown, made.files[::5], strict=False):
        (pictures / name).write_bytes(Path(file).read_bytes())
    (pictures / "below/last.JPG").write_bytes(Path(made.files[9]).read_bytes())
    (pictures / "notes.txt").write_text("no image")
    monkeypatch.chdir(pictures)
    words = ["predict", str(made.run), "--devices", "1", "--top", "2"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(shown) + "\n"))
    assert cli.main([*words, "-", "below/", "--csv", "-", "--json", str(tmp_path / "x.json")]) == 0
    table = rows(capsys.readouterr().out)
    assert [row["file"] for row in table] == [
        "'+a.png",
        "'-b.png",
        "<b>.png",
        "'@c.png",
        r"\x1b[2J.png",
        "below/last.JPG",
    ]
    assert {row["class_1"] for row in table} | {row["class_2"] for row in table} == {f"'{FORMULA}", HOSTILE, "plain"}
    assert all(0 < float(row["probability_2"]) <= float(row["probability_1"]) < 1 for row in table)
    text = (tmp_path / "x.json").read_text()
    assert not set("<>&\x1b") & set(text)
    images = json.loads(text)["images"]
    assert [each["file"] for each in images] == [*shown, "below/last.JPG"]  # the same names to a program
    assert [each["classes"][0]["class"] for each in images] == [row["class_1"].removeprefix("'") for row in table]
    assert cli.main([*words, str(pictures), "--features", str(tmp_path / "f.npz")]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert len(said.out.splitlines()) == 6
    assert "1 files that are no images by their extension are left out" in said.err
    with np.load(tmp_path / "f.npz", allow_pickle=False) as found:
        assert found["features"].shape == (6, 32)
        assert len(found["files"]) == 6
    assert image_files([str(pictures)])[0][-1].endswith("below/last.JPG")


def test_a_damaged_image_is_named_and_the_others_have_their_predictions(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxtrain.training.prediction.BATCH", 4)
    (tmp_path / "cut.png").write_bytes(Path(made.files[0]).read_bytes()[:60])
    files = [*made.files[:5], str(tmp_path / "cut.png"), *made.files[5:9], str(tmp_path / "none.png")]
    words = ["predict", str(made.run), *files, "--devices", "1", "--csv"]
    assert cli.main([*words, str(tmp_path / "x.csv")]) == 65
    said = capsys.readouterr().err
    assert "cut.png is not a readable image (" in said
    assert "none.png cannot be read (No such file or directory)." in said
    assert "2 of 11 images could not be read, and have no prediction" in said
    table = rows((tmp_path / "x.csv").read_text())
    assert [row["file"] for row in table] == made.files[:9]
    assert cli.main(["predict", str(made.run), *made.files[:9], "--devices", "1", "--csv", "-"]) == 0
    alone = rows(capsys.readouterr().out)
    assert [row["class_1"] for row in alone] == [row["class_1"] for row in table]
    assert cli.main([*words, str(tmp_path / "y.csv"), "--strict"]) == 65
    assert "cut.png is not a readable image" in capsys.readouterr().err
    assert not (tmp_path / "y.csv").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--top", "0"], 64, "--top 0: must be at least 1"),
        (["--csv", "-", "--json", "-"], 64, "name a file for one of them"),
        (["--csv", "none/x.csv"], 64, "there is no such directory"),
        (["--features", "x.pkl"], 64, "must be a file that ends with .npz"),
        (["--json", "s3://x/y"], 64, "is not a local path"),
        (["--checkpoint", "7"], 66, "has only the steps"),
    ],
)
def test_what_cannot_be_predicted_is_said(made, capsys, words, code, said):
    assert cli.main(["predict", str(made.run), made.files[0], *words]) == code
    assert said in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- report


class Tags(html.parser.HTMLParser):
    """The tags and the addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_report_is_one_page_in_which_nothing_is_mark_up(made, tmp_path, capsys):
    names = [str(tmp_path / "r.html"), str(tmp_path / "r.json")]
    words = ["evaluate", str(made.run), "--devices", "3", "--json", "--report", names[0], "--report", names[1]]
    assert cli.main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    text = Path(names[0]).read_text()
    page = Tags()
    page.feed(text)
    assert "script" not in page.tags
    assert page.tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "sub", "table", "tr", "th", "td", "div",
        "figure", "img", "figcaption", "br",
    }  # fmt: skip
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "&lt;script&gt;alert(1)&lt;|script&gt;" in text
    assert "default-src 'none'" in text
    report = json.loads(Path(names[1]).read_text())
    assert {name: report[name] for name in ("accuracy", "top5", "loss", "examples", "step", "weights")} == {
        name: shown[name] for name in ("accuracy", "top5", "loss", "examples", "step", "weights")
    }
    assert [each["class"] for each in report["classes"]] == list(CLASSES)
    logits = answers(made)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (made.labels, logits.argmax(-1)), 1)
    assert report["confusion"] == confusion.tolist()
    worst = np.argsort(-losses(logits, made.labels))[: len(report["worst"])]
    assert [os.path.basename(each["file"]) for each in report["worst"]] == [
        os.path.basename(made.files[i]) for i in worst
    ]
    assert report["worst"][0]["loss"] == pytest.approx(losses(logits, made.labels).max(), rel=1e-4)
    assert cli.main(["evaluate", str(made.run), "--report", "x.pdf"]) == 64
    assert "must end with .html or .json" in capsys.readouterr().err
    assert cli.main(["evaluate", str(made.run), "--devices", "3", "--report"]) == 0
    kept = made.run / "evaluation"
    assert json.loads((kept / "test.json").read_text()) == report
    assert (kept / "test.html").read_text() == text
    assert cli.main(["evaluate", "--config", "quickstart", "--report"]) == 64
    assert "--report needs a FILE" in capsys.readouterr().err


def answers(made: Made, flip: bool = False) -> np.ndarray:
    apply, variables, preprocess, _ = load_model(made.run)
    inputs = preprocess(made.files)
    return np.asarray(apply(variables, inputs[:, :, ::-1] if flip else inputs))


@pytest.mark.parametrize("devices", [1, 8])
def test_mirror_images_count_as_much_as_the_images(made, devices):
    found = evaluate(made.run, num_devices=devices, tta="flip", report=True)
    mean = (jax.nn.softmax(answers(made)) + jax.nn.softmax(answers(made, flip=True))) / 2
    right = mean[np.arange(len(made.labels)), made.labels]
    assert found.result.loss == pytest.approx(float(-jnp.log(right).mean()), rel=1e-5)
    assert found.result.accuracy == pytest.approx(np.mean(mean.argmax(-1) == made.labels))
    assert found.report is not None
    assert found.report.confusion.sum() == found.result.examples == len(made.labels)
    assert found.result.loss != pytest.approx(evaluate(made.run, num_devices=1).result.loss, rel=1e-4)


def test_the_calibration_is_the_papers():
    """Two bins by hand, with a confidence on an edge, which belongs to the bin below; and one of no confidence at all."""
    confidence = np.array([0.61, 0.65, 3 / 15, 0.15, 0.0, 1.0])
    correct = np.array([True, False, True, False, False, True])
    bins, error = calibration(confidence, correct)
    filled = {round(each.high * 15): each.examples for each in bins if each.examples}
    assert filled == {1: 1, 3: 2, 10: 2, 15: 1}
    assert error == pytest.approx((1 * 0 + 2 * abs(0.5 - 0.175) + 2 * abs(0.5 - 0.63) + 1 * 0) / 6)


# ---------------------------------------------------------------------------------------------------- a file of weights


def write_resnet(path: Path, **config: object) -> Path:
    """Random weights of a ResNet-18 of width 4 and one block a stage, with torchvision's names, for three classes."""
    random, found = np.random.default_rng(0), {}

    def draw_(name: str, *shape: int) -> None:
        found[f"{name}.weight"] = random.normal(0, 0.3, shape).astype(np.float32)

    def norm(name: str, channels: int) -> None:
        for kind in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{kind}"] = random.uniform(0.5, 1.5, channels).astype(np.float32)

    draw_("conv1", 4, 3, 3, 3)
    norm("bn1", 4)
    for stage, (old, new) in enumerate(((4, 4), (4, 8), (8, 16), (16, 32)), 1):
        for number, inputs in ((1, old), (2, new)):
            draw_(f"layer{stage}.0.conv{number}", new, inputs, 3, 3)
            norm(f"layer{stage}.0.bn{number}", new)
        if old != new:
            draw_(f"layer{stage}.0.downsample.0", new, old, 1, 1)
            norm(f"layer{stage}.0.downsample.1", new)
    draw_("fc", 3, 32)
    found["fc.bias"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(found, path, metadata={"pretrained_cfg": json.dumps(config)})
    return path


CONFIG = {"input_size": [3, SIDE, SIDE], "mean": [0.4] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}


def test_a_file_of_weights_is_a_model_too(made, tmp_path, capsys, caplog):
    """Its own config says how images are prepared, and the order of its classes; the evaluation follows both."""
    turned = ("plain", *CLASSES[:2])
    file = write_resnet(tmp_path / "x.safetensors", **CONFIG, crop_pct=0.875, label_names=list(turned))
    apply, variables, preprocess, class_names = load_model(file)
    assert class_names == turned
    logits = jax.jit(apply)(variables, preprocess(made.files))
    labels = np.array([turned.index(CLASSES[label]) for label in made.labels])
    data = DataConfig(name=f"folder:{made.data}", global_batch=16, image_size=SIDE, augmentation="resize_crop")
    model = ModelConfig(name="resnet18", width=4, depths=(1, 1, 1, 1), stem="cifar", init_from=str(file))
    for devices in (1, 3):
        found = evaluate_weights(Config(data=data, model=model), num_devices=devices, quiet=True, report=True)
        assert (found.class_names, found.weights, found.step) == (turned, "file", 0)
        assert found.result.loss == pytest.approx(losses(logits, labels).mean(), rel=1e-4)
        assert found.report is not None
        confusion = np.zeros((3, 3), int)
        np.add.at(confusion, (labels, np.asarray(logits).argmax(-1)), 1)
        np.testing.assert_array_equal(found.report.confusion, confusion)
    fields = {"data.name": data.name, "data.image_size": SIDE, "data.augmentation": "resize_crop"} | {
        f"model.{name}": getattr(model, name) for name in ("name", "width", "depths", "stem", "init_from")
    }
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    assert cli.main(["evaluate", "--config", "quickstart", *words, "--devices", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(found.result.loss, rel=1e-5)
    assert cli.main(["predict", str(file), made.files[0], "--devices", "1"]) == 0
    assert capsys.readouterr().out.startswith(made.files[0])
    for wrong, said in (([], "name the weights to evaluate"), (["--ema"], "--ema is of a run")):
        assert cli.main(["evaluate", "--config", "quickstart", *wrong]) == 64
        assert said in capsys.readouterr().err
    assert cli.main(["evaluate", str(made.run), "--config", "quickstart"]) == 64
    assert cli.main(["evaluate"]) == 64
    assert "does not say all of how" not in caplog.text
    vague = write_resnet(tmp_path / "y.safetensors", input_size=[3, SIDE, SIDE], crop_pct=0.95, interpolation="bicubic")
    loaded = load_model(vague)
    assert loaded.class_names == ("class 0", "class 1", "class 2")
    assert loaded.preprocess.side == round(SIDE / 0.95)
    assert "does not say all of how its images were prepared" in caplog.text
    assert "asks for bicubic resizing; images are resized bilinear" in caplog.text


@pytest.mark.parametrize("naming", ["torchvision", "timm"])
def test_what_is_exported_is_the_same_model_again(made, tmp_path, capsys, naming):
    out = str(tmp_path / "x.safetensors")
    assert cli.main(["export", str(made.run), "--naming", naming, "--out", out, "--devices", "1"]) == 0
    assert "the average of the weights (EMA)" in capsys.readouterr().out
    apply, variables, preprocess, class_names = load_model(out)
    assert class_names == CLASSES
    np.testing.assert_array_equal(apply(variables, preprocess(made.files)), answers(made))


def test_a_file_that_is_no_model_is_refused(made, tmp_path):
    pickle = tmp_path / "x.pth"
    pickle.write_bytes(b"\x80\x04cos\nsystem\n")
    other = tmp_path / "own.safetensors"
    safetensors.numpy.save_file({"params/layers_00/linear/kernel": np.zeros((4, 4), np.float32)}, other)
    for path, said in ((pickle, "can run code|could run code|code"), (other, "does not say which model it is")):
        with pytest.raises(WeightsError, match=said):
            load_model(path)
    with pytest.raises(ConfigError, match="has no checkpoints, and no moving average"):
        load_model(other, ema=True)


# -------------------------------------------------------------------------------------------------------------- formats

READER = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("jaxtrain", "flax", "optax", "orbax", "clu", "PIL"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import numpy as np
from jax import export
with open("model.stablehlo", "rb") as file:
    program = export.deserialize(file.read())
assert program.platforms == ("cpu", "cuda")
images = np.load("images.npy")
np.save("logits.npy", np.concatenate([program.call(images[:3]), program.call(images[3:])]))
"""


def test_a_program_of_stablehlo_needs_jax_alone(made, tmp_path, capsys):
    words = ["export", str(made.run), "--format", "stablehlo", "--out", str(tmp_path / "model.stablehlo")]
    assert cli.main([*words, "--devices", "1"]) == 0
    assert "(EMA), a program for cpu and cuda: uint8 images [b, 18, 18, 3] to logits" in capsys.readouterr().out
    assert cli.main(words) == 64
    assert "is there already; --force replaces it" in capsys.readouterr().err
    about = json.loads((tmp_path / "model.stablehlo.json").read_text())
    model = load_trained(made.run, devices=jax.devices()[:1])
    images = np.stack([model.preprocess.square(file) for file in made.files])
    assert about["input"] == {"type": "uint8", "shape": ["b", *images.shape[1:]]}
    assert about["class_names"] == list(CLASSES)
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-c", READER], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), answers(made), atol=1e-4)


@pytest.mark.parity
def test_other_families_become_a_program_for_any_batch():
    from jax import export  # noqa: PLC0415

    for name, fields in {
        "vgg11_bn": {"width": 2}, "swin_tiny": {"width": 32, "depths": (2, 1, 1, 1), "patch": 2, "window": 2},
    }.items():  # fmt: skip
        config = Config(model=ModelConfig(name=name, **fields), train=TrainConfig(precision="f32"))
        classifier = models.build(config.model, (32, 32, 3), 5, jnp.float32, jnp.float32)
        inputs = Preprocess(32, "none", (0.5,) * 3, (0.25,) * 3, 5)
        layout = Layout(make_mesh(LayoutConfig(), jax.devices()[:1]), LayoutConfig())
        params, batch_stats = jax.jit(lambda key, c=classifier: c.init(key, (1, 32, 32, 3), jnp.float32))(
            jax.random.key(0)
        )
        variables = {"params": params, "batch_stats": batch_stats}
        model = Trained(config, classifier, Preprocessor(inputs), tuple("abcde"), layout, variables, 0, "raw")
        images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
        context = Context(example=jnp.arange(3))
        wanted, _ = jax.jit(classifier.apply)(params, batch_stats, eval_inputs(inputs, images), context)
        found = export.deserialize(bytearray(to_stablehlo(model)[0])).call(images)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parity
@pytest.mark.skipif("JAXTRAIN_DATA_DIR" not in os.environ, reason="CIFAR-10 is read from $JAXTRAIN_DATA_DIR")
def test_real_images_as_files_have_the_answers_of_the_evaluation(tmp_path):
    """All of CIFAR-10's test images as PNGs, for a model that sees 24 pixels a side."""
    data = DataConfig(name="cifar10", dir=str(data_dir(DataConfig())), global_batch=64, examples=2048, image_size=24)
    model, steps = ModelConfig(name="mlp", width=32), TrainConfig(steps=32, eval_every="0")
    train(Config(data=data, model=model, train=steps), tmp_path / "run", num_devices=1, quiet=True)
    wanted = evaluate(tmp_path / "run", checkpoint="latest", num_devices=2, report=True)
    test = registry.load(data, image_size=24).test
    images, labels = test.read(np.arange(len(test)))
    files = [str(tmp_path / f"{index}.png") for index in range(len(test))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file, compress_level=1)
    trained = load_trained(tmp_path / "run", checkpoint="latest", devices=jax.devices()[:2])
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, [each.classes[0] for each in predict(trained, files)]), 1)
    assert wanted.report is not None
    np.testing.assert_array_equal(confusion, wanted.report.confusion)
