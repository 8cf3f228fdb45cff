"""What tracing a model leaves of the process: other threads compute, and attach, as if nobody traced."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.native import NATIVE, needs_kernels
from spfde.core.plain_kernels import uncompiled
from spfde.engines.trace import trace as trace_native
from spfde.model.trace import trace


@pytest.fixture(autouse=True)
def _often_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], object], number: int = 4) -> list[object]:
    """What each thread returns, all started at once; the first one's error is raised."""
    found: list[object] = [None] * number
    errors: list[BaseException] = []
    start = threading.Barrier(number)

    def run(index: int) -> None:
        start.wait()
        try:
            found[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def net() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def attached(model: nn.Module, engine: str) -> spfde.Session:
    loader = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = spfde.Recipe(sparsity=spfde.SET(sparsity=0.8), update_interval_epochs=1)
    return spfde.attach(model, optimizer, loader, recipe, epochs=3, engine=engine)


def switches() -> dict[str, object]:
    return {
        "oneDNN": torch.backends.mkldnn.enabled,
        "cuDNN": torch.backends.cudnn.enabled,
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "batches of one": torch.nn.functional._verify_batch_size,
        "calls of modules": nn.Module.__call__,
        "attributes of modules": nn.Module.__getattr__,
    }


@pytest.mark.parametrize("engine", ["masked", NATIVE])
def test_attaching_in_several_threads_gives_each_the_same_and_leaves_every_switch(engine: str) -> None:
    before = switches()
    sessions = in_threads(lambda _: attached(net(), engine))
    assert switches() == before
    first, *others = sessions
    for other in others:
        assert isinstance(first, spfde.Session)
        assert isinstance(other, spfde.Session)
        assert str(other.cost) == str(first.cost)
        assert all(torch.equal(mask, other.masks[name]) for name, mask in first.masks.items())


class Drawing(threading.Thread):
    """Draws from each generator of the process, until it is told to stop; ``found`` has the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[float, float, float]] = []
        self.over = threading.Event()

    def __enter__(self) -> Drawing:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        while not self.over.is_set():
            self.found.append(self.draw())

    @staticmethod
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(np.random.rand())  # noqa: NPY002

    @staticmethod
    def seed() -> None:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002


class Dropping(nn.Module):
    """Leaves a block out by chance, of a generator of the process."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.block, self.draw = nn.Conv2d(8, 8, 3, padding=1), draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.draw() > 0.5 else x


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("masked", spfde.SET(sparsity=0.8)),
        pytest.param("native", spfde.SET(sparsity=0.8), marks=needs_kernels),
        ("masked", spfde.SNIP(sparsity=0.8)),
    ],
    ids=["masked", "native", "scored"],
)
def test_a_thread_s_random_numbers_are_those_that_it_draws_where_nobody_attaches(
    engine: str, method: spfde.sparsity.SparsityMethod
) -> None:
    models = [net() for _ in range(4)]
    recipe = spfde.Recipe(sparsity=method)
    data = TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(4, (16,)))
    Drawing.seed()
    with Drawing() as drawing:
        for model in models:
            loader, optimizer = DataLoader(data, batch_size=8), torch.optim.SGD(model.parameters(), lr=0.1)
            assert spfde.attach(model, optimizer, loader, recipe, epochs=3, engine=engine).engine == engine
    Drawing.seed()
    assert drawing.found
    assert drawing.found == [Drawing.draw() for _ in drawing.found]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(len(torch.randperm(4)))])
def test_a_block_that_draws_is_left_to_pytorch_beside_a_thread_that_draws_too(draw: Callable[[], float]) -> None:
    layers = list(net())
    model = nn.Sequential(*layers[:4], Dropping(draw), *layers[4:])
    with Drawing():
        traced = trace_native(model, torch.zeros(1, 3, 8, 8))
    assert dict(traced.leaves) == {"4": "draws random numbers outside of PyTorch's operators"}


def test_the_switch_of_older_pytorch_is_turned_back_by_the_last_of_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo.eval_frame as dynamo

    monkeypatch.delattr(dynamo, "_use_eager_on_nested_compile", raising=False)
    before = dynamo._stance.stance
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dynamo._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert dynamo._stance.stance == before


class Attending(nn.Module):
    """Attention by its own call, and an encoder, both with fast paths; a recurrent layer; a compiled part."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(x, x, x)
        return self.encoder(self.lstm(attended)[0])


@pytest.mark.parametrize("engine", ["masked", NATIVE])
def test_a_thread_computes_the_same_while_another_one_attaches(engine: str) -> None:
    model, images = Attending().eval(), net().eval()
    x, pictures = torch.randn(2, 5, 8), torch.randn(2, 3, 8, 8)
    over = threading.Event()

    def compute() -> list[Tensor]:
        with torch.no_grad():
            return [model(x), images(pictures)]

    expected = compute()

    def work(index: int) -> int:
        if index:
            for _ in range(3):
                attached(net(), engine)
            over.set()
            return 0
        n_wrong = 0
        while not over.is_set():
            n_wrong += any(not torch.equal(*pair) for pair in zip(compute(), expected, strict=True))
        return n_wrong

    assert in_threads(work, 2)[0] == 0


def test_products_are_found_behind_fused_attention_and_recurrent_kernels_without_a_switch() -> None:
    read: list[object] = []

    class Watched(Attending):
        def forward(self, x: Tensor) -> Tensor:
            read.append(switches())
            return super().forward(x)

    before = switches()
    found = trace(Watched(), torch.zeros(1, 5, 8))
    assert read == [before]
    products = [op for op in found.ops if op.flops and not op.parameters]
    assert len(products) == 4, "twice queries by keys, and weights by values"
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0"} <= {
        name for op in found.ops if op.flops for name in op.parameters
    }
