"""Where Python looks for modules when jaxtrain is started as `python -m jaxtrain`. Imports nothing that a stranger could name.

`python -m` puts the current directory first: a file `optax.py` in it would be run by every command. It is taken out before
anything else is imported, and what a user's own settings name is found in it last (`plugins`).
"""

import os
import sys


def leave_out_the_current_directory() -> None:
    """To be called first of all in `python -m jaxtrain`; what stands in PYTHONPATH is the user's own word and stays.

    In a development checkout that was never installed the package itself lies there: then the directory goes last, so that
    the processes which Python starts find the package as this one did.
    """
    if sys.flags.safe_path or not sys.path or sys.path[0] not in ("", _here()):
        return
    del sys.path[0]
    if all(_find(finder) is None for finder in sys.meta_path):
        host = os.path.dirname(os.path.abspath(__file__))
        sys.path.append(os.path.dirname(os.path.dirname(host)))


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""


def _find(finder: object) -> object:
    """What a finder says of jaxtrain, as if it were not loaded yet."""
    find_spec = getattr(finder, "find_spec", None)
    return find_spec("jaxtrain", None, None) if find_spec else None
