from __future__ import annotations

from importlib.util import find_spec

import pytest

from spfde.app.train import checks
from spfde.app.train.checks import check_named
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument


@pytest.mark.parametrize("missing", ["accelerate", "tensorboard"])
def test_a_tracker_names_the_package_that_it_lacks(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == missing else find_spec("json"))
    with pytest.raises(InvalidArgument, match=rf"track='tensorboard': needs {missing}.*pip install {missing}`"):
        check_named(TrainOptions(track=("tensorboard",)).model_dump())
    check_named(TrainOptions().model_dump())
