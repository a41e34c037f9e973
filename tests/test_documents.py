"""What the documents name exists: files, tests, commands, options, fields, functions, links. Reads texts; trains nothing."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.metadata
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxtrain.cli import COMMANDS, parse
from jaxtrain.config import flat_keys
from jaxtrain.errors import ConfigError
from jaxtrain.recipes import resolve

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md")
)
SCRIPTS = [".ci/run", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github/workflows").glob("*.yml"))]

# Files and folders (and all in them) that a document may name though the repository does not have them.
MADE = {
    # the work directory of a run
    "config.json", "dataset.json", "metrics.csv", "metrics.jsonl", "result.json", "manifest.json", "bad_batches.jsonl",
    "sweep.json", "rates.yaml", "sinks.json", "events.jsonl", "layout.json", "schedule.svg", "evaluation/",
    "plan.json", "skipped_images.txt", "checkpoints/", "logs/", "starts/", "tensorboard/", "corrupt/", "superseded/",
    "profile/", "runs/",
    # the data directory
    "downloads/manual/",
    # what the documents' own commands and examples write
    "my-project/job.yaml", "my_project.py", "plan.svg", "comm.csv", "comm.svg", "links.json", "step.svg",
    "results/gpu.json", "pictures/", "predictions.csv",
    "predictions.json", "features.npz", "report.html", "report.json", "reports/", "runs.csv", "scaling.json", "scaling.csv",
    "digits.stablehlo", "digits.stablehlo.json", "vgg16.safetensors",
    # beside a checkout, in the CI
    "../shared/data", "../shared/data/unpack.py", "unpack.py",
}  # fmt: skip

# Options and words of other programs that no script here has, and packages whose dotted names are not looked up.
OTHERS_OPTIONS = {"--account", "--partition", "--gpus-per-task", "--shm-size", "--file_format"}
OTHERS_WORDS = {
    "MLFLOW_TRACKING_URI", "TRACKIO_DIR",
    "mallopt", "tmux", "perf", "OOMKilled", "NCCL_SOCKET_IFNAME", "jax_share_binary_between_hosts",
    "xla_cpu_use_onednn", "xla_cpu_experimental_onednn_custom_call",
}  # fmt: skip
OTHERS_MODULES = {"jax", "lax", "optax", "torch", "cudnn", "package", "clu"}


class Piece(NamedTuple):
    """A piece of a document, and the line that it begins on."""

    line: int
    text: str


# ----------------------------------------------------------------------------------------------------- the documents


def read(document: str) -> str:
    return (ROOT / document).read_text()


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


@functools.cache
def prose_and_blocks(document: str) -> tuple[str, list[Piece]]:
    """The text with its code blocks left empty, and the blocks: between fences, or set in by four spaces."""
    prose, blocks, fenced, inside = [], [], False, False
    for number, line in enumerate(read(document).split("\n"), 1):
        is_fence = line.lstrip().startswith("```")
        indented = line.startswith("    ") and (inside or not prose[-1].strip())
        if is_fence:
            fenced = not fenced
        if (fenced and is_fence) or (indented and not fenced and not inside):
            blocks.append(Piece(number + is_fence, ""))
        inside = not is_fence and (fenced or indented)
        if inside:
            blocks[-1] = Piece(blocks[-1].line, f"{blocks[-1].text}{line}\n")
        prose.append("" if inside or is_fence else line)
    return "\n".join(prose), blocks


def spans(document: str) -> Iterator[Piece]:
    """What the prose has in `code letters`."""
    text, _ = prose_and_blocks(document)
    for found in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)*)`", text):
        yield Piece(line_of(text, found.start()), " ".join(found[1].replace("\\|", "|").split()))


def commands(document: str) -> Iterator[Piece]:
    """The lines of the blocks, without prompt; lines that end in \\ as one."""
    for first, text in prose_and_blocks(document)[1]:
        for found in re.finditer(r"(?:.*\\\n)*.*", text):
            line = re.sub(r"\\\n\s*", "", found[0]).strip().removeprefix("$ ")
            yield Piece(first + text.count("\n", 0, found.start()), line)


# ---------------------------------------------------------------------------------------------------------- the tree


@functools.cache
def sources() -> dict[str, str]:
    """The texts of programs, scripts and settings by their path, without this file."""
    folders = ("jaxtrain", "benchmarks", "configs", "docs", "launch", "tests")
    paths = [ROOT / "pyproject.toml", *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    programs = (path for path in paths if path.suffix in (".py", ".sh", ".sbatch", ".yaml", ".toml"))
    return {str(path.relative_to(ROOT)): path.read_text() for path in programs if path != Path(__file__).resolve()}


@functools.cache
def words() -> set[str]:
    return {word for text in sources().values() for word in re.findall(r"\w+", text)}


@functools.cache
def modules() -> dict[str, set[str]]:
    """The names that each Python file defines: 'jaxtrain.data.augment' -> {'normalize', ...}."""
    return {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): defined(ast.parse(text))
        for path, text in sources().items()
        if path.endswith(".py")
    }


def defined(tree: ast.AST) -> set[str]:
    """Functions, classes, what is assigned and imported and in `__all__`; members of a class as 'Class.member'."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for name in defined(node)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            names |= assigned
            if assigned == {"__all__"}:
                names |= {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)}
        elif isinstance(node, ast.If):
            names |= defined(node)
    return names


