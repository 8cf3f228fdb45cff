from __future__ import annotations

import copy
import logging
import pickle
import types
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.native import needs_kernels
from helpers.training import EPOCHS, Parts, make_parts, step, train
from spfde.app.train.models import build_model
from spfde.engines.native import build, graph

pytestmark = needs_kernels

SPARSE = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=2)


def attach(parts: Parts, recipe: spfde.Recipe = SPARSE, engine: str = "native", **options: Any) -> spfde.Session:
    return spfde.attach(
        parts.model, parts.optimizer, parts.loader, recipe, epochs=EPOCHS, seed=3, engine=engine, **options
    )


def in_full_vectors(parts: Parts) -> Parts:
    """With batches that leave no lanes empty, whatever the processor."""
    return Parts(parts.model, parts.optimizer, DataLoader(parts.loader.dataset, batch_size=16))


def parts_of(model: nn.Module, *shape: int) -> Parts:
    data = TensorDataset(torch.randn(24, *shape), torch.randint(4, (24,)))
    return Parts(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), DataLoader(data, batch_size=8))


@pytest.mark.parametrize("method", [spfde.MEST(sparsity=0.8), spfde.SET(sparsity=0.8), spfde.RigL(sparsity=0.8)])
def test_both_engines_train_alike(method: spfde.sparsity.SparsityMethod, whole_recipe: spfde.Recipe) -> None:
    recipe = whole_recipe.model_copy(update={"sparsity": method, "sieving": None})
    found = {}
    for engine in ("masked", "native"):
        parts = make_parts()
        session = attach(parts, recipe, engine)
        losses = train(parts, session)
        found[engine] = losses, session.masks, dict(parts.model.state_dict())
        session.detach()
    assert len(found["masked"][0]) == 40
    # Rounding differs; the tolerance is what 40 steps make of it.
    assert found["native"][0] == pytest.approx(found["masked"][0], rel=2e-3, abs=2e-3)
    for name, mask in found["masked"][1].items():
        assert (mask == found["native"][1][name]).float().mean() > 0.98, name
    for name, value in found["masked"][2].items():
        assert torch.allclose(found["native"][2][name].float(), value.float(), atol=2e-2), name


def test_rigl_gets_dense_gradients_at_its_mutation_steps_and_sparse_ones_else() -> None:
    parts = make_parts()
    session = attach(parts, spfde.Recipe(sparsity=spfde.RigL(sparsity=0.8), update_interval_epochs=2))
    wanted = []
    seen = []

    def note(epoch: int) -> None:
        wanted.append(bool(session._masks.masker.wants_dense_gradients))

    original = torch.Tensor.register_post_accumulate_grad_hook
    assert original is not None
    for epoch in session.epochs():
        note(epoch)
        before = {name: mask.clone() for name, mask in session.masks.items()}
        for x, y in session.loader:
            step(parts, session, x, y)
        seen.append(any(not torch.equal(mask, before[name]) for name, mask in session.masks.items()))
    assert wanted == seen
    assert any(wanted)
    assert not all(wanted)


def test_detach_gives_the_model_its_own_forward_back() -> None:
    parts = make_parts()
    own = parts.model.forward
    session = attach(parts)
    assert parts.model.forward != own
    session.detach()
    assert "forward" not in vars(parts.model)
    assert parts.model.forward == own


def test_nothing_is_registered_on_the_model() -> None:
    parts = make_parts()
    modules, state = list(parts.model.modules()), list(parts.model.state_dict())
    attach(parts)
    parts.model(torch.randn(3, 2, 8, 8))
    assert list(parts.model.modules()) == modules
    assert list(parts.model.state_dict()) == state


def test_a_model_can_be_copied_and_pickled_while_it_is_attached() -> None:
    parts = make_parts()
    attach(parts)
    x = torch.randn(4, 2, 8, 8)
    parts.model.eval()
    expected = parts.model(x)
    for clone in (copy.deepcopy(parts.model), pickle.loads(pickle.dumps(parts.model))):
        assert torch.allclose(clone(x), expected, atol=1e-5)


def test_the_session_says_what_it_chose_why_and_what_it_left() -> None:
    session = attach(in_full_vectors(make_parts()), engine="auto")
    assert session.engine == "native"
    assert "faster than masked" in session.engine_reason
    told = str(session)
    assert "engine: native (about" in told
    assert "operations in 1 native regions, in PyTorch: fc (Linear; its weight is not sparse)" in told


def test_a_module_with_the_users_hook_stays_in_pytorch_and_the_hook_is_called() -> None:
    parts = make_parts()
    calls = []
    hooked = parts.model.blocks[1]  # type: ignore[index]
    hooked.register_forward_hook(lambda *_: calls.append(1))
    session = attach(parts)
    assert "blocks.1 (Residual; has hooks)" in str(session)
    train(parts, session)
    assert len(calls) == EPOCHS * 5


