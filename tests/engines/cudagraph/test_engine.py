"""A captured model trains as PyTorch does, and is left to PyTorch where it cannot be captured."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.captured import ENGINE, Net, attach, batches, both, computes, same, steps
from helpers.counting import Operations
from helpers.recording import Replays, on_cpu  # noqa: F401  # a fixture
from helpers.resuming import METHODS, MOMENTS, Loop, assert_equal, everything, recipe_with
from helpers.short import short
from helpers.training import EPOCHS, make_parts, train

pytestmark = pytest.mark.usefixtures("on_cpu")

# --- the same run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", short(METHODS, ("mest-ems", "gmp", "topkast", "str")))
def test_a_whole_run_ends_as_under_the_masked_engine(method: str) -> None:
    ends = []
    for engine in ("masked", ENGINE):
        parts, session = Loop(recipe_with(method), engine).start()
        train(parts, session)
        ends.append(everything(parts, session))
        if engine == ENGINE:
            assert computes(session).replayed > 2 * EPOCHS
    for end in ends:
        end["spfde"]["parts"].pop("engine")
    assert_equal(ends[1], ends[0])


@pytest.mark.parametrize("method", short(["mest-ems", "rigl", "topkast"], ["rigl"]))
def test_a_run_that_was_stopped_ends_like_one_that_never_stopped(method: str) -> None:
    loop = Loop(recipe_with(method), ENGINE)
    assert_equal(loop.end_with_stops(MOMENTS[1::3]), loop.end_with_stops([]))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.AdamW, {"lr": 0.01}),
        (torch.optim.Adam, {"lr": 0.01, "foreach": True, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.01}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_any_optimizer_steps_as_ever(optimizer: Any, options: dict[str, Any]) -> None:
    assert both(steps, optimizer=optimizer, **options).replayed == 4


def test_statistics_counters_and_draws_are_those_of_as_many_passes() -> None:
    found = both(steps)
    assert (found.replayed, found.recorded) == (4, 1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_add_up_and_those_that_are_kept_stay(set_to_none: bool) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        kept = []
        for number, (x, y) in enumerate(batches(9)):
            F.cross_entropy(model(x), y).backward()
            gradient = model.get_parameter("middle.weight").grad
            kept.append((gradient, gradient.clone()))
            if number % 3 == 2:
                # Added up in place by PyTorch: the last of three is the sum.
                assert torch.equal(*kept[-1])
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
                if set_to_none:
                    assert all(torch.equal(*kept[at]) for at in range(2, len(kept), 3))

    both(run)


def test_scaled_losses_and_hooks_see_the_gradients_masked() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        seen: list[int] = []
        model.get_parameter("middle.weight").register_post_accumulate_grad_hook(
            lambda p: seen.append(int(p.grad.count_nonzero()))
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        norms = []
        for x, y in batches(5):
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert max(seen) <= 128
        return norms

    both(run)


def test_gradients_that_come_masked_are_left_alone_before_the_step_and_in_it() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for x, y in batches(5):
            loss = F.cross_entropy(model(x), y)
            with Operations() as backward:
                loss.backward()
            with Operations() as step:
                optimizer.step()
            optimizer.zero_grad()
            products.append((backward.names["_foreach_mul_"], step.names["_foreach_mul_"]))

    products: list[tuple[int, int]] = []
    # A step masks weights and their state by one product.
    assert both(run, momentum=0.9).replayed == 4
    assert products == [(1, 1)] * 6 + [(0, 1)] * 4


def test_a_loss_of_two_forward_passes_leaves_masked_gradients() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        norms = []
        for x, y in batches(5):
            (F.cross_entropy(model(x), y) + model(x + 1).square().mean()).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))
            optimizer.step()
            optimizer.zero_grad()
        return norms

    both(run)


def test_outputs_belong_to_the_caller() -> None:
    model, optimizer, _ = attach(ENGINE)
    kept = []
    for x, y in batches(4):
        logits = model(x)
        kept.append((logits.detach(), logits.detach().clone()))
        F.cross_entropy(logits, y).backward()
        optimizer.zero_grad()
    assert all(torch.equal(*pair) for pair in kept)


# --- stages ----------------------------------------------------------------------------------------------------------


def test_each_frozen_front_is_recorded_once_and_those_that_are_over_are_freed() -> None:
    parts, session = Loop(recipe_with("mest-ems"), ENGINE).start()
    train(parts, session)
    found = computes(session)
    fronts = len(set(session.timeline.frozen))
    assert fronts >= 3
    assert Replays.newest.frees >= fronts - 1
    assert len(found._whole.recordings._known) <= 2  # two sizes of batches
    assert found.recorded <= 2 * fronts


def test_a_front_that_comes_back_is_not_recorded_again() -> None:
    recipe = recipe_with("set", "periodic")
    parts, session = Loop(recipe.replace(sieving=None), ENGINE).start()
    train(parts, session)
    frozen = session.timeline.frozen
    changes = sum(one != other for one, other in pairwise(frozen))
    assert changes > len(set(frozen)) - 1  # some came back
    assert computes(session).recorded == len(set(frozen))


def test_masks_that_change_are_read_by_what_was_recorded_before() -> None:
    model, optimizer, session = attach(ENGINE)
    steps(model, optimizer)
    before = session.masks["middle.weight"]
    for _ in range(2):
        session.end_epoch()
        session.begin_epoch()
        steps(model, optimizer)
    assert not torch.equal(session.masks["middle.weight"], before)
    assert computes(session).recorded == 1
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    assert not model.middle.weight.grad[~session.masks["middle.weight"]].any()


def test_a_shape_that_comes_once_in_an_epoch_is_left_to_pytorch_until_it_has_come_often() -> None:
    model, _, session = attach(ENGINE)
    large, small = batches(1)[0][0], batches(1)[0][0][:3]
    for _ in range(7):
        model(large).sum().backward()
        model(large).sum().backward()
        model(small).sum().backward()
    found = computes(session)
    assert (found.recorded, found.eager.total()) == (1, 1 + 7)
    model(small).sum().backward()
    assert found.recorded == 2


def test_evaluation_and_autocast_have_stages_of_their_own() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        found = []
        for x, y in batches(4):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            found += [model(x) for x, _ in batches(4)]
        model.train()
        return [*found, *steps(model, optimizer)]

    assert both(run).recorded == 3


def test_parameters_in_other_memory_are_noticed() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        steps(model, optimizer)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        steps(model, optimizer)

    assert both(run).recorded == 2


def test_a_module_in_the_place_of_another_is_noticed_and_so_is_the_first_one_when_it_is_back() -> None:
    model, _, session = attach(ENGINE)
    first, second = model.head, nn.Linear(16, 3)

    def gradients(head: nn.Module) -> None:
        model.head = head
        for x, y in batches(3):
            head.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            assert head.weight.grad is not None

    for head in (first, second, first):
        gradients(head)
    found = computes(session)
    assert found.recorded == 2
    assert found.replayed == 2 + 3 + 3  # the first call alone was met but once


def test_an_attribute_that_changes_is_noticed() -> None:
    def run(model: Any, optimizer: torch.optim.Optimizer) -> None:
        steps(model, optimizer)
        model.scale, model.drop.p = 0.5, 0.1
        steps(model, optimizer)

    assert both(run).recorded == 2


# --- what is left to PyTorch -----------------------------------------------------------------------------------------


def test_two_forward_passes_before_a_backward_pass_are_right() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for (x, y), (other, _) in zip(batches(5), batches(6)[1:], strict=True):
            (F.cross_entropy(model(x), y) + model(other).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert both(run).eager["an earlier forward pass waits for its backward pass"] == 4


def test_a_backward_pass_whose_forward_pass_is_overwritten_is_an_error() -> None:
    model, optimizer, _ = attach(ENGINE)
    steps(model, optimizer)
    x, y = batches(1)[0]
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(spfde.UsageError, match="overwritten"):
        loss.backward()


class Waiting(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if float(x.sum()) > 1e9 else x * 1.0


class Holding(Net):
    """Reads a parameter from where no module keeps it, as recurrent layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [self.middle.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(F.relu(self.first(x)), self.held[0]))


