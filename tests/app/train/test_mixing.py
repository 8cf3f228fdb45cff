"""Mixup and CutMix: what a mixed image is made of, and that it follows from the batch's seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spfde.app.train.mixing import Mixing
from spfde.core.generators import numpy_state
from spfde.core.numbers import mix

BOTH = {"mixup": {"mixup": 0.4, "cutmix": 0.0}, "cutmix": {"mixup": 0.0, "cutmix": 1.0}}


def mixing(*, mixup: float = 0.0, cutmix: float = 0.0) -> Mixing:
    return Mixing(mixup=mixup, cutmix=cutmix, classes=5)


def batch(n: int = 6, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images that are filled with their number, of class number % 5, and seeds."""
    numbers = torch.arange(n)
    images = numbers.float()[:, None, None, None].expand(n, 3, size, size).clone()
    return images, numbers % 5, mix(numbers, 1)


def test_mixup_blends_an_image_and_its_classes_with_another_of_the_batch() -> None:
    images, labels, seeds = batch()
    mixed, probabilities = (mixer := mixing(mixup=0.4))(images, labels, seeds)
    how = mixer.draw(seeds, 8, 8)
    for number, partner in enumerate(how.partner.tolist()):
        expected = how.share * number + (1 - how.share) * partner
        assert mixed[number].flatten().tolist() == pytest.approx([expected] * 192)
        classes = torch.zeros(5)
        classes[number % 5] += how.share
        classes[partner % 5] += 1 - how.share
        assert probabilities[number].tolist() == pytest.approx(classes.tolist())


def test_cutmix_pastes_a_rectangle_of_another_image_and_its_class_has_the_rectangle_s_share() -> None:
    images, labels, _ = batch()
    for number in range(20):
        seeds = mix(torch.arange(6), number)
        mixed, probabilities = (mixer := mixing(cutmix=1.0))(images, labels, seeds)
        how = mixer.draw(seeds, 8, 8)
        assert how.box is not None
        top, left, bottom, right = how.box
        expected = images.clone()
        expected[:, :, top:bottom, left:right] = images[how.partner, :, top:bottom, left:right]
        assert torch.equal(mixed, expected)
        own = (mixed == images)[:, 0].flatten(1).float().mean(1)
        assert own.tolist() == pytest.approx([how.share] * 6)
        assert probabilities.sum(1).tolist() == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("kind", BOTH)
def test_an_image_stays_mostly_itself_and_its_own_class_the_most_probable(kind: str) -> None:
    images, labels, _ = batch(5)
    for number in range(50):
        seeds = mix(torch.arange(5), number)
        mixer = mixing(**BOTH[kind])
        how = mixer.draw(seeds, 8, 8)
        assert sorted(how.partner.tolist()) == [0, 1, 2, 3, 4]
        assert not bool((how.partner == torch.arange(5)).any())
        assert torch.equal(mixer(images, labels, seeds)[1].argmax(1), labels)
        assert 0.5 <= how.share <= 1


def test_mixup_s_share_is_the_larger_part_of_a_beta_distribution() -> None:
    shares = [mixing(mixup=1.0).draw(mix(torch.arange(3), number), 1, 1).share for number in range(500)]
    assert np.mean(shares) == pytest.approx(0.75, abs=0.02)  # uniform over [1/2, 1]
    assert np.std(shares) == pytest.approx(0.5 / 12**0.5, abs=0.02)


def test_with_both_a_batch_has_one_of_them() -> None:
    cut = [mixing(mixup=0.2, cutmix=1.0).draw(mix(torch.arange(3), n), 8, 8).box is not None for n in range(100)]
    assert 35 < sum(cut) < 65


@pytest.mark.parametrize("kind", BOTH)
def test_who_is_mixed_with_whom_does_not_depend_on_the_order_of_the_batch(kind: str) -> None:
    images, labels, seeds = batch()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    mixed, classes = mixing(**BOTH[kind])(images, labels, seeds)
    again, classes_again = mixing(**BOTH[kind])(images[order], labels[order], seeds[order])
    assert torch.equal(mixed[order], again)
    assert torch.equal(classes[order], classes_again)


@pytest.mark.parametrize("kind", BOTH)
def test_no_global_generator_is_drawn_from_and_the_batch_is_left_alone(kind: str) -> None:
    images, labels, seeds = batch()
    before, numbers = torch.get_rng_state(), numpy_state()
    kept = images.clone()
    mixing(**BOTH[kind])(images, labels, seeds)
    assert torch.equal(before, torch.get_rng_state())
    assert numbers == numpy_state()
    assert torch.equal(images, kept)


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 100.0])
def test_any_parameter_gives_a_share(alpha: float) -> None:
    for kind in ("mixup", "cutmix"):
        assert 0.5 <= mixing(**{kind: alpha}).draw(torch.arange(4), 8, 8).share <= 1
