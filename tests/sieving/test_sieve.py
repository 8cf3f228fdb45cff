from __future__ import annotations

import io
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spfde.core.errors import InvalidArgument, StateMismatch
from spfde.sieving import DataSieving
from spfde.sieving.methods import check_fraction
from spfde.sieving.sieve import Sieve, easiest

INF = float("inf")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    n: int = 10, removed: float = 0.4, swap: float | None = None, generator: torch.Generator | None = None
) -> Sieve:
    technique = DataSieving(removed_fraction=removed, swap_fraction=swap)
    return Sieve(torch.arange(n), technique, seeded() if generator is None else generator)


def rank(sieve: Sieve, easy: list[int]) -> torch.Tensor:
    """Difficulties that make the given ids the easiest, in this order."""
    difficulty = torch.full((sieve.population.numel(),), INF)
    difficulty[torch.searchsorted(sieve.population, torch.tensor(easy))] = torch.arange(len(easy), dtype=torch.float32)
    return difficulty


# --- the technique ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_removed_fraction_outside_zero_to_one_is_refused_by_name(fraction):
    with pytest.raises(InvalidArgument, match="removed_fraction"):
        DataSieving(removed_fraction=fraction)


def test_several_wrong_fields_are_named_together():
    with pytest.raises(InvalidArgument) as caught:
        DataSieving(removed_fraction=2, swap_fraction=-1, never_learned="soft")
    assert {problem.argument for problem in caught.value.problems} == {
        "removed_fraction",
        "swap_fraction",
        "never_learned",
    }


@pytest.mark.parametrize(
    ("n", "removed", "swap", "n_removed", "n_swap"),
    [
        (50_000, 0.2, None, 10_000, 8_000),  # p % of the partial set, by default
        (50_000, 0.2, 0.05, 10_000, 2_000),
        (50_000, 0.2, 0.9, 10_000, 10_000),  # no more can come back than were removed
        (10, 0.25, None, 3, 2),  # 2.5 is rounded up, 1.75 too
        (10, 0.8, 1.0, 8, 2),  # no more can go than are there
        (100, 0.145, None, 15, 12),  # 14.5 is rounded up though it is a little less in floating point
        (1000, 0.145, 0.0, 145, 0),  # removed once and for all
        (1000, 0.002, 0.0001, 2, 1),  # at least one, so that every sample gets its turn
        (10, 0.0, 0.5, 0, 0),
        (4, 0.1, None, 0, 0),
    ],
)
def test_counts_are_the_shares_rounded_half_up(n, removed, swap, n_removed, n_swap):
    technique = DataSieving(removed_fraction=removed, swap_fraction=swap)
    assert technique.n_removed(n) == n_removed
    assert technique.moves(n) == (n_swap, n_swap)


def test_a_removed_fraction_that_leaves_no_full_batch_is_reported_with_what_would_do():
    (problem,) = check_fraction(DataSieving(removed_fraction=0.5), 100, 64, epochs=20)
    assert problem.argument == "removed_fraction"
    assert problem.value == 0.5
    assert "50 of 100" in problem.rule
    assert "0.36" in problem.remedy
    assert "batch_size=50 " in problem.remedy
    assert check_fraction(DataSieving(removed_fraction=0.36), 100, 64, epochs=20) == []
    assert check_fraction(DataSieving(removed_fraction=0.5), 100, 50, epochs=20) == []


def test_a_data_set_smaller_than_a_batch_is_fine_while_nothing_is_removed():
    assert check_fraction(DataSieving(removed_fraction=0.0), 10, 64, epochs=20) == []
    (problem,) = check_fraction(DataSieving(removed_fraction=0.2), 10, 64, epochs=20)
    assert "batch_size=8 " in problem.remedy
    assert "removed_fraction=0" in problem.remedy


