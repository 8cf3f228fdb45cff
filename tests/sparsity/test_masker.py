"""Masks over the epochs: counts, soft bound, freezing, inference and state. Steps are in test_masker_steps."""

import copy
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.masking import MaskedRun
from helpers.short import short
from spfde.core.errors import StateMismatch, UsageError
from spfde.sparsity import (
    DSR,
    GMP,
    MEST,
    NM,
    SET,
    SNFS,
    STR,
    Block,
    Channels,
    DeepR,
    RigL,
    SparsityMethod,
    StaticSparse,
    TopKAST,
)
from spfde.sparsity.distribution import active_count
from spfde.sparsity.layers import select_layers
from spfde.sparsity.masks import infer_mask

EVERY_METHOD = [
    StaticSparse(sparsity=0.8),
    StaticSparse(sparsity=0.8, init="magnitude"),
    SET(sparsity=0.8),
    SET(sparsity=0.8, distribution="erk", decay="constant"),
    RigL(sparsity=0.8),
    RigL(sparsity=0.8, distribution="erk"),
    MEST(sparsity=0.8),
    MEST(sparsity=0.8, gradient_weight=0.5),
    MEST(sparsity=0.8, soft_bound=False),
    MEST(sparsity=0.8, soft_bound=False, gradient_weight=0.5),
    DeepR(sparsity=0.8, noise=0.1),
    DSR(sparsity=0.8, threshold=0.05),
    SNFS(sparsity=0.8),
    TopKAST(sparsity=0.8),
    GMP(sparsity=0.8),
    STR(sparsity=0.8, threshold_start=-3.0, threshold_decay=1.0),
    SET(sparsity=0.8, structure=Block(rows=5, columns=5)),
    RigL(sparsity=0.8, structure=Channels()),
    MEST(sparsity=0.8, structure=Block(rows=5, columns=1)),
    SET(sparsity=0.6, structure=NM(n=2, m=5), exclude=("3.weight",)),
    RigL(sparsity=0.6, structure=NM(n=2, m=5), exclude=("3.weight",)),
    SNFS(sparsity=0.8, structure=Block(rows=5, columns=1)),
]
IDS = [f"{i}-{m.name}" for i, m in enumerate(EVERY_METHOD)]


class Run(MaskedRun):
    """A tiny model, its optimizer and its masker, with steps on seeded data."""

    def __init__(
        self,
        method: SparsityMethod,
        *,
        model: nn.Module | None = None,
        epochs: int = 8,
        interval: int = 2,
        shape: tuple[int, ...] = (10,),
        **timeline: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = model or nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 15), nn.Linear(15, 5))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        order = [name for name, _ in self.model.named_parameters()]
        layers = select_layers(self.model, method, order=order, head=[])
        super().__init__(layers, optimizer, method, epochs=epochs, interval=interval, **timeline)
        self.shape = shape
        self.data = torch.Generator().manual_seed(2)

    def step(self) -> None:
        self.optimizer.zero_grad()
        out = self.model(torch.randn(4, *self.shape, generator=self.data))
        out = out[0] if isinstance(out, tuple) else out
        out.square().mean().backward()
        self.optimizer.step()

    def epoch(self, epoch: int, steps: int = 2) -> None:
        self.begin_epoch(epoch)
        for _ in range(steps):
            self.step()

    def freeze(self, name: str) -> None:
        """What the freezer does to the weight of a frozen block."""
        weight = self.model.get_parameter(name).requires_grad_(False)
        weight.grad = None
        self.optimizer.state.pop(weight, None)

    def check_counts(self) -> None:
        for name, mask in self.masker.masks.items():
            weight = self.model.get_parameter(name)
            assert int(mask.sum()) == self.counts[name]
            assert (weight.detach()[~mask] == 0).all()


def _weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_first_mask_is_exact_and_the_weights_outside_are_zero() -> None:
    run = Run(StaticSparse(sparsity=0.9))
    assert run.targets == {"2.weight": 30, "3.weight": 8}
    assert run.masker.densities() == {"2.weight": 0.1, "3.weight": 8 / 75}
    assert int(run.model[2].weight.count_nonzero()) == 30
    assert int(run.model[0].weight.count_nonzero()) == 200
    run.check_counts()


def test_the_magnitude_start_keeps_the_largest_initial_weights() -> None:
    torch.manual_seed(0)
    weight = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 15))[2].weight.detach().abs().flatten()
    run = Run(StaticSparse(sparsity=0.9, init="magnitude"))
    assert set(run.masker.masks["2.weight"].flatten().nonzero().squeeze(1).tolist()) == set(
        weight.topk(30).indices.tolist()
    )


