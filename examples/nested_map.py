"""A map within a map: for each package of the standard library, each of its files.

The outer function waits for the inner map, and gives its core away meanwhile; so this works on a
machine with one core, too.

    fanout run examples/nested_map.py
"""

import importlib.util
import pathlib

import fanout as modal

app = modal.App("nested-map")

PACKAGES = ["asyncio", "collections", "concurrent", "email", "html", "http", "json", "logging"]


@app.function()
def lines_of(path: str) -> int:
    """Lines of code in one file: not blank, no comment."""
    text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    lines = (line.strip() for line in text.splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


@app.function()
def measure(package: str) -> tuple[str, int, int]:
    """Name, files and lines of a package; the files are counted in parallel."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    folders = spec.submodule_search_locations or []
    paths = sorted(str(path) for folder in folders for path in pathlib.Path(folder).rglob("*.py"))
    return package, len(paths), sum(lines_of.map(paths, order_outputs=False))


@app.local_entrypoint()
def main() -> None:
    total = 0
    for package, files, lines in measure.map(PACKAGES, order_outputs=False):
        print(f"{package:<12} {files:>4} files {lines:>7} lines")
        total += lines
    print(f"{len(PACKAGES)} packages, {total} lines in all")
