"""Short storms of the simulation, as tests that mutants of the core must fail; see `mutation.py`.

Nothing else collects this file: whoever wants storms runs `make sim`.
"""

from __future__ import annotations

import pytest

from tests import simulation

#: Few and fixed: a mutant that lives through all tests is paid for with all of them.
SEEDS = (1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_ends_with_everything_exactly_once(seed: int) -> None:
    _, _, failure = simulation.run_seed(seed)
    assert not failure, failure[-2000:]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the core first: one is quicker than a storm, and the first failure ends it."""
    items.sort(key=lambda item: ("mutation_seeds" in item.nodeid, item.nodeid))