@functools.cache
def options() -> dict[str, set[str]]:
    """The options of each `jaxtrain` command, and the values that its first argument may have."""
    found = {}
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        found[name] = {option for action in parser._actions for option in action.option_strings}
        found[name] |= {choice for action in parser._actions[:2] for choice in action.choices or ()}
    return found


@functools.cache
def every_option() -> set[str]:
    """The options of all commands, benchmarks and scripts, and of the programs that they call."""
    text = "\n".join(text for path, text in sources().items() if path.startswith(("benchmarks/", "launch/", "docs/")))
    return set(re.findall(r"--[\w-]+", text)).union({"--version"}, *options().values())


def find(path: str, document: str) -> list[Path]:
    """`path` below the root, `jaxtrain/` or the document's folder; of a test file the name alone, anywhere in `tests/`."""
    if re.fullmatch(r"test_\w+\.py", path):
        return list((ROOT / "tests").rglob(path))
    places = [ROOT, ROOT / "jaxtrain", (ROOT / document).parent]
    return [place / path for place in places if (place / path).exists()][:1]


# ------------------------------------------------------------------------------------- rules; each yields what is wrong

PATH = re.compile(  # file.py, file.py:12, recipe.py:zero3, test_file.py::test_name[id], folder/
    r"(?P<path>[\w.{},-]+(?:/[\w.{},-]+)*\.(?:py|md|toml|ya?ml|sh|sbatch|svg|json|jsonl|csv|txt)|(?:[\w.-]+/)+)"
    r"(?::(?P<line>\d+)|:(?P<recipe>[\w,]+)|::\w+(?:\[.*\])?)?"
)
FIELDS = set(flat_keys())
SECTIONS = {key.rpartition(".")[0] for key in FIELDS}
# A newcomer has tried the commands in the checkout, so that runs/ is there too.
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {made.rstrip("/") for made in MADE}


def check_word(word: str, document: str) -> Iterator[str]:
    """A word that looks like an option, a path or a name with dots."""
    word = word.strip(",;")
    name = word.partition("=")[0].removesuffix("()")
    if word.startswith("--config."):
        yield from check_dotted(name.removeprefix("--"))
    elif word.startswith("--xla_"):
        yield from check_single(name.removeprefix("--"))
    elif word.startswith("--"):
        if name != "--" and name not in every_option() | OTHERS_OPTIONS:
            yield f"no command has {name}"
    elif "<" in word or word.startswith(("~", "$", "/")):
        return
    elif found := PATH.fullmatch(word):
        yield from check_path(found, document)
    elif "/" in word and word.split("/")[0] in FOLDERS:
        if not (ROOT / word).exists():
            yield f"{word} is not there"
    elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        yield from check_dotted(name)


def check_path(found: re.Match[str], document: str) -> Iterator[str]:
    for path in expand(found["path"]):
        if any(path == made or (made.endswith("/") and path.startswith(made)) for made in MADE):
            continue
        places = find(path, document)
        if len(places) != 1:
            yield f"{path} is {f'in {len(places)} places' if places else 'not there'}"
        elif found["line"] and len(places[0].read_text().splitlines()) < int(found["line"]):
            yield f"{path} has fewer lines than {found['line']}"
        elif found["recipe"] and path.startswith("configs/"):
            yield from refused(functools.partial(resolve, f"{ROOT / path}:{found['recipe']}"))


