"""Masks over the steps: what optimizers, scalers, accumulation and closures may not break."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.masking import MaskedRun
from spfde.sparsity import MEST, SET, DropGrow, Gradient, MagnitudePlusGradient, RigL, SparsityMethod, StaticSparse
from spfde.sparsity.layers import select_layers

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True, foreach=True),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw-fused-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=2),
}


class Run(MaskedRun):
    """A tiny model on fixed data; ``pass_`` is one backward pass over one half of it."""

    def __init__(self, method: SparsityMethod, optimizer: str | Optimizers = "sgd", **timeline: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 8), nn.Linear(8, 3))
        make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        names = [name for name, _ in self.model.named_parameters()]
        layers = select_layers(self.model, method, order=names, head=["3.weight"])
        super().__init__(layers, make(list(self.model.parameters())), method, **{"epochs": 20, **timeline})
        self.x = torch.randn(8, 6)
        self.y = torch.randn(8, 3)

    @property
    def weight(self) -> nn.Parameter:
        weight = self.model[2].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def mask(self) -> Tensor:
        return self.masker.masks["2.weight"]

    def loss(self, rows: slice = slice(None)) -> Tensor:
        return (self.model(self.x[rows]) - self.y[rows]).square().sum()

    def step(self, *, set_to_none: bool = True) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=set_to_none)
            loss = self.loss()
            loss.backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def dense_gradient(self, rows: slice = slice(None)) -> Tensor:
        """The gradient of the middle weight without any mask, computed apart from the run."""
        (grad,) = torch.autograd.grad(self.loss(rows), [self.weight])
        return grad

    def check(self) -> None:
        for name, mask in self.masker.masks.items():
            p = self.model.get_parameter(name)
            assert (p.detach()[~mask] == 0).all()
            assert p.detach()[mask].any()
            for value in self.optimizer.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    assert (value[~mask] == 0).all()


def _grown_by(before: Tensor, kept_weight: Tensor, gradient: Tensor, keep: int, final: int) -> Tensor:
    """RigL in three lines, apart from the room's code: the mask that is expected."""
    kept = sorted(before.flatten().nonzero().squeeze(1).tolist(), key=lambda i: -abs(float(kept_weight.flatten()[i])))
    kept = kept[:keep]
    rest = sorted(set(range(before.numel())) - set(kept), key=lambda i: -abs(float(gradient.flatten()[i])))
    mask = torch.zeros(before.numel(), dtype=torch.bool)
    mask[kept + rest[: final - keep]] = True
    return mask.view(before.shape)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_an_inactive_weight_or_its_state(optimizer: str, set_to_none: bool) -> None:
    run = Run(SET(sparsity=0.7), optimizer)
    for epoch in range(4):
        run.begin_epoch(epoch)
        run.check()
        for _ in range(2):
            run.step(set_to_none=set_to_none)
            run.check()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rigl_keeps_the_invariants_under_every_optimizer(optimizer: str) -> None:
    run = Run(RigL(sparsity=0.7), optimizer)
    for epoch in range(4):
        before = run.mask
        run.begin_epoch(epoch)
        run.step()
        run.check()
        assert not run.pending
        assert run.mask.sum() == 24
        if epoch < 2:  # later the weight of a large gradient may be dropped and return at once
            assert torch.equal(before, run.mask) == (epoch == 0)


def test_momentum_and_weight_decay_do_not_move_a_dropped_weight() -> None:
    run = Run(SET(sparsity=0.7, drop_fraction=0.5))
    run.begin_epoch(0)
    for _ in range(3):
        run.step()
    before = run.mask
    run.begin_epoch(1)
    dropped = before & ~run.mask
    assert dropped.any()
    for _ in range(3):
        run.step(set_to_none=False)
        assert (run.weight.detach()[dropped] == 0).all()


def test_a_grown_weight_starts_from_zero_with_zero_state() -> None:
    run = Run(SET(sparsity=0.7, drop_fraction=0.5), "adam")
    run.begin_epoch(0)
    run.step()
    before = run.mask
    run.begin_epoch(1)
    grown = run.mask & ~before
    assert grown.any()
    assert (run.weight.detach()[grown] == 0).all()
    assert all((run.optimizer.state[run.weight][key][grown] == 0).all() for key in ("exp_avg", "exp_avg_sq"))
    run.step()
    assert (run.weight.detach()[grown] != 0).all()


