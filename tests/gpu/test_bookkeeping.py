"""On a GPU: a step waits for nothing, its masks take few kernels, and they are the same as on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

import spfde
from helpers.training import BATCH, SmallNet, make_images
from spfde.sparsity.together import Clearing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(recipe: spfde.Recipe, *, fused: bool = False) -> tuple[torch.nn.Module, spfde.Session]:
    """Two epochs, of which no step but the first ones may wait for the GPU."""
    torch.manual_seed(0)
    model = SmallNet().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    loader = DataLoader(make_images(), BATCH)
    session = spfde.attach(model, optimizer, loader, recipe, epochs=8, engine="masked")
    for epoch in range(2):
        session.begin_epoch()
        for number, (images, labels) in enumerate(session.loader):
            x, y = images.cuda(), labels.cuda()
            with waiting_is_an_error() if number >= 2 else nullcontext():
                logits = model(x)
                F.cross_entropy(logits, y).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                session.observe(logits, y)
        if epoch == 0:
            session.end_epoch()
    return model, session


@pytest.mark.parametrize("name", ["spfde", "mest", "rigl", "snfs", "topkast", "gmp"])
@pytest.mark.parametrize("fused", [False, True])
def test_no_step_waits_for_the_gpu(name: str, fused: bool) -> None:
    model, session = run(spfde.presets.get(name).replace(update_interval_epochs=2), fused=fused)
    assert all(not model.get_parameter(key)[~mask].any() for key, mask in session.masks.items())


@pytest.mark.parametrize("criterion", ["forgetting", "loss", "el2n", "random"])
def test_no_report_waits_for_the_gpu_with_ids_there_or_not(criterion: str) -> None:
    sieving = spfde.DataSieving(removed_fraction=0.25, criterion=criterion)
    recipe = spfde.Recipe(sieving=sieving, update_interval_epochs=2)
    run(recipe)
    model = SmallNet().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = spfde.attach(model, optimizer, DataLoader(make_images(), BATCH), recipe, epochs=8, engine="masked")
    session.begin_epoch()
    for x, y in session.loader:
        ids = session.loader.current_indices
        assert ids is not None
        there, y = ids.cuda(), y.cuda()
        logits = model(x.cuda())
        with waiting_is_an_error():
            session.observe(logits, y, there)
            if criterion in ("forgetting", "loss"):
                session.observe(loss=F.cross_entropy(logits.detach(), y, reduction="none"), indices=there)
    session.end_epoch()


def test_masks_of_many_layers_take_few_kernels_and_leave_the_bits_that_a_cpu_leaves() -> None:
    optimizers, kernels = [], 0
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(30)))
        model = model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        loader = DataLoader(make_images(), BATCH)
        recipe = spfde.Recipe(sparsity=spfde.StaticSparse(sparsity=0.5))
        session = spfde.attach(model, optimizer, loader, recipe, epochs=2, engine="masked", sample=torch.zeros(2, 16))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for parameter in model.parameters():
            parameter.data.view(-1)[::7] = float("nan")
        layers = session._masks.masker.live  # type: ignore[attr-defined]
        clear = Clearing()
        clear(layers)
        if device == "cuda":
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                clear(layers)
                torch.cuda.synchronize()
            kernels = sum(e.count for e in found.key_averages() if "kernel" in e.key and not e.key.startswith("cuda"))
        optimizers.append((model, optimizer))
    assert 0 < kernels <= 4
    (one, first), (other, second) = optimizers
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert p.isnan().any() or name in ("0.weight", "29.weight")
        assert torch.equal(p.detach().view(torch.int32), q.detach().cpu().view(torch.int32))
        assert torch.equal(first.state[p]["momentum_buffer"], second.state[q]["momentum_buffer"].cpu())
