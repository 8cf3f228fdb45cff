"""A model under what must see PyTorch's own operators: compilers, exports, transforms, dispatch modes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import spfde
from helpers.native import needs_kernels, random_masks, relative_error, twin
from spfde.engines.native.model import NativeModel
from spfde.engines.native.program import Program

pytestmark = needs_kernels

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def attached() -> tuple[nn.Module, nn.Module, NativeModel]:
    model = net().eval()
    masks = random_masks(model, 0.3)
    reference, engine = twin(model, masks, torch.float32)
    model(X)
    return model, reference, engine


def export(model: nn.Module) -> Tensor:
    found: Tensor = torch.export.export(model, (X,)).module()(X)
    return found


def vmapped(model: nn.Module) -> Tensor:
    found: Tensor = torch.func.vmap(lambda x: model(x[None])[0])(X)
    return found


def under_a_counter(model: nn.Module) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        found: Tensor = model(X)
    assert counter.get_total_flops() > 0
    return found


def compiled(model: nn.Module) -> Tensor:
    with pytest.warns(UserWarning, match="compiled after"):
        found: Tensor = torch.compile(model, backend="eager", fullgraph=True)(X)
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Converting a tensor")
@pytest.mark.parametrize(
    "use",
    [
        export,
        vmapped,
        under_a_counter,
        compiled,
        lambda model: torch.jit.trace(model, (X,), check_trace=False)(X),
        lambda model: make_fx(model)(X)(X),
        lambda model: torch.fx.symbolic_trace(model)(X),
        lambda model: torch.func.jvp(model, (X,), (X,))[0],
    ],
    ids=["export", "vmap", "counter", "compile", "jit", "make_fx", "fx", "jvp"],
)
def test_what_records_a_model_sees_pytorch_and_the_kernels_go_on_afterwards(
    use: Callable[[nn.Module], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference, engine = attached()
    n_captures = engine._n_captures
    played: list[int] = []
    play = Program.forward
    monkeypatch.setattr(Program, "forward", lambda *args: (played.append(1), play(*args))[1])
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative_error(use(model), reference(X)) < 1e-5
        assert not played
        assert relative_error(model(X), reference(X)) < 1e-5
    assert played
    assert engine._n_captures == n_captures


def test_inference_mode_is_computed_by_the_kernels() -> None:
    model = net()
    masks = random_masks(model, 0.3)
    reference, engine = twin(model, masks, torch.float32)
    for each in (model, reference):
        each(X)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        assert relative_error(model.eval()(X), reference.eval()(X)) < 1e-3
    assert len(engine.taken) == 2
    model.train()(X).sum().backward()


def attach(model: nn.Module, engine: str) -> tuple[spfde.Session, torch.optim.Optimizer]:
    loader = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.8), update_interval_epochs=1)
    return spfde.attach(model, optimizer, loader, recipe, epochs=3, engine=engine), optimizer


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_model_that_is_compiled_before_is_computed_by_the_masked_engine(how: str) -> None:
    model: nn.Module = net()
    if how == "in place":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    with pytest.raises(spfde.InvalidArgument, match="compile"):
        attach(model, "native")
    session, _ = attach(model, "auto")
    assert "engine: masked" in str(session)


@pytest.mark.filterwarnings("ignore:before .* no forward pass:UserWarning")  # see test_passes.py
def test_a_model_that_is_compiled_after_trains_as_under_the_masked_engine_and_it_is_said() -> None:
    def losses(engine: str) -> list[float]:
        model = net()
        torch._dynamo.reset()
        torch.manual_seed(2)
        session, optimizer = attach(model, engine)
        forward, found = torch.compile(model, backend="eager"), []
        for _ in session.epochs():
            for x, y in session.loader:
                loss = F.cross_entropy(forward(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        return found

    with pytest.warns(UserWarning, match='engine="masked"'):
        native = losses("native")
    assert native == losses("masked")
