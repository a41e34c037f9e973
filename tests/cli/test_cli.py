"""The command line: bad input is answered in one sentence with exit code 64; and what the commands print."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxtrain
from jaxtrain import cli
from jaxtrain.checkpoint import manifest
from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    explain,
    explain_sections,
    flatten,
)
from jaxtrain.data import registry as datasets
from jaxtrain.errors import DataError
from jaxtrain.models import registry
from jaxtrain.optim.optimizers import OPTIMIZERS
from jaxtrain.recipes import LAYOUTS
from jaxtrain.step.eval_step import EvalResult
from jaxtrain.training.evaluate import Evaluated
from jaxtrain.training.session import train

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
RESNET = str(ROOT / "configs" / "resnet50_cifar100.py")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, monkeypatch):
    """A run that starts where it should not leaves nothing in the working directory."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def sentence(capsys, argv, code=64) -> str:
    """Runs a command that must fail with `code`, and returns the one line that it said."""
    assert cli.main(argv) == code
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [
        line for line in said.err.splitlines() if not re.fullmatch(r"jaxtrain: [\w ]+, \d+ s", line)
    ]  # of long work
    assert line.startswith("jaxtrain: ")
    return line.removeprefix("jaxtrain: ").strip()


# ------------------------------------------------------------------------------- wrong before any device is touched

# (words behind `train --config quickstart.py`, what the sentence says)
WRONG = [
    # keys that do not exist
    (["--config.train.epoch=3"], ["config.train.epoch does not exist", "Did you mean 'config.train.epochs'?"]),
    (["--config.optim.learing_rate=3"], ["config.optim.learing_rate does not exist", "'config.optim.learning_rate'"]),
    (["--config.optim.lr=0.3"], ["config.optim.lr does not exist", "config.optim has name, learning_rate,"]),
    (["--config.optm.name=adamw"], ["config.optm.name does not exist", "Did you mean 'config.optim.name'?"]),
    (
        ["--config.learning_rate=1"],
        ["config.learning_rate does not exist", "Did you mean 'config.optim.learning_rate'?"],
    ),
    (["--config.lrr=1"], ["config.lrr does not exist", "seed, data, model, optim, train, layout, checkpoint"]),
    (["--config.optim=adamw"], ["config.optim is a section"]),
    (["--config.data.name.x=1"], ["config.data.name.x does not exist"]),
    (["--config.=3"], ["config. does not exist"]),
    (["--config.Seed=3"], ["config.Seed does not exist", "Did you mean 'config.seed'?"]),
    # wrong types
    (["--config.train.steps=1.5"], ["config.train.steps='1.5'", "a whole number"]),
    (["--config.train.steps=1e3"], ["config.train.steps='1e3'", "a whole number"]),
    (["--config.train.steps="], ["config.train.steps=''", "a whole number"]),
    (["--config.train.steps"], ["config.train.steps='true'", "a whole number"]),
    (["--config.train.steps", "many"], ["config.train.steps='many'", "a whole number"]),
    (["--config.data.global_batch=True"], ["config.data.global_batch='True'", "a whole number"]),
    (["--config.optim.learning_rate=fast"], ["config.optim.learning_rate='fast'", "a number"]),
    (["--config.optim.learning_rate=0,1"], ["config.optim.learning_rate='0,1'", "a number"]),
    (["--config.optim.nesterov=maybe"], ["config.optim.nesterov='maybe'", "true or false"]),
    (["--config.optim.step_at=(0.5,"], ["config.optim.step_at='(0.5,'", "a tuple such as"]),
    (["--config.model.depths=deep"], ["config.model.depths=('deep',)", "whole numbers"]),
    # not finite, out of range
    (["--config.optim.learning_rate=nan"], ["config.optim.learning_rate=nan", "finite"]),
    (["--config.optim.learning_rate=inf"], ["config.optim.learning_rate=inf", "finite"]),
    (["--config.optim.learning_rate=1e400"], ["config.optim.learning_rate=inf", "finite"]),
    (["--config.optim.learning_rate=-0.1"], ["config.optim.learning_rate=-0.1", "at least 0"]),
    (["--config.optim.warmup=1e400"], ["config.optim.warmup='1e400'", "not a duration"]),
    (["--config.optim.warmup=5 eons"], ["config.optim.warmup='5 eons'", "not a duration"]),
    (["--config.optim.ema=1"], ["config.optim.ema=1.0", "below 1"]),
    (["--config.seed=-1"], ["config.seed=-1", "at least 0"]),
    (["--config.data.global_batch=0"], ["config.data.global_batch=0", "at least 1"]),
    (["--config.data.augmentation=hevy"], ["config.data.augmentation='hevy'", "Did you mean 'heavy'?"]),
    (["--config.train.precision=fp32"], ["config.train.precision='fp32'", "auto, f32, tf32, bf16, fp16, f64"]),
    (["--config.layout.zero=4"], ["config.layout.zero=4", "0, 1, 2 or 3"]),
    (["--config.layout.data=0"], ["config.layout.data=0", "at least 1, or -1"]),
    (["--config.layout.rules=(('(',('tensor',)),)"], ["config.layout.rules", "not a regular expression"]),
    (["--config.checkpoint.every=soon"], ["config.checkpoint.every='soon'", "not a duration"]),
    # what does not divide, and which do
    (["--config.layout.microbatches=3"], ["global_batch=64", "layout.microbatches=3", "63 and 66"]),
    (["--config.model.bn_groups=5"], ["global_batch=64", "model.bn_groups=5", "60 and 65"]),
    # words that absl would ignore silently
    (["lr=0.3"], ["lr=0.3"]),
    (["config.lr=0.2"], ["config.lr=0.2"]),
    (["-config.optim.learning_rate=0.2"], ["-config.optim.learning_rate=0.2"]),
    (["--optim.learning_rate=0.2"], ["--optim.learning_rate=0.2"]),
    (["--device", "2"], ["--device 2"]),
    (["--workdirr", "x"], ["--workdirr x"]),
    (["--devices", "two"], ["--devices", "'two'"]),
    (["--devices", "-1"], ["--devices -1", "at least 1"]),
    (["--simulate-devices", "-8"], ["--simulate-devices -8", "at least 1"]),
    (["--workdir"], ["--workdir", "expected one argument"]),
]

