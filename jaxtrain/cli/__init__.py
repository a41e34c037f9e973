"""The command line: `jaxtrain COMMAND ...`. Each command is a module with `add_arguments(parser)` and `run(arguments)`.

`run` returns None, or an exit code where the command has one of its own.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jaxtrain.cli import checkpoint, compile, config, data, demo, doctor, evaluate, goodput, launch, layout, logs, train
from jaxtrain.config import did_you_mean
from jaxtrain.distributed.exit_report import ExitReport
from jaxtrain.errors import REPORT_THIS, ConfigError, JaxtrainError
from jaxtrain.host.text import escape_message, printable
from jaxtrain.recipes import split_override

COMMANDS = {
    "train": train, "launch": launch, "evaluate": evaluate, "checkpoint": checkpoint, "data": data, "config": config,
    "layout": layout, "compile": compile, "logs": logs, "goodput": goodput, "demo": demo, "doctor": doctor,
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for a wrong argument, so that it ends with the same kind of sentence and exit code as others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, or `JaxtrainError.exit_code` with one sentence on standard error."""
    # Outside of a run, log messages go to standard error without a handler that would escape them.
    logging.getLogger("jaxtrain").addFilter(escape_message)
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return COMMANDS[arguments.command].run(arguments) or 0
    except JaxtrainError as error:
        ExitReport.of(error, 0).write()  # `jaxtrain launch` does not restart what cannot succeed
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("Stopped at once; the last checkpoint is as it was.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `jaxtrain layout | head` is not an error
        return 0
    except Exception:
        return _fail(f"{REPORT_THIS}\n{traceback.format_exc()}", 70, lines=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments, with two more: `overrides`, a pair (dotted name, text) for each --config.KEY=VALUE, and
    `rest`, the words after --. Raises `ConfigError`.
    """
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    overrides, rest = split_overrides(argv[:end])
    parser = _Parser(prog="jaxtrain", description="Trains vision models in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, module in COMMANDS.items():
        help_text = (module.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(name, help=help_text, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(sub)
    arguments, unknown = parser.parse_known_args(rest)
    if unknown:
        known = [option for action in commands.choices[arguments.command]._actions for option in action.option_strings]
        hint = did_you_mean(unknown[0].partition("=")[0], known)
        if not hint and "=" in unknown[0]:
            hint = " A field of the config is set with --config.KEY=VALUE."
        raise ConfigError(f"jaxtrain {arguments.command} does not know {' '.join(unknown)}.{hint}")
    if overrides and not hasattr(arguments, "config"):
        raise ConfigError(f"--config.{overrides[0][0]}: jaxtrain {arguments.command} takes no config.")
    arguments.overrides, arguments.rest = overrides, argv[end + 1 :]
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
    print(f"jaxtrain: {printable(text, lines=lines)}", file=sys.stderr, flush=True)
    return code
