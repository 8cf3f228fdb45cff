"""Fixtures for tests of the session."""

from __future__ import annotations

import os

import pytest
import torch.utils.data

import spfde
from helpers.training import Parts, make_parts

# Set by a developer's shell or a CI, they make the command line colour what the tests read.
for _name in ("PY_COLORS", "FORCE_COLOR", "GITHUB_ACTIONS", "CLICOLOR_FORCE"):
    os.environ.pop(_name, None)


# A loader that the collector finds together with its session says goodbye to its workers through queues that are torn
# down already. PyTorch then waits this long for each of them (5 s otherwise) before it ends them.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2


@pytest.fixture
def parts() -> Parts:
    return make_parts()


@pytest.fixture
def whole_recipe() -> spfde.Recipe:
    """All three savings with an update epoch of two epochs."""
    return spfde.Recipe(
        sparsity=spfde.MEST(sparsity=0.8),
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.15),
        sieving=spfde.DataSieving(removed_fraction=0.25),
        learning_rate=spfde.BlockwiseCosine(),
        update_interval_epochs=2,
    )
