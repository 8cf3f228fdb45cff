"""A file's weights in a model that computes by the native kernels: what it gives, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import spfde
from helpers.native import NATIVE, needs_kernels
from helpers.training import SmallNet, make_parts
from spfde.core.errors import InvalidArgument, UsageError, WeightsFileError
from spfde.engines.native.tape import Tape
from spfde.export import load, save_compressed, save_dense


def sparse_net() -> SmallNet:
    """A tenth of the weights of its convolutions, and norms that have seen something."""
    torch.manual_seed(0)
    model = SmallNet()
    for _ in range(3):
        model(torch.randn(16, 2, 8, 8) * 2 + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.masked_fill_(torch.rand_like(parameter) < 0.9, 0)
    return model.eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_compressed(sparse_net().state_dict(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def images(n: int) -> Tensor:
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(n))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


@pytest.mark.parametrize("engine", [None, "masked", NATIVE])
def test_a_convolution_with_its_norm_gives_what_is_worked_out_by_hand(engine: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0), nn.ReLU())
    state = net.state_dict()
    state["0.weight"] = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1)
    for name, value in (("weight", 2.0), ("bias", 1.0), ("running_mean", 1.0), ("running_var", 4.0)):
        state[f"1.{name}"] = torch.tensor([value])
    save_dense(state, tmp_path / "x")
    found = load(tmp_path / "x", model=net, engine=engine)
    assert found is net
    # max(0, 2 (3 x - 1) / 2 + 1) = max(0, 3 x), of the first channel alone.
    x = torch.tensor([[[[0.5]], [[9.0]]], [[[-1.0]], [[9.0]]]])
    assert outputs(found, x).flatten().tolist() == [1.5, 0.0]


@needs_kernels
def test_batches_of_all_sizes_agree_with_pytorch(path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    plain = load(path, model=SmallNet())
    assert not native.training
    assert not plain.training
    for n in (1, 64, 7, 33, 2, 64):
        found = native(images(n))
        assert not found.requires_grad
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, outputs(plain, images(n)), rtol=1e-5, atol=1e-6)


@needs_kernels
def test_bf16_is_chosen_by_autocast_or_by_name(path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    always, never = (load(path, model=SmallNet(), engine="native", precision=each) for each in ("bf16", "fp32"))
    x = images(20)
    single = native(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = native(x)
        assert torch.equal(never(x), single)
    assert half.dtype == torch.bfloat16
    assert torch.equal(always(x), half)
    assert not torch.equal(half.float(), single)
    torch.testing.assert_close(half.float(), single, rtol=0.03, atol=0.03)


@needs_kernels
def test_the_model_stays_what_it_is(path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    state, kept = native.state_dict(), load(path)
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    x = images(3)
    twin = copy.deepcopy(native)
    torch.testing.assert_close(outputs(twin, x), native(x), rtol=1e-5, atol=1e-6)
    assert outputs(twin.train(), x).shape == (3, 4)
    # Other weights than those that were loaded, more of them: they are computed as they are.
    native.load_state_dict(SmallNet().state_dict())
    torch.testing.assert_close(native(x), outputs(copy.deepcopy(native), x), rtol=1e-5, atol=1e-6)


@contextmanager
def plays() -> Iterator[list[bool]]:
    """For each call of the kernels, whether it took weights and norms to be what they were."""
    found: list[bool] = []

    def play(tape: Tape, *args: Any, again: bool = False) -> list[Tensor]:
        found.append(again)
        return plain(tape, *args, again=again)

    plain = Tape.play
    with patch.object(Tape, "play", play):
        yield found


def change_nothing(native: nn.Module) -> None:
    """For comparison."""


def multiply_a_weight(native: nn.Module) -> None:
    with torch.no_grad():
        native.stem.weight.mul_(2)


def move_a_statistic(native: nn.Module) -> None:
    native.blocks[0].bn1.running_mean.add_(1)


def load_a_state(native: nn.Module) -> None:
    native.load_state_dict({name: value * 1.5 for name, value in native.state_dict().items()})


def give_a_parameter_other_memory(native: nn.Module) -> None:
    native.stem.weight.data = native.stem.weight.data * 3


@needs_kernels
@pytest.mark.parametrize(
    "change", [change_nothing, multiply_a_weight, move_a_statistic, load_a_state, give_a_parameter_other_memory]
)
def test_weights_are_read_again_when_they_were_written_to(change: Callable[[nn.Module], None], path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    for n in (1, 20):
        native(images(n))
    change(native)
    with plays() as found:
        for n in (1, 20, 1, 20):
            expected = outputs(copy.deepcopy(native), images(n))
            torch.testing.assert_close(native(images(n)), expected, rtol=1e-5, atol=1e-6)
    assert found == [change is change_nothing] * 2 + [True] * 2


@needs_kernels
def test_a_parameter_that_gets_other_memory_again_and_again_is_read_again(path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    for _ in range(8):
        native(images(1))
        for _ in range(2):  # what the first one left is free for the second
            native.stem.weight.data = native.stem.weight.data * 0.5
            expected = outputs(copy.deepcopy(native), images(20))
            torch.testing.assert_close(native(images(20)), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(native(images(1)), outputs(copy.deepcopy(native), images(1)), rtol=1e-5, atol=1e-6)


@needs_kernels
def test_what_pytorch_counts_no_writes_to_is_read_at_each_call(path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    with torch.inference_mode(), plays() as found:
        norm = native.blocks[0].bn1
        norm.running_mean = norm.running_mean.clone()
        for _ in range(3):
            norm.running_mean.add_(0.5)
            expected = outputs(copy.deepcopy(native), images(1))
            torch.testing.assert_close(native(images(1)), expected, rtol=1e-5, atol=1e-6)
    assert found == [False] * 3


@needs_kernels
def test_in_training_mode_it_is_refused_until_it_evaluates_again(path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    expected = native(images(2))
    with pytest.raises(UsageError, match=r"Call model\.eval\(\), or load the file with engine=\"masked\""):
        native.train()(images(2))
    assert torch.equal(native.eval()(images(2)), expected)


@needs_kernels
def test_nan_stays_nan(path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    x = images(4)
    x[1] = float("nan")
    found = native(x)
    assert found.isnan().any(1).tolist() == [False, True, False, False]


@needs_kernels
def test_threads_may_call_it_in_turn(path: Path) -> None:
    native = load(path, model=SmallNet(), engine="native")
    sizes = [1, 5, 16, 3] * 4
    expected = {n: native(images(n)) for n in set(sizes)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: native(images(n)), sizes))
    assert all(torch.equal(each, expected[n]) for each, n in zip(found, sizes, strict=True))


class Reflecting(nn.Module):
    """Two sparse layers, of which the kernels take one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).relu())
        return found


