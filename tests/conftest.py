"""Fixtures for tests of the session."""

from __future__ import annotations

import pytest

import spfde
from support import Parts, make_parts


@pytest.fixture
def parts() -> Parts:
    return make_parts()


@pytest.fixture
def whole_recipe() -> spfde.Recipe:
    """All three savings with a beat of two epochs."""
    return spfde.Recipe(
        sparsity=spfde.MEST(sparsity=0.8),
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
        sieving=spfde.DataSieving(removed_fraction=0.25),
        learning_rate=spfde.BlockwiseCosine(),
        update_interval_epochs=2,
    )
