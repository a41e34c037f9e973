"""Prints the table of docs/architecture.md, "The house": files and lines of code of each folder of jaxtrain/.

python docs/structure.py

Lines of code: without docstrings, comments and blank lines.
"""

from __future__ import annotations

import ast
import collections
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "jaxtrain"
EMPTY = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(source: str) -> int:
    """How many lines have code; a string that stands alone is a docstring."""
    strings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in EMPTY:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - strings)


def main() -> None:
    """Prints a row a folder, and their sum."""
    files: collections.Counter[str] = collections.Counter()
    lines: collections.Counter[str] = collections.Counter()
    for path in PACKAGE.rglob("*.py"):
        folder = str(path.relative_to(PACKAGE).parent)
        files[folder] += 1
        lines[folder] += lines_of_code(path.read_text())
    for folder in sorted(files):
        print(f"{folder:16} {files[folder]:4} files {lines[folder]:6,} lines")
    print(f"{'all':16} {files.total():4} files {lines.total():6,} lines")


if __name__ == "__main__":
    main()