def test_an_active_weight_trains_as_if_the_others_did_not_exist() -> None:
    run = Run(StaticSparse(sparsity=0.7))
    plain = Run(StaticSparse(sparsity=0.7))
    plain.masker.remove()
    for _ in range(3):
        run.step()
        plain.optimizer.zero_grad()
        plain.loss().backward()
        for name, mask in plain.masker.masks.items():
            plain.model.get_parameter(name).grad.mul_(mask)
        plain.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True))


def test_gradients_are_masked_as_soon_as_they_are_there() -> None:
    run = Run(StaticSparse(sparsity=0.7))
    dense = run.dense_gradient()
    run.loss().backward()
    assert torch.equal(run.weight.grad, torch.where(run.mask, dense, 0.0))
    run.loss().backward()
    assert torch.equal(run.weight.grad, torch.where(run.mask, 2 * dense, 0.0))


def test_clipping_sees_the_norm_of_the_sparse_gradients() -> None:
    run = Run(StaticSparse(sparsity=0.7))
    run.loss().backward()
    expected = torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm()
    dense = run.dense_gradient().norm()
    norm = torch.nn.utils.clip_grad_norm_([run.weight], 0.1)
    assert norm < dense
    assert norm <= expected


def test_gradients_set_by_hand_are_masked_before_the_step() -> None:
    run = Run(StaticSparse(sparsity=0.7))
    run.loss().backward()
    run.weight.grad = run.dense_gradient()
    seen = []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(run.weight.grad.clone()))
    run.optimizer.step()
    assert (seen[0][~run.mask] == 0).all()
    assert seen[0][run.mask].all()


def test_a_gradient_that_was_changed_after_its_backward_pass_is_masked_again() -> None:
    run = Run(StaticSparse(sparsity=0.7))
    run.loss().backward()
    run.weight.grad.add_(1.0)
    run.optimizer.step()
    run.check()
    assert (run.weight.grad[~run.mask] == 0).all()


def test_rigl_grows_by_the_dense_gradient_of_the_first_step_of_the_update_epoch() -> None:
    run = Run(RigL(sparsity=0.7, drop_fraction=0.5), interval=2)
    run.begin_epoch(0)
    run.step()
    run.step()
    before = run.mask
    run.begin_epoch(2)
    assert run.pending == ("1.weight", "2.weight")
    assert torch.equal(before, run.mask)
    dense = run.dense_gradient()
    moved = run.weight.detach().clone()
    momentum = run.optimizer.state[run.weight]["momentum_buffer"].clone()
    run.step()
    # What SGD makes of the kept weights decides the drop: the mutation follows the regular update.
    update = 0.9 * momentum + torch.where(before, dense, 0.0) + 0.1 * moved
    # Of 24 a half along a cosine goes: 0.478 of them.
    assert torch.equal(run.mask, _grown_by(before, moved - 0.1 * update, dense, 13, 24))
    after = run.mask
    run.step()
    assert torch.equal(after, run.mask)
    assert run.masker.dense_gradient_steps == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_rigl_adds_up_the_dense_gradients_of_an_accumulated_step(set_to_none: bool) -> None:
    run = Run(RigL(sparsity=0.7, drop_fraction=0.5), lambda p: torch.optim.SGD(p, lr=0.0))
    run.step()
    run.begin_epoch(1)
    before, weight = run.mask, run.weight.detach().clone()
    run.optimizer.zero_grad(set_to_none=set_to_none)
    for rows in (slice(0, 3), slice(3, 8)):
        run.loss(rows).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
    dense = run.dense_gradient()
    run.optimizer.step()
    assert torch.equal(run.mask, _grown_by(before, weight, dense, 12, 24))
    assert run.masker.dense_gradient_steps == 2
    run.masker.reset_epoch_counters()
    assert run.masker.dense_gradient_steps == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_rigl_forgets_the_dense_gradients_of_a_step_that_was_never_taken(set_to_none: bool) -> None:
    run = Run(RigL(sparsity=0.7, drop_fraction=0.5), lambda p: torch.optim.SGD(p, lr=0.0))
    run.step()
    run.begin_epoch(1)
    before, weight = run.mask, run.weight.detach().clone()
    run.optimizer.zero_grad(set_to_none=set_to_none)
    (1000 * run.loss(slice(0, 3))).backward()
    run.optimizer.zero_grad(set_to_none=set_to_none)
    run.loss(slice(3, 8)).backward()
    dense = run.dense_gradient(slice(3, 8))
    run.optimizer.step()
    assert torch.equal(run.mask, _grown_by(before, weight, dense, 12, 24))


