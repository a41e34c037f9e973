"""The recipes' numbers, their arguments, and where each value of a config came from."""

import importlib.util
import itertools
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from jaxtrain.config import Config, DataConfig, OptimConfig, flatten, from_dict, nested_dicts, to_dict
from jaxtrain.errors import ConfigError
from jaxtrain.optim.schedules import peak_learning_rate
from jaxtrain.recipes import LAYOUTS, change, load_config, packaged_recipes, recipe, resolve

CONFIGS = Path(__file__).parents[1] / "configs"
OWN = {
    "resnet18_cifar10": ("short", "tuned"),
    "resnet50_cifar100": ("single", "multi", "production", "tuned", "finetune", "probe"),
    "swin_tiny_cifar10": ("long", "224", "finetune", "probe"),
    "vgg19_cifar10": ("224", "finetune", "probe"),
}

# What the issue asks for. `rate`: the peak learning rate at the recipe's own batch.
NUMBERS = {
    "quickstart": {
        "data.name": "digits", "data.global_batch": 64, "model.name": "resnet18", "model.width": 16,
    },
    "mlp_synthetic": {
        "data.name": "synthetic", "data.examples": 10_000, "data.global_batch": 64, "train.epochs": 10, "rate": 0.001,
        "model.name": "mlp", "model.width": 512, "model.dropout": 0.3,
    },
    "resnet18_cifar10": {
        "data.name": "cifar10", "data.global_batch": 128, "model.name": "resnet18", "train.epochs": 200, "rate": 0.1,
    },
    "resnet18_cifar10:short": {
        "data.global_batch": 512, "optim.schedule": "linear", "optim.warmup": "7 epochs", "train.epochs": 35, "rate": 0.4,
    },
    "resnet18_cifar10:tuned": {
        "data.mixup": 1.0, "data.cutmix": 0.2, "optim.ema": 0.999, "train.epochs": 200, "rate": 0.1,
    },
    "resnet_fast_cifar10": {
        "data.name": "cifar10", "data.global_batch": 1024, "data.crop_padding": 2, "data.validation": 0.0,
        "model.name": "convnet_fast", "model.width": 0, "optim.name": "muon", "optim.label_smoothing": 0.2,
        "train.epochs": 14, "rate": 0.1,
    },
    "resnet18_cifar100": {
        "data.name": "cifar100", "data.global_batch": 256, "model.name": "resnet18", "train.epochs": 200, "rate": 0.2,
    },
    "resnet101_cifar100": {
        "data.name": "cifar100", "data.global_batch": 64, "model.name": "resnet101", "train.epochs": 200, "rate": 0.05,
    },
    "resnet50_cifar100": {
        "data.name": "cifar100", "data.global_batch": 128, "model.name": "resnet50", "train.epochs": 200, "rate": 0.1,
        "optim.name": "sgd", "optim.momentum": 0.9, "optim.lr_reference_batch": 128, "optim.lr_scaling": "linear",
        "optim.clip_norm": 0.0, "train.precision": "auto", "checkpoint.milestone_every": "0",
    },
    "resnet50_cifar100:single": {
        "data.global_batch": 128, "train.epochs": 200, "rate": 0.1, "optim.momentum": 0.9,
    },
    "resnet50_cifar100:multi": {
        "data.global_batch": 512, "train.epochs": 200, "rate": 0.4, "optim.momentum": 0.9,
        "optim.lr_reference_batch": 128, "optim.clip_norm": 0.0, "train.precision": "auto",
    },
    "resnet50_cifar100:production": {
        "data.name": "cifar100", "data.global_batch": 1024, "train.epochs": 300, "rate": 0.8, "optim.momentum": 0.9,
        "optim.lr_reference_batch": 128, "optim.clip_norm": 1.0, "train.precision": "bf16",
        "checkpoint.milestone_every": "10 epochs",
    },
    "resnet50_cifar100:tuned": {
        "data.global_batch": 128, "data.mixup": 1.0, "data.cutmix": 0.2, "optim.schedule": "cosine", "optim.ema": 0.999,
        "optim.nesterov": True, "train.epochs": 200, "rate": 0.1,
    },
    "vgg19_cifar10": {
        "data.name": "cifar10", "data.image_size": 0, "data.augmentation": "light", "model.name": "vgg19_bn",
    },
    "vgg19_cifar10:224": {
        # resize_crop: to 8/7 of 224, which is 256, then a crop of 224
        "data.image_size": 224, "data.augmentation": "resize_crop", "data.global_batch": 256, "model.name": "vgg19",
        "optim.lr_reference_batch": 256, "train.epochs": 20, "rate": 0.01,
    },
    "vgg19_cifar10:finetune": {
        "data.image_size": 224, "data.augmentation": "resize_crop", "data.mean": (), "model.name": "vgg19",
        "model.init_from": "required", "optim.head_rate": 10.0, "train.epochs": 10, "rate": 0.001,
    },
    "vgg19_cifar10:finetune,probe": {"optim.freeze_layers": -1, "model.init_from": "required", "train.epochs": 10},
    "resnet50_cifar100:finetune": {
        "data.image_size": 224, "data.augmentation": "random_resized_crop", "model.init_from": "required",
        "optim.schedule": "cosine", "optim.head_rate": 10.0, "train.epochs": 20, "rate": 0.01,
    },
    "resnet50_cifar100:finetune,probe": {"optim.freeze_layers": -1, "optim.freeze": ()},
    "swin_tiny_cifar10:finetune": {
        "data.image_size": 224, "data.augmentation": "random_resized_crop", "data.interpolation": "bicubic",
        "data.crop_pct": 0.9, "data.mixup": 0.0, "model.init_from": "required", "optim.layer_decay": 0.85,
        "train.epochs": 20, "rate": 2e-4,
    },
    "swin_tiny_cifar10:finetune,probe": {"optim.freeze_layers": -1, "optim.layer_decay": 1.0},
    "swin_tiny_cifar10": {
        "data.name": "cifar10", "data.global_batch": 128, "model.name": "swin_tiny", "model.patch": 0,
        "model.window": 0, "optim.name": "adamw",
    },
    "swin_tiny_cifar10:long": {"train.epochs": 600, "optim.warmup": "20 epochs", "optim.ema": 0.9999},
    "swin_tiny_cifar10:224": {
        "data.image_size": 224, "data.augmentation": "resize_crop", "data.global_batch": 128, "model.name": "swin_tiny",
        "train.epochs": 200,
    },
    "transformer_pipeline_zero": {
        "data.global_batch": 4 * 32, "model.name": "swin_tiny", "layout.stages": 2, "layout.zero": 2,
    },
}  # fmt: skip


