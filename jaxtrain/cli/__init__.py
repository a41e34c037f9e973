"""The command line: `jaxtrain COMMAND ...`. Each command is a module with `add_arguments(parser)` and `run(arguments)`.

`run` returns None, or an exit code where the command has one of its own.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib.metadata
import logging
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import jaxtrain
from jaxtrain.cli import (
    bench,
    checkpoint,
    compare,
    compile,
    config,
    dashboard,
    data,
    demo,
    doctor,
    evaluate,
    export,
    flags,
    goodput,
    init,
    launch,
    layout,
    logs,
    plan,
    predict,
    queue,
    report,
    resume,
    scale,
    status,
    stop,
    submit,
    sweep,
    train,
    weights,
)  # fmt: skip
from jaxtrain.distributed.exit_report import ExitReport
from jaxtrain.errors import ConfigError, JaxtrainError
from jaxtrain.host import limits, xla_flags
from jaxtrain.host.text import escape_message, printable
from jaxtrain.plugins import whose_fault
from jaxtrain.recipes import split_override

COMMANDS = {
    "train": train, "launch": launch, "evaluate": evaluate, "predict": predict, "export": export,
    "checkpoint": checkpoint, "data": data, "config": config, "layout": layout, "compile": compile, "plan": plan,
    "scale": scale, "bench": bench, "logs": logs, "goodput": goodput, "compare": compare, "report": report,
    "weights": weights, "demo": demo, "doctor": doctor, "init": init,
    "submit": submit, "queue": queue, "status": status, "stop": stop, "resume": resume,
    "dashboard": dashboard, "sweep": sweep,
}  # fmt: skip

_WITH_CONFIG = ("train", "evaluate", "layout", "compile", "plan", "scale", "config", "sweep")


class _Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for a wrong argument, so that it ends with the same kind of sentence and exit code as others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


class _Version(argparse.Action):
    """As argparse's own, but the versions are looked for only where they are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        jax, python = importlib.metadata.version("jax"), platform.python_version()
        print(f"jaxtrain {jaxtrain.__version__}, jax {jax}, Python {python}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or `JaxtrainError.exit_code` with one sentence on standard error."""
    # Outside of a run, log messages go to standard error without a handler that would escape them.
    logging.getLogger("jaxtrain").addFilter(escape_message)
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        xla_flags.hide_alarms(always=arguments.command in ("demo", "layout"))
        return COMMANDS[arguments.command].run(arguments) or 0
    except JaxtrainError as error:
        ExitReport.of(error, 0).write()  # `jaxtrain launch` does not restart what cannot succeed
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("Stopped at once; the last checkpoint is as it was.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `jaxtrain layout | head` is not an error
        return 0
    except Exception as error:
        known = limits.explained(error)
        if isinstance(known, JaxtrainError):
            return _fail(str(known), known.exit_code)
        return _fail(f"{whose_fault(error)}\n{traceback.format_exc()}", 70, lines=True)


def _unless_late(unraisable: sys.UnraisableHookArgs) -> None:
    """After a failed save, Orbax's other writes end when its event loop is closed, each with a traceback of its own."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """The whole program: `main`, and the end of the process. Threads that a failed save has left do not keep it alive."""
    sys.unraisablehook = _unless_late
    code = main(argv)
    if not code:
        sys.exit(0)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments, with three more.

    Those are `overrides`, a pair (dotted name, text) for each --config.KEY=VALUE; `translations`, a text for each
    flag of another trainer; and `rest`, the words after --. Raises `ConfigError`.
    """
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    words, translations = flags.translate(argv[:end]) if argv[:1] and argv[0] in _WITH_CONFIG else (argv[:end], [])
    overrides, rest = split_overrides(words)
    parser = _Parser(prog="jaxtrain", description="Trains vision models in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in COMMANDS.items():
        help_text = (module.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(name, help=help_text, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(sub)
    arguments, unknown = parser.parse_known_args(rest)
    if unknown:
        known = [option for action in commands.choices[arguments.command]._actions for option in action.option_strings]
        hints = dict.fromkeys(flags.hint(word, known) for word in unknown if word.startswith("-") or "=" in word)
        if arguments.command == "launch":
            hints = {
                " What is meant for the run comes after --: jaxtrain launch --nproc 2 -- train --config FILE.": None
            }
        if "--root" in known and os.path.isdir(unknown[0]):
            hints = {f" Did you mean --root {unknown[0]}?": None}
        raise ConfigError(f"jaxtrain {arguments.command} does not know {' '.join(unknown)}.{''.join(hints)}")
    if overrides and not hasattr(arguments, "config"):
        raise ConfigError(f"--config.{overrides[0][0]}: jaxtrain {arguments.command} takes no config.")
    arguments.overrides, arguments.translations, arguments.rest = overrides, translations, argv[end + 1 :]
    if arguments.rest and arguments.command != "launch":
        raise ConfigError(f"jaxtrain {arguments.command} takes no command after --: {' '.join(arguments.rest)}.")
    return arguments


def split_overrides(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Splits `argv` into overrides (dotted name, text) and the other words.

    An override is `--config.KEY=VALUE`, `--config.KEY VALUE`, or `--config.KEY` for true.
    """
    overrides, rest = [], []
    words = iter(range(len(argv)))
    for index in words:
        word = argv[index]
        if not word.startswith("--config."):
            rest.append(word)
        elif "=" in word:
            overrides.append(split_override(word))
        elif index + 1 < len(argv) and not argv[index + 1].startswith("--"):
            overrides.append(split_override(f"{word}={argv[next(words)]}"))
        else:
            overrides.append(split_override(f"{word}=true"))
    return overrides, rest


def _fail(text: str, code: int, *, lines: bool = False) -> int:
    with contextlib.suppress(OSError):  # standard error is closed, or a file on the disk that is full
        print(f"jaxtrain: {printable(text, lines=lines)}", file=sys.stderr, flush=True)
    return code
