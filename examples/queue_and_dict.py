"""A crawl with a queue of what is to be visited and a dict of what was found.

The pages are the modules of the standard library, the links their imports. Several crawlers take
modules from one queue; `skip_if_exists` makes sure that each is visited by one of them only.

    fanout run examples/queue_and_dict.py --start http.server
"""

import ast
import importlib.util
import queue
import sys

import fanout as modal

app = modal.App("queue-and-dict")


def imports_of(name: str) -> set[str]:
    """The modules of the standard library that a module imports."""
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:
        return set()
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return set()
    with open(spec.origin, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name for name in found if name.partition(".")[0] in sys.stdlib_module_names}


@app.function(cpu=0.25)
def crawl(to_visit: modal.Queue, seen: modal.Dict, links: modal.Dict) -> int:
    """Visit modules until there is nothing to do for a second. Returns how many."""
    count = 0
    while True:
        try:
            names = to_visit.get_many(8, timeout=1.0)
        except queue.Empty:
            return count
        for name in names:
            found = imports_of(name)
            links[name] = sorted(found)
            new = [other for other in found if seen.put(other, True, skip_if_exists=True)]
            to_visit.put_many(new)
            count += 1


@app.local_entrypoint()
def main(start: str = "http.server", crawlers: int = 3) -> None:
    with (
        modal.Queue.ephemeral() as to_visit,
        modal.Dict.ephemeral() as seen,
        modal.Dict.ephemeral() as links,
    ):
        seen[start] = True
        to_visit.put(start)
        handles = [(to_visit, seen, links)] * crawlers
        visited = sum(crawl.starmap(handles))
        print(f"{visited} modules visited, each once: {visited == links.len() == seen.len()}")
        most = max(links.items(), key=lambda item: len(item[1]))
        print(f"the most imports has {most[0]}: {len(most[1])}")
