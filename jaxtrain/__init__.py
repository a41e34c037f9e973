"""jaxtrain: a data- and model-parallel trainer for vision models in JAX and Flax.

    from jaxtrain import load_config, train, evaluate, plan
    result = train(load_config("configs/quickstart.py"), workdir="runs/digits")

They are imported when they are first used, so that `jaxtrain.config` and the command line's checks need no JAX.
"""

import importlib  # nothing else: `python -m jaxtrain` has the current directory first in its path, see `host.search_path`

TYPE_CHECKING = False
if TYPE_CHECKING:
    from jaxtrain.recipes import load_config
    from jaxtrain.reporting.report import report
    from jaxtrain.runs.comparison import compare
    from jaxtrain.scaling.scale import scale
    from jaxtrain.sweeps.session import sweep
    from jaxtrain.training.callbacks import Callback
    from jaxtrain.training.evaluate import evaluate
    from jaxtrain.training.inference import load_model
    from jaxtrain.training.plan.search import plan
    from jaxtrain.training.session import train

__all__ = [
    "Callback",
    "__version__",
    "compare",
    "evaluate",
    "load_config",
    "load_model",
    "plan",
    "report",
    "scale",
    "sweep",
    "train",
]
__version__ = "0.1.0"

_HOMES = {
    "Callback": "jaxtrain.training.callbacks",
    "compare": "jaxtrain.runs.comparison",
    "evaluate": "jaxtrain.training.evaluate",
    "load_config": "jaxtrain.recipes",
    "load_model": "jaxtrain.training.inference",
    "plan": "jaxtrain.training.plan.search",
    "report": "jaxtrain.reporting.report",
    "scale": "jaxtrain.scaling.scale",
    "sweep": "jaxtrain.sweeps.session",
    "train": "jaxtrain.training.session",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
