"""A client of the soak: works until it is told to stop, or does each kind of work once."""

import faulthandler
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for part in ("", "scheduler", "worker"):
    sys.path.insert(0, str(ROOT / part))

from tests import soak_kit as kit  # noqa: E402

if __name__ == "__main__":
    # What it waits for is in its log, should it not come to an end.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    folder, name, seed, mode = sys.argv[1:]
    kit.Client(folder, name, int(seed)).run(list(kit.UNITS) if mode == "once" else None)
