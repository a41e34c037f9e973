"""The floors of the house: an import points down only. Reads the imports; see docs/architecture.md."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxtrain"

# From the ground up. A module imports from the floors below its own, and a package's modules from each other.
FLOORS = (
    ("errors", "outside", "search_path", "xla_flags", "cpus"),
    ("config", "distributed"),
    ("plugins", "precision", "recipes", "workdir"),
    ("checkpoint_files", "lease", "gpus"),
    ("supervisor",),
    ("models", "data", "optim", "parallel", "logging", "anomalies"),
    ("state", "task"),
    ("step", "evaluator", "checkpoint", "stages"),
    ("pipeline",),
    ("feed", "run"),
    ("resume",),
    ("engine",),
    ("trainer", "evaluation", "inspect", "doctor"),
    ("demo",),
    ("cli", "__init__"),
    ("main", "__main__"),
)
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}

# What is run inside the jitted step, and what describes it, needs nothing else.
STEP_NEEDS = {"jax", "flax", "optax", "numpy"}

# The one module that knows each of these.
OWNERS = {
    "orbax": "checkpoint",
    "tensorflow_datasets": "data.tfds_sets",
    "grain": "data.stream",
    "tensorboardX": None,  # it imports PyTorch
    "sklearn": None,  # only its data file is read
    "tensorflow": None,
    "clu": None,
}


def module_name(path: Path) -> str:
    """'data.augment' for jaxtrain/data/augment.py, and 'data' for jaxtrain/data/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def names(path: Path) -> set[str]:
    """All that the file imports, inside functions too: 'jax', 'flax.linen', 'jaxtrain.config.Config'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def own_imports(module: str) -> frozenset[str]:
    """The modules of jaxtrain that `module` imports, by their names in `MODULES`."""
    found = set()
    for name in names(MODULES[module]):
        if name.startswith("jaxtrain."):
            parts = name.split(".")[1:]  # 'config.Config' is of 'config'
            found.add(
                next(inner for end in (len(parts), len(parts) - 1) if (inner := ".".join(parts[:end])) in MODULES)
            )
    return frozenset(found - {module})


def third_party(module: str) -> set[str]:
    tops = {name.partition(".")[0] for name in names(MODULES[module])}
    return tops - set(sys.stdlib_module_names) - {"jaxtrain"}


def closure(module: str) -> set[str]:
    """`module` and all that it imports, directly or not."""
    seen, todo = set(), [module]
    while todo:
        seen.add(name := todo.pop())
        todo += own_imports(name) - seen
    return seen


def top(module: str) -> str:
    return module.partition(".")[0]


def test_the_reading_of_imports_finds_what_is_there():
    assert {"data.augment", "models.layers", "optim", "state", "task"} <= own_imports("step")
    assert {"config", "resume", "workdir"} <= own_imports("trainer")  # from jaxtrain import config
    assert "evaluation" in own_imports("cli.evaluate")  # inside a function
    assert "flax.linen" in names(MODULES["models.layers"])


def test_every_module_has_a_floor():
    assert {top(module) for module in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("module", MODULES)
def test_an_import_points_down(module):
    for other in own_imports(module):
        same_package = top(other) == top(module)
        assert same_package or HEIGHT[top(other)] < HEIGHT[top(module)], f"jaxtrain.{module} imports jaxtrain.{other}"


def test_no_module_imports_itself_through_others():
    for module in MODULES:
        for other in own_imports(module):
            assert module not in closure(other), f"jaxtrain.{module} and jaxtrain.{other} import each other"


def test_models_know_nothing_of_layouts():
    for module in MODULES:
        if top(module) == "models":
            assert not any(top(other) in ("parallel", "state", "step", "task") for other in closure(module))


def test_only_models_know_linen():
    knows = {
        top(module) for module, path in MODULES.items() if any(name.startswith("flax.linen") for name in names(path))
    }
    assert knows == {"models"}


def test_the_step_needs_only_jax_flax_and_optax():
    used = {module: third_party(module) for module in closure("step")}
    assert {"data.augment", "models.layers", "parallel.layout"} <= set(used)
    assert {module: found - STEP_NEEDS for module, found in used.items() if found - STEP_NEEDS} == {}
    for module in MODULES:
        if top(module) == "models":
            assert third_party(module) <= STEP_NEEDS


@pytest.mark.parametrize(("library", "owner"), OWNERS.items())
def test_one_module_knows_each_library(library, owner):
    assert {module for module in MODULES if library in third_party(module)} == ({owner} if owner else set())


# ------------------------------------------------------------------------------------------------------- what is loaded


def run(code: str, *paths: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    "modules",
    [
        "jaxtrain",
        "jaxtrain.config",
        "jaxtrain.recipes",
        "jaxtrain.plugins",
        "jaxtrain.xla_flags",
        "jaxtrain.workdir",
        "jaxtrain.cli",
    ],
)
def test_checking_a_config_loads_no_jax(modules):
    run(f"import sys, {modules}; assert 'jax' not in sys.modules and 'flax' not in sys.modules")


def test_tensorflow_is_never_imported_by_a_run(tmp_path):
    """A decoy stands where TensorFlow would be, so that whoever tries to import it is seen."""
    decoy = tmp_path / "site" / "tensorflow"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("import traceback; traceback.print_stack()\n")
    run(
        f"""
import sys
from jaxtrain import train
from jaxtrain.config import Config, DataConfig, ModelConfig, TrainConfig
config = Config(
    data=DataConfig(name="digits", global_batch=16), model=ModelConfig("mlp", width=8), train=TrainConfig(steps=2)
)
result = train(config, {str(tmp_path / "run")!r}, num_devices=1, quiet=True)
assert result.result["steps"] == 2
assert "tensorflow_datasets" not in sys.modules  # the digits are not TFDS's
import jaxtrain.data.tfds_sets
assert "tensorflow" not in sys.modules
""",
        tmp_path / "site",
    )