@given(
    st.integers(2, 500), st.integers(1, 400), st.floats(0.01, 0.99), st.sampled_from([0, 0.1, 0.4]), st.integers(1, 30)
)
def test_what_the_remedy_advises_is_accepted(n, batch_size, fraction, full, epochs):
    def problems_of(removed, batch_size):
        return check_fraction(DataSieving(removed_fraction=removed, full_last=full), n, batch_size, epochs)

    problems = problems_of(fraction, batch_size)
    if problems:
        share = re.search(r"removed_fraction=([\d.]+\d|0)", problems[0].remedy)
        size = re.search(r"batch_size=(\d+)", problems[0].remedy)
        assert share is not None
        found = problems_of(float(share[1]), batch_size)
        if "none would be left" in problems[0].rule:  # whether a batch is full is told then
            found = [problem for problem in found if "no full batch" not in problem.rule]
        else:
            assert (size is None) == ("leaves 0 " in problems[0].rule)
        assert found == []
        if size is not None:
            assert problems_of(fraction, int(size[1])) == []


# --- the pure functions ----------------------------------------------------------------------------------------------


def test_the_easiest_come_first_and_hard_ones_last():
    difficulty = torch.tensor([2.0, 0.0, INF, 1.0, INF])
    assert easiest(difficulty, 3, seeded()).tolist() == [1, 3, 0]
    assert set(easiest(difficulty, 5, seeded())[3:].tolist()) == {2, 4}


def test_equals_come_in_an_order_that_the_seed_decides():
    difficulty = torch.zeros(50)
    assert torch.equal(easiest(difficulty, 20, seeded(1)), easiest(difficulty, 20, seeded(1)))
    assert not torch.equal(easiest(difficulty, 20, seeded(1)), easiest(difficulty, 20, seeded(2)))


def test_equals_are_chosen_with_equal_chance():
    generator, drawn = seeded(), torch.zeros(10)
    for _ in range(2000):
        drawn[easiest(torch.zeros(10), 3, generator)] += 1
    expected, deviation = 600, math.sqrt(2000 * 0.3 * 0.7)
    assert ((drawn - expected).abs() < 5 * deviation).all()


# --- the sieve -------------------------------------------------------------------------------------------------------


def test_at_the_start_a_random_share_is_removed():
    sieve = make(10, 0.4)
    assert sieve.removed.numel() == 4
    assert sieve.partial.tolist() == sorted(set(range(10)) - set(sieve.removed.tolist()))
    assert sieve.removed.tolist() == make(10, 0.4).removed.tolist()
    assert len({tuple(make(10, 0.4, generator=seeded(seed)).removed.tolist()) for seed in range(20)}) > 15


def test_several_turns_of_the_queue_by_hand():
    sieve = make(10, 0.4, swap=1 / 3)  # 6 partial, 4 removed, 2 change places
    a, b, c, d = sieve.removed.tolist()
    p = sieve.partial.tolist()

    sieve.update(rank(sieve, [p[5], p[0]]))  # the two easiest, the easiest first
    assert sieve.removed.tolist() == [c, d, p[5], p[0]]
    assert sieve.partial.tolist() == sorted([*p[1:5], a, b])
    assert not sieve.all_retrieved

    sieve.update(rank(sieve, [a, p[1]]))  # what came back may go again
    assert sieve.partial.tolist() == sorted([*p[2:5], b, c, d])
    # Now all of a, b, c, d have been back: the queue is shuffled, its content is as in the turn.
    assert sieve.all_retrieved
    assert sorted(sieve.removed.tolist()) == sorted([p[5], p[0], a, p[1]])

    head = sieve.removed[:2].tolist()
    sieve.update(rank(sieve, [c, p[3]]))
    assert set(head) <= set(sieve.partial.tolist())
    assert {c, p[3]} <= set(sieve.removed.tolist())


def test_the_queue_keeps_its_order_until_all_removed_samples_have_been_back_and_is_shuffled_from_then_on():
    sieve = Sieve(torch.arange(400), DataSieving(removed_fraction=0.5, swap_fraction=0.25), seeded())
    initial = sieve.removed.tolist()
    for update in range(1, 6):
        going = sieve.partial[:50].tolist()
        before = sieve.removed.tolist()
        sieve.update(rank(sieve, going))
        in_order = sieve.removed.tolist() == before[50:] + going
        assert sorted(sieve.removed.tolist()) == sorted(before[50:] + going)
        assert in_order == (update < 4)
        if update < 4:
            assert sieve.removed.tolist()[: 200 - 50 * update] == initial[50 * update :]


