"""Which functions of Python's own standard library are the most complex?

    fanout run examples/stdlib_report.py
    fanout run examples/stdlib_report.py --limit 200
    python examples/stdlib_report.py --limit 200

Every source file of the standard library is one input: its name and its content. Containers parse
it and count; the reports stream back in whatever order they are done. Some files cannot be parsed,
six of them because they were made so (`examples/data`): with `return_exceptions=True` each error
arrives as one more result, and everything else goes on. What the parser refuses is counted apart
from what went wrong in any other way, a timeout for example.
"""

import argparse
import ast
import heapq
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fanout

app = fanout.App("stdlib-report")

TOP = 20
BROKEN = Path(__file__).parent / "data"

#: What the parser raises for a file that is no Python: ValueError is for null bytes.
PARSER_ERRORS = (SyntaxError, ValueError)

#: Each of these opens one more path through a function.
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert)


# --- what runs in the containers --------------------------------------------------------------


@dataclass(frozen=True)
class FunctionReport:
    file: str
    line: int
    name: str
    length: int
    complexity: int


@dataclass(frozen=True)
class FileReport:
    lines: int
    function_count: int
    longest: FunctionReport | None
    most_complex: list[FunctionReport]


@app.function(timeout=60)
def analyse(name: str, content: bytes) -> FileReport:
    """Parse one source file and measure its functions."""
    try:
        tree = ast.parse(content, filename=name)
    except Exception as error:
        error.add_note(f"in {name}")  # not every error of the parser names the file
        raise
    functions = [
        FunctionReport(name, node.lineno, node.name, length_of(node), complexity_of(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return FileReport(
        lines=content.count(b"\n"),
        function_count=len(functions),
        longest=max(functions, key=lambda f: f.length, default=None),
        most_complex=heapq.nlargest(TOP, functions, key=lambda f: f.complexity),
    )


def length_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def complexity_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """McCabe's number: one, and one more a branch. Nested functions count for themselves."""
    complexity = 1
    nodes: list[ast.AST] = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, BRANCHES):
            complexity += 1
        elif isinstance(node, ast.BoolOp):
            complexity += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            complexity += 1 + len(node.ifs)
        elif isinstance(node, ast.match_case):
            complexity += 1
        nodes.extend(ast.iter_child_nodes(node))
    return complexity


# --- what runs here -----------------------------------------------------------------------------


def source_files(limit: int | None) -> list[Path]:
    """The broken files first, then the library's (the first `limit` of them)."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    return sorted(BROKEN.glob("*.py")) + files[:limit]


def read(paths: list[Path]) -> Iterator[tuple[str, bytes]]:
    """One input a file. It is a generator: a file is read when there is room to send it."""
    for path in paths:
        yield str(path), path.read_bytes()


class Report:
    """Everything that is kept of the results: totals, the worst functions and the errors."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.worst: list[FunctionReport] = []
        self.longest: FunctionReport | None = None
        self.errors: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, result: FileReport | Exception) -> None:
        self.counts["files"] += 1
        if isinstance(result, Exception):
            self.counts["unparsed" if isinstance(result, PARSER_ERRORS) else "failed"] += 1
            self.errors[type(result).__name__].append(described(result))
            return
        self.counts["lines"] += result.lines
        self.counts["functions"] += result.function_count
        self.worst = heapq.nlargest(
            TOP, self.worst + result.most_complex, key=lambda f: (f.complexity, f.length)
        )
        candidates = [f for f in (self.longest, result.longest) if f is not None]
        self.longest = max(candidates, key=lambda f: f.length, default=None)

    def show(self, seconds: float) -> None:
        print(f"\n{TOP} most complex functions\n\ncomplexity  lines  function")
        for f in self.worst:
            print(f"{f.complexity:10} {f.length:6}  {f.name}  {short(f.file)}:{f.line}")
        if self.longest is not None:
            f = self.longest
            print(f"\nlongest function: {f.name}, {f.length} lines, {short(f.file)}:{f.line}")
        self.show_errors()
        files, unparsed, failed = (self.counts[key] for key in ("files", "unparsed", "failed"))
        print(f"\n{files:,} files, of which {unparsed} could not be parsed")
        print(f"{failed} files failed in another way (timeouts and crashes, for example)")
        print(f"{self.counts['lines']:,} lines, {self.counts['functions']:,} functions")
        print(f"{seconds:.2f} s, {files / seconds:,.0f} files/s")

    def show_errors(self) -> None:
        for name, texts in sorted(self.errors.items()):
            print(f"\n{name}: {len(texts)}")
            for text in sorted(texts):
                print(f"  {text}")


def described(error: Exception) -> str:
    notes = getattr(error, "__notes__", [])
    place = next((note[3:] for note in notes if note.startswith("in ")), "")
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{short(place)}: {text}" if place else text


def short(file: str) -> str:
    """The path below the library's folder, or below `examples`."""
    path = Path(file)
    for folder in (Path(sysconfig.get_path("stdlib")), BROKEN.parent):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return file


@app.local_entrypoint()
def main(limit: int | None = None) -> None:
    paths = source_files(limit)
    print(f"analysing {len(paths):,} source files of Python {sys.version.split()[0]}")
    report = Report()
    start = time.perf_counter()
    for result in analyse.starmap(read(paths), order_outputs=False, return_exceptions=True):
        report.add(result)
    report.show(time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find the standard library's hardest functions.")
    parser.add_argument("--limit", type=int, help="only so many files of the library")
    arguments = parser.parse_args()
    with fanout.enable_output(), app.run():
        main(limit=arguments.limit)