def test_no_dense_gradient_is_kept_between_mutations() -> None:
    run = Run(RigL(sparsity=0.7), interval=5)
    run.begin_epoch(0)
    run.step()
    for epoch in range(1, 5):
        run.begin_epoch(epoch)
        run.step()
    assert run.masker.dense_gradient_steps == 0
    run.begin_epoch(5)
    run.step()
    run.step()
    assert run.masker.dense_gradient_steps == 1
    assert not run.masker.take_dense_gradients()


def test_rigl_mutates_by_gradients_set_by_hand() -> None:
    run = Run(RigL(sparsity=0.7, drop_fraction=0.5), lambda p: torch.optim.SGD(p, lr=0.0))
    run.begin_epoch(1)
    before, weight, dense = run.mask, run.weight.detach().clone(), run.dense_gradient()
    for p, grad in zip(
        run.model.parameters(), torch.autograd.grad(run.loss(), list(run.model.parameters())), strict=True
    ):
        p.grad = grad
    run.optimizer.step()
    assert torch.equal(run.mask, _grown_by(before, weight, dense, 12, 24))


def test_rigl_mutates_under_a_closure() -> None:
    run = Run(RigL(sparsity=0.7, drop_fraction=0.5), lambda p: torch.optim.SGD(p, lr=0.0))
    run.step()  # leaves a stale gradient behind
    run.x.mul_(-1.3)
    run.begin_epoch(1)
    before, weight, dense = run.mask, run.weight.detach().clone(), run.dense_gradient()

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss()
        loss.backward()
        return loss

    run.optimizer.step(closure)
    assert torch.equal(run.mask, _grown_by(before, weight, dense, 12, 24))
    assert run.masker.dense_gradient_steps == 1  # the stale one was no pass of this step


@pytest.mark.parametrize("with_closure", [True, False])
def test_mest_weighs_the_gradients_of_the_active_weights(with_closure: bool) -> None:
    method = MEST(sparsity=0.7, soft_bound=False, drop_steps=(0.5,), decay_at=(), gradient_weight=10.0)
    run = Run(method, lambda p: torch.optim.SGD(p, lr=0.0))
    run.begin_epoch(0)
    assert not run.pending
    run.step()
    run.x.mul_(-1.3)
    run.begin_epoch(1)
    assert run.pending == ("1.weight", "2.weight")
    before, weight, dense = run.mask, run.weight.detach().clone(), run.dense_gradient()

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss()
        loss.backward()
        return loss

    if with_closure:
        run.optimizer.step(closure)
    else:
        closure()
        run.optimizer.step()
        run.optimizer.zero_grad()
    importance = (weight.abs() + 10.0 * dense.abs())[before]
    survivors = before & (weight.abs() + 10.0 * dense.abs() >= importance.sort(descending=True).values[11])
    assert survivors.sum() == 12
    assert not (survivors & ~run.mask).any()
    assert torch.equal(run.weight.detach() != 0, survivors)
    assert run.mask.sum() == 24
    assert run.masker.dense_gradient_steps == 0


def test_a_mutation_that_grows_nothing_computes_no_dense_gradient() -> None:
    # Under a soft bound that ends at a fourth of the run; from then on a mutation would drop alone.
    method = DropGrow(
        sparsity=0.7,
        soft_bound=0.1,
        drop_fraction=0.0,
        stop_fraction=0.25,
        drop=MagnitudePlusGradient(),
        grow=Gradient(),
    )
    run = Run(method, interval=5)
    run.begin_epoch(0)
    run.step()
    assert run.mask.sum() == 24 + 8
    assert run.masker.dense_gradient_steps == 1
    run.begin_epoch(5)
    assert run.pending == ("1.weight", "2.weight")
    run.step()
    assert run.pending == ()
    assert run.mask.sum() == 24
    assert run.masker.dense_gradient_steps == 0


def test_a_layer_without_a_gradient_waits_for_one() -> None:
    run = Run(RigL(sparsity=0.7))
    run.begin_epoch(1)
    before = run.mask
    run.optimizer.step()
    assert run.pending == ("1.weight", "2.weight")
    run.step()
    assert run.pending == ()
    assert not torch.equal(before, run.mask)


def test_pruning_to_target_cancels_a_pending_mutation() -> None:
    run = Run(RigL(sparsity=0.7))
    run.begin_epoch(1)
    before = run.mask
    run.masker.strategy.prune_to_target([run.masker.layers["2.weight"]])
    assert run.pending == ("1.weight",)
    run.step()
    assert torch.equal(before, run.mask)


def test_a_pending_mutation_ends_with_freezing_and_with_the_last_epoch() -> None:
    run = Run(RigL(sparsity=0.7), interval=5, blocks=[("2.weight",)], frozen={11: 1})
    run.begin_epoch(5)  # the last update but one before epoch 11, with time to train what has grown
    assert run.pending == ("1.weight", "2.weight")
    run.begin_epoch(11)
    assert run.pending == ("1.weight",)
    run.begin_epoch(19)
    assert run.pending == ()


