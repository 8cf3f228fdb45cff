"""The prefix cache of the native engine: where the model is cut, and what is kept in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spfde
from helpers.caching import attach, go_on, train_and_save, train_cached
from helpers.native import needs_kernels
from helpers.training import SmallNet, make_parts
from spfde.engines.native.graph import capture, region_name

pytestmark = needs_kernels


def test_the_halves_put_together_are_the_model() -> None:
    model = SmallNet().eval()
    frozen = {name for name, _ in model.named_parameters() if name.startswith(("stem", "bn", "blocks.0"))}
    halves = capture(model, torch.zeros(1, 2, 8, 8), frozen=frozen).halves
    assert halves is not None
    front, given, back = halves
    assert not given(torch.zeros(1, 2, 8, 8))  # the back reads nothing but what the front hands over
    # The regions are filled in by the engine; in PyTorch the same cut is checked on the blocks themselves.
    assert [node.target for node in front.graph.nodes if node.op == "call_module"] == [region_name(0)]
    assert [node.target for node in back.graph.nodes if node.op == "call_module"] == [region_name(1), "fc"]


@pytest.mark.parametrize("frozen", [(), ("fc.weight", "fc.bias")])
def test_without_a_frozen_front_there_are_no_halves(frozen: tuple[str, ...]) -> None:
    assert capture(SmallNet(), torch.zeros(1, 2, 8, 8), frozen=frozen).halves is None


def test_what_draws_or_counts_in_front_of_a_frozen_layer_is_not_in_the_front() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(self.a(x), 0.5, training=self.training))

    frozen = ("a.weight", "a.bias", "b.weight", "b.bias")
    model = Net()
    halves = capture(model, torch.zeros(1, 2, 8, 8), frozen=frozen).halves
    assert halves is not None
    assert [node.target for node in halves.back.graph.nodes if node.op == "call_function"] == [F.dropout]
    # A norm without parameters that is in training mode measures each batch.
    counting = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3))
    halves = capture(counting, torch.zeros(1, 2, 8, 8), frozen=("0.weight", "0.bias", "2.weight", "2.bias")).halves
    assert halves is not None
    assert len([node for node in halves.back.graph.nodes if node.op == "call_module"]) == 1


# --- in a folder ----------------------------------------------------------------------------------------------------


def test_a_run_that_is_resumed_with_another_folder_is_the_same_run(tmp_path: Path) -> None:
    parts = make_parts()
    saved = train_and_save(parts, attach(parts), stop=5)
    again = go_on(saved, spfde.PrefixCache(1, folder=tmp_path, limit_gib=1.0))
    for name, value in parts.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(spfde.InvalidArgument) as refused:
        attach(make_parts(), cache=spfde.PrefixCache(1, folder=tmp_path / "none"))
    assert [problem.argument for problem in refused.value.problems] == ["cache.folder"]


def test_detach_frees_the_file(tmp_path: Path) -> None:
    parts = make_parts()
    session = attach(parts, cache=spfde.PrefixCache(1, folder=tmp_path))
    train_cached(parts, session)
    assert list(tmp_path.iterdir())
    session.detach()
    assert not list(tmp_path.iterdir())