def test_dropout_in_a_functional_form_follows_the_models_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(F.relu(self.stem(x))).mean((2, 3))
            return self.fc(F.dropout(x, 0.5, training=self.training))

    parts = parts_of(Net(), 2, 8, 8)
    attach(parts)
    x = torch.randn(8, 2, 8, 8)
    assert not torch.equal(parts.model(x), parts.model(x))
    parts.model.eval()
    assert torch.equal(parts.model(x), parts.model(x))


def test_the_engine_of_a_saved_state_is_taken_over() -> None:
    parts = in_full_vectors(make_parts())
    saved = attach(parts, engine="masked").state_dict()
    model, optimizer = copy.deepcopy(parts.model.state_dict()), parts.optimizer.state_dict()
    other = in_full_vectors(make_parts())
    session = attach(other, engine="auto")
    assert session.engine == "native"
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(optimizer)
    session.load_state_dict(saved)
    assert session.engine == "masked"
    assert "forward" not in vars(other.model)


def resumed(engine: str, saved_with: str) -> spfde.Session:
    parts = in_full_vectors(make_parts())
    saved = attach(parts, engine=saved_with).state_dict()
    other = in_full_vectors(make_parts())
    session = attach(other, engine=engine)
    other.model.load_state_dict(parts.model.state_dict())
    session.load_state_dict(saved)
    return session


@pytest.mark.parametrize(("engine", "saved_with"), [("masked", "native"), ("native", "masked")])
def test_an_engine_that_was_asked_for_stays_with_a_warning(engine: str, saved_with: str) -> None:
    with pytest.warns(UserWarning, match=f'saved with engine="{saved_with}" and goes on with engine="{engine}"'):
        assert resumed(engine, saved_with).engine == engine


def test_a_native_state_goes_on_masked_where_there_is_no_compiler_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = attach(make_parts()).state_dict()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    session = attach(make_parts(), engine="auto")
    capsys.readouterr()
    session.load_state_dict(saved)
    assert session.engine == "masked"
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "saved with the native engine, which cannot work here: no C++ compiler" in told


def test_auto_says_in_one_line_what_it_chose_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    session = attach(in_full_vectors(make_parts()), engine="auto")
    assert capsys.readouterr().err == f"spfde: engine native: {session.engine_reason}\n"
    attach(make_parts(), engine="native")
    attach(make_parts(), spfde.Recipe(), engine="auto")
    assert capsys.readouterr().err == ""
    logging.getLogger("spfde").setLevel(logging.WARNING)
    try:
        attach(make_parts(), engine="auto")
    finally:
        logging.getLogger("spfde").setLevel(logging.NOTSET)
    assert capsys.readouterr().err == ""


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    """The modes of the traces that were made for the engine."""
    made: list[bool | None] = []

    def trace(*args: Any, training: bool | None = None, **options: Any) -> Any:
        made.append(training)
        return original(*args, training=training, **options)

    original = graph.trace
    monkeypatch.setattr(graph, "trace", trace)
    return made


@pytest.mark.parametrize("engine", ["auto", "native"])
@pytest.mark.parametrize("cache", [None, spfde.PrefixCache(1)])
def test_a_model_is_traced_once_to_be_chosen_for_and_computed(
    engine: str, cache: spfde.PrefixCache | None, traces: list[bool | None]
) -> None:
    parts = in_full_vectors(make_parts())
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=4)
    session = attach(parts, SPARSE.replace(freezing=freezing), engine, cache=cache)
    assert session.engine == "native"
    for x, y in session.loader:
        step(parts, session, x, y)
    assert traces == [None]


def test_a_cache_is_checked_for_training_whatever_the_mode_at_attaching(traces: list[bool | None]) -> None:
    parts = make_parts()
    parts.model.eval()
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=4)
    attach(parts, SPARSE.replace(freezing=freezing), cache=spfde.PrefixCache(1))
    assert traces == [None, True]


def test_a_model_that_was_changed_after_the_choice_is_traced_anew(traces: list[bool | None]) -> None:
    parts = in_full_vectors(make_parts())
    attach(parts, engine="auto")
    parts.model.eval()
    x = torch.randn(16, 2, 8, 8)
    assert torch.allclose(parts.model(x), copy.deepcopy(parts.model)(x), atol=1e-5)
    assert traces == [None, None]


def test_batches_that_leave_lanes_empty_are_left_to_pytorch() -> None:
    parts = make_parts()
    reasons = {}
    for batch in (1, 2, 16, 17):
        loader = DataLoader(parts.loader.dataset, batch_size=batch)
        session = attach(Parts(parts.model, parts.optimizer, loader), engine="auto")
        reasons[batch] = session.engine
        session.detach()
    assert (reasons[1], reasons[2], reasons[16]) == ("masked", "masked", "native")


