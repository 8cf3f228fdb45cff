"""Criteria: which reports each takes, how it scores, and a stranger's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import spfde
from helpers.registering import forgetting_names
from helpers.training import EPOCHS, make_parts, train
from spfde.app.methods import render_catalogue
from spfde.app.train.options import choose_recipe
from spfde.core.errors import InvalidArgument
from spfde.core.registry import find, registered
from spfde.sieving import DataSieving, OneTimeRemoval, SievingCriterion
from spfde.sieving.criteria import Forgetting, Loss, Random, TopLoss

INF = float("inf")
EVEN = torch.tensor([[0.0, 0.0], [0.0, 0.0]])

every_criterion = pytest.mark.parametrize(
    "criterion", ["forgetting", "loss", "el2n", "random", "top-loss", "repeated-random"]
)


def make(name: str) -> SievingCriterion:
    found = find("sieving-criterion", name, argument="criterion")()
    assert isinstance(found, SievingCriterion)
    return found


def observe(scorer: Any, *batches: tuple[list[int], list[float]]) -> None:
    for indices, values in batches:
        scorer.observe(torch.tensor(indices, dtype=torch.long), torch.tensor(values, dtype=torch.float32))


# --- evidence --------------------------------------------------------------------------------------------------------


@every_criterion
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"logits": EVEN},
        {"logits": EVEN, "y": torch.zeros(2), "loss": torch.zeros(2)},
        {"correct": torch.ones(2), "loss": torch.zeros(2)},
        {"y": torch.zeros(2)},
    ],
)
def test_every_criterion_wants_exactly_one_kind_of_report(criterion: str, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="exactly one"):
        make(criterion).evidence(**{"logits": None, "y": None, **given})


@pytest.mark.parametrize(
    ("criterion", "given", "wanted", "other"),
    [
        ("el2n", {"loss": torch.zeros(2)}, "logits and y", "loss"),
        ("el2n", {"correct": torch.ones(2)}, "logits and y", "forgetting"),
        ("loss", {"correct": torch.ones(2)}, "logits and y or loss=", "forgetting"),
    ],
)
def test_a_report_that_a_criterion_cannot_use_is_refused_with_what_it_takes_and_who_takes_that(
    criterion: str, given: dict[str, Any], wanted: str, other: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make(criterion).evidence(None, None, **given)
    (problem,) = caught.value.problems
    assert (problem.argument, problem.value) == ("observe", f"{next(iter(given))}=")
    assert criterion in problem.rule
    assert wanted in problem.remedy
    assert other in problem.remedy


def test_a_loss_a_pixel_is_averaged_over_the_sample_and_a_mean_loss_is_refused() -> None:
    loss = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    assert make("loss").evidence(None, None, loss=loss).tolist() == [2.0, 0.0]
    assert make("forgetting").evidence(None, None, loss=loss).tolist() == [False, True]
    assert make("random").evidence(None, None, loss=loss).tolist() == [0.0, 0.0]
    with pytest.raises(InvalidArgument, match="reduction="):
        make("loss").evidence(None, None, loss=torch.tensor(1.0))


def test_what_was_right_is_taken_as_it_is_told() -> None:
    assert make("forgetting").evidence(None, None, correct=torch.tensor([[1], [0]])).tolist() == [True, False]
    assert make("forgetting").evidence(None, None, correct=[True, False]).tolist() == [True, False]  # type: ignore[arg-type]


@every_criterion
@pytest.mark.parametrize("y", [torch.zeros(4, dtype=torch.long), torch.zeros(4, 3)], ids=["hard", "soft"])
def test_a_report_never_looks_at_values_so_that_no_device_has_to_wait(criterion: str, y: Tensor) -> None:
    # On the meta device there are no values: whoever looks at one is refused.
    values = make(criterion).evidence(torch.zeros(4, 3, device="meta", requires_grad=True), y.to("meta"))
    assert values.shape == (4,)
    assert not values.requires_grad


# --- scores ----------------------------------------------------------------------------------------------------------


def test_the_mean_by_hand() -> None:
    scorer = Loss().scorer(5)
    observe(scorer, ([0, 1, 2], [1.0, 4.0, float("nan")]), ([1, 0, 2, 3], [2.0, 0.0, 1.0, INF]))
    assert scorer.difficulty().tolist() == [0.5, 3.0, INF, INF, INF]  # NaN, infinite and unseen are hard


def test_the_last_loss_by_hand() -> None:
    scorer = TopLoss().scorer(5)
    observe(scorer, ([0, 1, 0, 2], [1.0, 4.0, 3.0, float("nan")]), ([1, 3, 1], [2.0, INF, 0.5]))
    assert scorer.difficulty().tolist() == [3.0, 0.5, INF, INF, INF]  # NaN, infinite and unseen are hard


def test_at_random_all_are_alike_seen_or_not() -> None:
    scorer = Random().scorer(3)
    observe(scorer, ([0, 1], [5.0, 1.0]))
    assert scorer.difficulty().tolist() == [0.0, 0.0, 0.0]


def test_only_a_random_choice_can_do_without_reports() -> None:
    found = [name for name in registered("sieving-criterion") if not make(name).needs_every_batch]
    assert found == ["random", "repeated-random"]


@pytest.mark.parametrize("method", [DataSieving, OneTimeRemoval])
def test_a_recipe_makes_its_criterion_and_never_learned_reaches_forgetting(method: type[DataSieving]) -> None:
    found = method(never_learned="literal").make_criterion()
    assert isinstance(found, Forgetting)
    assert found.never_learned == "literal"
    assert isinstance(method(criterion="loss", never_learned="literal").make_criterion(), Loss)


def test_an_unknown_criterion_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match="Did you mean 'el2n'") as caught:
        DataSieving(criterion="el2m")
    assert [problem.argument for problem in caught.value.problems] == ["criterion"]


# --- a stranger's ----------------------------------------------------------------------------------------------------


@pytest.fixture
def largest_loss() -> Iterator[type[SievingCriterion]]:
    with forgetting_names("sieving-criterion"):

        @spfde.register("sieving-criterion")
        class LargestLoss(spfde.sieving.SievingCriterion):
            name = "largest-loss"
            summary = "The lowest of the largest losses is easiest."

            def from_loss(self, loss: Tensor) -> Tensor:
                return loss

            def start(self, n: int) -> dict[str, Tensor]:
                return {"largest": torch.full((n,), -INF)}

            def add(self, kept: dict[str, Tensor], indices: Tensor, values: Tensor) -> None:
                kept["largest"].scatter_reduce_(0, indices, values, "amax")

            def difficulty(self, kept: Any) -> Tensor:
                return kept["largest"].abs()  # never seen: infinite

        yield LargestLoss


def test_a_stranger_s_criterion_scores_by_hand(largest_loss: type[SievingCriterion]) -> None:
    scorer = largest_loss().scorer(4)
    observe(scorer, ([0, 1, 0], [1.0, 5.0, 3.0]), ([0, 2], [2.0, 0.0]))
    assert scorer.difficulty().tolist() == [3.0, 5.0, 0.0, INF]


def test_a_stranger_s_criterion_works_in_a_recipe_in_toml_and_in_the_command_line_s_options(
    largest_loss: type[SievingCriterion],
) -> None:
    recipe = spfde.Recipe(sieving=DataSieving(criterion="largest-loss"))
    assert spfde.Recipe.from_toml(recipe.to_toml()) == recipe
    assert choose_recipe("dense", sieve=0.2, sieve_criterion="largest-loss") == recipe
    assert "largest-loss" in render_catalogue()
    assert largest_loss.summary.split(".")[0] in " ".join(render_catalogue().split())


def test_a_run_sieves_by_a_stranger_s_criterion(largest_loss: type[SievingCriterion]) -> None:
    """A sample whose loss is told as its index: the lowest indices of the partial set leave."""
    parts = make_parts()
    recipe = spfde.Recipe(
        sieving=DataSieving(removed_fraction=0.25, criterion="largest-loss"), update_interval_epochs=2
    )
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS)
    before = session.partial_set.tolist()
    for epoch in session.epochs():
        if epoch == 2:
            break
        for x, y in session.loader:
            torch.nn.functional.cross_entropy(parts.model(x), y).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(loss=session.loader.current_indices.float())
    moved = session.sieve_turnover["moved"]
    assert moved > 0
    assert sorted(set(before) - set(session.partial_set.tolist())) == before[:moved]


def test_a_report_that_a_stranger_s_criterion_has_no_use_for_is_refused(largest_loss: type[SievingCriterion]) -> None:
    parts = make_parts()
    recipe = spfde.Recipe(sieving=DataSieving(criterion="largest-loss"), update_interval_epochs=2)
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS)
    with pytest.raises(InvalidArgument, match="loss="):
        train(parts, session)


def test_values_of_a_stranger_that_are_not_one_a_sample_are_refused_by_name() -> None:
    class Whole(SievingCriterion):
        name = "whole"
        summary = "Forgets to take one value a sample."

        def from_logits(self, logits: Tensor, y: Tensor) -> Tensor:
            return logits

    with pytest.raises(InvalidArgument, match=r"Whole=\(2, 2\)"):
        Whole().evidence(EVEN, torch.zeros(2, dtype=torch.long))
