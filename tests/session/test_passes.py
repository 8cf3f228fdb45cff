"""The bill is what was computed: passes that ran, with the shapes that they had."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde

N, FORWARD = 24, 2 * (8 * 16 + 16 * 4)


def parts(recipe: spfde.Recipe | None = None) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader, spfde.Session]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.randn(N, 8), torch.arange(N) % 4), batch_size=4)
    session = spfde.attach(model, optimizer, data, recipe or spfde.Recipe(), epochs=4, engine="masked")
    return model, optimizer, data, session


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def test_batches_of_ones_own_count_as_they_are_computed_though_gradients_are_accumulated() -> None:
    model, optimizer, data, session = parts()
    for _ in session.epochs():
        for number, (x, y) in enumerate(data, start=1):
            backward(model, x, y)
            if number % 3 == 0:
                optimizer.step()
        break
    session.end_epoch()
    row = session.cost.rows[0]
    assert (row.samples, row.steps) == (N, 2)
    assert row.training_flops == row.dense_training_flops == 3 * FORWARD * N
    assert row.saved_by_sieving == 0


def test_two_passes_a_batch_are_two_and_those_without_gradients_none() -> None:
    model, optimizer, _, session = parts()
    for _ in session.epochs():
        for x, y in session.loader:
            backward(model, x, y)
            backward(model, x, y)
            with torch.no_grad():
                model(x)
            model.eval()
            model(x)
            model.train()
            optimizer.step()
        break
    session.end_epoch()
    assert session.cost.rows[0].training_flops == 2 * 3 * FORWARD * N
    assert session.cost.rows[0].samples == N


def test_what_the_sieve_left_out_is_all_that_sieving_saves() -> None:
    sieving = spfde.DataSieving(removed_fraction=0.5)
    model, optimizer, _, session = parts(spfde.Recipe(sieving=sieving, update_interval_epochs=2))
    for _ in session.epochs():
        for x, y in session.loader:
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            backward(model, x, y)
            optimizer.step()
            session.observe(logits, y)
        break
    session.end_epoch()
    row = session.cost.rows[0]
    assert row.training_flops == row.saved_by_sieving == 3 * FORWARD * N
    assert row.dense_training_flops == 2 * 3 * FORWARD * N


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.each, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.each(self.embedding(tokens)).mean(1))


def texts(lengths: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for length in lengths:
        yield torch.ones(2, length, dtype=torch.long), torch.tensor([0, 1])


def words() -> tuple[nn.Module, torch.optim.Optimizer, spfde.Session]:
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.ones(4, 3, dtype=torch.long), torch.arange(4)), batch_size=2)
    return model, optimizer, spfde.attach(model, optimizer, data, spfde.Recipe(), epochs=2, engine="masked")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, lengths: list[int]) -> None:
    for x, y in texts(lengths):
        backward(model, x, y)
        optimizer.step()


def test_each_shape_costs_what_it_computes() -> None:
    model, optimizer, session = words()
    session.begin_epoch()
    train(model, optimizer, [3, 5, 5, 7])
    session.end_epoch()
    each, head = 2 * 8 * 8, 2 * 8 * 4
    row = session.cost.rows[0]
    assert row.training_flops == row.dense_training_flops == 3 * 2 * (each * (3 + 5 + 5 + 7) + 4 * head)


def test_beyond_the_shapes_that_are_measured_the_nearest_counts_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spfde.session.passes.MOST_SHAPES", 1)
    model, optimizer, session = words()
    session.begin_epoch()
    train(model, optimizer, [6, 12])
    session.end_epoch()
    each, head = 2 * 8 * 8, 2 * 8 * 4
    assert session.cost.rows[0].training_flops == 3 * 2 * (6 * each + head + 2 * (6 * each + head))
    assert "2 samples" in str(session)


@pytest.mark.filterwarnings("ignore:epoch 0 has had more")
@pytest.mark.parametrize("ends", [True, False])
def test_samples_that_were_not_measured_are_still_said_in_the_run_that_goes_on(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spfde.session.passes.MOST_SHAPES", 1)
    model, optimizer, session = words()
    session.begin_epoch()
    train(model, optimizer, [6, 12, 12])
    if ends:
        session.end_epoch()
    states = [own.state_dict() for own in (model, optimizer, session)]
    again = words()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for own, state in zip(again, states, strict=True):
            own.load_state_dict(state)
    assert "4 samples of shapes that were not measured" in str(again[2])


def called(how: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
    if how == "torch.compile":
        return torch.compile(model, backend="eager")
    if how == "compile":
        model.compile(backend="eager")
    return model.forward if how == "forward" else model


@pytest.mark.parametrize("how", ["torch.compile", "compile", "forward"])
def test_steps_whose_passes_are_not_seen_are_said_once_and_stay_in_the_state(how: str) -> None:
    model, optimizer, session = words()
    forward = called(how, model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            session.begin_epoch()
            for x, y in texts([5, 7, 7]):
                F.cross_entropy(forward(x), y).backward()
                optimizer.step()
            session.end_epoch()
    assert sum("no forward pass" in str(warning.message) for warning in heard) == 1
    assert "6 steps without a forward pass" in str(session)
    _, _, other = words()
    other._bill.load_state_dict(session._bill.state_dict())
    assert "6 steps without a forward pass" in str(other)


@pytest.mark.parametrize("how", ["eval", "forward"])
def test_accumulated_gradients_are_billed_in_evaluation_mode_and_without_a_hook_too(how: str) -> None:
    model, optimizer, data, session = parts()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        session.begin_epoch()
        if how == "eval":
            model.eval()
        for number, (x, y) in enumerate(data, start=1):
            F.cross_entropy(model(x) if how == "eval" else model.forward(x), y).backward()
            if number % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
        session.end_epoch()
    assert session.cost.rows[0].samples == N
    assert session.cost.rows[0].training_flops == session.cost.rows[0].dense_training_flops == 3 * FORWARD * N
    assert sum("no forward pass" in str(warning.message) for warning in heard) == (how == "forward")


def test_an_evaluation_that_forgets_to_switch_gradients_off_is_not_billed() -> None:
    model, optimizer, data, session = parts()
    session.begin_epoch()
    for x, y in data:
        model.eval()
        model(x)
        model.train()
        backward(model, x, y)
        optimizer.step()
    session.end_epoch()
    assert session.cost.rows[0].training_flops == 3 * FORWARD * N


@pytest.mark.filterwarnings("ignore:before .* no forward pass:UserWarning")
def test_a_pass_that_is_seen_stands_for_those_that_are_not() -> None:
    model, optimizer, _, session = parts()
    for _ in session.epochs():
        for number, (x, y) in enumerate(session.loader):
            F.cross_entropy(model(x) if number == 2 else model.forward(x), y).backward()
            optimizer.step()
        break
    session.end_epoch()
    assert session.cost.rows[0].samples == N
    assert session.cost.rows[0].training_flops == 3 * FORWARD * N


def test_a_model_that_was_compiled_before_attach_is_billed_by_its_shapes() -> None:
    model = Words()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.ones(4, 3, dtype=torch.long), torch.arange(4)), batch_size=2)
    session = spfde.attach(compiled, optimizer, data, spfde.Recipe(), epochs=2, engine="masked")
    session.begin_epoch()
    train(compiled, optimizer, [5, 7])
    session.end_epoch()
    assert session.cost.rows[0].training_flops == 3 * 2 * (2 * 8 * 8 * (5 + 7) + 2 * 2 * 8 * 4)
    assert "without a forward pass" not in str(session)


def test_steps_without_a_gradient_need_no_pass() -> None:
    _, optimizer, session = words()
    session.begin_epoch()
    optimizer.step()
    session.end_epoch()
    assert "without a forward pass" not in str(session)


def test_passes_that_run_ahead_of_their_steps_are_seen() -> None:
    model, optimizer, session = words()
    session.begin_epoch()
    losses = [F.cross_entropy(model(x), y) for x, y in texts([3, 5, 7])]
    for loss in losses[:1]:
        loss.backward()
    for _ in losses:
        optimizer.step()
    session.end_epoch()
    assert "without a forward pass" not in str(session)


def test_what_ran_before_an_epoch_is_not_billed() -> None:
    model, optimizer, _, session = parts()
    model(torch.zeros(7, 8))
    for _ in session.epochs():
        for x, y in session.loader:
            backward(model, x, y)
            optimizer.step()
        break
    session.end_epoch()
    assert session.cost.rows[0].training_flops == 3 * FORWARD * N


def test_a_copy_and_a_pickle_of_the_model_count_nothing_and_detaching_takes_the_hook_off() -> None:
    model, _, _, session = parts()
    session.begin_epoch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(torch.zeros(3, 8))
    assert not session._bill.passes.state_dict()["samples"]
    session.detach()
    assert not model._forward_pre_hooks


def test_counts_amid_an_epoch_are_in_the_state() -> None:
    model, optimizer, session = words()
    session.begin_epoch()
    train(model, optimizer, [3, 5])
    state = session._bill.state_dict()
    other_model, other_optimizer, other = words()
    other.begin_epoch()
    other._bill.check_state(state)
    other._bill.load_state_dict(state)
    for own in ((model, optimizer, session), (other_model, other_optimizer, other)):
        train(*own[:2], [5, 7])
        own[2].end_epoch()
    assert session.cost.rows[0].training_flops == other.cost.rows[0].training_flops


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * float(x.abs().max()))


def test_sieving_takes_a_model_that_cannot_be_traced_and_says_that_flops_are_missing() -> None:
    model = Reading()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = DataLoader(TensorDataset(torch.randn(N, 8), torch.arange(N) % 4), batch_size=4)
    recipe = spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.5), update_interval_epochs=2)
    session = spfde.attach(model, optimizer, data, recipe, epochs=4)
    assert session.engine == "masked"
    for _ in session.epochs():
        for x, y in session.loader:
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            optimizer.step()
            session.observe(logits, y)
    assert session.cost.totals.samples == 4 * N // 2
    assert session.cost.totals.cost.training_flops == 0
    assert "FLOPs are not known" in str(session)
