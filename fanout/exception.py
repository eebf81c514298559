"""Modal's name of `fanout.exceptions`: both are one module."""

from __future__ import annotations

import sys

from fanout import exceptions
from fanout.exceptions import *  # noqa: F403  for type checkers, which do not see the next line

sys.modules[__name__] = exceptions
