"""What a frozen front computes, kept on a real GPU: tests/engines/cudagraph/test_front.py shows the rest on the CPU."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.app.train.models import build_model
from spfde.engines.cudagraph import engine as engine_module
from spfde.engines.kept_outputs import OutputStore

pytestmark = pytest.mark.usefixtures("deterministic")
EPOCHS, SAMPLES, BATCH = 8, 224, 32


class Run:
    """ResNet-8 whose images are shifted by their seeds; a block is frozen at epochs 2 and 4."""

    def __init__(self, cache: spfde.PrefixCache | None, *, bf16: bool = True) -> None:
        torch.manual_seed(0)
        model = build_model("resnet8", num_classes=10, in_channels=3, image_size=32, seed=0)
        self.model, self.bf16 = model.cuda().to(memory_format=torch.channels_last), bf16
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(
            torch.randn(SAMPLES, 3, 32, 32, generator=generator), torch.randint(10, (SAMPLES,), generator=generator)
        )
        loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(2))
        recipe = spfde.Recipe(
            sparsity=spfde.MEST(sparsity=0.9),
            freezing=spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=2),
            update_interval_epochs=2,
        )
        self.session = spfde.attach(
            self.model, self.optimizer, loader, recipe, epochs=EPOCHS, engine="cudagraph", cache=cache
        )
        self.losses: list[torch.Tensor] = []
        self.x: torch.Tensor | None = None  # as the model got it last

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        seeds = self.session.augmentation_seeds()
        x = torch.stack([torch.roll(image, int(seed % 3), 2) for image, seed in zip(x, seeds, strict=True)])
        x, y = x.cuda().contiguous(memory_format=torch.channels_last), y.cuda()
        self.x = x
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def train(self, *, save_at: int | None = None) -> tuple[list[float], bytes]:
        file = io.BytesIO()
        for epoch in self.session.epochs():
            if epoch == save_at:
                states = [each.state_dict() for each in (self.model, self.optimizer, self.session)]
                torch.save(copy.deepcopy(states), file)
            for x, y in self.session.loader:
                self.step(x, y)
        return [float(loss) for loss in self.losses], file.getvalue()

    @property
    def front(self) -> Any:
        return self.session._computing.engine.computes.cached


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_training_from_what_is_kept_is_training_on_what_is_computed(precision: str) -> None:
    cached, plain = Run(spfde.PrefixCache(1, precision=precision)), Run(None)
    found = cached.train()[0]
    expected = plain.train()[0]
    assert cached.front._cached.store.device.type == "cuda"
    torch.testing.assert_close(found[: 2 * 7], expected[: 2 * 7], rtol=1e-3, atol=1e-3)  # before anything is frozen
    assert sum(found[-7:]) < sum(found[:7])
    print(session_line(cached))


def session_line(run: Run) -> str:
    return next(line for line in str(run.session).splitlines() if "cached:" in line)


def test_the_kept_outputs_are_the_front_s_rounded() -> None:
    run = Run(spfde.PrefixCache(1), bf16=False)
    for epoch in run.session.epochs():
        for x, y in run.session.loader:
            run.step(x, y)
            ids = run.session.loader.current_indices
        if epoch == 2:
            break
    store = run.front._cached.store
    (kept,) = store.get(torch.arange(SAMPLES))
    assert kept.is_cuda
    assert kept.is_contiguous(memory_format=torch.channels_last)
    assert bool(store.has(torch.arange(SAMPLES)).all())
    with torch.no_grad():
        (computed,) = run.front._cuts[0].halves.front(run.x)
    torch.testing.assert_close(kept[ids], computed, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("save_at", [3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(save_at: int) -> None:
    cache = spfde.PrefixCache(1)
    losses, saved = Run(cache).train(save_at=save_at)
    again = Run(cache)
    states = torch.load(io.BytesIO(saved), weights_only=False)
    for each, state in zip((again.model, again.optimizer, again.session), states, strict=True):
        each.load_state_dict(state)
    assert again.train()[0] == losses[save_at * 7 :]


def test_main_memory_gives_the_same_numbers_as_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = Run(spfde.PrefixCache(1)).train()[0]
    monkeypatch.setattr(engine_module, "kept_on", lambda device, n_bytes: torch.device("cpu"))
    run = Run(spfde.PrefixCache(1))
    assert run.train()[0] == on_gpu
    assert run.front._cached.store.device.type == "cpu"
    assert "in main memory" in session_line(run)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_is_kept_is_read_without_waiting(device: str) -> None:
    store = OutputStore(64, [(4, 8, 8)], device=torch.device(device))
    slots, values = torch.arange(64), torch.randn(64, 4, 8, 8, device="cuda")
    store.put(slots, [values])
    torch.cuda.set_sync_debug_mode("error")
    try:
        (found,) = store.get(slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, values.half().float())
