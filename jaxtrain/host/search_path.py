"""Where Python looks for modules: the current directory comes last, and only for what a user's settings name.

`python -m` puts the current directory first: every command would run a file `optax.py` that lies in it. So `python -m
jaxtrain` takes it out before it imports anything else. This module is imported before that: it imports only what Python
itself has loaded at its start, which `contextlib` is not.
"""

import os
import sys


def leave_out_the_current_directory() -> None:
    """Call this first in `python -m jaxtrain`. What the user has put into PYTHONPATH stays.

    In a checkout that was never installed, the package itself lies in the current directory. Then its directory is appended,
    so that this process and those that it starts still find the package.
    """
    if sys.flags.safe_path or not sys.path or sys.path[0] not in ("", _here()):
        return
    del sys.path[0]
    if all(_find(finder, "jaxtrain") is None for finder in sys.meta_path):
        host = os.path.dirname(os.path.abspath(__file__))
        sys.path.append(os.path.dirname(os.path.dirname(host)))


def add_working_directory() -> str:
    """Makes the modules of the current directory importable; all other directories come first.

    Returns what was added to `sys.path`, '' where the directory is in it already. It usually stays there: code that was
    loaded from the directory may import from it later.
    """
    here = os.getcwd()
    if "" in sys.path or here in sys.path:
        return ""
    sys.path.append(here)
    return here


class Importable:
    """A context in which the modules of a folder and of the current directory are importable; for code that runs once.

    That is a recipe, and `folder` is where it lies. Installed modules come first, then those of the folder. A module that is
    imported later and is not installed must not be taken from there. Nor must the next recipe, in another folder, get
    this one's modules: they are forgotten afterwards. What is found without the folder is installed, and stays.
    """

    def __init__(self, folder: str) -> None:
        self._folder = os.path.abspath(folder)

    def __enter__(self) -> None:
        self._own = self._folder not in sys.path
        sys.path += [self._folder] * self._own
        self._added = [*[self._folder] * self._own, *filter(None, [add_working_directory()])]
        self._before = set(sys.modules)

    def __exit__(self, *_: object) -> None:
        for folder in self._added:
            if folder in sys.path:
                sys.path.remove(folder)
        if self._own and self._folder != _here():
            for top in {name.partition(".")[0] for name in sys.modules} - self._before:
                if self._lies_here(top) and all(_find(finder, top) is None for finder in sys.meta_path):
                    for name in [name for name in sys.modules if name.partition(".")[0] == top]:
                        del sys.modules[name]

    def _lies_here(self, top: str) -> bool:
        """Whether a module or package is one of the folder itself, not of an environment somewhere below it."""
        module, place = sys.modules.get(top), os.path.join(self._folder, top)
        files = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]  # of a folder, the path
        return any(str(file).startswith((place + ".", place + os.sep)) or file == place for file in files)


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""


def _find(finder: object, name: str) -> object:
    """The spec of a module by this finder, as if it were not loaded yet; None if it does not find it."""
    find_spec = getattr(finder, "find_spec", None)
    return find_spec(name, None, None) if find_spec else None