def test_a_static_mask_never_changes_and_draws_nothing() -> None:
    run = Run(StaticSparse(sparsity=0.9))
    before, drawn = run.masker.masks, run.masker.generator.get_state()
    for epoch in range(run.epochs):
        run.epoch(epoch)
    assert _same(before, run.masker.masks)
    assert torch.equal(drawn, run.masker.generator.get_state())


def test_the_soft_bound_takes_the_sparsity_from_085_over_0875_to_090() -> None:
    model = nn.Sequential(nn.Linear(10, 40), nn.Linear(40, 10))
    run = Run(MEST(sparsity=0.9), model=model, epochs=16, interval=1)
    seen = []
    for epoch in range(16):
        run.epoch(epoch, steps=1)
        run.check_counts()
        seen.append(1 - run.masker.densities()["1.weight"])
    assert seen == pytest.approx([0.85] * 9 + [0.875] * 3 + [0.9] * 4)


def test_the_last_epoch_is_at_target_even_when_it_is_no_update_epoch() -> None:
    run = Run(MEST(sparsity=0.8, soft_bound_steps=(0.05,), decay_at=()), epochs=6, interval=4)
    for epoch in range(5):
        run.epoch(epoch)
        assert run.counts["2.weight"] == 60 + 15
    before = run.masker.masks
    run.begin_epoch(5)
    assert run.counts["2.weight"] == 60
    assert not any((run.masker.masks[name] & ~before[name]).any() for name in before)
    run.check_counts()


def test_a_run_of_one_epoch_is_at_target_throughout() -> None:
    run = Run(MEST(sparsity=0.8), epochs=1)
    run.epoch(0)
    assert run.counts["2.weight"] == 60


def test_a_mutation_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(4, 1, bias=False))
    run = Run(SET(sparsity=0.5, drop_fraction=0.5, decay="constant"), model=model, epochs=4, interval=1)
    layer, mask = model[1].weight, run.masker.masks["1.weight"][0]
    with torch.no_grad():
        layer[0, mask] = torch.tensor([3.0, -0.5])
    run.optimizer.state[layer]["momentum_buffer"] = torch.where(mask, 7.0, 0.0).view(1, 4)
    survivor = int(mask.nonzero()[0])
    run.begin_epoch(1)
    assert run.masker.masks["1.weight"].sum() == 2
    assert run.masker.masks["1.weight"][0, survivor]
    assert layer[0, survivor] == 3.0
    assert layer.count_nonzero() == 1  # what was grown, returned or not, starts at zero
    momentum = run.optimizer.state[layer]["momentum_buffer"]
    assert momentum[0, survivor] == 7.0
    assert momentum.count_nonzero() == 1


def test_nothing_mutates_between_update_epochs() -> None:
    run = Run(SET(sparsity=0.8), interval=3)
    run.epoch(0)
    before = run.masker.masks
    for epoch in (1, 2):
        run.epoch(epoch)
        assert _same(before, run.masker.masks)
    run.epoch(3)
    assert not _same(before, run.masker.masks)


def test_layers_mutate_apart_from_each_other() -> None:
    # A layer that is frozen draws nothing, and the rest still mutates.
    run = Run(SET(sparsity=0.8), frozen={2: 1})
    run.epoch(0)
    before = run.masker.masks
    run.epoch(2)
    assert torch.equal(before["2.weight"], run.masker.masks["2.weight"])
    assert not torch.equal(before["3.weight"], run.masker.masks["3.weight"])


def test_a_layer_that_is_dense_by_override_is_never_touched() -> None:
    run = Run(SET(sparsity=0.8, overrides={"3.*": 0.0}))
    for epoch in range(run.epochs):
        run.epoch(epoch)
        assert run.masker.masks["3.weight"].all()
    assert run.model[3].weight.all()


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("method", EVERY_METHOD, ids=IDS)
def test_a_frozen_layer_is_at_its_target_and_keeps_its_mask_and_its_weights(method: SparsityMethod, start: int) -> None:
    run = Run(method, frozen={start: 1})
    for epoch in range(start):
        run.epoch(epoch)
    run.begin_epoch(start)
    run.freeze("2.weight")
    assert run.counts["2.weight"] == run.targets["2.weight"]
    weight, mask = run.model[2].weight.clone(), run.masker.masks["2.weight"]
    run.step()
    for epoch in range(start + 1, run.epochs):
        run.epoch(epoch)
    assert torch.equal(weight, run.model[2].weight)
    assert torch.equal(mask, run.masker.masks["2.weight"])
    run.check_counts()


