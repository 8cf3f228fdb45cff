"""SNFS: a smoothed dense gradient says which layers gain weights, and which ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.counting import Operations
from helpers.masking import HandRun
from spfde.sparsity import SNFS
from spfde.sparsity.redistribution import LayerView, add_smoothly, add_where_finite


def _view(n_units: int, active: int, momentum: float) -> LayerView:
    return LayerView(n_units, torch.ones(active), momentum)


def _smoothed(run: HandRun) -> set[str]:
    """Layers of which there is a smoothed gradient."""
    return {name for name, gradient in run.strategy_state["smoothed"].items() if gradient.numel()}


def test_the_gradient_is_smoothed_by_hand() -> None:
    smoothed: dict[str, torch.Tensor] = {}
    add_smoothly(smoothed, {"w": torch.tensor([1.0, 2.0])}, momentum=0.9)
    add_smoothly(smoothed, {"w": torch.tensor([3.0, -2.0])}, momentum=0.9)
    assert smoothed["w"].tolist() == pytest.approx([0.9 * 0.1 + 0.3, 0.9 * 0.2 - 0.2])


def test_what_all_layers_drop_is_shared_out_by_the_mean_momentum() -> None:
    method = SNFS(sparsity=0.5)
    # Half of each at progress 0: four go, and go back in the proportion 3:1.
    turnovers = method.allot([_view(9, 4, 0.3), _view(9, 4, 0.1)], progress=0.0, memory={})
    assert turnovers == [(2, 5), (2, 3)]


def test_the_dropped_share_falls_along_a_cosine() -> None:
    method = SNFS(sparsity=0.5, drop_fraction=0.5, final_drop_fraction=0.1)
    layers = [_view(99, 40, 1.0)]
    dropped = [40 - method.allot(layers, progress=p, memory={})[0][0] for p in (0.0, 0.5, 1.0)]
    assert dropped == [20, 12, 4]


def test_a_layer_takes_no_more_than_it_has_room_for() -> None:
    turnovers = SNFS(sparsity=0.5).allot([_view(5, 4, 100.0), _view(99, 8, 1.0)], progress=0.0, memory={})
    assert turnovers == [(2, 5), (4, 7)]


def test_layers_without_any_momentum_share_alike() -> None:
    assert SNFS(sparsity=0.5).allot([_view(9, 4, 0.0), _view(9, 4, 0.0)], progress=0.0, memory={}) == [(2, 4), (2, 4)]


def test_a_mutation_by_hand() -> None:
    method = SNFS(sparsity=0.5, drop_fraction=0.5, final_drop_fraction=0.5, momentum=0.5)
    run = HandRun(method, {"w": [1.0, 2.0, 3.0, 4.0] * 2, "v": [1.0, 2.0, 3.0, 4.0] * 2}, lr=0.0)
    run.begin_epoch(0)
    old = {name: run.active(name) for name in ("w", "v")}
    first = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    second = [8.0, -7.0, 6.0, -5.0, 4.0, -3.0, 2.0, -1.0]
    run.step(w=first, v=[0.1] * 8)
    run.step(w=second, v=[0.1] * 8)
    smooth = [abs(0.25 * a + 0.5 * b) for a, b in zip(first, second, strict=True)]
    claims = {"w": sum(smooth[p] for p in old["w"]) / 4, "v": 0.075}
    assert claims["w"] > 10 * claims["v"]
    kept = {name: sorted(places, key=lambda p: (-run.weight(name)[p], p))[:2] for name, places in old.items()}
    run.begin_epoch(1)
    # Four went; nearly all claims are those of the first layer, which has room for six.
    assert len(run.active("w")) == 6
    assert sorted(kept["v"]) == run.active("v")
    best = sorted(set(range(8)) - set(kept["w"]), key=lambda p: (-smooth[p], p))[:4]
    assert run.active("w") == sorted([*kept["w"], *best])


def test_the_mean_is_over_the_active_weights_alone() -> None:
    method = SNFS(sparsity=0.5, drop_fraction=0.5, final_drop_fraction=0.5)
    run = HandRun(method, {"w": [1.0] * 8, "v": [1.0] * 8}, lr=0.0)
    run.begin_epoch(0)
    active = {name: run.active(name) for name in ("w", "v")}
    # The first layer's gradient is large only where it has no weights, the second one's only where it has them.
    run.step(w=[0.0 if p in active["w"] else 9.0 for p in range(8)], v=[float(p in active["v"]) for p in range(8)])
    run.begin_epoch(1)
    assert (len(run.active("w")), len(run.active("v"))) == (2, 6)


def test_a_layer_that_is_frozen_takes_its_smoothed_gradient_with_it() -> None:
    run = HandRun(SNFS(sparsity=0.5), {"w": [1.0] * 8, "v": [1.0] * 8}, frozen={1: 1})
    run.begin_epoch(0)
    run.step(w=[1.0] * 8, v=[1.0] * 8)
    assert _smoothed(run) == {"w", "v"}
    frozen = run.active("w")
    run.begin_epoch(1)
    run.step(v=[1.0] * 8)
    assert _smoothed(run) == {"v"}
    assert run.active("w") == frozen
    assert len(run.active("v")) == 4


def test_the_bill_charges_dense_weight_gradients_until_the_last_mutation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(3, (20,))), batch_size=8)
    recipe = spfde.Recipe(sparsity=SNFS(sparsity=0.8), update_interval_epochs=2)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=6, engine="masked")
    active = []
    for _ in session.epochs():
        active.append({name: int(mask.sum()) for name, mask in session.masks.items()})
        for x, y in session.loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    numel = {"1.weight": 80, "2.weight": 60}
    # Mutations happen at epochs 2 and 4: epochs 0 to 3 smooth the gradients, of 20 samples at 2 FLOPs a weight.
    expected = [
        sum(20 * 2 * (numel[name] - n) for name, n in counts.items()) if epoch < 4 else 0
        for epoch, counts in enumerate(active)
    ]
    assert [row.dense_gradient_flops for row in session.cost.rows] == expected
    assert all(sum(counts.values()) == 28 for counts in active)
    assert active[0] == {"1.weight": 16, "2.weight": 12}
    assert active[2] != active[0]
    bill = spfde.plan(model, torch.zeros(1, 4), recipe, 6, 20, batch_size=8)
    # Beforehand the layers' shares are not known: the plan leaves them as they start.
    assert [cost.dense_gradient_flops for cost in bill.epoch_costs] == [expected[0]] * 4 + [0, 0]


def gradients_of(generator: torch.Generator, dtype: torch.dtype, bad: str) -> dict[str, Tensor]:
    drawn = {name: torch.randn(3, 2, generator=generator, dtype=dtype) for name in "abc"}
    if bad != "no":
        drawn["b"][1, 1] = float(bad)
    return drawn


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bad=st.lists(st.sampled_from(["no", "no", "inf", "nan"]), min_size=1, max_size=5),
    skips=st.lists(st.booleans(), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_means_that_the_device_decides_on_are_bit_for_bit_those_that_the_host_does(
    seed: int, bad: list[str], skips: list[bool], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = {name: torch.randn(3, 2, generator=generator, dtype=dtype) for name in "abc"}
    means = {name: value.clone() for name, value in expected.items()}
    for kind, skipped in zip(bad, skips, strict=False):
        gradients = gradients_of(generator, dtype, kind)
        if kind == "no" and not skipped:
            add_smoothly(expected, gradients, momentum=0.9)
        add_where_finite(means, gradients, momentum=0.9, skipped=torch.tensor([float(skipped)]))
    assert all(torch.equal(means[name], expected[name]) for name in expected)


def test_the_means_of_all_layers_take_the_same_few_operations() -> None:
    counts = []
    for layers in (2, 20):
        means = {str(n): torch.zeros(4) for n in range(layers)}
        with Operations() as found:
            add_where_finite(means, {str(n): torch.ones(4) for n in range(layers)}, momentum=0.9)
        counts.append(sum(found.names.values()) - layers)  # ones
        assert found.reads == 0
    assert counts[0] == counts[1] <= 14