def test_difficulties_of_removed_samples_do_not_matter():
    one, other = make(20, 0.5), make(20, 0.5)
    difficulty = torch.rand(20, generator=seeded(3))
    changed = difficulty.clone()
    changed[one.removed] = -1.0
    one.update(difficulty)
    other.update(changed)
    assert torch.equal(one.partial, other.partial)
    assert torch.equal(one.removed, other.removed)


def test_when_all_are_hard_a_random_choice_goes():
    going = set()
    for seed in range(20):
        sieve = make(10, 0.4, swap=1 / 6, generator=seeded(seed))
        before = set(sieve.partial.tolist())
        sieve.update(torch.full((10,), INF))
        going |= before - set(sieve.partial.tolist())
    assert len(going) > 5


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 40),
    removed=st.floats(0, 0.95),
    swap=st.none() | st.floats(0, 1),
    seed=st.integers(0, 1000),
    updates=st.integers(0, 6),
)
def test_no_sample_is_lost_or_doubled_and_the_partial_set_keeps_its_size(n, removed, swap, seed, updates):
    technique = DataSieving(removed_fraction=removed, swap_fraction=swap)
    if technique.n_removed(n) == n:
        return
    population = torch.arange(n) * 3 + 1  # ids with gaps, as of a subset
    sieve = Sieve(population, technique, seeded(seed))
    size = sieve.partial.numel()
    assert size == n - technique.n_removed(n)
    for update in range(updates):
        before = set(sieve.removed.tolist())
        sieve.update(torch.randint(0, 3, (n,), generator=seeded(update)).float())
        assert sieve.partial.numel() == size
        assert sorted([*sieve.partial.tolist(), *sieve.removed.tolist()]) == population.tolist()
        assert bool((sieve.partial.diff() > 0).all())
        # What goes does not come back in the same turn.
        assert len(before - set(sieve.removed.tolist())) == sieve.n_swap
        if sieve.removed.numel():
            assert sieve.keep().nonzero().flatten().tolist() == sieve.partial.tolist()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40), removed=st.floats(0.05, 0.9), swap=st.none() | st.floats(0.01, 1), seed=st.integers(0, 99))
