"""Inputs that fail are run again, after a delay that grows; those that never work are told apart.

Each "download" fails a number of times before it works, as real ones do. The attempts are counted
in files, since containers share nothing else.

    fanout run examples/retries.py
"""

import tempfile
from pathlib import Path

import fanout as modal

app = modal.App("retries")

POLICY = modal.Retries(max_retries=3, initial_delay=0.05, backoff_coefficient=2.0)


class Unavailable(Exception):
    """The server is busy."""


@app.function(retries=POLICY, timeout=30)
def download(page: int, folder: str) -> str:
    """Page n needs n attempts."""
    tally = Path(folder, str(page))
    with tally.open("a") as file:
        file.write("x")
    attempt = tally.stat().st_size
    if attempt < page:
        raise Unavailable(f"page {page}: attempt {attempt} failed")
    return f"page {page} after {attempt} attempts"


@app.local_entrypoint()
def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pages = range(1, 7)
        results = download.map(pages, kwargs={"folder": folder}, return_exceptions=True)
        for page, result in zip(pages, results, strict=True):
            if isinstance(result, Unavailable):
                print(f"page {page} given up: {result}")
            else:
                print(result)
        attempts = sum(Path(folder, str(page)).stat().st_size for page in pages)
    print(f"{attempts} attempts in all")