@pytest.mark.parametrize("method", EVERY_METHOD, ids=IDS)
def test_a_layer_keeps_its_mask_through_a_pause_and_goes_on_with_it(method: SparsityMethod) -> None:
    run = Run(method, frozen={2: 1, 4: 0}, pauses=True)
    run.epoch(0)
    run.epoch(1)
    mask = run.masker.masks["2.weight"]
    run.begin_epoch(2)
    run.freeze("2.weight")
    run.step()
    run.epoch(3)
    assert torch.equal(mask, run.masker.masks["2.weight"])
    run.model[2].weight.requires_grad_(True)
    for epoch in range(4, run.epochs):
        run.epoch(epoch)
        run.check_counts()
    assert run.counts == run.targets


def test_pruning_to_target_keeps_the_largest() -> None:
    run = Run(MEST(sparsity=0.8))
    run.epoch(0)
    weight = run.model[2].weight.detach().clone()
    run.masker.strategy.prune_to_target([run.masker.layers["2.weight"]])
    kept = run.masker.masks["2.weight"]
    assert kept.sum() == 60
    assert weight[kept].abs().min() >= weight[~kept].abs().max()
    assert run.counts["3.weight"] > run.targets["3.weight"]


def test_a_layer_comes_to_its_target_one_update_before_it_is_frozen_and_grows_no_more() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    run = Run(MEST(sparsity=0.9), model=model, epochs=40, interval=2, frozen={4: 1})
    counts = []
    for epoch in range(5):
        run.epoch(epoch, steps=1)
        counts.append(tuple(run.counts.values()))
    assert counts == [(15, 15), (15, 15), (10, 15), (10, 15), (10, 15)]


SHAPES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 9), nn.Linear(9, 3)), (6,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 3, 2)), (2, 5, 5)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.Conv1d(3, 4, 3)), (2, 5)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 3, 2)), (1, 3, 3, 3)),
}


def _scheduled(method: SparsityMethod, target: int, numel: int, progress: float) -> int:
    """Active weights at that progress, by the papers' words."""
    if isinstance(method, GMP):
        wanted = target + (numel - target) * (1.0 - min(progress / 0.75, 1.0)) ** 3
    elif isinstance(method, MEST):
        bound = 0.05 if progress < 90 / 160 else 0.025 if progress < 120 / 160 else 0.0
        wanted = min(numel, target + math.floor(round(bound * numel, 6) + 0.5))
    else:
        wanted = target
    return math.floor(round(wanted, 6) + 0.5)


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from([type(m) for m in EVERY_METHOD]),
    distribution=st.sampled_from(["uniform", "erk"]),
    shape=st.sampled_from(sorted(SHAPES)),
    sparsity=st.floats(0.01, 0.9),
    interval=st.integers(1, 3),
    epochs=st.integers(1, 6),
)
def test_counts_are_exact_for_every_method_shape_and_sparsity(
    method: type[SparsityMethod], distribution: str, shape: str, sparsity: float, interval: int, epochs: int
) -> None:
    make, sample = SHAPES[shape]
    made = method(sparsity=sparsity, distribution=distribution)
    run = Run(made, model=make(), epochs=epochs, interval=interval, shape=sample)
    numel = {name: p.numel() for name, p in run.model.named_parameters() if name in run.masker.masks}
    if distribution == "erk":
        assert sum(run.targets.values()) == active_count(sum(numel.values()), sparsity)
    elif made.counts_known:
        assert run.targets == {name: active_count(n, sparsity) for name, n in numel.items()}
    for epoch in range(epochs):
        run.epoch(epoch, steps=1)
        run.check_counts()
        if not made.counts_known:
            continue
        progress = (epoch - epoch % interval) / epochs
        for name, target in run.targets.items():
            is_settled = epoch == epochs - 1 or target == numel[name]
            expected = target if is_settled else _scheduled(made, target, numel[name], progress)
            assert run.counts[name] == expected
            assert run.timeline[epoch].layers[name].active == expected
    total = sum(active_count(n, sparsity) for n in numel.values())
    if distribution == "uniform":
        assert sum(int(mask.sum()) for mask in run.masker.masks.values()) == total


def test_attention_projections_are_masked() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(10, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x).unsqueeze(1).expand(-1, 3, -1)
            return self.attention(h, h, h, need_weights=False)[0]

    run = Run(SET(sparsity=0.75), model=Attends())
    for epoch in range(run.epochs):
        run.epoch(epoch)
        run.check_counts()
    assert run.targets == {"attention.in_proj_weight": 48, "attention.out_proj.weight": 16}