def load(spec: str) -> Config:
    name, colon, arg = spec.partition(":")
    return from_dict(nested_dicts(load_config(f"{CONFIGS / name}.py{colon}{arg}")))


@pytest.mark.parametrize("spec", NUMBERS)
def test_the_numbers_of_a_recipe(spec):
    config = load(spec)
    found = flatten(to_dict(config)) | {"rate": peak_learning_rate(config.optim, config.data.global_batch)}
    wanted = NUMBERS[spec]
    assert {key: found[key] for key in wanted} == {
        key: pytest.approx(v) if key == "rate" else v for key, v in wanted.items()
    }


def test_every_recipe_is_in_the_table():
    assert {spec.partition(":")[0] for spec in NUMBERS} == {path.stem for path in CONFIGS.glob("*.py")}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_every_recipe_takes_the_layout_arguments(name):
    base = to_dict(load(name))
    for arg, fields in LAYOUTS.items():
        found = to_dict(load(f"{name}:{arg}"))
        assert found["layout"] == base["layout"] | fields
        assert {k: v for k, v in found.items() if k != "layout"} == {k: v for k, v in base.items() if k != "layout"}
    assert set(LAYOUTS) == {"dp", "zero1", "zero2", "zero3", "tensor2", "hybrid", "pipeline2", "pipeline4"}


def test_what_the_layout_arguments_mean():
    layouts = {arg: load(f"quickstart:{arg}").layout for arg in LAYOUTS}
    assert [layouts[arg].zero for arg in ("dp", "zero1", "zero2", "zero3")] == [0, 1, 2, 3]
    assert (layouts["tensor2"].tensor, layouts["tensor2"].zero) == (2, 0)
    assert (layouts["hybrid"].replica, layouts["hybrid"].zero) == (2, 3)
    assert [(layouts[f"pipeline{n}"].stages, layouts[f"pipeline{n}"].microbatches) for n in (2, 4)] == [(2, 0), (4, 0)]


@pytest.mark.parametrize(("name", "own"), [(name, own) for name, args in OWN.items() for own in args])
def test_arguments_combine(name, own):
    for order in itertools.permutations((own, "tensor2", "zero1")):
        config = load(f"{name}:{','.join(order)}")
        assert (config.layout.tensor, config.layout.zero) == (2, 1)
        assert to_dict(config)["data"] == to_dict(load(f"{name}:{own}"))["data"]
    assert load("quickstart:zero3,zero1").layout.zero == 1  # from left to right


