"""Hold every source file to 300 lines of code: blank lines, comments and docstrings do not count."""

from __future__ import annotations

import ast
import sys
import tokenize
from pathlib import Path

BUDGET = 300
ROOMS = ("runtime", "harness", "suites", "fixtures", "reports", "ci")
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
SILENT = {tokenize.COMMENT, *LAYOUT}


def docstring_lines(tree: ast.AST) -> set[int]:
    """Line numbers taken by docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def code_lines(path: Path) -> int:
    """Number of lines that hold code."""
    lines: set[int] = set()
    with tokenize.open(path) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type not in SILENT:
                lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(path.read_text(encoding="utf-8"))))


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    over, total = [], 0
    for room in ROOMS:
        files = sorted((root / room).rglob("*.py"))
        counts = {file.relative_to(root): code_lines(file) for file in files}
        total += sum(counts.values())
        print(f"{room:10} {len(counts):4} files {sum(counts.values()):6} lines")
        over += [
            f"{file}: {n} lines of code, at most {BUDGET}; split it"
            for file, n in counts.items()
            if n > BUDGET
        ]
    print(f"{'total':10} {'':10} {total:6} lines")
    print("\n".join(over), file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