@pytest.mark.parametrize("method", EVERY_METHOD, ids=IDS)
@pytest.mark.parametrize("stop", short([1, 2, 3, 5, 7], (2, 3)))
def test_a_resumed_run_goes_on_bit_for_bit(method: SparsityMethod, stop: int) -> None:
    whole = Run(method)
    for epoch in range(whole.epochs):
        whole.epoch(epoch)

    first = Run(method)
    for epoch in range(stop):
        first.epoch(epoch)
    first.begin_epoch(stop)  # saved at the top of an epoch, with a mutation pending where it waits
    saved = io.BytesIO()
    states = [each.state_dict() for each in (first.model, first.optimizer, first.masker)]
    torch.save([*states, first.masker.generator.get_state()], saved)
    saved.seek(0)
    model, optimizer, masks, drawn = torch.load(saved, weights_only=True)

    second = Run(method)
    second.data = first.data
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.masker.load_state_dict(masks)
    second.masker.generator.set_state(drawn)
    second.step()
    second.step()
    for epoch in range(stop + 1, second.epochs):
        second.epoch(epoch)
    assert _same(_weights(whole), _weights(second))
    assert _same(whole.masker.masks, second.masker.masks)
    assert torch.equal(whole.masker.generator.get_state(), second.masker.generator.get_state())
    assert whole.masker.dense_gradient_steps == second.masker.dense_gradient_steps


def test_a_state_of_weights_that_were_not_loaded_is_refused_and_changes_nothing() -> None:
    run = Run(SET(sparsity=0.8))
    run.epoch(0)
    run.epoch(2)
    state = run.masker.state_dict()
    fresh = Run(SET(sparsity=0.8))
    before, drawn = fresh.masker.masks, fresh.masker.generator.get_state()
    with pytest.raises(StateMismatch, match=r"2\.weight"):
        fresh.masker.load_state_dict(state)
    assert _same(before, fresh.masker.masks)
    assert torch.equal(drawn, fresh.masker.generator.get_state())


def test_states_that_do_not_fit_are_refused() -> None:
    run = Run(SET(sparsity=0.8))
    state = run.masker.state_dict()
    packed, pending = state["masks"]["2.weight"], state["strategy"]["pending"]
    other_layers = Run(SET(sparsity=0.8, dense_first=False)).masker.state_dict()
    narrow = nn.Sequential(nn.Linear(10, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 2))
    cases = [
        ({}, "masks"),
        ({key: value for key, value in state.items() if key != "explored"}, "explored"),
        (other_layers, r"0\.weight"),
        (Run(SET(sparsity=0.8), model=narrow).masker.state_dict(), r"2\.weight"),
        (Run(SET(sparsity=0.9)).masker.state_dict(), "60 .* 30"),
        ({**state, "masks": {**state["masks"], "2.weight": packed[:-1]}}, "damaged"),
        ({**state, "masks": {**state["masks"], "2.weight": torch.zeros_like(packed)}}, r"2\.weight.* 0 .* 60"),
        ({**state, "strategy": {"pending": {**pending, "9.weight": [1, 2]}}}, r"9\.weight"),
        ({**state, "strategy": {"pending": {**pending, "2.weight": [1000, 1000]}}}, r"2\.weight.*1000"),
        ({**state, "strategy": {"pending": {**pending, "2.weight": [60]}}}, r"2\.weight"),
        ({**state, "strategy": {"latents": {}}}, "pending"),
        ({**state, "strategy": {"pending": {}}, "explored": {**state["explored"], "2.weight": packed[:-1]}}, "damaged"),
    ]
    for wrong, message in cases:
        with pytest.raises(StateMismatch, match=message):
            run.masker.load_state_dict(wrong)


@pytest.mark.parametrize("target", [0, -5, 301, 2**70])
def test_a_target_that_no_layer_can_have_is_refused_where_data_decide_it(target: int) -> None:
    run = Run(DSR(sparsity=0.8))
    state = run.masker.state_dict()
    with pytest.raises(StateMismatch, match=r"2\.weight"):
        run.masker.load_state_dict({**state, "target": {**state["target"], "2.weight": target}})