@pytest.mark.parametrize("spec", ["resnet50_cifar100:prod", "vgg19_cifar10:zero3,225", "quickstart:multi"])
def test_an_unknown_argument_lists_the_known_ones(spec):
    name, _, args = spec.partition(":")
    with pytest.raises(ConfigError) as caught:
        load(spec)
    assert f"recipe argument {args.split(',')[-1]!r}" in str(caught.value)
    assert ", ".join([*OWN.get(name, ()), *LAYOUTS]) in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_docstring_holds_the_command(path):
    text = path.read_text()
    docstring = text.split('"""')[1]
    specs = re.findall(rf"python -m jaxtrain.main --config configs/{path.stem}\.py(:[\w,]+)?", docstring)
    assert specs, "the command that trains it"
    for arg in specs:
        load(path.stem + arg)
    assert {own for own in OWN.get(path.stem, ()) if own != "single"} <= set(
        ",".join(specs).replace(":", "").split(",")
    )


# -------------------------------------------------------------------------------------------- writing and loading one


def test_a_config_is_locked_but_its_fields_can_be_set():
    config = load_config(CONFIGS / "quickstart.py")
    config.train.steps = 3
    with pytest.raises(AttributeError):
        config.train.step = 3
    assert from_dict(nested_dicts(config)).train.steps == 3


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("train.steps", 20, "20"), ("optim.learning_rate", 0.25, "2.5e-1"), ("optim.nesterov", False, "false"),
        ("optim.step_at", (0.5, 0.75), "(0.5, 0.75)"), ("model.depths", (2,), "2"), ("data.name", "cifar10", "cifar10"),
        ("optim.warmup", "2 epochs", "2 epochs"), ("seed", 5, "5"), ("data.dir", "a=b,c", "a=b,c"),
        ("data.workers", -1, "-1"),
        ("layout.rules", (("kernel$", (None, "tensor")),), "(('kernel$', (None, 'tensor')),)"),
    ],
)  # fmt: skip
def test_every_kind_of_field_can_be_overridden(key, value, text):
    for overrides in ({key: value}, [f"{key}={text}"], [f"--config.{key}={text}"]):
        config = load_config(CONFIGS / "quickstart.py", overrides)
        assert flatten(to_dict(from_dict(nested_dicts(config))))[key] == value


def test_every_field_can_be_overridden_by_its_own_value():
    stored = flatten(to_dict(load("quickstart")))
    overrides = {key: value for key, value in stored.items() if value != ()}
    assert flatten(to_dict(from_dict(nested_dicts(load_config(CONFIGS / "quickstart.py", overrides))))) == stored
    assert len(overrides) > 50


def test_mean_and_std_are_overridden_together():
    config = load_config(CONFIGS / "quickstart.py", {"data.mean": (0.5,), "data.std": (0.25,)})
    assert (config.data.mean, config.data.std) == ((0.5,), (0.25,))


def test_where_each_value_came_from():
    found = resolve(f"{CONFIGS / 'resnet50_cifar100.py'}:multi,zero1", [("seed", "3"), ("data.global_batch", "512")])
    assert found.name == "resnet50_cifar100"
    wanted = {
        "seed": "flag", "data.global_batch": "flag", "optim.warmup": "argument", "layout.zero": "argument",
        "model.name": "recipe", "data.name": "recipe", "optim.ema": "default", "layout.tensor": "default",
    }  # fmt: skip
    assert {key: found.origins[key] for key in wanted} == wanted
    assert set(found.origins) == set(flatten(to_dict(Config())))


def test_a_later_override_wins():
    config = load_config(CONFIGS / "quickstart.py", ["train.steps=3", "train.steps=4"])
    assert config.train.steps == 4


def test_change_names_fields_by_their_dotted_names():
    config = change(Config(), **{"optim.name": "adamw", "seed": 3})
    assert (config.optim.name, config.seed) == ("adamw", 3)
    with pytest.raises(ConfigError, match=r"config\.optim\.ema=2"):
        change(config, **{"optim.ema": 2.0})


def test_a_recipe_may_import_from_the_current_directory_and_nothing_else_may(tmp_path, monkeypatch):
    (tmp_path / "own_settings.py").write_text("SEED = 7\n")
    (tmp_path / "yaml.py").write_text("raise ImportError('not the installed one')\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(
        "import own_settings, yaml\nfrom jaxtrain.config import Config\nfrom jaxtrain.recipes import recipe\n"
        "def get_config(arg=''):\n    return recipe(Config(seed=own_settings.SEED), arg)\n"
    )
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    monkeypatch.delitem(sys.modules, "yaml", raising=False)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_config("recipes/mine.py").seed == 7
    assert sys.path == before