@needs_kernels
def test_what_the_kernels_do_not_take_is_told(tmp_path: Path) -> None:
    net = Reflecting()
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.weight[:, 0] = 0
    save_dense(net.state_dict(), tmp_path / "x")
    native, expected = load(tmp_path / "x", model=Reflecting(), engine="native"), outputs(net, images(3))
    with pytest.warns(UserWarning, match=r"leaves 1 of 2 sparse layers to PyTorch.*: second\.weight\. .*second \(Conv"):
        found = native(images(3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    native(images(3))  # told once: warnings are errors here


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Linear(6, 4)), ["model='0.bias, 0.weight': are not in", "has no blocks."]),
        (nn.Sequential(SmallNet()), ["0.blocks.0.bn1.bias, ", "42 more': are not in", "has no blocks.0.bn1.bias, "]),
    ],
)
def test_a_model_of_other_names_is_refused(model: nn.Module, told: list[str], path: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidArgument) as refused:
        load(path, model=model)
    assert all(words in str(refused.value) for words in told), str(refused.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


def test_a_model_of_other_shapes_is_refused(path: Path) -> None:
    net = SmallNet()
    net.fc = nn.Linear(6, 5)
    with pytest.raises(InvalidArgument, match=r"model='fc.weight': is \(4, 6\) in .*, and \(5, 6\) in the model"):
        load(path, model=net)


def test_what_cannot_be_meant_is_refused_before_the_file_is_read() -> None:
    nowhere: Any = "nowhere"
    with pytest.raises(InvalidArgument, match=r"engine='nativ': is no engine for inference\. Did you mean 'native'"):
        load(nowhere, model=SmallNet(), engine="nativ")  # type: ignore[call-overload]
    with pytest.raises(InvalidArgument, match="none was passed"):
        load(nowhere, engine="native")  # type: ignore[call-overload]
    with pytest.raises(InvalidArgument, match="precision='bf16': is a setting of the native engine"):
        load(nowhere, model=SmallNet(), precision="bf16")
    with pytest.raises(WeightsFileError, match="is no file"):
        load(nowhere, model=SmallNet())


def test_without_a_compiler_the_remedy_is_pytorch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InvalidArgument, match=r'cannot work here: .*compiler.*Load it with engine="masked"'):
        load(path, model=SmallNet(), engine="native")


@needs_kernels
def test_a_model_that_cannot_be_computed_natively_is_refused_and_stays_as_it_was(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"stem.weight is torch.float64 on cpu"):
        load(path, model=SmallNet().double(), engine="native")
    save_dense(SmallNet().state_dict(), tmp_path / "dense")
    net = SmallNet()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InvalidArgument, match="no convolution has zeros"):
        load(tmp_path / "dense", model=net, engine="native")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    parts = make_parts()
    spfde.attach(parts.model, parts.optimizer, parts.loader, spfde.presets.static, epochs=2, engine="native")
    with pytest.raises(InvalidArgument, match="Detach the session, or pass another model"):
        load(path, model=parts.model, engine="native")
