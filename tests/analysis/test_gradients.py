"""Gradient norms: of the mean loss over all samples, over active weights alone, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spfde.analysis import gradient_norms
from spfde.analysis.gradients import successive_differences
from spfde.core.errors import InvalidArgument

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()


def test_a_norm_worked_out_by_hand() -> None:
    # The gradient of the mean of w·x is the mean of x, (12, 16) / 3, however the samples are cut into batches.
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [9.0, 16.0]])
    batches = [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(1))]
    found = gradient_norms(model, batches, lambda out, y: out.mean(), parameters=["weight"])
    assert found["weight"] == pytest.approx(20 / 3)


def test_batches_do_not_matter_and_masks_cut_the_rest_off() -> None:
    model = net()
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[:, 0] = True
    F.cross_entropy(model(X), Y).backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    expected = {"0.weight": float(gradient[:, 0].norm()), "2.weight": float(model[2].weight.grad.norm())}  # type: ignore[union-attr, operator]
    for size in (10, 4):
        batches = zip(X.split(size), Y.split(size), strict=True)
        found = gradient_norms(model, batches, F.cross_entropy, parameters=list(expected), masks={"0.weight": mask})
        assert found == pytest.approx(expected, rel=1e-5)


def test_no_gradient_mode_or_flag_is_changed() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradient_norms(model, [(X, Y)], F.cross_entropy, parameters=["0.weight"])
    assert found["0.weight"] > 0.0, "a frozen layer has a gradient too"
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_parameter_that_the_loss_does_not_read_has_none() -> None:
    model = net()
    model.register_parameter("idle", nn.Parameter(torch.ones(2)))
    assert gradient_norms(model, [(X, Y)], F.cross_entropy, parameters=["idle"]) == {"idle": 0.0}


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"parameters='3\.weight': is no parameter of the model"):
        gradient_norms(net(), [(X, Y)], F.cross_entropy, parameters=["3.weight"])
    with pytest.raises(InvalidArgument, match="batches=0: must hold at least one sample"):
        gradient_norms(net(), [], F.cross_entropy, parameters=["0.weight"])


def test_differences_are_between_neighbours() -> None:
    assert successive_differences([4.0, 1.0, 1.5]) == [3.0, 0.5]
    assert successive_differences([4.0]) == []