SCALED = {"plain": "sgd", "fused": "adamw-fused", "sgd-fused": "sgd-fused"}


@pytest.mark.parametrize("optimizer", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("method", [RigL(sparsity=0.7), MEST(sparsity=0.7, soft_bound=False, gradient_weight=0.5)])
def test_a_step_that_the_scaler_skips_does_not_mutate(method: SparsityMethod, optimizer: str) -> None:
    run = Run(method, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(*, overflow: bool) -> None:
        run.optimizer.zero_grad()
        scale = float("inf") if overflow else 1.0
        scaler.scale(run.loss() * scale).backward()
        scaler.step(run.optimizer)
        scaler.update()

    run.begin_epoch(0)
    step(overflow=False)
    run.begin_epoch(1)
    before, weight = run.mask, run.weight.detach().clone()
    step(overflow=True)
    assert torch.equal(before, run.mask)
    assert torch.equal(weight, run.weight)
    assert run.pending
    step(overflow=False)
    assert not run.pending
    assert not torch.equal(before, run.mask)
    assert run.mask.sum() == 24
    run.check()


@pytest.mark.parametrize("optimizer", ["adamw-fused", "sgd-fused"])
def test_a_fused_step_skipped_because_of_another_weight_does_not_mutate(optimizer: str) -> None:
    run = Run(RigL(sparsity=0.7), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run.begin_epoch(1)
    before = run.mask
    scaler.scale(run.loss()).backward()
    run.model[3].bias.grad.fill_(float("inf"))
    scaler.step(run.optimizer)
    assert torch.equal(before, run.mask)
    assert run.pending == ("1.weight", "2.weight")


def test_a_gradient_that_is_not_finite_puts_the_mutation_off_by_a_step() -> None:
    run = Run(RigL(sparsity=0.7), lambda p: torch.optim.SGD(p, lr=0.0))
    run.begin_epoch(1)
    before = run.mask
    run.loss().backward()
    run.optimizer.zero_grad()
    (run.loss() * float("inf")).backward()
    run.optimizer.step()
    assert torch.equal(before, run.mask)
    assert run.pending == ("1.weight", "2.weight")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused"])
@pytest.mark.parametrize(
    "method",
    [
        MEST(sparsity=0.7, soft_bound=False, drop_steps=(0.5,), decay_at=(), gradient_weight=0.02),
        DropGrow(sparsity=0.7, drop_fraction=0.5, drop=MagnitudePlusGradient(gradient_weight=0.02), grow=Gradient()),
    ],
    ids=["random growth", "growth by gradient"],
)
def test_the_loss_scale_does_not_enter_the_importance(method: SparsityMethod, optimizer: str) -> None:
    plain, scaled = Run(method, optimizer), Run(method, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for epoch in range(3):
        for run in (plain, scaled):
            run.begin_epoch(epoch)
            run.optimizer.zero_grad()
        plain.loss().backward()
        plain.optimizer.step()
        scaler.scale(scaled.loss()).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        assert torch.equal(plain.mask, scaled.mask)


def test_the_shape_of_the_parameter_groups_does_not_change() -> None:
    run = Run(MEST(sparsity=0.7), "adamw")
    before = [(sorted(group), [id(p) for p in group["params"]]) for group in run.optimizer.param_groups]
    for epoch in range(3):
        run.begin_epoch(epoch)
        run.step()
    assert before == [(sorted(group), [id(p) for p in group["params"]]) for group in run.optimizer.param_groups]


def test_a_weight_that_is_frozen_and_thawed_is_masked_again() -> None:
    run = Run(StaticSparse(sparsity=0.7))
    run.step()
    run.weight.requires_grad_(False)
    run.weight.grad = None
    run.step()
    run.weight.requires_grad_(True)
    run.optimizer.zero_grad()
    run.loss().backward()
    assert (run.weight.grad[~run.mask] == 0).all()
    run.optimizer.step()
    run.check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [RigL(sparsity=0.7), MEST(sparsity=0.7), SET(sparsity=0.7)])
def test_masks_follow_a_model_that_moves_after_it_was_attached(method: SparsityMethod) -> None:
    run = Run(method, "adamw")
    run.model.cuda()
    run.x, run.y = run.x.cuda(), run.y.cuda()
    for epoch in range(3):
        run.step()
        run.begin_epoch(epoch)
        run.step()
        assert run.mask.is_cuda
        run.check()
