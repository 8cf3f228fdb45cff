"""A damaged state is refused, wherever it is damaged, before anything has changed."""

from __future__ import annotations

import pytest

import spfde
from helpers.damaging import damaged
from helpers.native import NATIVE
from helpers.resuming import METHODS, Loop, assert_equal, recipe_with
from helpers.training import step

STOP = 5
# Tables whose entries come with use, so that none is known to be missing; their values have their types all the same.
TABLES = ("['parts']['bill']['uncounted'][",)

SIEVING = {
    "by loss, balanced, rescaled": spfde.DataSieving(
        removed_fraction=0.25, criterion="loss", balanced=True, rescale_loss=True
    ),
    "by el2n": spfde.DataSieving(removed_fraction=0.25, criterion="el2n"),
    "the highest losses": spfde.DataSieving(removed_fraction=0.25, criterion="top-loss"),
    "all in the end": spfde.DataSieving(removed_fraction=0.25, full_last=0.6),
    "at random": spfde.DataSieving(removed_fraction=0.25, criterion="random"),
    "once": spfde.OneTimeRemoval(removed_fraction=0.25, at_fraction=0.25),
}
FREEZING = {
    "by structure": spfde.ProgressiveFreezing(flops_reduction=0.1, criterion="structure", threshold=0.5),
    "by representation": spfde.ProgressiveFreezing(
        flops_reduction=0.1, criterion="representation", threshold=0.5, probe_samples=8
    ),
}
# Together they have every part, every strategy and every kind of evidence.
LOOPS = {
    **{name: Loop(recipe_with(name)) for name in METHODS},
    **{name: Loop(recipe_with("set").replace(sieving=sieving)) for name, sieving in SIEVING.items()},
    **{name: Loop(recipe_with("set").replace(freezing=freezing)) for name, freezing in FREEZING.items()},
    "nothing": Loop(spfde.Recipe()),
    "native": Loop(recipe_with("rigl"), engine="native"),
}


def state_amid(loop: Loop) -> tuple[spfde.Session, dict[str, object]]:
    """A session after some epochs, when all that it can remember is there."""
    parts, session = loop.start()
    for epoch in session.epochs():
        parts.model.train()
        if epoch == STOP:
            break
        for x, y in session.loader:
            session.loss_weights()
            step(parts, session, x, y)
    return session, session.state_dict()


@pytest.mark.parametrize("name", [pytest.param(name, marks=NATIVE.marks if name == "native" else ()) for name in LOOPS])
def test_a_state_that_lacks_a_key_or_has_a_value_of_another_type_is_refused(name: str) -> None:
    session, state = state_amid(LOOPS[name])
    wrong: list[str] = []
    assert state["parts"].keys() >= {"engine", "sampling", "masks", "freezing", "bill"}
    for what, other in damaged(state):
        if what.endswith("deleted") and what.startswith(TABLES):
            continue
        try:
            session.load_state_dict(other)
        except spfde.StateMismatch:
            continue
        except Exception as error:
            wrong.append(f"{what}: {error!r}")
        else:
            wrong.append(f"{what}: was loaded")
            session.load_state_dict(state)
    assert wrong == []
    session.load_state_dict(state)
    assert_equal(session.state_dict(), state)
