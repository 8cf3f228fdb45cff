"""States are refused where an entry is missing, foreign or of another kind."""

from __future__ import annotations

import pytest
import torch

from spfde.core.state import check_all, check_entries
from spfde.errors import StateMismatch

KINDS = {"count": int, "share": (int, float), "mask": torch.Tensor}
STATE = {"count": 3, "share": 0.5, "mask": torch.ones(2)}


def test_a_state_with_just_its_entries_passes() -> None:
    check_entries(STATE, "the test", KINDS)
    check_entries({**STATE, "share": 1}, "the test", KINDS)
    check_all({"a": 1, "b": 2}, "counts", int)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", ["text", None, [], True])
def test_an_entry_of_another_kind_is_named(name: str, value: object) -> None:
    with pytest.raises(StateMismatch, match=name):
        check_entries({**STATE, name: value}, "the test", KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_entry_is_named(name: str) -> None:
    with pytest.raises(StateMismatch, match=name):
        check_entries({key: value for key, value in STATE.items() if key != name}, "the test", KINDS)


@pytest.mark.parametrize("state", [None, 3, [1], {**STATE, "more": 1}])
def test_what_is_no_such_mapping_is_refused(state: object) -> None:
    with pytest.raises(StateMismatch):
        check_entries(state, "the test", KINDS)


@pytest.mark.parametrize("values", [None, {1: 1}, {"a": "b"}, {"a": True}])
def test_mappings_of_another_kind_are_refused(values: object) -> None:
    with pytest.raises(StateMismatch):
        check_all(values, "counts", int)
