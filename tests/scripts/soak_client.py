"""A client of the soak: does each kind of work once, or works until it is told to stop."""

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
    folder, name, seed, mode, *kinds = sys.argv[1:]
    kit.Client(folder, name, int(seed)).run(kinds, is_endless=mode == "endless")
