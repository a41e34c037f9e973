"""The house: six layers, one rule (pyproject.toml, [tool.importlinter]; docs/architecture.md), and what is loaded when."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxtrain"


def test_imports_keep_the_rules_of_the_house():
    command = [Path(sys.executable).with_name("lint-imports"), "pyproject.toml", "--no-cache"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stdout


def test_only_models_know_linen():
    """(import-linter sees Flax as one.)"""
    knows = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            if any(f"{module}{name}".startswith("flax.linen") for name in names):
                knows.add(path.relative_to(PACKAGE).parts[0])
    assert knows == {"models"}


def test_functions_and_classes_fit_on_a_screen():
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            most = {ast.FunctionDef: 60, ast.AsyncFunctionDef: 60, ast.ClassDef: 250}.get(type(node))
            if most and (lines := node.end_lineno - node.lineno + 1) > most:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines of at most {most}")
    assert not long


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
        "jaxtrain.host.xla_flags",
        "jaxtrain.workdir",
        "jaxtrain.cli",
        "jaxtrain.dashboard.server",
    ],
)
def test_checking_a_config_loads_no_jax(modules):
    run(f"import sys, {modules}; assert 'jax' not in sys.modules and 'flax' not in sys.modules")


@pytest.mark.parity
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
assert "clu.metrics" in sys.modules
assert "tensorflow" not in sys.modules
""",
        tmp_path / "site",
    )
