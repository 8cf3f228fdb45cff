"""``attach`` with Accelerate and loaders of all kinds: each epoch's last batch is announced, and all is gathered."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler

import spfde
from helpers import accelerate_runs as runs
from helpers.processes import start
from helpers.training import BATCH, SAMPLES, make_images, make_parts
from spfde.integrations.accelerate import attach

pytestmark = pytest.mark.filterwarnings("ignore")
UNSIEVED = spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8), update_interval_epochs=1)
SIEVED = spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.3, criterion="loss"), update_interval_epochs=1)
EPOCHS = 3


class OwnOrder(Sampler[int]):
    """A sampler of which it cannot be told how many of its samples are in the partial set."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist())

    def __len__(self) -> int:
        return SAMPLES


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(make_images())


def batches() -> list[Any]:
    return [list(batch) for batch in zip(*(t.split(BATCH) for t in make_images().tensors), strict=True)]


def own_batches() -> DataLoader[Any]:
    order = RandomSampler(range(SAMPLES), generator=torch.Generator().manual_seed(0))
    return DataLoader(make_images(), batch_sampler=runs.OwnBatches(order, BATCH, drop_last=False))


STREAMS: dict[str, Any] = {
    "over a stream": lambda: DataLoader(Stream(), batch_size=BATCH),
    "own batch sampler": own_batches,
    "a list of batches": batches,
    "a function": lambda: lambda: iter(batches()),
}


class Loop:
    """The loop of Accelerate's documentation; notes at which batches the optimizer steps."""

    def __init__(self, loader: Any, recipe: Any, *, accumulation: int, prepared: bool = False, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        parts = make_parts()
        self.net, self.optimizer = self.accelerator.prepare(parts.model, parts.optimizer)
        if prepared:
            loader = self.accelerator.prepare(loader)
        how: Any = {"epochs": EPOCHS, "engine": "masked", **options}
        self.session = attach(self.accelerator, self.net, self.optimizer, loader, recipe, **how)
        self.steps: list[bool] = []

    def train(self, stop: int | None = None) -> None:
        for _ in self.session.epochs():
            for x, y in self.session.loader:
                with self.accelerator.accumulate(self.net):
                    logits = self.net(x)
                    self.accelerator.backward(F.cross_entropy(logits, y))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.session.observe(logits, y)
                self.steps.append(self.accelerator.sync_gradients)
                if len(self.steps) == stop:
                    return

    def states(self) -> Any:
        held = self.net, self.optimizer, self.session
        return copy.deepcopy([each.state_dict() for each in held])

    def load(self, states: Any) -> None:
        for each, state in zip((self.net, self.optimizer, self.session), states, strict=True):
            each.load_state_dict(state)


def of_five(accumulation: int) -> list[bool]:
    """At which of five batches accumulation steps: at each so-many-th, and at the last."""
    return [batch % accumulation == 0 or batch == 5 for batch in range(1, 6)]


@pytest.mark.parametrize("stop", [6, 7, 8, 9])
def test_a_run_that_goes_on_within_an_epoch_steps_at_its_end(stop: int) -> None:
    """Five batches an epoch, two a step. Accelerate counts anew from where it goes on."""
    whole, stopped, resumed = (Loop(make_parts().loader, UNSIEVED, accumulation=2) for _ in range(3))
    whole.train()
    assert whole.steps == of_five(2) * EPOCHS
    stopped.train(stop)
    resumed.load(stopped.states())
    resumed.train()
    left = 10 - stop
    assert resumed.steps[:left] == [batch % 2 == 0 or batch == left for batch in range(1, left + 1)]
    assert resumed.steps[left:] == of_five(2)
    if stop in (7, 9):  # behind a step; what was accumulated before the others is in no state
        assert all(torch.equal(*pair) for pair in zip(whole.net.parameters(), resumed.net.parameters(), strict=True))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_accumulation_ends_with_an_epoch_whose_length_is_not_known(workers: int) -> None:
    kept = SAMPLES - int(0.3 * SAMPLES)  # 28: four batches, the last one of 4
    loop = Loop(
        DataLoader(make_images(), batch_size=BATCH, sampler=OwnOrder(), num_workers=workers), SIEVED, accumulation=3
    )
    loop.train()
    assert loop.steps == [False, False, True, True] * EPOCHS
    assert [row.samples for row in loop.session.cost.rows] == [kept] * EPOCHS


@pytest.mark.parametrize("sampler", [None, OwnOrder()], ids=["known length", "unknown length"])
def test_all_samples_of_a_sieved_epoch_are_gathered_for_metrics(sampler: Any) -> None:
    accelerator = Accelerator(cpu=True)
    parts = make_parts()
    loader = DataLoader(make_images(), batch_size=16, sampler=sampler)
    session = attach(accelerator, *accelerator.prepare(parts.model, parts.optimizer, loader), SIEVED, epochs=EPOCHS)
    gathered = 0
    for _ in session.epochs():
        for x, y in session.loader:
            session.observe(parts.model(x), y)
            gathered += len(accelerator.gather_for_metrics(y))
    assert gathered == EPOCHS * 28  # 16 and 12; of the whole data set 8 would be left over


@pytest.mark.long
def test_two_ranks_gather_each_sample_of_a_sieved_epoch_once(tmp_path: Path) -> None:
    """Of 32 samples in batches of 6 the last round is one of 6 and one of 2, or, of 24 in 8s, one and a repetition."""
    done = start(runs.__file__, str(tmp_path), "gather", ranks=2)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "rank0.pt")
    assert found["gathered"] == [sorted(each) for each in found["partial"]]


