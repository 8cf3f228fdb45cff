import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument
from spfde.sparsity.distribution import active_count, erk


@pytest.mark.parametrize(
    ("numel", "sparsity", "count"),
    [(100, 0.9, 10), (5, 0.9, 1), (15, 0.9, 2), (3, 0.5, 2), (1, 0.99, 1), (1000, 0.9999, 1), (7, 0.0, 7), (0, 0.5, 0)],
)
def test_counts_are_rounded_half_up_and_are_never_zero(numel: int, sparsity: float, count: int) -> None:
    assert active_count(numel, sparsity) == count


def test_full_sparsity_keeps_nothing() -> None:
    assert active_count(10, 1.0) == 0


def test_erk_follows_the_sum_over_the_product_of_the_dimensions() -> None:
    # 130 of 1300 weights in proportion to 20 + 10 (a) and 50 + 20 (b): 130 * 30/100 and 130 * 70/100.
    assert erk({"a": (20, 15), "b": (50, 20)}, 0.9) == {"a": round(130 * 35 / 105), "b": round(130 * 70 / 105)}


def test_a_layer_that_erk_would_overfill_is_dense_and_the_rest_takes_less() -> None:
    # 0.5 * 10004 = 5002 active. By the dims, (2, 2) would get 5002 * 4/204 = 98 of its 4: it is dense, 4998 remain.
    assert erk({"tiny": (2, 2), "wide": (100, 100)}, 0.5) == {"tiny": 4, "wide": 4998}


def test_the_other_layers_absorb_an_override_of_erk() -> None:
    counts = erk({"a": (10, 10), "b": (10, 10), "c": (10, 10)}, 0.9, overrides={"a": 0.8})
    assert counts == {"a": 20, "b": 5, "c": 5}


def test_overrides_of_every_layer_decide_alone() -> None:
    assert erk({"a": (10, 10)}, 0.9, overrides={"*": 0.5}) == {"a": 50}


def test_overrides_that_take_all_weights_from_the_others_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="-40"):
        erk({"a": (10, 10), "b": (10, 10)}, 0.9, overrides={"a": 0.4})


_SHAPES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)


@given(shapes=_SHAPES, sparsity=st.floats(0.0, 0.99))
def test_erk_adds_up_exactly_and_stays_within_each_layer(shapes: dict[str, tuple[int, ...]], sparsity: float) -> None:
    total = sum(math.prod(shape) for shape in shapes.values())
    budget = active_count(total, sparsity)
    if budget < len(shapes):
        with pytest.raises(InvalidArgument, match="sparsity"):
            erk(shapes, sparsity)
        return
    counts = erk(shapes, sparsity)
    assert sum(counts.values()) == budget
    assert list(counts) == list(shapes)
    assert all(1 <= counts[name] <= math.prod(shape) for name, shape in shapes.items())


@given(numel=st.integers(1, 10**7), sparsity=st.floats(0.0, 0.999))
def test_a_count_is_the_nearest_integer(numel: int, sparsity: float) -> None:
    count = active_count(numel, sparsity)
    assert 1 <= count <= numel
    assert count == 1 or abs(count - (1 - sparsity) * numel) <= 0.5 + 1e-5