def expand(text: str) -> list[str]:
    """Braces as a shell expands them: 'a{b,c}' -> ['ab', 'ac']."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    return [word for part in found[1].split(",") for word in expand(text[: found.start()] + part + text[found.end() :])]


def check_dotted(name: str) -> Iterator[str]:
    """A field or a section of the config, a name of a module or of a class: 'train.steps', 'augment.normalize'."""
    field, parts = name.removeprefix("config."), name.split(".")
    if field in FIELDS | SECTIONS or parts[0] in OTHERS_MODULES:
        return
    for cut in range(len(parts), 0, -1):  # the longest module that is there
        prefix, attribute = ".".join(parts[:cut]), ".".join(parts[cut:])
        homes = [names for module, names in modules().items() if f".{module}".endswith(f".{prefix}")]
        if homes:
            if attribute and not any(attribute in names for names in homes):
                yield f"{prefix} has no {attribute}"
            return
    if not any(name in names for names in modules().values()):
        yield f"{name} is neither a field of the config nor a name of a module"


def check_single(name: str) -> Iterator[str]:
    if name not in words() | OTHERS_WORDS:
        yield f"no source has the word {name}"


def check_command(line: list[str]) -> Iterator[str]:
    """A `jaxtrain COMMAND ...` in a sentence, perhaps cut short: the command, its options and its actions."""
    line = [word for word in line if word != "..."]
    if len(line) < 2 or line[1].startswith("--"):
        return
    command, rest = line[1], line[2:]
    if command not in COMMANDS:
        yield f"there is no command {command}"
        return
    rest = rest[: rest.index("--")] if "--" in rest else rest
    for word in (word.partition("=")[0] for word in rest if word.startswith("--")):
        if not word.startswith("--config.") and word not in options()[command]:
            yield f"jaxtrain {command} has no {word}"
    actions = {word for word in options()[command] if not word.startswith("-")}
    if actions and rest and not actions.issuperset(rest[0].split("|")):
        yield f"jaxtrain {command} has no {rest[0]}"


def check_line(line: str, document: str) -> Iterator[str]:
    """A line of a block. What does not begin like a command is output or code."""
    if not re.match(r"([A-Z_]+=\S* )*((python|jaxtrain|pip|sbatch|qsub|docker|kubectl|sky) |launch/)", line):
        return
    for word in line.split():
        if found := PATH.fullmatch(word.strip("\"'")):
            yield from check_path(found, document)
    command = re.split(r"\s#\s|\s\|\s", line)[0]  # without a comment, and what follows a pipe
    for module in re.findall(r" -m ((?:jaxtrain|benchmarks)[\w.]*)", command):
        if module not in modules():
            yield f"there is no module {module}"
    for part in command.split(" && "):
        yield from check_arguments(shlex.split(part))


def check_arguments(line: list[str]) -> Iterator[str]:
    """A whole `jaxtrain` command: it is parsed, and its config is made."""
    if line[:3] == ["python", "-m", "jaxtrain.main"]:
        line = ["jaxtrain", "train", *line[3:]]
    if len(line) < 2 or line[0] != "jaxtrain" or "..." in line:
        return

    def understand() -> None:
        arguments = parse(line[1:])
        arguments = parse(arguments.rest) if arguments.rest else arguments
        if getattr(arguments, "config", None):  # FILE of `jaxtrain config --explain` may be left out
            resolve(arguments.config, arguments.overrides)

    yield from refused(understand)


def refused(action: Callable[[], object]) -> Iterator[str]:
    try:
        action()
    except ConfigError as error:
        yield str(error)


# --------------------------------------------------------------------------------------------------------- the tests


def report(document: str, wrong: Iterator[tuple[int, str]]) -> None:
    lines = [f"{document}:{line}: {why}" for line, why in wrong]
    assert not lines, "\n" + "\n".join(lines)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_stands_in_code_letters_exists(document):
    """Options, paths, names with dots, `jaxtrain` commands; a single name is at least a word of some source."""

    def wrong() -> Iterator[tuple[int, str]]:
        for line, text in spans(document):
            if text.startswith(("jaxtrain ", "python -m jaxtrain.main ")):
                yield from (
                    (line, why)
                    for why in check_command(text.replace("python -m jaxtrain.main", "jaxtrain train").split())
                )
            yield from ((line, why) for word in text.split() for why in check_word(word, document))
            if re.fullmatch(r"[A-Za-z_]\w*", text):
                yield from ((line, why) for why in check_single(text))

    report(document, wrong())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_name_that_is_said_to_be_in_a_file_is_there(document):
    """`name` (`file.py`), `name` in `file.py`, `name` of `file.py`."""

    def wrong() -> Iterator[tuple[int, str]]:
        text, _ = prose_and_blocks(document)
        for found in re.finditer(r"`(\w+)`(?:\s+(?:in|of)|\s+\()\s*`([\w/]+\.py)`", text):
            for path in find(found[2], document):
                names = modules()[".".join(path.relative_to(ROOT).with_suffix("").parts)]
                if found[1] not in {name.rpartition(".")[2] for name in names}:
                    yield line_of(text, found.start()), f"{found[2]} has no {found[1]}"

    report(document, wrong())


def named_tests(document: str) -> Iterator[tuple[int, str, str, str]]:
    """Line, file, function and id of each test that is named. `::test_x` is of the last file on its line."""
    for number, line in enumerate(read(document).split("\n"), 1):
        file = ""
        for found in re.finditer(r"(test_\w+\.py)?(::)?(?:\b(test_\w+)\b(?!\.py)(\[[^\]`]*\])?)?", line):
            file = found[1] or (file if found[2] else "")
            if found[3]:
                yield number, file, found[3], found[4] or ""


@pytest.mark.parametrize("document", [*DOCUMENTS, *SCRIPTS])
def test_tests_that_are_named_exist(document):
    def wrong() -> Iterator[tuple[int, str]]:
        for line, file, function, _ in named_tests(document):
            homes = [module for module, names in modules().items() if function in names and module.startswith("tests.")]
            if not any(f".{file}".endswith(f".{module.rpartition('.')[2]}.py") or not file for module in homes):
                yield line, f"there is no test {file}::{function}"

    report(document, wrong())


@pytest.mark.parity
def test_ids_of_tests_that_are_named_are_collected():
    tests = {
        (file, function + brackets) for d in DOCUMENTS for _, file, function, brackets in named_tests(d) if brackets
    }
    ids = [f"{find(file, '')[0]}::{test}" for file, test in sorted(tests)]
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "--collect-only", "-m", "", *ids]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not ids or done.returncode == 0, done.stdout + done.stderr


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, hyphens for spaces, a number behind one that comes again."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*)$", prose_and_blocks(str(document.relative_to(ROOT)))[0], re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-"))
    again = [f"{name}-{found[:i].count(name)}" for i, name in enumerate(found) if name in found[:i]]
    return {*found, *again}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    def wrong() -> Iterator[tuple[int, str]]:
        text, _ = prose_and_blocks(document)
        for found in re.finditer(r"(?:\]\(|(?:href|src|srcset)=\")([^)\s\"]+)", text):
            if re.match(r"https?:", found[1]):
                continue
            path, _, anchor = found[1].partition("#")
            target = (ROOT / document).parent.joinpath(path).resolve() if path else ROOT / document
            if not target.exists():
                yield line_of(text, found.start()), f"{found[1]} leads nowhere"
            elif anchor and anchor not in anchors(target):
                yield line_of(text, found.start()), f"{found[1]}: there is no such heading"

    report(document, wrong())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_blocks_are_understood(document, monkeypatch):
    """Their files and modules exist; a `jaxtrain` command is parsed and its config made."""
    monkeypatch.chdir(ROOT)
    report(document, ((line, why) for line, text in commands(document) for why in check_line(text, document)))


def test_each_row_of_the_migration_page_can_be_done():
    """Its commands are parsed as a whole, with their recipes; each row names a command, a field, a file, or says why not."""
    document = "docs/migrating.md"

    def wrong() -> Iterator[tuple[int, str]]:
        for line, text in spans(document):
            if text.startswith("jaxtrain "):
                yield from ((line, why) for why in check_arguments(shlex.split(text)))
        for number, row in enumerate(read(document).split("\n"), 1):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            if (
                row.startswith("| ")
                and cells[1] != "here"
                and not re.search(r"`|\]\(|by design|not needed|default", cells[1])
            ):
                yield number, f"{cells[0]}: nothing is named for it"

    report(document, wrong())


PROGRAMS = "python3? jaxtrain pip sbatch qsub docker kubectl sky aws gcloud git ruff tensorboard"
COMMAND = re.compile(rf"([A-Z_]+=\S* )*(({PROGRAMS.replace(' ', '|')}) (?!launch:)|launch/)")
NOT_RUN = "not run by a test"


def run_by_a_test(document: str) -> list[Piece]:
    """The commands in the blocks of a document that say nothing else, and its Python blocks.

    `NOT_RUN` stands in the line, in a comment at the top of the block, or in the text of the section.
    """
    lines, prose = read(document).split("\n"), prose_and_blocks(document)[0].split("\n")
    found = []
    for block in prose_and_blocks(document)[1]:
        heading = next((n for n in range(block.line - 1, 0, -1) if re.match(r"#+ ", prose[n - 1])), 1)
        end = next((n for n in range(block.line, len(prose) + 1) if re.match(r"#+ ", prose[n - 1])), len(prose) + 1)
        first = block.text.split("\n")[0]
        if f"section are {NOT_RUN}" in " ".join(prose[heading - 1 : end]) or (NOT_RUN in first and first[0] == "#"):
            continue
        if lines[block.line - 2].strip() == "```python":
            found.append(block)
            continue
        mine = (piece for piece in commands(document) if 0 <= piece.line - block.line < block.text.count("\n"))
        found += [piece for piece in mine if COMMAND.match(piece.text) and NOT_RUN not in piece.text]
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_run_by_a_test_or_says_that_it_is_not(document):
    """`test_the_commands_do_what_they_say` runs the others, so they must be of jaxtrain, and need no host but this one."""

    def wrong() -> Iterator[tuple[int, str]]:
        for line, text in run_by_a_test(document):
            if "\n" not in text and not re.match(
                r"python -m jaxtrain\.main |jaxtrain |launch/local\.sh |python docs/", text
            ):
                yield line, f"{text}: a command that no test runs must say so ({NOT_RUN!r})"

    report(document, wrong())


def shown_below(document: str, line: int) -> list[str]:
    """What a block shows as the output of the command on this line, which has a prompt; without what is left out."""
    first, *rest = read(document).split("\n")[line - 1 :]
    output = rest[: rest.index("```")] if first.startswith("$ ") else []
    return [text for text in output if text != "..."]


@pytest.mark.parity
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if run_by_a_test(document)])
def test_the_commands_do_what_they_say(document, tmp_path):
    """Each in turn, as a user would, in a directory that has what a checkout has."""
    for folder in ("configs", "docs", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "bin").mkdir()
    for name, words in (("jaxtrain", "-P -m jaxtrain"), ("python", "")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for line, text in run_by_a_test(document):
        command = text
        if "\n" in text:
            mine = "def small_cnn" in text or text.startswith("# my_project.py")
            name = "my_project.py" if mine else "from_python.py"
            (tmp_path / name).write_text(text)
            command = f"python {name}"
        needs_data = re.search(r"cifar\d+", command) and re.search(r"--smoke| data (prepare|verify) ", command)
        if needs_data and "JAXTRAIN_DATA_DIR" not in os.environ:
            continue
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{document}:{line}: {command}\n{done.stdout}{done.stderr}"
        if importlib.metadata.version("jax").startswith("0.10."):  # another one counts operations otherwise
            assert set(shown_below(document, line)) <= set(done.stdout.splitlines()), (
                f"{document}:{line}\n{done.stdout}"
            )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_python_blocks_import_exists(document):
    def wrong() -> Iterator[tuple[int, str]]:
        lines = read(document).split("\n")
        blocks = [block for block in prose_and_blocks(document)[1] if lines[block.line - 2].strip() == "```python"]
        for line, text in blocks:
            for node in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)):
                module = node.module or ""
                for name in (alias.name for alias in node.names) if module.startswith("jaxtrain") else ():
                    if name not in modules().get(module, ()) and f"{module}.{name}" not in modules():
                        yield line + node.lineno - 1, f"{module} has no {name}"

    report(document, wrong())


@pytest.mark.parametrize("script", SCRIPTS)
def test_files_and_commands_of_the_ci_exist(script):
    def wrong() -> Iterator[tuple[int, str]]:
        for number, line in enumerate(read(script).split("\n"), 1):
            line_words = [word.strip("\"'`();") for word in line.split() if "$" not in word and "@" not in word]
            for word in line_words:
                yield from ((number, why) for why in check_word(word, script) if "/" in word or PATH.fullmatch(word))
            if line_words[:1] == ["jaxtrain"]:
                yield from ((number, why) for why in check_command(line_words))

    report(script, wrong())


@pytest.mark.parity
def test_the_pictures_are_those_that_the_script_draws():
    """Where this fails, `python docs/pictures.py` draws them anew; look at them before they are committed."""
    for name, picture in runpy.run_path(str(ROOT / "docs/pictures.py"))["pictures"]().items():
        assert picture == read(f"docs/{name}"), name


def test_every_exception_is_needed():
    """One that no document needs any more would hide a mistake."""
    texts = "\n".join(map(read, [*DOCUMENTS, *SCRIPTS]))
    exceptions = {*MADE, *OTHERS_OPTIONS, *OTHERS_WORDS, *(f"{module}." for module in OTHERS_MODULES)}
    assert not {word for word in exceptions if word not in texts}
    assert not {path for path in MADE if not path.startswith("..") and (ROOT / path).is_file()}
    assert not (OTHERS_WORDS & words()) | (OTHERS_OPTIONS & every_option())
