"""The moving average of weights, and norms that are estimated anew, on numbers that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spfde.app.train.averaging import Average
from spfde.app.train.norms import reestimate
from spfde.freezing.freezer import hold_in_eval


def linear(*weights: float) -> nn.Linear:
    model = nn.Linear(len(weights), 1, bias=False)
    put(model, *weights)
    return model


def put(model: nn.Linear, *weights: float) -> None:
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))


def values(model: nn.Linear) -> list[float]:
    return [round(value, 5) for value in model.weight.flatten().tolist()]


class Masks:
    """Gives masks, as a session does: one that changes is another tensor."""

    def __init__(self, *mask: int) -> None:
        self.change(*mask)

    def change(self, *mask: int) -> None:
        self.now = {"weight": torch.tensor([mask]).bool()}

    def __call__(self) -> dict[str, Tensor]:
        return self.now


class TestAverage:
    def test_the_first_updates_forget_faster(self) -> None:
        model, twin = linear(1.0), linear(7.0)
        average = Average(model, twin, dict, 0.15)
        assert values(twin) == [1.0]
        put(model, 2.0)
        average.update()  # decay 1/10
        assert values(twin) == [1.9]
        put(model, 3.0)
        average.update()  # 2/11 is more than the decay
        assert values(twin) == [pytest.approx(0.15 * 1.9 + 0.85 * 3.0)]

    def test_a_grown_weight_begins_at_its_own_value_and_a_dropped_one_is_zero(self) -> None:
        model, twin, masks = linear(1.0, 1.0, 0.0, 0.0), linear(*4 * [7.0]), Masks(1, 1, 0, 0)
        average = Average(model, twin, masks, 0.9)
        assert values(twin) == [1.0, 1.0, 0.0, 0.0]
        masks.change(1, 0, 1, 0)
        put(model, 2.0, 0.0, 5.0, 0.0)
        average.update()
        assert values(twin) == [1.9, 0.0, 5.0, 0.0]
        put(model, 2.0, 0.0, 6.0, 0.0)
        average.update()
        assert values(twin)[1::2] == [0.0, 0.0]
        assert values(twin)[2] == pytest.approx(5 * 2 / 11 + 6 * 9 / 11, abs=1e-5)

    def test_a_mask_that_changed_since_the_last_step_holds_before_it_is_used(self) -> None:
        model, twin, masks = linear(1.0, 1.0), linear(7.0, 7.0), Masks(1, 1)
        average = Average(model, twin, masks, 0.9)
        put(model, 3.0, 0.0)
        masks.change(1, 0)
        average.finish()
        assert values(twin) == [1.0, 0.0]

    def test_what_is_frozen_is_taken_over_as_it_is_and_averaged_again_once_it_learns(self) -> None:
        model, twin = linear(1.0), linear(7.0)
        average = Average(model, twin, dict, 0.9)
        put(model, 2.0)
        average.update()
        model.weight.requires_grad_(False)
        average.update()
        assert values(twin) == [2.0]
        model.weight.requires_grad_(True)
        put(model, 3.0)
        average.update()  # the third
        assert values(twin) == [pytest.approx(2 * 3 / 12 + 3 * 9 / 12)]

    def test_through_a_pause_the_average_stays_and_goes_on_from_there(self) -> None:
        model, twin = linear(1.0), linear(7.0)
        average = Average(model, twin, dict, 0.9, pauses=True)
        put(model, 2.0)
        average.update()
        model.weight.requires_grad_(False)
        average.update()
        average.finish()
        assert values(twin) == [1.9]
        model.weight.requires_grad_(True)
        average.update()  # the third
        assert values(twin) == [pytest.approx(1.9 * 3 / 12 + 2 * 9 / 12)]

    def test_statistics_are_averaged_as_weights_are_but_not_those_of_frozen_norms(self) -> None:
        model, twin = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        average = Average(model, twin, dict, 0.9)
        model(torch.tensor([[10.0], [10.0]]))
        assert float(model.running_mean) == 1.0  # type: ignore[arg-type]  # it is there
        average.update()
        average.finish()
        assert (float(twin.running_mean), int(twin.num_batches_tracked)) == (pytest.approx(0.9), 1)  # type: ignore[arg-type]
        hold_in_eval(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        average.update()
        assert float(twin.running_mean) == 1.0  # type: ignore[arg-type]

    def test_it_goes_on_from_what_was_loaded(self) -> None:
        model, twin, masks = linear(1.0, 0.0), linear(7.0, 7.0), Masks(1, 0)
        average = Average(model, twin, masks, 0.9)
        masks.change(0, 1)
        put(model, 0.0, 4.0)
        put(twin, 0.0, 3.0)
        average.updates = 1
        average.begin()
        average.update()
        assert values(twin) == [0.0, pytest.approx(3 * 2 / 11 + 4 * 9 / 11, abs=1e-5)]


class TestNorms:
    def test_statistics_are_the_means_of_those_of_the_batches(self) -> None:
        norm = nn.BatchNorm1d(1)
        norm(torch.tensor([[100.0], [200.0]]))
        batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])]  # variances 2 and 8
        reestimate(norm, batches, lambda model, x: model(x))
        assert float(norm.running_mean) == 3.5  # type: ignore[arg-type]
        assert float(norm.running_var) == 5.0  # type: ignore[arg-type]
        assert (norm.momentum, norm.training) == (0.1, False)

    def test_norms_to_keep_and_all_that_draws_stay_as_in_evaluation(self) -> None:
        model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.9), nn.BatchNorm1d(1))
        before, state = torch.get_rng_state(), {k: v.clone() for k, v in model[0].state_dict().items()}
        reestimate(model, [torch.tensor([[1.0], [3.0]])], lambda net, x: net(x), kept=["0"])
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(value, state[name]) for name, value in model[0].state_dict().items())
        assert float(model[2].running_mean) == pytest.approx(2.0, abs=1e-4)
        assert not any(module.training for module in model)