@pytest.mark.long
def test_two_ranks_share_the_batches_that_accelerate_deals_out(tmp_path: Path) -> None:
    """Five batches of 8: the sixth is the first once more, so that both take three."""
    done = start(runs.__file__, str(tmp_path), "stream", ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert sorted(first["seen"] + second["seen"]) == sorted([*range(SAMPLES), *range(BATCH)])
    assert first["samples"] == second["samples"] == [SAMPLES + BATCH] * runs.EPOCHS


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_loader_of_any_kind_trains_what_the_loop_of_the_library_trains(kind: str, prepared: bool) -> None:
    options: Any = {"sample": make_images().tensors[0][:1], "samples_per_epoch": SAMPLES}
    loop = Loop(STREAMS[kind](), UNSIEVED, accumulation=1, prepared=prepared, **options)
    loop.train()
    parts = make_parts()
    options = {**options, "epochs": EPOCHS, "engine": "masked"}
    session = spfde.attach(parts.model, parts.optimizer, STREAMS[kind](), UNSIEVED, **options)
    for _ in session.epochs():
        for x, y in session.loader:
            F.cross_entropy(parts.model(x), y).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(loop.net.parameters(), parts.model.parameters(), strict=True))
    assert [row.cost for row in loop.session.cost.rows] == [row.cost for row in session.cost.rows]


@pytest.mark.parametrize("kind", STREAMS)
def test_accumulation_ends_with_an_epoch_of_a_loader_of_any_kind(kind: str) -> None:
    options: Any = {"sample": make_images().tensors[0][:1], "samples_per_epoch": SAMPLES}
    loop = Loop(STREAMS[kind](), UNSIEVED, accumulation=3, **options)
    loop.train()
    assert loop.steps == of_five(3) * EPOCHS


def test_batches_come_from_elsewhere_where_there_is_no_loader() -> None:
    options: Any = {"sample": make_images().tensors[0][:1], "samples_per_epoch": SAMPLES}
    loop = Loop(None, UNSIEVED, accumulation=1, **options)
    for _ in loop.session.epochs():
        for x, y in batches():
            loop.accelerator.backward(F.cross_entropy(loop.net(x), y))
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert [row.steps for row in loop.session.cost.rows] == [5] * EPOCHS


@pytest.mark.parametrize("kind", [*STREAMS, "none"])
def test_a_loader_that_cannot_be_sieved_is_refused_before_anything_is_changed(kind: str) -> None:
    loader = STREAMS.get(kind, lambda: None)()
    parts = make_parts()
    before = copy.deepcopy(parts.model.state_dict())
    with pytest.raises(spfde.InvalidArgument) as caught:
        attach(Accelerator(cpu=True), parts.model, parts.optimizer, loader, SIEVED, epochs=EPOCHS)
    assert all(problem.argument.startswith("loader") for problem in caught.value.problems)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.model.state_dict().items())
    spfde.attach(parts.model, parts.optimizer, parts.loader, SIEVED, epochs=EPOCHS).detach()
