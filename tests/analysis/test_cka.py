"""CKA agrees with its definitions, and has the properties that it is used for."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spfde.analysis import batch_grams, linear_cka, minibatch_cka
from spfde.analysis.cka import MinibatchCKA, centred_gram, unbiased_hsic
from spfde.core.errors import InvalidArgument


def features(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def update(total: MinibatchCKA, x: Tensor, y: Tensor) -> None:
    total.add(centred_gram(x), centred_gram(y))


def hsic(x: Tensor, y: Tensor) -> float:
    return unbiased_hsic(centred_gram(x), centred_gram(y))


def song(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """Equation 5 of Song et al. 2012, term by term."""
    n = len(k)
    k, l = k - torch.diag(k.diag()), l - torch.diag(l.diag())  # noqa: E741
    one = torch.ones(n, dtype=torch.float64)
    total = (
        (k @ l).trace() + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return float(total) / (n * (n - 3))


def u_statistic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """HSIC as what it estimates: E k l + E k E l - 2 E k l, over samples that are all different."""
    n = len(k)
    pairs = [float(k[i, j] * l[i, j]) for i, j in permutations(range(n), 2)]
    triples = [float(k[i, j] * l[i, q]) for i, j, q in permutations(range(n), 3)]
    quads = [float(k[i, j] * l[q, r]) for i, j, q, r in permutations(range(n), 4)]
    return sum(pairs) / len(pairs) + sum(quads) / len(quads) - 2 * sum(triples) / len(triples)


class TestFullBatch:
    def test_two_samples_on_a_line_are_always_aligned(self) -> None:
        assert linear_cka(torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0, 1.0], [2.0, 7.0]])) == pytest.approx(1.0)

    def test_a_value_worked_out_by_hand(self) -> None:
        # Centred: x = (-1, 0, 1), y = (1, -2, 1). Orthogonal in the samples, so YᵀX = 0.
        assert linear_cka(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [-2.0], [1.0]])) == pytest.approx(
            0.0
        )
        # Centred: x = (-1, 0, 1), y = (-4/3, -1/3, 5/3): (YᵀX)² / (XᵀX YᵀY) = 9 / (2 · 14/3) = 27/28.
        assert linear_cka(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]])) == pytest.approx(
            27 / 28
        )

    @given(n=st.integers(3, 12), dx=st.integers(1, 20), dy=st.integers(1, 20), seed=st.integers(0, 1000))
    @settings(max_examples=40, deadline=None)
    def test_it_is_the_definition_on_covariances(self, n: int, dx: int, dy: int, seed: int) -> None:
        x, y = features(n, dx, seed), features(n, dy, seed + 1)
        xc, yc = x - x.mean(0), y - y.mean(0)
        norm = torch.linalg.matrix_norm
        expected = norm(yc.T @ xc) ** 2 / (norm(xc.T @ xc) * norm(yc.T @ yc))
        assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-9)

    def test_constant_features_have_none(self) -> None:
        assert math.isnan(linear_cka(torch.ones(5, 3), features(5, 3, 0)))

    def test_float32_features_with_a_large_mean_keep_their_digits(self) -> None:
        x, y = features(40, 30, 1), features(40, 30, 2)
        y = x + y
        assert linear_cka((x + 300).float(), (y - 200).float()) == pytest.approx(linear_cka(x, y), abs=1e-4)


class TestUnbiasedHSIC:
    @given(n=st.integers(4, 15), seed=st.integers(0, 1000))
    @settings(max_examples=40, deadline=None)
    def test_it_is_the_estimator_of_song_et_al(self, n: int, seed: int) -> None:
        x, y = features(n, 6, seed), features(n, 3, seed + 1)
        assert hsic(x, y) == pytest.approx(song(x @ x.T, y @ y.T), rel=1e-9, abs=1e-9)

    def test_it_is_a_mean_over_different_samples_and_so_unbiased(self) -> None:
        x, y = features(6, 4, 0), features(6, 2, 1)
        assert hsic(x, y) == pytest.approx(u_statistic(x @ x.T, y @ y.T))

    def test_the_mean_over_all_minibatches_is_the_value_of_the_whole(self) -> None:
        x, y = features(7, 5, 2), features(7, 3, 3)
        parts = [hsic(x[list(some)], y[list(some)]) for some in combinations(range(7), 4)]
        assert sum(parts) / len(parts) == pytest.approx(hsic(x, y))

    def test_centred_grams_have_no_diagonal_and_rows_that_add_up_to_nothing(self) -> None:
        gram = centred_gram(features(9, 5, 4))
        assert torch.equal(gram.diag(), torch.zeros(9, dtype=torch.float64))
        assert torch.allclose(gram.sum(0), torch.zeros(9, dtype=torch.float64), atol=1e-12)

    def test_feature_maps_count_alike_in_every_memory_format(self) -> None:
        maps = features(8, 2 * 3 * 5, 5).view(8, 2, 3, 5)
        tuned = maps.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(centred_gram(maps), centred_gram(tuned), rtol=1e-12)

    @pytest.mark.parametrize("n", [1, 3])
    def test_fewer_than_four_samples_are_refused(self, n: int) -> None:
        with pytest.raises(InvalidArgument, match="must have at least 4 samples"):
            centred_gram(features(n, 2, 0))

    def test_features_of_different_samples_are_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="must have as many samples"):
            linear_cka(features(5, 2, 0), features(6, 2, 0))


class TestMinibatches:
    def test_it_is_the_ratio_of_sums_of_the_estimator(self) -> None:
        x, y = features(20, 6, 0), features(20, 4, 1)
        y = y + x[:, :4]
        total = MinibatchCKA()
        sums = [0.0, 0.0, 0.0]
        for part in torch.arange(20).split(5):
            update(total, x[part], y[part])
            k, l = x[part] @ x[part].T, y[part] @ y[part].T  # noqa: E741
            sums = [old + song(a, b) for old, (a, b) in zip(sums, ((k, l), (k, k), (l, l)), strict=True)]
        assert total.value == pytest.approx(sums[0] / math.sqrt(sums[1] * sums[2]), rel=1e-9)

    @given(seed=st.integers(0, 1000), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
    @settings(max_examples=30, deadline=None)
    def test_a_representation_is_like_itself_turned_shifted_and_scaled(
        self, seed: int, shift: float, scale: float
    ) -> None:
        x, y = features(24, 5, seed), features(24, 7, seed + 1)
        turn = torch.linalg.qr(features(5, 5, seed + 2)).Q
        same, turned, straight = MinibatchCKA(), MinibatchCKA(), MinibatchCKA()
        for part in torch.arange(24).split(8):
            update(same, x[part], scale * x[part] @ turn + shift)
            update(turned, scale * x[part] @ turn + shift, y[part])
            update(straight, x[part], y[part])
        assert same.value == pytest.approx(1.0)
        assert turned.value == pytest.approx(straight.value, abs=1e-9)
        assert -1.0 <= straight.value <= 1.0

    def test_a_stretch_of_one_axis_is_not_forgiven(self) -> None:
        x = features(24, 5, 0)
        total = MinibatchCKA()
        update(total, x, x * torch.tensor([10.0, 1, 1, 1, 1], dtype=torch.float64))
        assert total.value < 0.9

    def test_independent_features_are_near_zero_where_the_biased_form_is_far_from_it(self) -> None:
        total, biased = MinibatchCKA(), []
        for seed in range(50):
            x, y = features(16, 200, 2 * seed), features(16, 200, 2 * seed + 1)
            update(total, x, y)
            biased.append(linear_cka(x, y))
        assert abs(total.value) < 0.05
        assert min(biased) > 0.8

    def test_many_models_are_compared_with_one_reference(self) -> None:
        batches = list(features(24, 4, 0).split(6))

        def model(batch: Tensor) -> dict[str, Tensor]:
            return {"a": batch.relu(), "b": batch * 3}

        reference = list(batch_grams(model, batches))
        found = minibatch_cka(batch_grams(lambda x: {"a": x, "b": x}, iter(batches)), reference)
        expected = MinibatchCKA()
        for batch in batches:
            update(expected, batch, batch.relu())
        assert found["a"] == pytest.approx(expected.value)
        assert found["b"] == pytest.approx(1.0)
        with pytest.raises(ValueError, match=r"shorter|longer"):
            minibatch_cka(batch_grams(model, batches[:2]), reference)

    def test_without_a_batch_there_is_no_value(self) -> None:
        assert math.isnan(MinibatchCKA().value)
