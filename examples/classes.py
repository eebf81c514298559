"""A class whose model is loaded once for each container: which module is a sentence about?

The "model" is an index of word weights over the documentation of the standard library. Building it
takes a while, so it is done in `@enter`, and every call after that is quick.

    fanout run examples/classes.py --text "read rows of a spreadsheet"
"""

import importlib
import inspect
import math
import os
import re
from collections import Counter

import fanout as modal

app = modal.App("classes")

MODULES = {
    "data": ["csv", "json", "sqlite3", "pickle", "configparser", "zipfile", "tarfile", "gzip"],
    "net": ["socket", "ssl", "http.client", "smtplib", "ftplib", "urllib.request", "email"],
    "time": ["datetime", "calendar", "sched", "zoneinfo", "time"],
    "text": ["re", "difflib", "textwrap", "string", "unicodedata", "gettext", "html"],
}


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 2]


def documentation_of(name: str) -> str:
    module = importlib.import_module(name)
    parts = [name, inspect.getdoc(module) or ""]
    parts += [f"{key} {inspect.getdoc(value) or ''}" for key, value in vars(module).items()]
    return " ".join(parts)


@app.cls(max_containers=2)
class Librarian:
    field: str = modal.parameter(default="data")

    @modal.enter()
    def build_index(self) -> None:
        counts = {name: Counter(words_of(documentation_of(name))) for name in MODULES[self.field]}
        spread = Counter(word for count in counts.values() for word in count)
        total = len(counts)
        self.weights = {
            name: {w: (1 + math.log(n)) * math.log(total / spread[w]) for w, n in count.items()}
            for name, count in counts.items()
        }
        self.pid = os.getpid()

    @modal.method()
    def find(self, sentence: str) -> tuple[str, int]:
        """The module that the sentence is most likely about, and the process that said so."""
        words = words_of(sentence)
        scores = {
            name: sum(weights.get(word, 0.0) for word in words)
            for name, weights in self.weights.items()
        }
        return max(scores, key=lambda name: scores[name]), self.pid

    @modal.method()
    def vocabulary(self) -> list[int]:
        return [len(weights) for weights in self.weights.values()]

    @modal.exit()
    def say_goodbye(self) -> None:
        print(f"the librarian of {self.field!r} leaves")


@app.local_entrypoint()
def main(text: str = "") -> None:
    questions = [
        "read rows of a spreadsheet file with a dialect",
        "execute a query of a database connection",
    ]
    data = Librarian()
    pids = set()
    for question, (module, pid) in zip(questions * 50, data.find.map(questions * 50), strict=True):
        pids.add(pid)
        answer = f"{question!r}: {module}"
    print(answer)
    print(f"100 questions, answered by at most 2 containers: {len(pids) <= 2}")
    time = Librarian(field="time")
    print(f"about time: {time.find.remote('a calendar with the name of each weekday')[0]}")
    print(f"words known: {sum(time.vocabulary.remote())}")
    if text:
        for field in MODULES:
            print(f"{field}: {Librarian(field=field).find.remote(text)[0]}")
