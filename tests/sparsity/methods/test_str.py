"""STR: thresholds are learnt, by the gradient that autograd would find, and the total at the end is exact."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.masking import MaskedRun, places
from spfde.sparsity import STR
from spfde.sparsity.methods.str import soft_threshold, threshold, threshold_slope


def _soft(weight: Tensor, s: Tensor) -> Tensor:
    """The reparameterisation as the paper writes it."""
    return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(s))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double()


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.arange(16) % 3


SPARSE = ("0.weight", "2.weight")


def _masked(model: nn.Module, optimizer: torch.optim.Optimizer, method: STR) -> MaskedRun:
    layers = {name: model.get_parameter(name) for name in SPARSE}
    run = MaskedRun(layers, optimizer, method, epochs=10)
    run.begin_epoch(0)
    return run


def _s(run: MaskedRun, name: str) -> float:
    return float(run.strategy_state["latents"][name]["s"])


def test_the_threshold_is_subtracted_by_hand() -> None:
    expected = 1 / (1 + math.e)  # 0.2689
    assert threshold(-1.0) == pytest.approx(expected)
    sparse = soft_threshold(torch.tensor([0.5, -0.3, 0.2, 0.0]), -1.0)
    assert sparse.tolist() == pytest.approx([0.5 - expected, expected - 0.3, 0.0, 0.0])


def test_the_derivative_of_the_threshold_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    gradient = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    def loss(s: float) -> float:
        return float((gradient * soft_threshold(weight, s)).sum())

    mask = soft_threshold(weight, -1.5) != 0
    slope = threshold_slope(weight, gradient.masked_fill(~mask, 0.0), -1.5, mask)
    assert slope != 0
    assert slope == pytest.approx((loss(-1.5 + 1e-5) - loss(-1.5 - 1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_steps_equal_those_of_a_module_that_leaves_the_threshold_to_autograd(
    momentum: float, weight_decay: float
) -> None:
    x, y = _data()
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=momentum, weight_decay=weight_decay)
    run = _masked(model, optimizer, STR(sparsity=0.99, threshold_start=-3.0, threshold_decay=0.1))

    twin = _net()
    thresholds = {name: torch.tensor(-3.0, dtype=torch.float64, requires_grad=True) for name in SPARSE}
    groups = [
        {"params": list(twin.parameters()), "momentum": momentum, "weight_decay": weight_decay},
        {"params": list(thresholds.values()), "weight_decay": 0.1},
    ]
    explicit = torch.optim.SGD(groups, lr=0.2)

    def parts() -> dict[str, Tensor]:
        return {n: _soft(p, thresholds[n]) if n in thresholds else p for n, p in twin.named_parameters()}

    crossed = {name: set() for name in SPARSE}
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        explicit.zero_grad()
        F.cross_entropy(functional_call(twin, parts(), (x,)), y).backward()
        explicit.step()
        for name, expected in parts().items():
            torch.testing.assert_close(model.get_parameter(name).detach(), expected.detach(), rtol=1e-9, atol=1e-12)
        for name in SPARSE:
            assert _s(run, name) == pytest.approx(thresholds[name].item(), rel=1e-9)
            assert run.counts[name] == int(parts()[name].count_nonzero())
            crossed[name].add(tuple(places(run.masker.masks[name])))
    assert all(len(masks) > 5 for masks in crossed.values())


def test_the_masks_settle_at_the_exact_total_as_soon_as_it_is_reached() -> None:
    x, y = _data()
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    run = _masked(model, optimizer, STR(sparsity=0.6, threshold_start=-3.0, threshold_decay=0.3))
    total = round(0.4 * 72) + round(0.4 * 120)
    counts = []
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        counts.append(sum(run.counts[name] for name in SPARSE))
        assert all((model.get_parameter(n).detach()[~mask] == 0).all() for n, mask in run.masker.masks.items())
    assert counts[0] > total
    assert counts[-1] == total == min(counts)
    assert not any(run.strategy_state["latents"].values())
    assert run.targets == run.counts
    # What each layer holds was learnt, and is not the target that it started from.
    assert run.counts["0.weight"] != round(0.4 * 72)


def test_masks_that_have_settled_stay_through_the_update_epochs_that_follow() -> None:
    x, y = _data()
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    run = _masked(model, optimizer, STR(sparsity=0.6, threshold_start=-3.0, threshold_decay=0.3))
    settled: dict[str, Tensor] = {}
    for epoch in range(10):
        run.begin_epoch(epoch)
        for name, mask in settled.items():
            assert torch.equal(run.masker.masks[name], mask), f"{name} in epoch {epoch}"
        for _ in range(200 if epoch == 1 else 1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if not any(run.strategy_state["latents"].values()):
            settled = settled or run.masker.masks
        assert bool(settled) == (epoch >= 1)


def test_at_the_stop_fraction_the_largest_margins_stay() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = _masked(model, optimizer, STR(sparsity=0.75, stop_fraction=0.5))
    weights = torch.cat([model.get_parameter(name).detach().flatten().abs() for name in SPARSE])
    for epoch in range(1, 6):
        assert sum(run.counts[name] for name in SPARSE) == 192
        run.begin_epoch(epoch)
    kept = torch.cat([run.masker.masks[name].flatten() for name in SPARSE])
    assert places(kept) == sorted(weights.topk(18 + 30).indices.tolist())


def test_the_bill_charges_each_step_at_the_density_that_it_ran_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loader = DataLoader(TensorDataset(torch.randn(40, 6), torch.randint(3, (40,))), batch_size=8)
    recipe = spfde.Recipe(sparsity=STR(sparsity=0.6, threshold_start=-3.0, threshold_decay=0.2))
    session = spfde.attach(model, optimizer, loader, recipe, epochs=6, engine="masked")
    expected, fell = [], 0
    for _ in session.epochs():
        steps = []
        for x, y in session.loader:
            # The first layer and the head are dense.
            steps.append(3 * 8 * 2 * (72 + 30 + int(session.masks["2.weight"].sum())))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected.append(sum(steps))
        fell += steps[-1] < steps[0]
    assert fell >= 2
    assert int(session.masks["2.weight"].sum()) == 48
    assert [row.training_flops for row in session.cost.rows] == expected
