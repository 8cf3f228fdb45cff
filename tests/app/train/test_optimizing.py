"""Steps: the optimizer, its rates, and gradients of several batches, on numbers that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW

from spfde import presets
from spfde.app.train.loop import train_step
from spfde.app.train.optimizing import make_optimizer, rate_factor, share_of_step, take_step, told
from spfde.app.train.options import TrainOptions
from spfde.core.errors import InvalidArgument
from spfde.freezing import BlockwiseCosine

MEST = presets.mest.to_dict()


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**({"recipe": MEST, "recipe_name": "mest"} | changes))


class TestOptimizer:
    def test_each_has_its_usual_rate_and_the_settings_that_were_given(self) -> None:
        weights = [nn.Parameter(torch.zeros(1))]
        sgd = make_optimizer(weights, options(momentum=0.8, nesterov=True, weight_decay=0.1))
        assert isinstance(sgd, SGD)
        assert {name: sgd.defaults[name] for name in ("lr", "momentum", "nesterov", "weight_decay")} == {
            "lr": 0.1,
            "momentum": 0.8,
            "nesterov": True,
            "weight_decay": 0.1,
        }
        adamw = make_optimizer(weights, options(optimizer="adamw", weight_decay=0.05))
        assert isinstance(adamw, AdamW)
        assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.001, 0.05)
        assert make_optimizer(weights, options(optimizer="adamw", lr=0.5)).defaults["lr"] == 0.5

    @pytest.mark.parametrize("given", [{"optimizer": "adamw"}, {"momentum": 0.0}])
    def test_nesterov_without_a_momentum_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgument, match=r"nesterov=True: is a form of sgd's momentum"):
            options(nesterov=True, **given)

    def test_a_momentum_of_adamw_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match=r"momentum=0\.95: is sgd's alone"):
            options(optimizer="adamw", momentum=0.95)

    def test_gradients_are_clipped_together(self) -> None:
        weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
        for weight, gradient in zip(weights, (3.0, 4.0), strict=False):  # their norm is 5; the third has none
            weight.grad = torch.tensor([gradient])
        take_step(SGD(weights, lr=1.0), GradScaler(enabled=False), 1.0)
        assert [round(weight.item(), 4) for weight in weights] == [-0.6, -0.8, 0.0]
        assert weights[0].grad is None


class TestRates:
    def test_a_constant_rate_is_warmed_up_and_stays(self) -> None:
        given = options(schedule="constant", warmup=4, epochs=6)
        assert [rate_factor(given, epoch) for epoch in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]

    def test_steps_are_at_half_and_at_three_quarters_of_the_run(self) -> None:
        given = options(schedule="step", epochs=5)
        assert [round(rate_factor(given, epoch), 6) for epoch in range(5)] == [1.0, 1.0, 1.0, 0.1, 0.01]

    def test_a_cosine_begins_behind_its_warm_up(self) -> None:
        given = options(warmup=2, epochs=6)
        assert [round(rate_factor(given, epoch), 3) for epoch in range(6)] == [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]

    def test_a_recipe_that_drives_the_rates_takes_the_warm_up_and_refuses_other_schedules(self) -> None:
        blockwise = {"recipe": presets.spfde.to_dict(), "recipe_name": "spfde"}
        assert options(**blockwise, warmup=3).load_recipe().learning_rate == BlockwiseCosine(warmup_epochs=3)
        assert options(**blockwise).load_recipe() == presets.spfde
        with pytest.raises(InvalidArgument, match=r"schedule='step': recipe spfde drives the rates itself"):
            options(**blockwise, schedule="step")

    def test_a_warm_up_as_long_as_the_run_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match=r"warmup=4: must be shorter than the run \(4 epochs\)"):
            options(warmup=4, epochs=4)

    def test_a_run_of_an_earlier_version_goes_on_as_it_was_begun(self) -> None:
        given = options(lr=0.2)
        earlier = {"data", "model", "recipe", "recipe_name", "epochs", "batch_size", "lr", "momentum", "weight_decay"}
        command = given.model_dump(mode="json", include=earlier)
        found = TrainOptions.from_config({"command": command}, Path("config.json"))
        found.check_identity(command, Path("c"))
        assert told(found) == told(given)

    def test_what_is_unusual_is_told(self) -> None:
        assert told(options()) is None
        assert told(options(optimizer="adamw", clip_norm=2.0)) == (
            "updates: optimizer adamw, clip norm 2.0, initial learning rate 0.001"
        )


class TestAccumulation:
    def test_a_short_last_group_counts_by_what_it_has(self) -> None:
        assert [share_of_step(number, 5, 3) for number in range(1, 6)] == [
            (1 / 3, False),
            (1 / 3, False),
            (1 / 3, True),
            (1 / 2, False),
            (1 / 2, True),
        ]
        assert [share_of_step(number, 2, 1) for number in (1, 2)] == [(1.0, True), (1.0, True)]

    def test_two_batches_step_as_one_of_all_their_samples(self) -> None:
        x, y = torch.randn(8, 3), torch.arange(8) % 2

        def stepped(parts: int) -> Tensor:
            torch.manual_seed(0)
            model = nn.Linear(3, 2)
            run: Any = SimpleNamespace(
                options=options(accumulate=parts, clip_norm=0.1, label_smoothing=0.1),
                logits=model,
                scaler=GradScaler(enabled=False),
                optimizer=SGD(model.parameters(), lr=1.0),
            )
            for number, (part, own) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), start=1):
                train_step(run, part, own, None, *share_of_step(number, parts, parts))
            return model.weight.detach()

        assert torch.allclose(stepped(2), stepped(1), atol=1e-6)
