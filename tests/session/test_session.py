"""The session on somebody's loop: what holds during a run, what is refused, and what detaching undoes."""

from __future__ import annotations

import copy
import multiprocessing
import re
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import spfde
from helpers.compiling import RECOMPILE_LIMIT, recompile_limit
from helpers.training import BATCH, EPOCHS, SAMPLES, Parts, SmallNet, make_images, make_parts, step, train
from spfde.model.trace import trace
from spfde.session import attach as door


def attach(parts: Parts, recipe: spfde.Recipe, **options: Any) -> spfde.Session:
    return spfde.attach(parts.model, parts.optimizer, parts.loader, recipe, **{"epochs": EPOCHS, **options})


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_inactive_weights_are_zero_and_counts_exact_after_every_epoch(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    weights = dict(parts.model.named_parameters())

    def check(_: int) -> None:
        for name, mask in session.masks.items():
            assert not weights[name][~mask].any()
        assert len(session.partial_set) == SAMPLES - 10
        together = torch.cat([session.partial_set, session.removed_set]).sort().values
        assert torch.equal(together, torch.arange(SAMPLES))

    train(parts, session, at_bottom=check)
    for mask in session.masks.values():
        assert int(mask.sum()) == round(0.2 * mask.numel() + 1e-9)


def test_the_first_layer_and_the_classifier_stay_dense(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    names = set(attach(parts, whole_recipe).masks)
    assert names == {f"blocks.{block}.conv{conv}.weight" for block in range(3) for conv in (1, 2)}


def test_frozen_blocks_no_longer_move_and_their_batch_norms_stay_in_eval(
    parts: Parts, whole_recipe: spfde.Recipe
) -> None:
    session = attach(parts, whole_recipe)
    frozen_at: dict[str, dict[str, torch.Tensor]] = {}

    def remember(_: int) -> None:
        for block in session.blueprint.partition.blocks[: session.frozen_blocks]:
            state = {
                name: value.clone()
                for name, value in parts.model.state_dict().items()
                if any(name.startswith(module) for module in block.modules)
            }
            frozen_at.setdefault(block.name, state)

    train(parts, session, at_top=remember)
    assert session.frozen_blocks == len(frozen_at) >= 2
    now = parts.model.state_dict()
    for state in frozen_at.values():
        assert len(state) > 0
        assert all(torch.equal(now[name], value) for name, value in state.items())
    parts.model.train()
    assert not parts.model.blocks[0].bn1.training
    assert parts.model.blocks[-1].bn1.training


def test_a_block_leaves_the_soft_bound_one_interval_before_it_is_frozen(
    parts: Parts, whole_recipe: spfde.Recipe
) -> None:
    session = attach(parts, whole_recipe)
    freeze_epoch = session.blueprint.freeze_plan.start_epoch
    assert freeze_epoch == 4
    seen = []

    def look(epoch: int) -> None:
        masks = session.masks
        frozen = session.frozen_blocks
        seen.append((int(masks["blocks.0.conv1.weight"].sum()), int(masks["blocks.2.conv1.weight"].sum()), frozen))

    train(parts, session, at_top=look)
    numel, target = 6 * 6 * 9, round(0.2 * 6 * 6 * 9)
    bounded = target + round(0.05 * numel)
    assert seen[0] == (bounded, bounded, 0)
    assert seen[freeze_epoch - 2] == (target, bounded, 0)
    assert seen[freeze_epoch] == (target, bounded, 1)


def test_the_bill_of_a_finished_run_equals_the_plan(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    bill = spfde.plan(parts.model, torch.zeros(1, 2, 8, 8), whole_recipe, EPOCHS, SAMPLES, batch_size=BATCH)
    session = attach(parts, whole_recipe)
    train(parts, session)
    assert session.cost.totals.cost == bill.cost


@pytest.mark.parametrize(
    "method",
    [
        spfde.RigL(sparsity=0.8),
        spfde.SET(sparsity=0.8, distribution="erk"),
        spfde.SET(sparsity=0.8, structure=spfde.Kernels()),
        spfde.MEST(sparsity=0.8, structure=spfde.Patterns()),
        spfde.GMP(sparsity=0.8),
        spfde.TopKAST(sparsity=0.8, stop_fraction=0.5),
        spfde.DeepR(sparsity=0.8),
    ],
)
def test_the_bill_equals_the_plan_with_dense_gradients_too(method: spfde.sparsity.SparsityMethod) -> None:
    recipe = spfde.Recipe(sparsity=method, update_interval_epochs=2)
    parts = make_parts()
    bill = spfde.plan(parts.model, torch.zeros(1, 2, 8, 8), recipe, EPOCHS, SAMPLES, batch_size=BATCH)
    session = attach(parts, recipe)
    train(parts, session)
    assert session.cost.totals.cost == bill.cost
    assert (bill.cost.dense_gradient_flops > 0) == (method.name in ("rigl", "topkast"))


def test_a_smoothed_dense_gradient_is_charged_for_every_sample_until_the_last_mutation() -> None:
    recipe = spfde.Recipe(sparsity=spfde.SNFS(sparsity=0.8), update_interval_epochs=2)
    parts = make_parts()
    bill = spfde.plan(parts.model, torch.zeros(1, 2, 8, 8), recipe, EPOCHS, SAMPLES, batch_size=BATCH)
    session = attach(parts, recipe)
    train(parts, session)
    forward = sum(layer.forward_flops for layer in session.blueprint.cost.layers if layer.name in session.masks)
    inactive = round(SAMPLES * forward * (1 - 65 / 324))  # 65 of 324 weights in each layer at 80 %
    # Update epochs at epochs 2, 4 and 6 of 8: nothing mutates after the last of them.
    assert [cost.dense_gradient_flops > 0 for cost in bill.epoch_costs] == [True] * 6 + [False] * 2
    assert session.cost.rows[0].dense_gradient_flops == pytest.approx(inactive, rel=1e-6)


def test_the_bill_holds_the_dense_models_modelled_memory_against_the_runs(
    parts: Parts, whole_recipe: spfde.Recipe
) -> None:
    session = attach(parts, whole_recipe)
    train(parts, session)
    assert session.cost.dense_memory_bytes > session.cost.totals.minimum_memory_bytes


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole_recipe: spfde.Recipe) -> None:
    runs = []
    for seed in (5, 5, 6):
        parts = make_parts()
        runs.append(train(parts, attach(parts, whole_recipe, seed=seed)))
    assert runs[0] == runs[1] != runs[2]


def test_the_global_generator_is_left_alone_by_a_whole_run(whole_recipe: spfde.Recipe) -> None:
    parts = make_parts()
    session = attach(parts, whole_recipe)
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    for _ in session.epochs():
        for x, y in session.loader:
            before = torch.get_rng_state()
            step(parts, session, x, y)
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), expected)