def test_every_sample_is_used_once_the_run_is_long_enough(n, removed, swap, seed):
    technique = DataSieving(removed_fraction=removed, swap_fraction=swap)
    if not 0 < technique.n_removed(n) < n:
        return
    sieve = Sieve(torch.arange(n), technique, seeded(seed))
    used = set(sieve.partial.tolist())
    needed = -(-technique.n_removed(n) // technique.moves(n)[0])
    for update in range(needed):
        assert not sieve.all_retrieved
        assert sieve.ever_used == len(used) < n
        sieve.update(torch.randint(0, 2, (n,), generator=seeded(update)).float())
        used |= set(sieve.partial.tolist())
    assert sieve.all_retrieved
    assert used == set(range(n))
    assert sieve.ever_used == n


def test_with_nothing_removed_all_is_partial_and_nothing_is_drawn():
    generator = seeded()
    before = generator.get_state()
    sieve = Sieve(torch.arange(5), DataSieving(removed_fraction=0.0, swap_fraction=0.5), generator)
    assert sieve.update(torch.zeros(5)) == 0
    assert sieve.partial.tolist() == list(range(5))
    assert sieve.removed.numel() == 0
    assert sieve.keep() is None
    assert torch.equal(generator.get_state(), before)


def test_with_nothing_swapped_the_removed_samples_stay_removed_and_nothing_is_drawn():
    generator = seeded()
    sieve = Sieve(torch.arange(10), DataSieving(removed_fraction=0.4, swap_fraction=0.0), generator)
    partial, before = sieve.partial.clone(), generator.get_state()
    assert sieve.update(torch.zeros(10)) == 0
    assert torch.equal(sieve.partial, partial)
    assert torch.equal(generator.get_state(), before)
    assert sieve.keep() is not None


def test_the_sieve_says_what_has_moved_and_who_has_been_used():
    sieve = make(10, 0.4, swap=1 / 3)
    assert sieve.ever_used == 6
    assert sieve.update(torch.zeros(10)) == 2
    assert sieve.update(torch.zeros(10)) == 2
    assert sieve.ever_used == 10


def test_an_update_makes_a_new_mask_and_leaves_the_old_one_to_who_holds_it():
    sieve = make(10, 0.4)
    held = sieve.keep()
    copy = held.clone()
    sieve.update(torch.zeros(10))
    assert torch.equal(held, copy)
    assert not torch.equal(sieve.keep(), copy)


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    make(50, 0.4).update(torch.zeros(50))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("updates_before", [0, 1, 3])
def test_a_resumed_sieve_goes_on_bit_for_bit(updates_before):
    difficulties = [torch.randint(0, 3, (30,), generator=seeded(i)).float() for i in range(7)]
    generator = seeded()
    sieve = make(30, 0.4, swap=0.3, generator=generator)
    for difficulty in difficulties[:updates_before]:
        sieve.update(difficulty)
    file = io.BytesIO()
    torch.save(sieve.state_dict(), file)
    file.seek(0)
    other = seeded(99)
    resumed = make(30, 0.4, swap=0.3, generator=other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    other.set_state(generator.get_state())  # the session's: it saves it once, for all its parts
    assert torch.equal(resumed.keep(), sieve.keep())
    for difficulty in difficulties[updates_before:]:
        assert sieve.update(difficulty) == resumed.update(difficulty)
        assert torch.equal(sieve.partial, resumed.partial)
        assert torch.equal(sieve.removed, resumed.removed)
    assert torch.equal(generator.get_state(), other.get_state())


def test_a_state_does_not_change_with_the_sieve():
    sieve = make()
    state = sieve.state_dict()
    before = {name: torch.as_tensor(value).clone() for name, value in state.items()}
    sieve.update(torch.zeros(10))
    assert all(torch.equal(torch.as_tensor(state[name]), value) for name, value in before.items())


def test_a_state_takes_few_bytes_a_sample():
    n = 80_000
    sieve = make(n, 0.2)
    sieve.update(torch.zeros(n))
    tensors = [value for value in sieve.state_dict().values() if isinstance(value, torch.Tensor)]
    # Ids of the removed fifth in 4 bytes, counts in 2, and a bit.
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == n * (0.2 * 4 + 2 + 1 / 8)


def damaged(**changes: object) -> dict[str, object]:
    return {**make(10, 0.4).state_dict(), **changes}


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({}, "removed"),
        *(
            ({key: value for key, value in damaged().items() if key != name}, name)
            for name in ("ids", "removed", "ever_used", "included", "updates", "n_swap")
        ),
        *((damaged(**{name: "text"}), name) for name in ("ids", "removed", "ever_used", "included", "updates")),
        (damaged(generator=torch.zeros(3)), "generator"),
        (damaged(removed=torch.arange(4.0)), "removed"),
        (damaged(removed=torch.arange(4, dtype=torch.int16)[None]), "removed"),
        (damaged(included=torch.zeros(10)), "included"),
        (damaged(ever_used=torch.zeros(3, dtype=torch.bool)), "ever_used"),
        (damaged(updates=-1), "-1"),
        (damaged(updates=True), "updates"),
        (damaged(n_swap=1), "swap"),
        (damaged(removed=torch.tensor([0, 0, 0, 0], dtype=torch.int16)), "ids"),
        (make(12, 0.4).state_dict(), "swap"),
        (make(12, 0.4, swap=0.3).state_dict(), "removed|included"),
        (Sieve(torch.arange(10) + 5, DataSieving(removed_fraction=0.4), seeded()).state_dict(), "ids"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, told):
    sieve = make(10, 0.4, generator=seeded(5))
    before = sieve.state_dict()
    with pytest.raises(StateMismatch, match=told):
        sieve.load_state_dict(state)
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(sieve.state_dict()[key])) for key in before)


@pytest.mark.parametrize("difficulty", [torch.zeros(9), torch.tensor([float("nan")] * 10)])
def test_a_difficulty_that_does_not_fit_is_refused(difficulty):
    with pytest.raises(InvalidArgument, match="difficulty"):
        make().update(difficulty)
