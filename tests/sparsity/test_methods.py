import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.sparsity import MEST, METHODS, SET, PruningAtInitialisation, RigL, StaticSparse, planned_active
from spfde.sparsity.methods import planned_keep


def test_methods_are_registered_by_name() -> None:
    assert list(METHODS)[:4] == ["static", "set", "rigl", "mest"]
    for name, method in METHODS.items():
        assert method.name == name
        assert method.references
        assert method.cost
        assert "\n" not in method.summary


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), "much"])
def test_a_sparsity_outside_its_range_is_refused(sparsity: object) -> None:
    with pytest.raises(InvalidArgument, match=r"sparsity=.*a number in \[0, 1\)"):
        StaticSparse(sparsity=sparsity)


def test_all_wrong_fields_are_named_together() -> None:
    with pytest.raises(InvalidArgument) as caught:
        SET(sparsity=2.0, drop_fraction=1.0, stop_fraction=0.0, overrides={"a": 1.0}, droprate=0.1)
    assert {p.argument for p in caught.value.problems} == {
        "sparsity",
        "drop_fraction",
        "stop_fraction",
        "overrides.a",
        "droprate",
    }


def test_stages_of_mest_must_fit_their_boundaries() -> None:
    with pytest.raises(InvalidArgument, match="soft_bound_steps must have one value more than decay_at"):
        MEST(sparsity=0.9, soft_bound_steps=(0.05, 0.0))
    with pytest.raises(InvalidArgument, match="drop_steps must have one value more than decay_at"):
        MEST(sparsity=0.9, soft_bound=False, drop_steps=(0.2,))
    with pytest.raises(InvalidArgument, match="decay_at must rise"):
        MEST(sparsity=0.9, decay_at=(0.7, 0.5))


def test_set_decays_by_a_cosine_or_not_at_all() -> None:
    method = SET(sparsity=0.9, drop_fraction=0.4, stop_fraction=0.8)
    assert [method.drop_fraction_at(p) for p in (0.0, 0.4, 0.8, 1.0)] == pytest.approx([0.4, 0.2, 0.0, 0.0])
    constant = SET(sparsity=0.9, drop_fraction=0.4, decay="constant", stop_fraction=0.8)
    assert [constant.drop_fraction_at(p) for p in (0.0, 0.79, 0.8)] == [0.4, 0.4, 0.0]


def test_rigl_stops_at_its_fraction_of_the_run_and_needs_dense_gradients() -> None:
    method = RigL(sparsity=0.9)
    assert method.gradients == "dense"
    assert [method.drop_fraction_at(p) for p in (0.0, 0.375, 0.75, 0.9)] == pytest.approx([0.3, 0.15, 0.0, 0.0])


def test_mest_uses_the_soft_bound_or_the_drop_steps() -> None:
    soft, elastic = MEST(sparsity=0.9), MEST(sparsity=0.9, soft_bound=False)
    stages = (0.0, 89 / 160, 90 / 160, 119 / 160, 120 / 160)
    assert [soft.excess_at(p) for p in stages] == [0.05, 0.05, 0.025, 0.025, 0.0]
    assert [elastic.drop_fraction_at(p) for p in stages] == [0.2, 0.2, 0.1, 0.1, 0.0]
    assert all(soft.drop_fraction_at(p) == 0.0 == elastic.excess_at(p) for p in stages)


def test_mest_needs_the_active_gradients_only_for_its_gradient_term() -> None:
    assert MEST(sparsity=0.9).gradients == "none"
    method = MEST(sparsity=0.9, gradient_weight=0.5)
    assert method.gradients == "active"
    assert method.drop_score(torch.tensor([-1.0]), torch.tensor([-2.0])).tolist() == [2.0]


def test_the_planned_density_of_the_soft_bound_decays_to_the_target() -> None:
    method = MEST(sparsity=0.9)
    planned = [planned_active(method, 100, 1000, epoch=e, interval=5, epochs=160) for e in (0, 89, 90, 119, 120, 159)]
    assert planned == [150, 150, 125, 125, 100, 100]


def test_the_soft_bound_changes_at_update_epochs_only() -> None:
    # 20 epochs, update epochs every 4: the first decay (11.25) shows at epoch 12, the second (15) at epoch 16.
    planned = [planned_active(MEST(sparsity=0.9), 100, 1000, epoch=e, interval=4, epochs=20) for e in range(20)]
    assert planned == [150] * 12 + [125] * 4 + [100] * 4


def test_the_soft_bound_never_exceeds_the_layer_and_leaves_dense_layers_alone() -> None:
    method = MEST(sparsity=0.02)
    assert planned_active(method, 98, 100, epoch=0, interval=1, epochs=10) == 100
    assert planned_active(method, 100, 100, epoch=0, interval=1, epochs=10) == 100


def test_nothing_is_dropped_at_epoch_zero_nor_in_the_last_epoch() -> None:
    method = SET(sparsity=0.9, decay="constant")
    assert [planned_keep(method, 10, 100, epoch=e, epochs=4) for e in range(4)] == [10, 7, 7, 10]


def test_counts_follow_the_distribution() -> None:
    shapes = {"tiny": (2, 2), "wide": (100, 100)}
    assert StaticSparse(sparsity=0.5).counts(shapes) == {"tiny": 2, "wide": 5000}
    assert StaticSparse(sparsity=0.5, distribution="erk").counts(shapes) == {"tiny": 4, "wide": 4998}
    assert StaticSparse(sparsity=0.5, overrides={"t*": 0.0}).counts(shapes) == {"tiny": 4, "wide": 5000}


@pytest.mark.parametrize("method", METHODS.values())
def test_a_method_survives_its_own_dump(method: type[StaticSparse]) -> None:
    overrides = {} if issubclass(method, PruningAtInitialisation) else {"b": 0.5}
    made = method(sparsity=0.8, include=("a*",), overrides=overrides)
    assert method(**made.model_dump()) == made


@given(progress=st.floats(0, 1), sparsity=st.floats(0, 0.99))
def test_fractions_stay_in_range(progress: float, sparsity: float) -> None:
    for method in METHODS.values():
        made = method(sparsity=sparsity)
        assert 0.0 <= made.drop_fraction_at(progress) < 1.0
        assert 0.0 <= made.excess_at(progress) < 1.0