def write_recipe(folder: Path, head: str, signature: str = "arg=''", seed: str = "0") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "mine.py"
    path.write_text(
        f"from jaxtrain.config import Config\nfrom jaxtrain.recipes import recipe\n{head}\n"
        f"def get_config({signature}):\n    return recipe(Config(seed={seed}))\n"
    )
    return path


def test_a_recipe_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    """Each its own, wherever it is started, and nothing of that is left in the process."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "my_common.py").write_text("SEED = 1\n")
    (here / "yaml.py").write_text("raise ImportError('not the installed one')\n")
    monkeypatch.chdir(here)
    monkeypatch.delitem(sys.modules, "yaml", raising=False)
    before = list(sys.path)
    for seed in (2, 3):
        path = write_recipe(tmp_path / f"recipes{seed}", "import my_common, yaml, my_parts.more", seed="my_common.SEED")
        (path.parent / "my_common.py").write_text(f"SEED = {seed}\n")
        (path.parent / "my_parts").mkdir()
        (path.parent / "my_parts" / "more.py").write_text("")
        assert load_config(path).seed == seed
        assert sys.path == before
        assert not [name for name in sys.modules if name.startswith("my_")]


def test_what_is_installed_below_a_recipe_stays_imported(tmp_path, monkeypatch):
    """An environment in the recipe's folder, and the folder's own package that an editable install makes importable."""
    installed = tmp_path / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "my_library.py").write_text("")
    (tmp_path / "my_package.py").write_text("")
    (tmp_path / "my_common.py").write_text("")

    class Editable:
        @staticmethod
        def find_spec(name, path=None, target=None):
            file = tmp_path / "my_package.py"
            return importlib.util.spec_from_file_location(name, file) if name == "my_package" else None

    monkeypatch.syspath_prepend(installed)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    path = write_recipe(tmp_path, "import my_common, my_library, my_package")
    load_config(path)
    left = {name for name in sys.modules if name.startswith("my_")}
    for name in left:
        monkeypatch.delitem(sys.modules, name)
    assert left == {"my_library", "my_package"}


def test_a_recipe_that_takes_no_argument(tmp_path):
    path = write_recipe(tmp_path, "", signature="", seed="5")
    assert load_config(path).seed == 5
    with pytest.raises(ConfigError, match=r"mine\.py:zero3: its get_config takes no argument"):
        load_config(f"{path}:zero3")


def test_a_recipe_that_comes_with_jaxtrain_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = resolve("resnet50_cifar100:production,zero3")
    assert (found.name, found.config.data.global_batch, found.config.layout.zero) == ("resnet50_cifar100", 1024, 3)
    write_recipe(tmp_path, "", seed="9").rename("quickstart")  # a file comes first
    with pytest.raises(ConfigError, match=r"a name that ends in \.py"):
        resolve("quickstart")
    for name in ("quikstart", "configs/quikstart.py", "quikstart.py"):
        with pytest.raises(ConfigError) as caught:
            resolve(name)
        assert "Did you mean 'quickstart'" in str(caught.value)
        assert ", ".join(sorted(path.stem for path in CONFIGS.glob("*.py"))) in str(caught.value)


def test_an_installed_package_has_the_recipes_in_it(tmp_path, monkeypatch):
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"configs": "jaxtrain/configs", "launch": "jaxtrain/launch"}
    shutil.copytree(CONFIGS, tmp_path / included["configs"])
    monkeypatch.setattr("jaxtrain.recipes.__file__", str(tmp_path / "jaxtrain" / "recipes.py"))
    assert set(packaged_recipes().values()) == set((tmp_path / included["configs"]).glob("*.py"))
    assert resolve("quickstart").name == "quickstart"


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from jaxtrain.config import Config, DataConfig\n"
        "from jaxtrain.recipes import change, recipe\n"
        "def get_config(arg=''):\n"
        "    return recipe(Config(data=DataConfig(global_batch=32)), arg, {'big': lambda c: change(c, seed=9)})\n"
    )
    config = load_config(f"{path}:big,zero2", {"optim.momentum": 0.5})
    assert json.loads(config.to_json()) == json.loads(
        recipe(
            change(Config(data=DataConfig(global_batch=32), optim=OptimConfig(momentum=0.5)), seed=9), "zero2"
        ).to_json()
    )