# whole commands
WRONG_COMMANDS = [
    ([], ["COMMAND"]),
    (["trian"], ["'trian'", "'train'"]),
    (["train"], ["--config"]),
    (["train", "--confg", QUICKSTART], ["--config"]),
    (["train", "--config"], ["--config", "expected one argument"]),
    (["train", "--config", "configs/no_such_recipe.py"], ["configs/no_such_recipe.py", "no such file"]),
    (["train", "--config", str(ROOT / "configs" / "quickstrat.py")], ["no such file", "quickstart.py"]),
    (["train", "--config", str(ROOT / "configs")], ["no such file", "quickstart.py"]),
    (["train", "--config", str(ROOT / "LICENSE")], ["LICENSE", "a name that ends in .py"]),
    (["train", "--config", f"{QUICKSTART}:zero4"], ["'zero4'", *LAYOUTS]),
    (["train", "--config", f"{RESNET}:prod,dp"], ["'prod'", "single, multi, production", *LAYOUTS]),
    (["layout", "--config", QUICKSTART, "--jsn"], ["--jsn"]),
    (["config"], ["FILE"]),
    (["config", QUICKSTART, "lr=3"], ["lr=3"]),
    (["config", "--explain"], ["--explain", "expected at least one argument"]),
    (["config", "--explain", "optim.wramup"], ["config.optim.wramup does not exist", "'config.optim.warmup'"]),
    (["config", "--explain", "seed", "optm"], ["config.optm does not exist", "Did you mean 'config.optim'?"]),
    (["config", "--explain", "optim.lr"], ["config.optim.lr does not exist", "config.optim has name, learning_rate,"]),
    (["config", "--explain", "seed", QUICKSTART], [f"--explain {QUICKSTART}", "config FILE --explain KEY"]),
    (["config", "--explain", "seed", "--config.seed=3"], ["--config.seed", "jaxtrain config FILE --explain KEY"]),
    (["data", "prep", "digits"], ["'prep'", "prepare"]),
    (["data", "verify", "digits", "--config.data.dir=x"], ["--config.data.dir", "jaxtrain data takes no config"]),
    (["evaluate", "runs/x", "--split", "tset"], ["'tset'", "test"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG, ids=" ".join)
def test_a_typo_or_a_bad_value(capsys, words, parts):
    text = sentence(capsys, ["train", "--config", QUICKSTART, *words])
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(("argv", "parts"), WRONG_COMMANDS, ids=lambda value: " ".join(value)[-40:])
def test_a_bad_command(capsys, argv, parts):
    text = sentence(capsys, argv)
    assert all(part in text for part in parts), text


def test_there_are_many_typos_in_the_table():
    assert len(WRONG) >= 40


def run(*argv, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_they_are_answered_before_jax_is_imported():
    code = """
import json, sys
from jaxtrain.cli import main
for argv in json.load(sys.stdin):
    assert main(argv) == 64, argv
    assert "jax" not in sys.modules, argv
"""
    commands = [["train", "--config", QUICKSTART, *words] for words, _ in WRONG]
    found = run("-c", code, input=json.dumps(commands + [argv for argv, _ in WRONG_COMMANDS]))
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("\n") == len(WRONG) + len(WRONG_COMMANDS)


@pytest.mark.parametrize("words", [["--config.optim.learing_rate=3"], ["lr=0.3"], ["--config.train.steps=nan"]])
def test_the_exit_code_of_the_process(tmp_path, words):
    found = run("-m", "jaxtrain.main", "--config", QUICKSTART, *words, cwd=tmp_path)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (64, "", 1)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- broken recipes

HEAD = "from jaxtrain.config import *\nfrom jaxtrain.recipes import recipe\n"
# (bytes of the file, the line that is to blame, what is said of it)
BROKEN = {
    "syntax": (b"x = 1\ndef get_config(arg='':\n    return x\n", 2, "SyntaxError"),
    "indentation": (b"def get_config(arg=''):\n\tif arg:\n        return 1\n", 3, "TabError"),
    "not-utf8": (b"def get_config(arg=''):\n    return '\xff\xfe'\n", None, "utf-8"),
    "utf16": ("def get_config(arg=''):\n    return 1\n".encode("utf-16"), None, "SyntaxError"),
    "nul": (b"x = 1\n\x00\n", None, "null bytes"),
    "noise": (bytes(range(256)) * 8, None, "SyntaxError"),
    "brackets": (b"(" * 5000, None, "Error"),
    "import": (b"\nimport no_such_module\n", 2, "no_such_module"),
    "raises": (b"def get_config(arg=''):\n    raise ValueError('one\\ntwo')\n", 2, "ValueError: one two"),
    "assertion": (b"def get_config(arg=''):\n    assert 1 > 2\n", 2, "AssertionError"),
    "exits": (b"import sys\ndef get_config(arg=''):\n    sys.exit(3)\n", 3, "SystemExit: 3"),
    "exits-at-once": (b"import sys\nsys.exit(0)\n", 2, "SystemExit: 0"),
    "recursion": (b"def get_config(arg=''):\n    return get_config(arg)\n", 2, "RecursionError"),
    "unknown-field": (f"{HEAD}def get_config(arg=''):\n    return Config(sed=3)\n".encode(), 4, "'sed'"),
    "bad-value": (
        f"{HEAD}def get_config(arg=''):\n    return recipe(Config(seed=-3))\n".encode(),
        None,
        "config.seed=-3",
    ),
    "bad-value-outside": (f"{HEAD}CONFIG = Config(seed=-3)\n".encode(), 3, "config.seed=-3"),
    "extra-key": (
        f"{HEAD}def get_config(arg=''):\n    c = recipe(Config()).unlock()\n    c.optim.lr = 1; return c\n".encode(),
        None,
        "config.optim.lr does not exist",
    ),
    "returns-a-dict": (b"def get_config(arg=''):\n    return {'seed': 1}\n", None, "returned dict"),
    "returns-nothing": (b"def get_config(arg=''):\n    pass\n", None, "returned NoneType"),
    "nothing": (b"", None, "must define get_config"),
    "not-a-function": (b"get_config = 3\n", None, "must define get_config"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("relative", [False, True])
def test_a_broken_recipe_names_file_and_line(capsys, tmp_path, monkeypatch, name, relative):
    data, line, said = BROKEN[name]
    path = tmp_path / f"recipe_{name.replace('-', '_')}.py"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    named = path.name if relative else str(path)
    text = sentence(capsys, ["config", named])
    assert (f"{named}:{line}: " if line else named) in text or name == "extra-key"
    assert said in text


# --------------------------------------------------------------------------- what only shows with devices and data


def tiny(*words) -> list[str]:
    """The MLP recipe, small."""
    recipe = str(ROOT / "configs" / "mlp_synthetic.py")
    small = ["model.width=16", "data.examples=64", "data.global_batch=16", "train.steps=2", "checkpoint.every=0"]
    return ["--config", recipe, *(f"--config.{field}" for field in small), *words]


UNFIT = [
    (
        ["--config.model.name=resnet19"],
        ["config.model.name='resnet19'", "vgg11, ", "swin_base", "Did you mean 'resnet18'?"],
    ),
    (["--config.optim.name=adam"], ["config.optim.name='adam'", "sgd, adamw, lamb, lars, lion, muon", "'adamw'"]),
    (["--config.optim.loss=crossentropy"], ["config.optim.loss='crossentropy'", "'cross_entropy'"]),
    (
        ["--config.data.name=cifar11"],
        ["config.data.name='cifar11'", "digits, synthetic, cifar10, cifar100", "Did you mean 'cifar10"],
    ),
    (["--config.model.name=no_such_module:Net"], ["config.model.name='no_such_module:Net'", "no_such_module"]),
    (["--config.optim.name=math:nothing"], ["config.optim.name='math:nothing'", "has no 'nothing'"]),
    (["--config.model.name=math:pi"], ["config.model.name='math:pi'", "not a class or function"]),
    (["--config.optim.loss=math:pi"], ["config.optim.loss='math:pi'", "must be a function"]),
    (["--config.model.num_classes=5"], ["config.model.num_classes=5", "has 10"]),
    (["--config.model.depths=(1,1)"], ["config.model.depths=(1, 1)", "mlp"]),
    (
        ["--config.model.name=resnet18", "--config.model.depths=(1,1)"],
        ["config.model.depths=(1, 1)", "takes 4 numbers"],
    ),
    (["--config.model.name=vgg11"], ["config.model.name='vgg11'", "32 x 32", "28 x 28"]),
    (["--config.data.mean=(1,2)", "--config.data.std=(1,2)"], ["config.data.mean=(1, 2)", "1 numbers"]),
    (["--devices", "9"], ["--devices 9", "has 8", "--simulate-devices 9"]),
    # a mesh that does not multiply to the devices, with the nearest that do
    (
        ["--config.layout.data=3"],
        ["layout.data=3", "needs 3 devices but the run has 8", "layout.data=8 or --devices 3"],
    ),
    (["--config.layout.data=16"], ["needs 16 devices but the run has 8", "layout.data=8"]),
    (["--config.layout.tensor=3"], ["layout.tensor=3", "the run has 8", "2 and 4"]),
    (["--config.layout.replica=16"], ["layout.replica=16", "the run has 8", "divide 8 are 8"]),
    (["--config.layout.replica=2", "--devices", "1"], ["layout.replica=2", "the run has 1"]),
    # a batch that does not divide by what it is split over, with the nearest that do
    (["--config.data.global_batch=20"], ["data.global_batch=20", "8 batch shards", "16 and 24"]),
    (["--config.layout.microbatches=4"], ["data.global_batch=16", "microbatches=4 x 8 batch shards", "is 32"]),
    (
        ["--config.data.batch_per_device=3", "--config.model.bn_groups=5"],
        ["global_batch=24", "bn_groups=5", "20 and 25"],
    ),
    # a microbatch must hold whole BatchNorm groups
    (
        ["--config.model.name=resnet18", "--config.data.image_size=8", "--config.layout.microbatches=2"],
        ["config.model.bn_groups=1", "layout.microbatches=2", "--config.model.bn_groups=2"],
    ),
    # tensor parallelism that splits nothing, and user rules
    (
        ["--config.layout.tensor=2", "--config.model.width=17"],
        ["config.layout.tensor=2 splits no layer", "linear/kernel", "17"],
    ),
    (["--config.layout.rules=(('no_such',('tensor',)),)"], ["'no_such' matches no parameter"]),
    (
        ["--config.layout.rules=(('layers_01/linear/kernel',('data',)),)"],
        ["has 1 dims", "layers_01/linear/kernel", "(16, 8)"],
    ),
]


@pytest.mark.parametrize("command", ["train", "layout"])
@pytest.mark.parametrize(("words", "parts"), UNFIT, ids=lambda value: " ".join(value)[:60])
def test_what_does_not_fit_together(capsys, tmp_path, command, words, parts):
    where = ["--workdir", str(tmp_path)] if command == "train" else []
    assert cli.main([command, *tiny(*where, *words)]) == 64
    said = capsys.readouterr()
    text = said.err.splitlines()[-1]  # `train` has named its work directory before
    assert text.startswith("jaxtrain: ")
    assert all(part in text for part in parts), text
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("field", ["model.name=resnet19", "optim.name=adam", "optim.loss=crossentropy", "data.name=x"])
def test_a_wrong_name_is_answered_before_the_data_and_the_work_directory(capsys, tmp_path, field):
    nothing = ["--config.data.name=cifar10", f"--config.data.dir={tmp_path}", "--workdir", str(tmp_path / "run")]
    text = sentence(capsys, ["train", *tiny(*nothing, f"--config.{field}")])
    assert text.startswith(f"config.{field.partition('=')[0]}=")
    assert not (tmp_path / "run").exists()


TRAIN = ["train", "--config", QUICKSTART]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ([*TRAIN, "--workdir", "s3://b/run"], 73),
        ([*TRAIN, "--workdir", "s3:/b"], 73),
        ([*TRAIN, "--workdir", "file:///runs/x"], 73),
        ([*TRAIN, "--config.data.dir=gs://b/d"], 64),
        ([*TRAIN, "--config.data.name=folder:s3://b/d"], 64),
        ([*TRAIN, "--config.data.name=s3://b/d"], 64),
        ([*TRAIN, "--config.checkpoint.resume=s3://b/run"], 64),
        (["train", "--config", "s3://b/recipe.py:dp"], 64),
        (["evaluate", "s3://b/run"], 73),
        (["checkpoint", "list", "s3://b/run"], 73),
        (["logs", "s3://b/run"], 73),
        (["goodput", "s3://b/run"], 73),
        (["layout", "--config", QUICKSTART, "--schedule-plot", "s3://b/x.svg"], 64),
        (["layout", "--config", QUICKSTART, "--schedule-plot", "x.svg", "--trace", "s3://b/run"], 64),
        (["data", "prepare", "digits", "--dir", "s3://b/d"], 64),
        (["doctor", "--write", "--workdir", "s3://b"], 73),
    ],
    ids=lambda value: " ".join(map(str, value[-2:])) if isinstance(value, list) else str(value),
)
def test_an_address_is_no_path(capsys, argv, code):
    assert "is not a local path but an address (" in sentence(capsys, argv, code)
    assert not list(Path.cwd().iterdir())


def test_an_address_of_the_data_directory_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_DATA_DIR", "s3://b/d")
    assert sentence(capsys, TRAIN).startswith("$JAXTRAIN_DATA_DIR='s3://b/d' is not a local path")
    assert not list(Path.cwd().iterdir())


def test_other_errors_have_other_exit_codes(capsys, monkeypatch):
    def fails(error):
        def run(arguments):
            raise error

        monkeypatch.setattr(cli.config, "run", run)
        code = cli.main(["config", QUICKSTART])
        return code, capsys.readouterr().err

    assert fails(DataError("Some file is damaged.")) == (65, "jaxtrain: Some file is damaged.\n")
    assert fails(KeyboardInterrupt())[0] == 130
    code, said = fails(ValueError("a bug"))
    assert code == 70
    assert "please report" in said
    assert "ValueError: a bug" in said


# ------------------------------------------------------------------------------------------------------------- config


def test_config_shows_every_value_and_where_it_came_from(capsys):
    assert cli.main(["config", f"{RESNET}:multi,zero1", "--config.seed=3", "--config.data.dir", "somewhere"]) == 0
    rows = {row.split()[0]: row.split() for row in capsys.readouterr().out.splitlines()}
    assert rows["config.seed"] == ["config.seed", "3", "flag"]
    assert rows["config.data.dir"] == ["config.data.dir", "'somewhere'", "flag"]
    assert rows["config.data.global_batch"] == ["config.data.global_batch", "512", "argument"]
    assert rows["config.layout.zero"][-1] == "argument"
    assert rows["config.model.name"] == ["config.model.name", "'resnet50'", "recipe"]
    assert rows["config.optim.ema"] == ["config.optim.ema", "0.0", "default"]


def test_config_takes_the_recipe_as_other_commands_do(capsys):
    printed = []
    for words in ([QUICKSTART], ["--config", QUICKSTART], ["--config", "quickstart"]):
        assert cli.main(["config", *words]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    (paragraph,) = explained(capsys, "--explain", "seed", "--config", QUICKSTART)  # in any order
    assert "  value      0 (from: default)" in paragraph
    assert "takes one recipe" in sentence(capsys, ["config", QUICKSTART, "--config", RESNET])


def test_config_as_json_is_what_a_run_stores(capsys, finished):
    stored = json.loads((finished / "config.json").read_text())
    assert cli.main(["config", *tiny("--json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: type(value) for name, value in flatten(found).items()} == {
        name: type(value) for name, value in flatten(stored).items()
    }
    assert found["model"]["width"] == 16
    assert "--json prints values" in sentence(capsys, ["config", "--explain", "seed", "--json"])


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    python = ".".join(map(str, sys.version_info[:3]))
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"jaxtrain {jaxtrain.__version__}, jax {jax.__version__}, Python {python}\n"


def explained(capsys, *words) -> list[str]:
    """What `jaxtrain config ... --explain ...` prints: a paragraph a field."""
    assert cli.main(["config", *words]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return text.rstrip("\n").split("\n\n")


def test_explain_a_field(capsys):
    (paragraph,) = explained(capsys, "--explain", "optim.schedule")
    lines = paragraph.splitlines()
    assert lines[:5] == [
        "config.optim.schedule",
        "  type       str (a string)",
        "  default    'cosine'",
        "  allowed    one of constant, step, cosine, linear, wsd",
        "  on resume  may change only with --config.checkpoint.allow_changes=true",
    ]
    assert lines[5].startswith("  meaning    ")
    assert all(line.startswith(" " * 13) for line in lines[6:])
    assert explain()["optim.schedule"].meaning == " ".join(paragraph.partition("  meaning    ")[2].split())


def test_explain_a_field_of_a_recipe_shows_its_value_too(capsys):
    paragraphs = explained(
        capsys, f"{RESNET}:production", "--config.seed=3", "--explain", "config.seed", "train.precision", "data.dir"
    )
    assert [paragraph.splitlines()[0] for paragraph in paragraphs] == [
        "config.seed", "config.train.precision", "config.data.dir"
    ]  # fmt: skip
    values = [line for paragraph in paragraphs for line in paragraph.splitlines() if line.startswith("  value")]
    assert values == [
        "  value      3 (from: flag)", "  value      'bf16' (from: argument)", "  value      '' (from: default)"
    ]  # fmt: skip


def test_explain_a_section_lists_its_fields(capsys):
    first, *fields = explained(capsys, "--explain", "train")
    assert " ".join(first.split()) == f"config.train: {explain_sections()['train']}"
    names = [key for key in explain() if key.startswith("train.")]
    assert [field.splitlines()[0] for field in fields] == [f"config.{name}" for name in names]
    by_name = dict(zip(names, fields, strict=True))
    assert "on resume  may change freely" in by_name["train.log_every"]
    assert "on resume  may change where every step already run keeps its learning rate" in by_name["train.epochs"]
    assert "on resume  may change only with" in by_name["train.precision"]
    assert "allowed" not in by_name["train.deterministic"]


def test_explain_is_answered_without_jax():
    code = "import sys; from jaxtrain.cli import main; main(['config', '--explain', 'seed']); assert 'jax' not in sys.modules"
    found = run("-OO", "-c", code)  # also where Python keeps no docstrings
    assert (found.returncode, found.stdout.splitlines()[0]) == (0, "config.seed"), found.stderr


@pytest.mark.parametrize(
    ("key", "names"), [("optim.name", OPTIMIZERS), ("data.name", datasets.NAMES), ("model.name", registry._BUILDERS)]
)
def test_the_names_that_there_are_stand_in_the_meaning(key, names):
    listed = [name.removesuffix("_bn") if name in ("vgg13_bn", "vgg16_bn", "vgg19_bn") else name for name in names]
    meaning = explain()[key].meaning
    assert not [name for name in listed if f"`{name}`" not in meaning]


# ------------------------------------------------------------------------------------------------------------- layout


def test_layout_as_json(capsys):
    words = tiny("--json", "--config.layout.zero=3", "--config.layout.tensor=2", "--config.optim.ema=0.9")
    assert cli.main(["layout", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "parameters", "devices", "mesh", "zero", "microbatches", "bytes_per_device", "bytes_by_stage", "stages", "warnings",
        "leaves",
    }  # fmt: skip
    assert (found["devices"], found["zero"]) == (8, 3)
    assert (found["microbatches"], found["warnings"]) == (1, [])
    assert found["parameters"] == 784 * 16 + 16 + 16 * 8 + 8 + 8 * 10 + 10
    assert found["mesh"] == {"stage": 1, "replica": 1, "data": 4, "tensor": 2}
    by_path = {leaf["path"]: leaf for leaf in found["leaves"]}
    kernel = by_path["params/layers_00/linear/kernel"]
    assert kernel == {
        "tree": "params",
        "path": "params/layers_00/linear/kernel",
        "shape": [784, 16],
        "dtype": "float32",
        "spec": ["data", "tensor"],
        "stage": 0,
        "bytes_per_device": 784 * 16 * 4 // 8,
        "note": "",
        "rate": 1.0,
    }
    assert by_path["step"]["spec"] == by_path["step"]["shape"] == []
    assert by_path["gradients/layers_00/linear/kernel"]["spec"] == ["data", "tensor"]
    for tree in ("params", "opt_state", "ema", "gradients"):
        leaves = [leaf for leaf in found["leaves"] if leaf["tree"] == tree]
        assert found["bytes_per_device"][tree] == sum(leaf["bytes_per_device"] for leaf in leaves) > 0
        assert sum(leaf["path"].endswith("layers_01/linear/kernel") for leaf in leaves) == (
            2 if tree == "opt_state" else 1
        )


def test_layout_has_totals_first_and_a_row_a_layer(capsys):
    assert cli.main(["layout", *tiny("--devices", "2", "--config.layout.zero=1")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12,786 parameters; mesh stage 1 x replica 1 x data 2 x tensor 1"
    assert all(len(line) < 80 for line in lines)
    held = {"params": 12786 * 4, "opt_state": 2 * 12786 * 4 // 2, "gradients": 12786 * 4}
    mib = {line.split()[0]: line.split()[-1] for line in lines if line}
    assert [name for name in mib if name in (*held, "sum")] == [*held, "sum"]
    assert {name: mib[name] for name in held} == {name: f"{count / 2**20:.2f}" for name, count in held.items()}
    assert mib["sum"] == f"{sum(held.values()) / 2**20:.2f}"
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("layers_")}
    assert list(rows) == ["layers_00", "layers_01", "layers_02"]
    assert rows["layers_00"][1:-1] == ["12,560", "-", "data", "0"]


def test_layout_with_leaves_has_a_row_for_each(capsys):
    assert cli.main(["layout", *tiny("--devices", "2", "--config.layout.zero=1", "--leaves")]) == 0
    text = capsys.readouterr().out
    assert "params/layers_00/linear/kernel" in text
    assert "P(data, None)" in text


def test_a_layout_says_what_concerns_many_leaves_once(capsys):
    swin = str(ROOT / "configs" / "swin_tiny_cifar10.py")
    words = ["--devices", "2", "--config.model.depths=(1,1,1,1)"]
    assert cli.main(["layout", "--config", f"{swin}:tensor2", *words]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "does not divide by tensor=2" in line]
    assert said == ["params/layers_01/attn/bias_table and 11 other leaves: 3 does not divide by tensor=2: kept whole"]


def test_layout_needs_no_data_of_cifar(capsys, tmp_path):
    words = [f"--config.data.dir={tmp_path}", "--config.model.name=resnet18", "--config.model.width=8", "--json"]
    assert cli.main(["layout", "--config", f"{RESNET}:zero3", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert next(leaf for leaf in found["leaves"] if leaf["path"].endswith("linear/kernel"))["shape"] == [64, 100]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("resnet18_cifar10", {"data.examples": 60000}, "cifar10 has 45,000 training examples"),
        ("resnet18_cifar10", {"data.splits": "test=none"}, "cifar10 has its own splits"),
        ("resnet18_cifar10", {"data.mean": "(0.5,)", "data.std": "(0.5,)"}, "must have 3 numbers"),
        ("quickstart", {"data.examples": 5000}, "digits has 1,294 training examples"),
        ("resnet50_cifar100", {"model.bn_groups": 64, "data.image_size": 8, "data.global_batch": 64}, "single value"),
    ],
)
def test_layout_refuses_what_training_refuses(capsys, tmp_path, recipe, changes, said):
    config = [str(ROOT / "configs" / f"{recipe}.py"), *(f"--config.{key}={value}" for key, value in changes.items())]
    assert said in sentence(capsys, ["layout", "--config", *config, "--devices", "1"], 64)


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -c 'from jaxtrain.cli import main; exit(main())'"
    found = subprocess.run(
        ["bash", "-c", f"{command} config {QUICKSTART} | head -1; exit ${{PIPESTATUS[0]}}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, "")


# --------------------------------------------------------------------------------------------------------------- data


def test_data_prepare_and_verify(capsys, tmp_path):
    assert cli.main(["data", "prepare", "digits"]) == 0
    said = capsys.readouterr().out
    assert Path(said.removeprefix("digits: ").strip()).is_file()
    assert cli.main(["data", "verify", "digits"]) == 0
    counts = dict(reversed(part.split()) for part in capsys.readouterr().out.partition("sound; ")[2].split(", "))
    assert sum(map(int, counts.values())) == 1797
    assert set(counts) == {"train", "validation", "test"}
    assert cli.main(["data", "prepare", "synthetic"]) == 0
    assert "nothing on disk" in capsys.readouterr().out
    text = sentence(capsys, ["data", "prepare", "cifra10", "--dir", str(tmp_path)])
    assert "config.data.name='cifra10'" in text
    assert "Did you mean 'cifar10'?" in text


# ----------------------------------------------------------------------------------------------------------- evaluate


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run whose weights, and whose average, are neither at chance nor perfect."""
    path = tmp_path_factory.mktemp("finished")
    config = Config(
        data=DataConfig(name="digits", global_batch=48),
        model=ModelConfig(name="mlp", width=16),
        optim=OptimConfig(learning_rate=0.1, lr_scaling="none", schedule="constant", ema=0.9),
        train=TrainConfig(steps=30, eval_every="10 steps"),
        checkpoint=CheckpointConfig(every="10 steps", keep=3),
    )
    train(config, path, num_devices=4, quiet=True)
    return path


def evaluated(capsys, *words) -> dict:
    assert cli.main(["evaluate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("devices", [[], ["--devices", "4"], ["--devices", "1"], ["--devices", "5"]])
def test_evaluate_finds_what_the_run_found(capsys, finished, devices):
    result = json.loads((finished / "result.json").read_text())
    for words, wanted in [
        ([], result["best"]["test_ema"]),  # the weights that it was chosen by
        (["--no-ema"], result["best"]["test"]),
        (["--checkpoint", "latest", "--no-ema"], result["last"]["test"]),
        (["--checkpoint", "latest"], result["last"]["test_ema"]),
        (["--split", "val", "--ema"], result["best"]["validation_ema"]),
    ][: 1 if devices else None]:
        found = evaluated(capsys, str(finished), *words, *devices)
        assert found["accuracy"] == wanted["accuracy"]
        assert found["top5"] == wanted["top5"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert found["weights"] == ("raw" if "--no-ema" in words else "ema")
    assert result["last"]["test"]["loss"] != result["last"]["test_ema"]["loss"]
    assert result["best"]["weights"] == "ema"


def test_the_accuracy_of_each_class(capsys, finished):
    found = evaluated(capsys, str(finished), "--checkpoint", "20")
    assert (found["step"], found["split"], found["examples"]) == (20, "test", 359)
    assert list(found["per_class"]) == [str(digit) for digit in range(10)]
    assert 0.2 < found["accuracy"] < 1
    assert found["accuracy"] <= found["top5"] <= 1
    assert min(found["per_class"].values()) <= found["accuracy"] <= max(found["per_class"].values())
    assert cli.main(["evaluate", str(finished), "--checkpoint", "20"]) == 0
    text = capsys.readouterr().out
    first, second, _, *rows = text.splitlines()
    assert first == "step 20, the average of the weights (EMA), test: 359 examples"
    assert second.startswith(f"accuracy {found['accuracy']:.4f}, top-5 ")
    worst_first = sorted(found["per_class"].items(), key=lambda row: row[1])
    assert [row.split() for row in rows[1:]] == [[name, f"{accuracy:.4f}"] for name, accuracy in worst_first]


def test_evaluate_a_model_with_more_outputs_than_classes(capsys, tmp_path):
    config = Config(
        data=DataConfig("digits"), model=ModelConfig("mlp", width=8, num_classes=12), train=TrainConfig(steps=2)
    )
    train(config, tmp_path, num_devices=1, quiet=True)
    found = evaluated(capsys, str(tmp_path))["per_class"]
    assert list(found)[9:] == ["9", "class 10", "class 11"]
    assert found["class 10"] is None
    assert cli.main(["evaluate", str(tmp_path)]) == 0


def test_evaluate_changes_nothing_in_the_run(capsys, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert math.isfinite(evaluated(capsys, str(finished), "--split", "train")["loss"])
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--checkpoint", "7"], 66, "only the steps 10, 20, 30"),
        (["--checkpoint", "epoch:9"], 66, "epoch:9"),
        (["--checkpoint", "nowhere"], 64, "nowhere"),
        (["--devices", "9"], 64, "has 8"),
    ],
)
def test_evaluate_what_is_not_there(capsys, finished, words, code, said):
    assert said in sentence(capsys, ["evaluate", str(finished), *words], code)


@pytest.fixture
def decoys(tmp_path) -> Path:
    """A directory with files called like packages that jaxtrain needs; `ran` is there once one was run."""
    (tmp_path / "here").mkdir()
    for name in ("optax", "jax", "numpy", "rich", "ml_collections", "argparse", "typing", "dataclasses"):
        code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise ImportError('a stranger wrote this')\n"
        (tmp_path / "here" / f"{name}.py").write_text(code)
    return tmp_path / "here"


@pytest.mark.faults
def test_no_file_of_the_current_directory_is_run(decoys, finished):
    for argv in (
        ["-m", "jaxtrain", "evaluate", str(finished), "--devices", "1"],
        ["-m", "jaxtrain", "layout", "--config", QUICKSTART],
        ["-m", "jaxtrain.main", "--help"],
    ):
        found = run(*argv, cwd=decoys)
        assert found.returncode == 0, found.stderr
    assert not (decoys.parent / "ran").exists()


def test_a_launcher_finds_the_package_and_no_file_of_its_name(tmp_path):
    (tmp_path / "jaxtrain.py").write_text("open('ran', 'w')\n")
    command = "import sys; from jaxtrain.cli import main; sys.exit(main())"
    found = subprocess.run(
        [sys.executable, "-P", "-c", command, "launch", "--", "train", "--config", "nowhere.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, (tmp_path / "ran").exists()) == (64, False), found


def test_a_path_that_the_user_set_stays(tmp_path):
    """Also where it is the current directory, which `python -m` adds once more."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\natexit.register(lambda: print(sys.path.count(sys.path[0]), sys.path[0]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert found.stdout.splitlines()[-1] == f"1 {tmp_path}", found


def test_a_command_leaves_the_search_path_as_it_was(capsys, monkeypatch):
    before = list(sys.path)
    assert cli.main(["config", QUICKSTART]) == 0
    assert sys.path == before


@pytest.mark.parametrize("field", ["model.name", "data.name", "data.augmentation", "optim.name", "optim.loss"])
def test_code_that_a_run_directory_names_is_not_run_unless_it_is_trusted(
    capsys, finished, tmp_path, monkeypatch, field
):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (tmp_path / "stranger.py").write_text("raise RuntimeError('the code was run')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = copy / "checkpoints" / "30"
    position = dict(manifest.read_manifest(folder).position)
    section, _, key = field.partition(".")
    position["config"][section][key] = "stranger:thing"
    manifest.annotate(folder, position=position)
    words = ["evaluate", str(copy), "--checkpoint", "30"]
    (tmp_path / "data/a/1.0.0").mkdir(parents=True)  # where TFDS has prepared data: the run still says which
    (tmp_path / "data/a/1.0.0/features.json").write_text("{}")
    for more in ([], ["--data", str(tmp_path / "data")]):
        text = sentence(capsys, [*words, *more])
        assert all(part in text for part in (f"config.{field}='stranger:thing'", str(folder), "--trust", "trust=True"))
    assert "the code was run" in sentence(capsys, [*words, "--trust"])


HOSTILE = "cat\x1b[31m\n dog  0.9999\r\u202e\u2028\x9b\udc80"
SHOWN = r"cat\x1b[31m\n dog  0.9999\r\u202e\u2028\x9b\udc80"


def test_a_class_name_is_shown_as_letters(capsys, monkeypatch):
    result = EvalResult(1.0, 0.5, 1.0, 2, (0.25, 0.75))
    found = Evaluated(result, step=3, split="test", weights="raw", class_names=(HOSTILE, "[red]Katze"))
    monkeypatch.setattr("jaxtrain.training.evaluate.evaluate", lambda *_, **__: found)
    assert cli.main(["evaluate", "run"]) == 0
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.rstrip() for row in rows] == [f"{SHOWN}  0.2500", f"{'[red]Katze'.ljust(len(SHOWN))}  0.7500"]
    assert cli.main(["evaluate", "run", "--json"]) == 0
    said = capsys.readouterr().out
    assert said.isascii()
    assert HOSTILE in json.loads(said)["per_class"]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["logs", HOSTILE], 73),
        (["checkpoint", "list", HOSTILE], 66),
        (["goodput", HOSTILE], 73),
        (["evaluate", HOSTILE], 66),
        (["train", "--config", HOSTILE], 64),
        (["layout", "--config", QUICKSTART, f"--{HOSTILE}"], 64),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_name_in_an_error_is_shown_as_letters(capsys, argv, code):
    text = sentence(capsys, argv, code)
    assert SHOWN in text
    assert text.isprintable()


def test_evaluate_no_run(capsys, tmp_path):
    assert f"{tmp_path} holds no checkpoint" in sentence(capsys, ["evaluate", str(tmp_path)], 66)
    assert not list(tmp_path.iterdir())
