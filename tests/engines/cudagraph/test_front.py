"""A captured model whose frozen front is kept: two halves are recorded, and the front runs for what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from helpers.caching import ONE, RECIPE, attach, shifted, train_cached
from helpers.captured import ENGINE, computes
from helpers.recording import on_cpu  # noqa: F401  # a fixture
from helpers.training import EPOCHS, Parts, make_parts, step
from spfde.engines import compiled
from spfde.engines.cudagraph.front import CachedFront

pytestmark = pytest.mark.usefixtures("on_cpu")
ALL = RECIPE.replace(sieving=None)


class Fronts:
    """Notes the batches that the front half is run with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.halves = 0
        original = CachedFront.split

        def split(front: CachedFront, args: Any, kwargs: Any, compute: Any) -> Any:
            def counted(what: Any, args: Any, kwargs: Any) -> Any:
                self.sizes.append(len(args[0]))
                return compute(what, args, kwargs)

            found = original(front, args, kwargs, counted)
            self.halves += found is not None
            return found

        monkeypatch.setattr(CachedFront, "split", split)


def test_both_halves_are_recorded_once_a_front_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fronts = Fronts(monkeypatch)
    parts = make_parts()
    session = attach(parts, ALL, ENGINE)
    train_cached(parts, session)
    frozen = session.timeline.frozen
    stages = len(set(frozen) - {0})
    n_cached = sum(count > 0 for count in frozen) * 5
    assert fronts.halves == n_cached
    assert fronts.sizes == [8] * 5 * stages  # one epoch after each freeze step
    found = computes(session)
    assert found.recorded == 1 + 2 * stages
    assert found.eager.total() == 1 + 2 * stages
    assert found.replayed == EPOCHS * 5 + 5 * stages - found.eager.total()


def test_the_front_is_run_in_batches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    fronts = Fronts(monkeypatch)
    parts = make_parts()
    session = attach(parts, ALL, ENGINE)
    for epoch in session.epochs():
        for x, y in session.loader:
            if epoch >= 2:
                ids = session.loader.current_indices
                twice = torch.cat([ids, ids[:5]])
                x, y = torch.cat([x, x[:5]]), torch.cat([y, y[:5]])
                step(parts, session, shifted(x, session.augmentation_seeds(twice)), y)
            else:
                step(parts, session, x, y)
    assert set(fronts.sizes) == {8}
    assert len(fronts.sizes) > 0


def test_numbers_come_back_in_the_type_and_layout_that_the_front_gave_them() -> None:
    parts = make_parts()
    parts.model.to(memory_format=torch.channels_last)
    session = attach(parts, ALL, ENGINE)
    front = computes(session).cached
    seen: list[tuple[torch.dtype, bool]] = []
    for epoch in session.epochs():
        for x, y in session.loader:
            x = shifted(x, session.augmentation_seeds()).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=epoch >= 5):
                if session.frozen_blocks:
                    announced = front._announced
                    _, (kept, *_) = front.split((x,), {}, lambda what, args, kwargs: what.run(*args, **kwargs))
                    seen.append((kept.dtype, kept.is_contiguous(memory_format=torch.channels_last)))
                    front._announced = announced
                loss = F.cross_entropy(parts.model(x).float(), y)
            loss.backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(loss=loss.detach().expand(len(y)))
    assert set(seen[:15]) == {(torch.float32, True)}
    assert set(seen[15:]) == {(torch.bfloat16, True)}


def test_another_autocast_makes_what_is_kept_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fronts = Fronts(monkeypatch)
    parts = make_parts()
    session = attach(parts, ALL, ENGINE)
    for epoch in session.epochs():
        before = len(fronts.sizes)
        for x, y in session.loader:
            x = shifted(x, session.augmentation_seeds())
            with torch.autocast("cpu", torch.bfloat16, enabled=epoch == EPOCHS - 1):
                loss = F.cross_entropy(parts.model(x).float(), y)
            loss.backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
    assert len(fronts.sizes) - before == 5


