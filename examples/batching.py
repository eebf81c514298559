"""Callers give single inputs, the function gets batches: similar function names, found in bulk.

A batch shares what is expensive for one input: here the table of trigrams of all names of the
standard library, in practice a pass through a GPU.

    fanout run examples/batching.py
"""

import asyncio
import keyword
import sys
from collections import Counter

import fanout as modal

app = modal.App("batching")

NAMES = sorted(sys.stdlib_module_names | set(keyword.kwlist) | set(dir(__builtins__)))


def trigrams(name: str) -> set[str]:
    padded = f"  {name.lower()} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


@app.function()
@modal.batched(max_batch_size=64, wait_ms=50)
def closest(names: list[str]) -> list[tuple[str, int]]:
    """For each name the most similar known one, and how large the batch was."""
    table = [(known, trigrams(known)) for known in NAMES]
    answers = []
    for name in names:
        wanted = trigrams(name)
        best = max(table, key=lambda row: len(wanted & row[1]) / len(wanted | row[1]))
        answers.append((best[0], len(names)))
    return answers


async def ask_all(names: list[str]) -> list[tuple[str, int]]:
    """A hundred callers at once, none of which knows of the others."""
    return list(await asyncio.gather(*(closest.remote.aio(name) for name in names)))


@app.local_entrypoint()
async def main() -> None:
    wrong = ["asincio", "collection", "dattetime", "json5", "pathlibb", "statistic"]
    answers = [answer async for answer in closest.map.aio(wrong)]
    for name, (known, _) in zip(wrong, answers, strict=True):
        print(f"{name} -> {known}")
    found = await ask_all([name[:-1] or name for name in NAMES[:100]])
    sizes = Counter(size for _, size in found)
    print(f"100 calls of one input each ran in batches of up to {max(sizes)}")