def test_each_block_has_its_own_learning_rate_that_ends_at_its_freeze_epoch(
    parts: Parts, whole_recipe: spfde.Recipe
) -> None:
    session = attach(parts, whole_recipe)
    freeze_epochs = [at for at in session.blueprint.freeze_plan.freeze_epochs if at is not None]
    rates: dict[int, list[float]] = {}

    def look(epoch: int) -> None:
        group_of = {id(p): group for group in parts.optimizer.param_groups for p in group["params"]}
        for index in range(3):
            group = group_of[id(parts.model.blocks[index].conv1.weight)]
            rates.setdefault(index, []).append(group["lr"])

    train(parts, session, at_top=look)
    assert all(values[0] == 0.05 for values in rates.values())
    for index, at in enumerate(freeze_epochs):
        assert all(value == pytest.approx(0.0, abs=1e-9) for value in rates[index][at:])
        assert all(value > 0 for value in rates[index][:at])


def test_without_a_schedule_of_ours_no_learning_rate_is_touched(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    groups = parts.optimizer.param_groups
    train(parts, attach(parts, whole_recipe.replace(learning_rate=None)))
    assert parts.optimizer.param_groups is groups
    assert [group["lr"] for group in groups] == [0.05]


def test_gradients_are_sparse_when_the_caller_clips_them(parts: Parts) -> None:
    session = attach(parts, spfde.Recipe(sparsity=spfde.MEST(sparsity=0.8)))
    x, y = next(iter(session.loader))
    F.cross_entropy(parts.model(x), y).backward()
    for name, mask in session.masks.items():
        assert not dict(parts.model.named_parameters())[name].grad[~mask].any()


@pytest.mark.parametrize("n_micro", [1, 2])
def test_gradient_accumulation_keeps_counts_and_zeros(n_micro: int, whole_recipe: spfde.Recipe) -> None:
    parts = make_parts()
    recipe = whole_recipe.replace(sparsity=spfde.RigL(sparsity=0.8))
    session = attach(parts, recipe)
    for _ in session.epochs():
        for number, (x, y) in enumerate(session.loader):
            logits = parts.model(x)
            F.cross_entropy(logits, y).backward()
            if number % n_micro == n_micro - 1:
                parts.optimizer.step()
                parts.optimizer.zero_grad(set_to_none=False)
            session.observe(logits, y)
    weights = dict(parts.model.named_parameters())
    for name, mask in session.masks.items():
        assert int(mask.sum()) == round(0.2 * mask.numel() + 1e-9)
        assert not weights[name][~mask].any()


def test_batches_from_elsewhere_are_allowed_while_nothing_is_sieved(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe.replace(sieving=None))
    for _ in session.epochs():
        for x, y in parts.loader:
            step(parts, None, x, y)
    assert len(session.cost.rows) == EPOCHS
    assert [row.samples for row in session.cost.rows] == [SAMPLES] * EPOCHS
    assert session.frozen_blocks > 0


def test_batches_from_elsewhere_with_their_indices_are_sieved(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    images, labels = make_images().tensors
    for _ in session.epochs():
        for indices in session.partial_set.split(10):
            logits = parts.model(images[indices])
            F.cross_entropy(logits, labels[indices]).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(logits, labels[indices], indices)
    assert [row.samples for row in session.cost.rows] == [30] * EPOCHS


def test_per_sample_losses_can_stand_in_for_right_and_wrong(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    for _ in session.epochs():
        for x, y in session.loader:
            loss = F.cross_entropy(parts.model(x), y, reduction="none")
            loss.mean().backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(loss=loss)
    assert session.sieve_turnover["ever_used"] > 30


def test_a_model_in_torch_compile_freezes_with_a_bounded_number_of_compilations(whole_recipe: spfde.Recipe) -> None:
    parts = make_parts()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(parts.model, backend=counter)
    session = spfde.attach(compiled, parts.optimizer, parts.loader, whole_recipe, epochs=EPOCHS)
    for _ in session.epochs():
        compiled.train()
        for x, y in session.loader:
            if len(y) < BATCH:
                session.observe(parts.model(x).detach(), y)
                continue
            logits = compiled(x)
            F.cross_entropy(logits, y).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            session.observe(logits, y)
    stages = 1 + session.frozen_blocks
    assert session.frozen_blocks >= 2
    assert stages <= counter.frame_count <= 2 * stages


def test_a_compiled_model_that_would_meet_the_recompile_limit_warns(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    compiled = torch.compile(parts.model, backend="eager")
    with recompile_limit(3), pytest.warns(UserWarning, match=RECOMPILE_LIMIT):
        spfde.attach(compiled, parts.optimizer, parts.loader, whole_recipe, epochs=EPOCHS)


# --- detaching -------------------------------------------------------------------------------------------------------


def test_detach_ends_the_workers_that_stay_between_epochs(whole_recipe: spfde.Recipe) -> None:
    parts, others = make_parts(workers=1, persistent=True), set(multiprocessing.active_children())
    session = attach(parts, whole_recipe)
    train(parts, session)
    assert len(set(multiprocessing.active_children()) - others) == 1
    session.detach()
    assert set(multiprocessing.active_children()) <= others


def test_detach_restores_everything(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    groups = [dict(group, params=list(group["params"])) for group in parts.optimizer.param_groups]
    session = attach(parts, whole_recipe)
    train(parts, session)
    session.detach()
    now = parts.optimizer.param_groups
    assert [group.keys() for group in now] == [group.keys() for group in groups]
    assert [group["lr"] for group in now] == [0.05]
    assert all(a is b for a, b in zip(now[0]["params"], groups[0]["params"], strict=True))
    assert all(p.requires_grad for p in parts.model.parameters())
    assert not parts.optimizer._optimizer_step_pre_hooks
    assert not parts.optimizer._optimizer_step_post_hooks
    assert all(not p._post_accumulate_grad_hooks for p in parts.model.parameters())
    assert all("train" not in vars(module) for module in parts.model.modules())
    parts.model.train()
    assert all(module.training for module in parts.model.modules())
    step(parts, None, *next(iter(parts.loader)))
    name = next(iter(session.masks))
    assert dict(parts.model.named_parameters())[name][~session.masks[name]].any(), "dense training goes on"
    with pytest.raises(spfde.UsageError, match="detached"):
        session.state_dict()
    session.detach()


def test_a_detached_session_lets_another_one_attach(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    attach(parts, whole_recipe).detach()
    train(parts, attach(parts, whole_recipe))


def test_print_lists_what_is_hooked(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    shown = str(session)
    assert all(name in shown for name in session.masks)
    assert "30 of 40 samples" in shown
    assert "session.loader" in shown
    assert "bn" not in shown
    train(parts, session)
    held = {name for name, module in parts.model.named_modules() if "train" in vars(module)}
    assert "bn" in held
    assert held <= {line.strip() for line in str(session).splitlines()}
    session.detach()
    assert "detached" in str(session)
    assert "session.loader" not in str(session)
    assert "bn" not in str(session)


def hooks_on(parts: Parts) -> dict[str, int]:
    """How many hooks there are, by the word that print has for what they are on."""
    model, optimizer = parts.model, parts.optimizer
    return {
        "gradients": sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()),
        "steps": len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks),
        "forward pass": len(model._forward_pre_hooks),
    }


def hooks_told(session: spfde.Session) -> dict[str, int]:
    found = {"gradients": 0, "steps": 0, "forward pass": 0}
    for line in str(session).splitlines():
        if "hooked:" in line:
            if number := re.search(r"gradients? of (\d+) ", line):
                found["gradients"] += int(number[1])
            found["steps"] += 2 * ("steps" in line)  # before and after
            found["forward pass"] += "forward pass" in line
    return found


def test_print_tells_of_each_hook_that_there_is(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe, engine="masked")
    assert hooks_told(session) == hooks_on(parts)
    assert min(hooks_on(parts).values()) > 0
    for epoch in session.epochs():
        parts.model.train()
        assert hooks_told(session) == hooks_on(parts), epoch
        for x, y in session.loader:
            step(parts, session, x, y)
        assert hooks_told(session) == hooks_on(parts), epoch
    session.detach()
    assert set(hooks_on(parts).values()) == {0}


def test_the_model_is_not_wrapped_and_can_be_copied_while_attached(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    kind, keys = type(parts.model), list(parts.model.state_dict())
    session = attach(parts, whole_recipe)
    train(parts, session)
    assert type(parts.model) is kind
    assert list(parts.model.state_dict()) == keys
    twin = copy.deepcopy(parts.model).eval()
    x = torch.randn(2, 2, 8, 8)
    # The copy computes in PyTorch: under the native engine the two round differently.
    assert torch.allclose(twin(x), parts.model.eval()(x), atol=1e-5)


def test_masks_are_inferred_from_a_sparse_checkpoint(whole_recipe: spfde.Recipe) -> None:
    parts = make_parts()
    session = attach(parts, whole_recipe)
    train(parts, session)
    fresh = make_parts(seed=3)
    again = attach(fresh, whole_recipe, seed=4)
    fresh.model.load_state_dict(parts.model.state_dict())
    again.infer_masks()
    weights = dict(parts.model.named_parameters())
    for name, mask in again.masks.items():
        assert int(mask.sum()) == round(0.2 * mask.numel() + 1e-9)
        assert not weights[name][~mask].any()


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(parts: Parts, recipe: spfde.Recipe, match: str, **options: Any) -> None:
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    with pytest.raises(spfde.InvalidArgument, match=match):
        attach(parts, recipe, **options)
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
    assert len(parts.optimizer.param_groups) == 1
    assert not parts.optimizer._optimizer_step_pre_hooks


def test_an_unreachable_flops_reduction_is_refused_with_the_most_possible(parts: Parts) -> None:
    recipe = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.9))
    refused(parts, recipe, r"flops_reduction=0\.9: cannot be reached.*most possible is 0\.\d+")


def test_a_removed_fraction_that_leaves_no_full_batch_is_refused(parts: Parts) -> None:
    refused(parts, spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.9)), "no full batch of 8")


def test_an_explicit_interval_longer_than_the_run_is_refused(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    refused(parts, whole_recipe.replace(update_interval_epochs=9), "update_interval_epochs=9.*8 epochs")


def test_an_interval_of_one_epoch_warns_that_forgetting_cannot_be_counted(parts: Parts) -> None:
    recipe = spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.25), update_interval_epochs=1)
    with pytest.warns(UserWarning, match="update_interval_epochs"):
        attach(parts, recipe)


def test_a_scheduler_on_the_optimizer_is_refused_together_with_ours(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    torch.optim.lr_scheduler.StepLR(parts.optimizer, 3)
    refused(parts, whole_recipe, "initial_lr")
    train(parts, attach(parts, whole_recipe.replace(learning_rate=None)))


@pytest.mark.parametrize("learning_rate", [spfde.BlockwiseCosine(), spfde.BlockwiseCosine(warmup_epochs=7)])
def test_a_learning_rate_that_cannot_be_driven_is_refused_before_an_engine_is_built(
    learning_rate: spfde.BlockwiseCosine,
    parts: Parts,
    whole_recipe: spfde.Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("an engine was asked for")

    monkeypatch.setattr(door, "choose_engine", build)
    if not learning_rate.warmup_epochs:
        torch.optim.lr_scheduler.StepLR(parts.optimizer, 3)
    refused(parts, whole_recipe.replace(learning_rate=learning_rate), "initial_lr|warmup_epochs=7", engine="native")


def test_problems_of_different_kinds_are_named_together(parts: Parts) -> None:
    optimizer = torch.optim.SGD(parts.model.fc.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    recipe = spfde.Recipe(
        sieving=spfde.DataSieving(removed_fraction=0.95),
        learning_rate=spfde.BlockwiseCosine(),
        update_interval_epochs=9,
    )
    with pytest.raises(spfde.InvalidArgument) as caught:
        spfde.attach(parts.model, optimizer, parts.loader, recipe, epochs=EPOCHS)
    named = [problem.argument for problem in caught.value.problems]
    assert named == ["optimizer", "optimizer", "update_interval_epochs", "removed_fraction"]
    for words in ("lacks", "initial_lr", "8 epochs", "no full batch of 8"):
        assert words in str(caught.value)


def test_arguments_of_a_wrong_kind_are_named_together(parts: Parts) -> None:
    with pytest.raises(spfde.InvalidArgument) as caught:
        spfde.attach(
            "net",  # type: ignore[arg-type]
            parts.model,  # type: ignore[arg-type]
            [1, 2],  # type: ignore[arg-type]
            "spfde",  # type: ignore[arg-type]
            epochs=0,
            seed=1.5,  # type: ignore[arg-type]
            engine="nativ",
        )
    named = [problem.argument for problem in caught.value.problems]
    assert named == ["model", "optimizer", "loader", "recipe", "epochs", "seed", "engine"]
    assert str(caught.value).startswith("model='net': must be a torch.nn.Module. ")


@pytest.mark.parametrize("seed", ["a", 1.5, True, None, 2**70, -(2**70)])
def test_a_seed_that_no_generator_takes_is_refused(seed: Any, parts: Parts) -> None:
    refused(parts, spfde.Recipe(), "seed=.*must be a whole number", seed=seed)


def test_a_second_session_on_the_same_model_or_optimizer_is_refused(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    with pytest.raises(spfde.InvalidArgument, match="has a session already"):
        attach(parts, whole_recipe)
    session.detach()
    attach(parts, whole_recipe)


def test_foreign_and_missing_parameters_are_named_together(parts: Parts) -> None:
    head = list(parts.model.fc.parameters())
    optimizer = torch.optim.SGD([*head, nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(spfde.InvalidArgument) as caught:
        spfde.attach(parts.model, optimizer, parts.loader, spfde.Recipe(), epochs=2)
    assert "not the model's" in str(caught.value)
    assert "stem.weight" in str(caught.value)
    assert len(caught.value.problems) == 2


def test_a_model_without_prunable_layers_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(128))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(spfde.InvalidArgument, match="prunable"):
        spfde.attach(model, optimizer, make_parts().loader, spfde.presets.mest, epochs=4)


def test_an_unknown_engine_is_refused_with_the_nearest_name(parts: Parts) -> None:
    refused(parts, spfde.Recipe(), "Did you mean 'native'", engine="nativ")


def test_an_engine_that_cannot_be_had_is_refused_with_the_reason(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    parts.model.double()
    refused(parts, whole_recipe, "float64, and the kernels take float32", engine="native")


@pytest.mark.parametrize("epochs", [0, -1, 2.5, True])
def test_a_length_that_is_no_number_of_epochs_is_refused(parts: Parts, epochs: Any) -> None:
    refused(parts, spfde.Recipe(), "epochs", epochs=epochs)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


class Empty(Dataset[Any]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError


def test_loaders_that_cannot_be_sieved_are_refused_with_the_remedy(parts: Parts) -> None:
    own = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(make_images()), 8, False)

    class OwnBatches(torch.utils.data.BatchSampler):
        pass

    mine = OwnBatches(own.sampler, 8, False)
    loaders: list[tuple[DataLoader[Any], str]] = [
        (DataLoader(Stream(), batch_size=4), "iterable-style"),
        (DataLoader(Empty(), batch_size=4), "length 0"),
        (DataLoader(make_images(), batch_sampler=mine), "Pass sampler="),
    ]
    for loader, match in loaders:
        with pytest.raises(spfde.InvalidArgument, match=match):
            spfde.attach(parts.model, parts.optimizer, loader, spfde.presets.spfde, epochs=4)


def test_observe_called_twice_missing_or_with_wrong_lengths_or_labels_is_an_error(
    parts: Parts, whole_recipe: spfde.Recipe
) -> None:
    session = attach(parts, whole_recipe)
    batches = iter(session.loader)
    x, y = next(batches)
    logits = parts.model(x)
    with pytest.raises(spfde.InvalidArgument, match="one entry for each of the 8"):
        session.observe(logits[:4], y[:4])
    with pytest.raises(spfde.InvalidArgument, match="exactly one"):
        session.observe()
    with pytest.raises(spfde.InvalidArgument, match=r"y=4: must be in \[0, 4\)"):
        session.observe(logits, y.clamp(max=2).index_fill(0, torch.tensor([5]), 4))
    session.observe(logits, y)
    with pytest.raises(spfde.UsageError, match="nothing to observe"):
        session.observe(logits, y)
    list(batches)
    with pytest.raises(spfde.UsageError, match="was not called for 3 batches"):
        session.end_epoch()


def test_an_epoch_whose_last_batch_was_not_observed_cannot_end(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    batches = [None for x, y in session.loader if session.observe(parts.model(x), y) is None][:-1]
    assert batches
    session.end_epoch()
    first, *rest = session.loader, *()
    assert not rest
    iterator = iter(first)
    next(iterator)
    with pytest.raises(spfde.UsageError, match="was not called"):
        session.end_epoch()


def test_steps_without_observation_are_an_error_while_samples_are_sieved(
    parts: Parts, whole_recipe: spfde.Recipe
) -> None:
    session = attach(parts, whole_recipe)
    step(parts, None, *next(iter(parts.loader)))
    with pytest.raises(spfde.UsageError, match="without observe"):
        session.end_epoch()


def test_a_session_with_workers_that_keep_no_order_needs_indices(whole_recipe: spfde.Recipe) -> None:
    parts = make_parts()
    probe = DataLoader(make_images(), batch_size=8)
    if not hasattr(probe, "in_order"):
        pytest.skip("this torch has no in_order")
    loader = DataLoader(make_images(), batch_size=8, shuffle=True, num_workers=1, in_order=False)
    session = spfde.attach(parts.model, parts.optimizer, loader, whole_recipe, epochs=EPOCHS)
    x, y = next(iter(session.loader))
    with pytest.raises(spfde.UsageError, match="indices="):
        session.observe(parts.model(x), y)


def test_a_model_whose_inputs_cannot_be_told_from_a_batch_asks_for_a_sample() -> None:
    class Records(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": torch.randn(2, 8, 8), "label": index % 4}

    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Records(), batch_size=4)
    with pytest.raises(spfde.InvalidArgument, match="sample="):
        spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2)
    sample = torch.zeros(1, 2, 8, 8)
    session = spfde.attach(model, optimizer, loader, spfde.presets.static, epochs=2, sample=sample)
    assert len(list(session.loader)) == 4


def test_errors_of_the_recipe_name_the_argument_the_value_the_rule_and_the_remedy() -> None:
    with pytest.raises(spfde.InvalidArgument) as caught:
        spfde.MEST(sparsity=1.0, soft_bond=True)
    text = str(caught.value)
    assert "sparsity=1.0" in text
    assert "less than 1" in text
    assert "Did you mean 'soft_bound'?" in text
    assert isinstance(caught.value, ValueError)


def test_nothing_warns_on_an_ordinary_attach(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(parts, whole_recipe)
        trace(parts.model, torch.zeros(1, 2, 8, 8))


# --- found by reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        spfde.SET(sparsity=0.5),
        spfde.RigL(sparsity=0.5),
        spfde.MEST(sparsity=0.5, soft_bound=False),
        spfde.MEST(sparsity=0.5),
        spfde.MEST(sparsity=0.5, gradient_weight=0.5),
    ],
    ids=lambda method: repr(method)[:24],
)
def test_freezing_takes_no_trained_weight_away(method: spfde.sparsity.SparsityMethod, parts: Parts) -> None:
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.15)
    session = attach(parts, spfde.Recipe(sparsity=method, freezing=freezing, update_interval_epochs=2))
    weights = dict(parts.model.named_parameters())
    before: dict[str, torch.Tensor] = {}

    def at_top(_: int) -> None:
        for block in session.blueprint.partition.blocks[: session.frozen_blocks]:
            for name in block.parameters:
                assert torch.equal(weights[name], before[name])

    def at_bottom(_: int) -> None:
        before.update({name: p.detach().clone() for name, p in weights.items()})

    train(parts, session, at_top=at_top, at_bottom=at_bottom)
    assert session.frozen_blocks >= 1
    for name in ("blocks.0.conv1.weight", "blocks.0.conv2.weight"):
        assert int(torch.count_nonzero(weights[name])) == int(session.masks[name].sum())


def test_rigl_grows_by_true_dense_gradients_where_the_epoch_begins_with_a_step() -> None:
    """Batches from elsewhere and no begin_epoch(): the first gradient arrives masked and must not be ranked by."""
    parts = make_parts()
    session = attach(parts, spfde.Recipe(sparsity=spfde.RigL(sparsity=0.8), update_interval_epochs=2))
    for _ in range(3):
        before = {name: mask.clone() for name, mask in session.masks.items()}
        for number, (x, y) in enumerate(parts.loader):
            step(parts, None, x, y)
            if session.epoch == 2 and number == 0:
                assert all(torch.equal(mask, before[name]) for name, mask in session.masks.items())
        session.end_epoch()
    assert any(not torch.equal(mask, before[name]) for name, mask in session.masks.items())


def test_a_callback_loop_may_begin_its_epochs_itself(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    images, labels = make_images().tensors
    for epoch in range(EPOCHS):
        session.begin_epoch()
        assert session.epoch == epoch
        for indices in session.partial_set.split(10):
            logits = parts.model(images[indices])
            session.observe(logits, labels[indices], indices)
            F.cross_entropy(logits, labels[indices]).backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
        session.end_epoch()
    assert [row.samples for row in session.cost.rows] == [30] * EPOCHS


def test_a_loop_that_never_ends_its_epochs_is_warned(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    for x, y in session.loader:
        step(parts, session, x, y)
    with pytest.warns(UserWarning, match=r"end_epoch\(\)"):
        next(iter(session.loader))


def test_an_optimizer_without_step_hooks_is_refused_before_anything_is_changed(
    parts: Parts, whole_recipe: spfde.Recipe
) -> None:
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        @property
        def param_groups(self) -> Any:
            return self.inner.param_groups

    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    with pytest.raises(spfde.InvalidArgument, match="has no step hooks"):
        spfde.attach(parts.model, Wrapped(parts.optimizer), parts.loader, whole_recipe, epochs=EPOCHS)
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
    assert len(parts.optimizer.param_groups) == 1


def test_an_optimizer_that_moves_parameters_without_a_gradient_cannot_freeze(parts: Parts) -> None:
    optimizer = torch.optim.LBFGS(parts.model.parameters())
    recipe = spfde.Recipe(freezing=spfde.ProgressiveFreezing(flops_reduction=0.1))
    with pytest.raises(spfde.InvalidArgument, match="moves parameters that have no gradient"):
        spfde.attach(parts.model, optimizer, parts.loader, recipe, epochs=EPOCHS)


def test_a_scheduler_that_joins_later_is_an_error(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    torch.optim.lr_scheduler.StepLR(parts.optimizer, 1)
    with pytest.raises(spfde.UsageError, match="scheduler"):
        next(session.epochs())


def test_detaching_in_the_loops_body_ends_the_loop(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    for _ in session.epochs():
        session.detach()


def test_a_data_sets_own_generators_are_put_back_after_the_first_item_was_looked_at() -> None:
    class Noisy(Dataset[Any]):
        def __init__(self) -> None:
            import numpy as np

            self.rng = np.random.default_rng(0)
            self.torch_rng = torch.Generator().manual_seed(0)

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            noise = torch.randn(2, 8, 8, generator=self.torch_rng)
            return noise + float(self.rng.normal()), index % 4

    data = Noisy()
    before = (data.rng.bit_generator.state, data.torch_rng.get_state())
    parts = make_parts()
    loader = DataLoader(torch.utils.data.Subset(data, range(12)), batch_size=4)
    spfde.attach(parts.model, parts.optimizer, loader, spfde.Recipe(), epochs=2)
    assert data.rng.bit_generator.state == before[0]
    assert torch.equal(data.torch_rng.get_state(), before[1])


@pytest.mark.parametrize("missing", ["clock", "parts", "run", "generator"])
def test_a_state_with_a_missing_part_is_refused(parts: Parts, whole_recipe: spfde.Recipe, missing: str) -> None:
    session = attach(parts, whole_recipe)
    state = session.state_dict()
    del state[missing]
    with pytest.raises(spfde.StateMismatch, match=missing):
        session.load_state_dict(state)


def test_a_state_with_a_missing_sieve_is_refused(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    state = session.state_dict()
    del state["parts"]["sampling"]["sieve"]
    with pytest.raises(spfde.StateMismatch, match="lacks sieve"):
        session.load_state_dict(state)


@pytest.mark.parametrize("method", [spfde.TopKAST(sparsity=0.8), spfde.STR(sparsity=0.8)])
def test_weights_behind_the_mask_and_an_optimizer_that_runs_the_model_itself_are_refused(
    method: spfde.sparsity.SparsityMethod,
) -> None:
    parts = make_parts()
    parts.optimizer = torch.optim.LBFGS(parts.model.parameters())
    with pytest.raises(spfde.InvalidArgument, match=r"LBFGS.*runs the model within its step"):
        attach(parts, spfde.Recipe(sparsity=method))


def test_what_was_frozen_when_it_was_detached_can_still_be_read(parts: Parts, whole_recipe: spfde.Recipe) -> None:
    session = attach(parts, whole_recipe)
    train(parts, session)
    frozen = session.frozen_blocks
    assert frozen == session.cost.rows[-1].frozen_blocks > 0
    session.detach()
    assert session.frozen_blocks == frozen
    assert f"freezing: {frozen} of 3 blocks frozen" in str(session)
    assert all(parameter.requires_grad for parameter in parts.model.parameters())


@pytest.mark.parametrize(
    ("epochs", "interval", "advised", "not_said"),
    [
        (8, 1, ["update_interval_epochs=2"], "4 epochs"),
        (3, 1, ["update_interval_epochs=2", "4 epochs"], "run of"),
        (3, "auto", ["4 epochs"], "update_interval_epochs"),
        (2, "auto", ["4 epochs"], "update_interval_epochs"),
    ],
)
def test_samples_that_are_left_out_at_random_are_warned_of_with_advice_that_ends_it(
    epochs: int, interval: int | str, advised: list[str], not_said: str
) -> None:
    recipe = spfde.Recipe(sieving=spfde.DataSieving(removed_fraction=0.25), update_interval_epochs=interval)
    wanted = recipe.replace(update_interval_epochs=2) if "update_interval_epochs=2" in advised else recipe
    for attempt in (
        lambda recipe, epochs: attach(make_parts(), recipe, epochs=epochs),
        lambda recipe, epochs: spfde.plan(SmallNet(), torch.zeros(1, 2, 8, 8), recipe, epochs, SAMPLES),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attempt(recipe, epochs)
        (warning,) = caught
        for words in (*advised, "at random"):
            assert words in str(warning.message)
        assert not_said not in str(warning.message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attempt(wanted, max(epochs, 4))


def test_a_loop_without_ends_is_told_one_thing_by_the_warning_and_another_by_the_error(
    parts: Parts, whole_recipe: spfde.Recipe
) -> None:
    session = attach(parts, whole_recipe)
    for x, y in session.loader:
        step(parts, session, x, y)
    with pytest.warns(UserWarning, match="another loader") as heard:
        batch = next(iter(session.loader))
    with pytest.raises(spfde.UsageError, match=r"session\.epochs\(\)") as caught:
        step(parts, session, *batch)
    assert "mutated" in str(caught.value)
    assert "mutated" not in str(heard[0].message)
