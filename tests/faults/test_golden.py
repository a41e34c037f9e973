"""Checkpoints that earlier versions wrote are still read. `golden/schemaN` was written by the jaxtrain whose schema N was."""

import shutil
from pathlib import Path

import pytest
from runs import SMALL, here

from jaxtrain import evaluate
from jaxtrain.checkpoint.manifest import problems, read_manifest
from jaxtrain.checkpoint.resume import warn_of_other_products
from jaxtrain.checkpoint.resume_point import find_resume_point
from jaxtrain.config import from_dict
from jaxtrain.workdir import Workdir

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("schema", [1, 2])
def test_a_golden_checkpoint_is_read(tmp_path, caplog, schema):
    copy = shutil.copytree(GOLDEN / f"schema{schema}", tmp_path / "run")
    folder = copy / "checkpoints" / "4"
    assert problems(folder) == []
    assert read_manifest(folder).schema == schema
    assert evaluate(copy, checkpoint="4", trust=True).result.loss == pytest.approx(2.2866918563842775, rel=1e-5)
    config = from_dict(read_manifest(folder).position["config"])
    resume = find_resume_point(Workdir(copy), config)
    warn_of_other_products(resume, config, "cpu")
    assert "rounded" not in caplog.text
    warn_of_other_products(resume, config, "gpu")
    assert ("step 4 is of an older version, which rounded the products of f32 to TF32" in caplog.text) == (schema == 1)
    result = here(copy, SMALL | {"train.steps": 6, "train.eval_every": "0"})
    assert [row["step"] for row in result.history if row["phase"] == "train"] == [5, 6]