class Counting(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1.0 + self.calls)


@pytest.mark.parametrize(("kind", "told"), [(Holding, "middle.weight"), (Counting, "attribute")])
def test_what_cannot_be_recorded_is_an_error_that_names_the_reason_and_leaves_the_model_as_it_was(
    kind: type[Net], told: str
) -> None:
    torch.manual_seed(0)
    model, optimizer, _ = attach(ENGINE, kind())
    plain, other, _ = attach("masked", copy.deepcopy(model))
    x, y = batches(1)[0]
    for each, opt in ((model, optimizer), (plain, other)):
        torch.manual_seed(2)
        F.cross_entropy(each(x), y).backward()
        opt.step()
        opt.zero_grad()
    drawn = torch.get_rng_state()
    with pytest.raises(spfde.UsageError, match=told):
        model(x)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert same(model, plain)


def test_a_model_that_waits_for_a_result_is_refused_where_it_is_attached() -> None:
    model = Waiting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*batches(1)[0]), batch_size=4)
    with pytest.raises(spfde.InvalidArgument) as caught:
        spfde.attach(model, optimizer, loader, spfde.Recipe(), epochs=1, engine=ENGINE)
    assert caught.value.problems[0].argument == "engine"
    assert "forward" not in vars(model)


def test_under_auto_it_is_left_to_pytorch_and_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, optimizer, session = attach("auto", Holding())
    assert session._computing.choice.name == ENGINE
    torch.manual_seed(0)
    plain, other, _ = attach("masked", Holding())
    torch.manual_seed(1)
    steps(model, optimizer)
    torch.manual_seed(1)
    steps(plain, other)
    assert same(model, plain)
    assert capfd.readouterr().err.count("middle.weight") == 1