def _every_entry(state: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in state.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _every_entry(value, (*path, key))


@pytest.mark.parametrize("method", EVERY_METHOD, ids=IDS)
def test_every_entry_of_a_state_that_is_missing_or_of_another_kind_is_refused(method: SparsityMethod) -> None:
    run = Run(method)
    run.epoch(0)
    run.begin_epoch(2)
    state = run.masker.state_dict()
    for path in _every_entry(state):
        for damage in ("missing", "text", None, [], torch.zeros(3, dtype=torch.int8)):
            damaged = copy.deepcopy(state)
            inside = damaged
            for key in path[:-1]:
                inside = inside[key]
            if damage == "missing":
                del inside[path[-1]]
            else:
                inside[path[-1]] = damage
            with pytest.raises(StateMismatch):
                run.masker.load_state_dict(damaged)


def test_masks_are_inferred_from_a_sparse_checkpoint() -> None:
    trained = Run(SET(sparsity=0.8))
    for epoch in range(3):
        trained.epoch(epoch, steps=5)
    run = Run(SET(sparsity=0.8))
    run.model.load_state_dict(trained.model.state_dict())
    run.infer_masks()
    assert _same(_weights(run), _weights(trained))
    for name, mask in run.masker.masks.items():
        nonzero = infer_mask(trained.model.get_parameter(name))
        assert not (nonzero & ~mask).any()
        assert int(mask.sum()) == run.targets[name] == run.counts[name]


def test_a_checkpoint_under_the_soft_bound_keeps_it_until_it_is_pruned() -> None:
    trained = Run(MEST(sparsity=0.8))
    trained.epoch(0, steps=5)
    run = Run(MEST(sparsity=0.8))
    run.model.load_state_dict(trained.model.state_dict())
    run.infer_masks()
    assert 60 < run.counts["2.weight"] <= 75
    assert run.counts["2.weight"] == trained.model[2].weight.count_nonzero()
    run.begin_epoch(7)
    assert run.counts["2.weight"] == 60


def test_inferred_masks_have_no_mutation_that_waits() -> None:
    run = Run(RigL(sparsity=0.8))
    run.epoch(0)
    run.begin_epoch(2)
    assert run.pending
    run.infer_masks()
    assert not run.pending


def test_where_data_decide_a_checkpoint_may_have_more_weights_in_a_layer_than_planned() -> None:
    run = Run(DSR(sparsity=0.8))
    with torch.no_grad():
        run.model[2].weight.flatten()[:100] = 1.0
    run.infer_masks()
    assert run.counts["2.weight"] >= 100


def test_a_dense_checkpoint_has_no_masks_to_infer() -> None:
    run = Run(SET(sparsity=0.8))
    nn.init.ones_(run.model[2].weight)
    with pytest.raises(StateMismatch, match=r"2\.weight.* 300 .* 60"):
        run.infer_masks()


def test_hooks_are_installed_once_and_removed_without_a_trace() -> None:
    run = Run(SET(sparsity=0.8))
    with pytest.raises(UsageError, match="hooked"):
        run.masker.install()
    run.masker.remove()
    run.masker.remove()
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in run.model.parameters())
    run.step()
    assert (
        run.model[2].weight[~run.masker.masks["2.weight"]].any()
    )  # nothing holds the inactive weights at zero any more


def test_a_masker_without_layers_hooks_nothing_and_trains_like_the_plain_loop() -> None:
    method = MEST(sparsity=0.0)
    run, plain = Run(method), Run(method)
    assert not run.optimizer._optimizer_step_pre_hooks
    for epoch in range(run.epochs):
        run.epoch(epoch)
        plain.step()
        plain.step()
    assert _same(_weights(run), _weights(plain))


def test_the_model_can_be_copied_and_saved_while_it_is_hooked() -> None:
    run = Run(MEST(sparsity=0.8))
    run.epoch(0)
    twin = copy.deepcopy(run.model)
    twin(torch.randn(2, 10)).sum().backward()
    assert twin[2].weight.grad[~run.masker.masks["2.weight"]].any()  # the copy is not masked
    buffer = io.BytesIO()
    torch.save(run.model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded[2].weight, run.model[2].weight)


def test_masks_follow_the_memory_layout_and_the_dtype_of_their_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 8, 3))
    run = Run(SET(sparsity=0.8), model=model, shape=(2, 4, 4))
    model.to(memory_format=torch.channels_last, dtype=torch.float64)
    run.data = torch.Generator().manual_seed(0)
    run.begin_epoch(0)
    model(torch.randn(2, 2, 4, 4, dtype=torch.float64)).sum().backward()
    run.optimizer.step()
    assert run.masker.masks["1.weight"].stride() == model[1].weight.stride()
    run.check_counts()


def test_the_same_seed_gives_the_same_masks_and_the_global_generator_is_not_touched() -> None:
    first = Run(SET(sparsity=0.8))
    before = torch.get_rng_state()
    for epoch in (0, 2, 4):
        first.begin_epoch(epoch)
    assert torch.equal(before, torch.get_rng_state())
    second = Run(SET(sparsity=0.8))
    for epoch in (0, 2, 4):
        second.begin_epoch(epoch)
    assert _same(first.masker.masks, second.masker.masks)
