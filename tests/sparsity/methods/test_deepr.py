"""DEEP R: weights that cross zero go dormant, random ones wake up, and the sign bit remembers the sign."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.masking import HandRun, places
from spfde.sparsity import DeepR
from spfde.sparsity.methods.deepr import rewire

FOUR = [0.5, -0.5, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5]  # at sparsity 0.5 four of these eight are active


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_one_step_of_rewiring_by_hand(seed: int) -> None:
    mask = torch.tensor([True, True, True, False, False, False])
    before = torch.tensor([False, True, False, False, False, False])
    stepped = torch.tensor([-0.1, -0.3, 0.4, 0.0, 0.0, 0.0])  # the first was positive: it has crossed zero
    weight, rewired = rewire(stepped, mask, before, shrink=0.05, noise=0.0, generator=_generator(seed))
    assert weight[[1, 2]].tolist() == pytest.approx([-0.25, 0.35])
    assert int(rewired.sum()) == 3
    assert rewired[1]
    assert rewired[2]
    assert (weight[[0, 3, 4, 5]] == 0).all()


def test_every_dormant_weight_may_wake_up_with_either_sign() -> None:
    mask, before = torch.tensor([True, False, False]), torch.tensor([False, False, False])
    woken = set()
    for seed in range(50):
        weight, rewired = rewire(
            torch.tensor([-1.0, 0.0, 0.0]), mask, before, shrink=0.0, noise=0.0, generator=_generator(seed)
        )
        (place,) = places(rewired)
        woken.add((place, bool(torch.signbit(weight[place]))))
    # The one that has just crossed zero is a candidate, too.
    assert woken == {(place, sign) for place in range(3) for sign in (False, True)}


def test_the_penalty_alone_sends_a_small_weight_to_sleep() -> None:
    mask, before = torch.tensor([True, True, False]), torch.tensor([False, True, False])
    weight, _ = rewire(torch.tensor([0.01, -0.03, 0.0]), mask, before, shrink=0.02, noise=0.0, generator=_generator())
    assert weight.tolist() == pytest.approx([0.0, -0.01, 0.0])


def test_noise_acts_along_the_sign_of_each_active_weight() -> None:
    mask, before = torch.tensor([True, False, True]), torch.tensor([False, False, True])
    drawn = torch.randn(2, generator=_generator(3))
    weight, rewired = rewire(
        torch.tensor([5.0, 0.0, -5.0]), mask, before, shrink=0.0, noise=0.1, generator=_generator(3)
    )
    assert weight.tolist() == pytest.approx([5.0 + 0.1 * float(drawn[0]), 0.0, -(5.0 + 0.1 * float(drawn[1]))])
    assert torch.equal(rewired, mask)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 0.5), st.floats(0, 1))
def test_the_count_stays_and_no_survivor_changes_its_sign(seed: int, n: int, shrink: float, noise: float) -> None:
    generator = _generator(seed)
    mask = torch.rand(n, generator=generator) < 0.5
    old = torch.randn(n, generator=generator) * mask
    stepped = old + torch.randn(n, generator=generator) * mask
    weight, rewired = rewire(stepped, mask, torch.signbit(old), shrink=shrink, noise=noise, generator=generator)
    assert int(rewired.sum()) == int(mask.sum())
    assert (weight[~rewired] == 0).all()
    moved = weight != 0
    assert (mask[moved]).all()
    assert torch.equal(torch.signbit(weight[moved]), torch.signbit(old[moved]))


def test_a_weight_that_the_optimizer_drives_over_zero_is_replaced_at_once() -> None:
    run = HandRun(DeepR(sparsity=0.5, l1=0.0, noise=0.0), {"w": FOUR})
    run.begin_epoch(0)
    active = run.active()
    first = active[0]
    sign = 1.0 if run.weight()[first] > 0 else -1.0
    gradient = [0.0] * 8
    gradient[first] = 6.0 * sign  # a step of 0.6 against a weight of 0.5
    run.step(w=gradient)
    assert len(run.active()) == 4
    assert run.weight()[first] == 0.0
    assert [run.weight()[place] for place in active[1:]] == [FOUR[place] for place in active[1:]]


def test_the_sign_bit_of_a_sleeper_that_woke_up_decides_which_way_it_may_go() -> None:
    seen = set()
    for toward in (1.0, -1.0):
        for seed in range(6):
            run = HandRun(DeepR(sparsity=0.5, l1=0.0, noise=0.0), {"w": FOUR})
            run.masker.generator.manual_seed(seed)
            run.begin_epoch(0)
            before = run.active()
            # Every active weight crosses zero at once: four others, or the same ones, wake up with new signs.
            run.step(w=[12.0 * value for value in FOUR])
            assert len(run.active()) == 4
            assert run.weight() == [0.0] * 8
            negative = torch.signbit(run.weights["w"].detach()).flatten()
            awake = run.active()
            run.step(w=[-toward] * 8)  # all are pushed to one side by 0.1
            for place in awake:
                goes_with_its_sign = bool(negative[place]) == (toward < 0)
                seen.add((toward, goes_with_its_sign))
                if goes_with_its_sign:
                    assert run.weight()[place] == pytest.approx(0.1 * toward)
                else:
                    assert run.weight()[place] == 0.0
            assert before
    assert seen == {(side, way) for side in (1.0, -1.0) for way in (True, False)}


def test_the_penalty_and_the_noise_are_per_unit_of_the_learning_rate() -> None:
    run = HandRun(DeepR(sparsity=0.5, l1=0.5, noise=0.0), {"w": FOUR}, lr=0.2)
    run.begin_epoch(0)
    active = run.active()
    run.step(w=[0.0] * 8)
    assert run.active() == active
    assert all(abs(run.weight()[place]) == pytest.approx(0.5 - 0.2 * 0.5) for place in active)


def test_each_layer_keeps_its_count_at_every_step_and_sleepers_have_no_momentum() -> None:
    weights = {"w": FOUR * 3, "v": FOUR * 5}
    run = HandRun(DeepR(sparsity=0.75, noise=3.0), weights, lr=0.1, momentum=0.9, weight_decay=0.1)
    generator, masks = _generator(), set()
    for epoch in range(3):
        run.begin_epoch(epoch)
        for _ in range(4):
            run.step(**{name: torch.randn(len(w), generator=generator).tolist() for name, w in weights.items()})
            assert len(run.active("w")) == 6
            assert len(run.active("v")) == 10
            masks.add(tuple(run.active("v")))
            for name in weights:
                asleep = set(range(len(weights[name]))) - set(run.active(name))
                assert all(run.weight(name)[place] == 0.0 == run.momentum(name)[place] for place in asleep)
    assert len(masks) > 3


def test_the_last_epoch_and_weights_without_a_gradient_are_not_rewired() -> None:
    run = HandRun(DeepR(sparsity=0.5, noise=5.0), {"w": FOUR, "v": FOUR}, epochs=2)
    run.begin_epoch(0)
    frozen = run.weight("v")
    active = run.active("w")
    run.step(w=[0.0] * 8)  # nothing reaches v, as in a frozen block
    assert run.weight("v") == frozen
    assert run.active("w") != active
    run.begin_epoch(1)
    active = run.active("w")
    run.step(w=[10.0 * value for value in run.weight("w")])
    assert run.active("w") == active