def test_hooks_inside_the_model_see_each_pass() -> None:
    seen: list[Any] = []
    model, optimizer, _ = attach("auto")
    model.middle.register_forward_hook(lambda *_: seen.append(1))
    steps(model, optimizer)
    assert len(seen) == 5


def test_gradients_of_inputs_are_left_to_pytorch() -> None:
    model, _, session = attach(ENGINE)
    for x, _ in batches(3):
        x.requires_grad_()
        model(x).sum().backward()
        assert x.grad is not None
    assert computes(session).recorded == 0


# --- attach and detach -----------------------------------------------------------------------------------------------


def test_detached_the_model_computes_as_its_class_says_and_copies_have_no_engine() -> None:
    model, optimizer, session = attach(ENGINE)
    steps(model, optimizer)
    clone = copy.deepcopy(model)
    assert "_spfde_engine" not in vars(clone) or vars(clone)["_spfde_engine"] is None
    model.eval(), clone.eval()
    x = batches(1)[0][0]
    assert torch.equal(model(x), clone(x))
    session.detach()
    assert "forward" not in vars(model)
    assert torch.equal(model(x), clone(x))


def test_it_says_what_it_did() -> None:
    model, optimizer, session = attach(ENGINE)
    steps(model, optimizer)
    (line,) = [line for line in str(session).splitlines() if "stages recorded" in line]
    assert "1 stages recorded, 4 passes replayed" in line


def test_a_neutral_recipe_takes_it_where_it_is_asked_for() -> None:
    parts = make_parts()
    session = spfde.attach(parts.model, parts.optimizer, parts.loader, spfde.Recipe(), epochs=2, engine=ENGINE)
    plain = make_parts()
    train(parts, session)
    for _ in range(2):
        for x, y in plain.loader:
            F.cross_entropy(plain.model(x), y).backward()
            plain.optimizer.step()
            plain.optimizer.zero_grad()
    assert same(parts.model, plain.model)
    assert computes(session).replayed > 0
