"""One thread for every process of the tests, and what tests of the session start with."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Several processes run tests at once and would fight over the cores. Read by torch, once, and by what tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Set by a developer's shell or a CI, they make the command line colour what the tests read.
for _name in ("PY_COLORS", "FORCE_COLOR", "GITHUB_ACTIONS", "CLICOLOR_FORCE"):
    os.environ.pop(_name, None)

import pytest
import torch
from hypothesis import settings

import spfde
from helpers.training import Parts, make_parts

# For tests that say no number of examples of their own; the long form has as many as Hypothesis wants.
settings.register_profile("short", max_examples=20)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not long":
        settings.load_profile("short")


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: to look through them is most of what a collection of garbage takes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def what_is_left_stays() -> Iterator[None]:
    """As when the tests have been collected: PyTorch and others import more while the tests run."""
    yield
    gc.collect()
    gc.freeze()


torch.set_num_threads(1)
# No test cuts the power: to wait for the disk, hundreds of times in a comparison of runs, shows nothing.
os.fsync = lambda descriptor: None
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run on the CPU


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