def test_what_auto_chose_is_what_the_model_is_called_with() -> None:
    class Gated(nn.Module):
        """A shortcut that broadcasts: the kernels add values of one shape only."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.gate, self.last = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 16, 3, padding=1)
            self.fc = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(F.relu(self.stem(x)))
            return self.fc(self.last(x + self.gate(x)).mean((2, 3)))

    parts = in_full_vectors(parts_of(Gated(), 2, 8, 8))
    session = attach(parts, engine="auto")
    assert session.engine == "native"
    assert "add (adds values of different shapes)" in str(session)
    train(parts, session)


def test_a_forward_on_the_instance_is_masked_under_auto_and_refused_by_name_else() -> None:
    def patched() -> Parts:
        parts = make_parts()
        parts.model.forward = types.MethodType(  # type: ignore[method-assign]
            lambda self, x: type(self).forward(self, x) + 1.0, parts.model
        )
        return parts

    parts = patched()
    assert attach(parts, engine="auto").engine == "masked"
    with pytest.raises(spfde.InvalidArgument, match="has a forward of its own"):
        attach(patched())


def test_a_neutral_recipe_is_masked_whatever_was_asked_for() -> None:
    assert attach(make_parts(), spfde.Recipe()).engine == "masked"


def test_little_sparsity_is_left_to_pytorch_unless_native_was_asked_for() -> None:
    little = spfde.Recipe(sparsity=spfde.StaticSparse(sparsity=0.05))
    session = attach(make_parts(), little, "auto")
    assert session.engine == "masked"
    assert "native engine would take about" in session.engine_reason
    assert attach(make_parts(), little, "native").engine == "native"


def test_without_a_compiler_auto_is_masked_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    session = attach(make_parts(), engine="auto")
    assert session.engine == "masked"
    assert "no C++ compiler" in session.engine_reason
    with pytest.raises(spfde.SpfdeError, match="no C\\+\\+ compiler"):
        attach(make_parts())


def test_a_failed_build_is_masked_under_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise build.KernelsUnavailable("the build failed (no such flag)")

    monkeypatch.setattr(build, "load", fail)
    session = attach(in_full_vectors(make_parts()), engine="auto")
    assert (session.engine, "the build failed" in session.engine_reason) == ("masked", True)


class Undecided(nn.Module):
    """Its way depends on the data, so it cannot be traced symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[0] > 1_000_000:
            x = -x
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "shape", "match"),
    [
        (Undecided(), (2, 8, 8), "cannot be traced"),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(16, 4)), (2, 8), "1 .Conv1d."),
    ],
    ids=["undecided", "1d"],
)
def test_a_model_that_the_kernels_cannot_compute_is_refused_with_the_reason(
    model: nn.Module, shape: tuple[int, ...], match: str
) -> None:
    with pytest.raises(spfde.SpfdeError, match=match):
        attach(parts_of(copy.deepcopy(model), *shape))
    session = attach(parts_of(copy.deepcopy(model), *shape), engine="auto")
    assert session.engine == "masked"


def test_a_compiled_model_stays_masked() -> None:
    parts = make_parts()
    model = torch.compile(parts.model, backend="eager")
    parts = Parts(model, parts.optimizer, parts.loader)  # type: ignore[arg-type]
    with pytest.raises(spfde.SpfdeError, match=r"compiled by torch\.compile"):
        attach(parts)
    assert attach(parts, engine="auto").engine == "masked"


def test_parameters_in_double_precision_are_refused_by_name() -> None:
    parts = make_parts()
    parts.model.double()
    data = TensorDataset(torch.randn(8, 2, 8, 8).double(), torch.randint(4, (8,)))
    parts = Parts(parts.model, parts.optimizer, DataLoader(data, batch_size=4))
    with pytest.raises(spfde.SpfdeError, match=r"blocks\.0\.conv1\.weight is torch\.float64"):
        attach(parts)


def test_the_spfde_preset_trains_a_resnet_natively_with_freezing_and_sieving() -> None:
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=4, in_channels=2, image_size=(8, 8))
    parts = Parts(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), make_parts().loader)
    session = attach(parts, spfde.presets.spfde)
    losses = train(parts, session)
    assert session.frozen_blocks > 0
    assert sum(losses[-4:]) < sum(losses[:4])
    for name, mask in session.masks.items():
        assert not bool((dict(model.named_parameters())[name] * ~mask).any())


def test_a_checkpointed_model_has_the_gradients_of_one_that_is_not() -> None:
    """What checkpointing saves can be unpacked but once."""
    gradients = []
    for checkpointed in (False, True):
        parts = in_full_vectors(make_parts())
        session = attach(parts)
        x, y = next(iter(session.loader))
        call = partial(checkpoint, parts.model, use_reentrant=False) if checkpointed else parts.model
        F.cross_entropy(call(x), y).backward()
        gradients.append([p.grad for p in parts.model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