def drawn(session: spfde.Session) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Epoch, number of the batch, images and labels."""
    for epoch in session.epochs():
        for number, (x, y) in enumerate(session.loader):
            yield epoch, number, x, y


def test_a_layer_in_the_place_of_a_frozen_one_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fronts = Fronts(monkeypatch)
    parts = make_parts()
    session = attach(parts, ALL, ENGINE)
    for epoch, number, x, _ in drawn(session):
        if epoch == EPOCHS - 1 and number == 2:
            before = len(fronts.sizes)
            parts.model.stem.weight = nn.Parameter(parts.model.stem.weight * 1.5, requires_grad=False)
        parts.model(shifted(x, session.augmentation_seeds()))
        if epoch == EPOCHS - 1 and number == 2:
            assert len(fronts.sizes) - before == 1
            return


def test_weights_that_are_loaded_within_an_epoch_are_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fronts = Fronts(monkeypatch)
    parts = make_parts()
    session = attach(parts, ALL, ENGINE)
    for epoch, number, x, y in drawn(session):
        if epoch == EPOCHS - 1 and number == 2:
            before = len(fronts.sizes)
            parts.model.load_state_dict({k: v * 1.5 for k, v in parts.model.state_dict().items()})
        step(parts, session, shifted(x, session.augmentation_seeds()), y)
        if epoch == EPOCHS - 1 and number == 4:
            assert len(fronts.sizes) - before == 3
            return


def test_it_says_where_the_outputs_lie_and_how_much_of_them_there_is() -> None:
    parts = make_parts()
    session = attach(parts, ALL, ENGINE, spfde.PrefixCache(2, precision="int8"))
    assert "cached: nothing of the frozen front yet" in str(session)
    train_cached(parts, session)
    assert "cached: what the frozen front makes of 40 samples in 2 variants, as int8" in str(session)
    small = attach(make_parts(), ALL, ENGINE, spfde.PrefixCache(2, limit_gib=1e-9))
    for _ in small.epochs():
        for _ in small.loader:
            small.augmentation_seeds()
        if small.frozen_blocks:
            break
    assert "cached: nothing fits" in str(small)


def test_auto_takes_it_where_a_cache_is_wanted() -> None:
    session = attach(make_parts(), ALL, "auto")
    assert session.engine == ENGINE


def test_a_folder_is_refused_with_the_reason(tmp_path: Any) -> None:
    with pytest.raises(spfde.InvalidArgument) as refused:
        attach(make_parts(), ALL, ENGINE, spfde.PrefixCache(1, folder=tmp_path))
    (problem,) = refused.value.problems
    assert problem.argument == "cache"
    assert "folder" in problem.rule


def test_detached_it_keeps_nothing() -> None:
    parts = make_parts()
    session = attach(parts, ALL, ENGINE)
    train_cached(parts, session)
    front = computes(session).cached
    assert front._cached.store is not None
    session.detach()
    assert front._cached.store is None
    assert not front._cuts


def test_a_step_is_not_captured_as_one_graph_where_the_front_is_kept() -> None:
    session = attach(make_parts(), ALL, ENGINE)
    assert not session.captures_steps
    with pytest.raises(spfde.InvalidArgument) as refused:
        session.capture(lambda x, y: x)
    assert "cache=" in refused.value.problems[0].rule


# --- with compiled blocks --------------------------------------------------------------------------------------------


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("eagerly")
def test_compiled_blocks_compute_in_both_halves() -> None:
    ends = []
    for compiles in (False, True):
        parts = make_parts()
        session = spfde.attach(
            parts.model,
            parts.optimizer,
            parts.loader,
            ALL,
            epochs=5,
            seed=3,
            engine=ENGINE,
            cache=ONE,
            compile=compiles,
        )
        ends.append(train_cached(parts, session))
        if compiles:
            cut = computes(session).cached._cuts[0]
            called = [
                {str(node.target) for node in half.graph.nodes if node.op == "call_module"}
                for half in (cut.halves.front, cut.halves.back)
            ]
            assert {"stem", "bn", "blocks.0"} <= called[0]
            assert {"blocks.2", "fc"} <= called[1]
    assert ends[0] == ends[1]


# --- when it cannot be -----------------------------------------------------------------------------------------------


class Chain(nn.Sequential):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers, nn.Linear(4, 3))


class Turned(nn.Module):
    """Hands the batch over in its second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 2, 4).transpose(0, 1)
        return self.head(F.relu(self.c(F.relu(self.b(x)))).transpose(0, 1).mean(1))


def refusal(model: nn.Module, data: Tensor, *, blocks: tuple[str, ...] | None = None) -> str:
    loader = DataLoader(TensorDataset(data, torch.zeros(len(data), dtype=torch.long)), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=1, blocks=blocks)
    recipe = spfde.Recipe(freezing=freezing, update_interval_epochs=1)
    with pytest.raises(spfde.InvalidArgument) as refused:
        spfde.attach(model, optimizer, loader, recipe, epochs=6, engine=ENGINE, cache=ONE)
    (problem,) = refused.value.problems
    assert problem.argument == "cache"
    return problem.rule


def test_what_hands_over_no_value_a_sample_is_refused() -> None:
    assert "each sample" in refusal(Turned(), torch.zeros(8, 8).view(8, 2, 4))


def test_layers_that_run_as_a_whole_and_freeze_in_part_are_refused_by_name() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(x)).mean(1))

    assert "encoder (TransformerEncoder)" in refusal(Text(), torch.zeros(8, 2, 4))


def test_dropout_between_frozen_layers_is_refused_and_behind_them_it_draws_in_each_pass() -> None:
    said = refusal(Chain(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(8, 4))
    assert "(Dropout) draws" in said
    torch.manual_seed(0)
    model = Chain(nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), batch_size=4)
    parts = Parts(model, torch.optim.SGD(model.parameters(), lr=0.0), loader)
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=1, blocks=("0", "1"))
    recipe = spfde.Recipe(freezing=freezing, update_interval_epochs=1)
    session = spfde.attach(model, parts.optimizer, loader, recipe, epochs=6, engine=ENGINE, cache=ONE)
    losses = []
    for _ in session.epochs():
        for x, y in session.loader:
            session.augmentation_seeds()
            losses.append(float(step(parts, session, x, y)))
    assert computes(session).cached._cached.store is not None
    assert len(set(losses[-8:])) > 4  # the same samples, weights and kept outputs
