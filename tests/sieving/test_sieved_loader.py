from __future__ import annotations

import gc
import itertools
import math
import re
import warnings
from collections import Counter

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from spfde.core.errors import UsageError
from spfde.sieving import DataSieving
from spfde.sieving.batch_sampler import SievedBatchSampler
from spfde.sieving.loader import SievedLoader, check_loader, loader_generators, population_of
from spfde.sieving.sieve import Sieve

N = 23


class Tuples(Dataset):
    """Sample i is (i, noise): the noise shows whether workers were seeded the same."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return index, torch.rand(())


class Dicts(Tuples):
    def __getitem__(self, index):
        return {"x": torch.full((2,), index), "id": index}


class Batched(Tuples):
    def __getitems__(self, indices):
        found = [(index, 0.0) for index in indices]
        indices.clear()  # a data set may do so with its own list
        return found


class Failing(Tuples):
    def __getitem__(self, index):
        if index == 5:
            raise ValueError("sample 5 is broken")
        return index, 0.0


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(N))


class EveryOther(Sampler):
    """A sampler of a user's own, which counts how often it was started."""

    def __init__(self):
        self.started = 0

    def __iter__(self):
        self.started += 1
        return iter(range(0, N, 2))

    def __len__(self):
        return len(range(0, N, 2))


class OwnIteration(DataLoader):
    def __iter__(self):
        return iter([])


def ids_of(samples):
    return torch.tensor([sample[0] for sample in samples])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wrap(loader: DataLoader, keep: torch.Tensor | None = None) -> SievedLoader:
    source = SievedBatchSampler(loader.sampler, loader.batch_size, loader.drop_last, keep=lambda: keep)
    return SievedLoader(loader, source)


def without(*removed: int) -> torch.Tensor:
    keep = torch.ones(N, dtype=torch.bool)
    keep[list(removed)] = False
    return keep


def flat(batches) -> list[int]:
    return [int(i) for batch in batches for i in (batch[0] if isinstance(batch, list | tuple) else batch)]


# --- with nothing removed ---------------------------------------------------------------------------------------------

ARGUMENTS = {
    "sequential": {},
    "shuffled": {"shuffle": True},
    "shuffled, drop_last": {"shuffle": True, "drop_last": True},
    "shuffled, batch size that divides": {"shuffle": True, "batch_size": N},
    "own generator": {"shuffle": True, "generator": True},
    "own generator, drop_last": {"shuffle": True, "generator": True, "drop_last": True},
    "workers": {"shuffle": True, "num_workers": 2},
    "workers, own generator, prefetch": {"shuffle": True, "num_workers": 2, "generator": True, "prefetch_factor": 3},
    "persistent workers": {"shuffle": True, "num_workers": 2, "persistent_workers": True},
    "persistent workers, own generator, drop_last": {
        "shuffle": True,
        "num_workers": 2,
        "persistent_workers": True,
        "generator": True,
        "drop_last": True,
    },
    "replacement": {"sampler": lambda g: RandomSampler(Tuples(), replacement=True, num_samples=70, generator=g)},
    "subset": {"sampler": lambda g: SubsetRandomSampler([2, 3, 5, 7, 11], generator=g)},
    "weighted": {"sampler": lambda g: WeightedRandomSampler(torch.arange(1.0, N + 1), 40, generator=g)},
}


def plain_loader(arguments) -> DataLoader:
    arguments = {"batch_size": 4, **arguments}
    generator = seeded(7) if arguments.pop("generator", False) else None
    if "sampler" in arguments:
        generator = seeded(8)
        arguments["sampler"] = arguments["sampler"](generator)
    return DataLoader(Tuples(), generator=generator, **arguments)


def record(loader, epochs, after):
    """Batches, and the state of every generator after each step: iterator made, each batch, end."""
    torch.manual_seed(3)
    seen = []
    for epoch in range(epochs):
        iterator = iter(loader)
        seen.append(after())
        for number, batch in enumerate(iterator):
            seen.append((batch[0].tolist(), batch[1].tolist(), after()))
            if epoch == 1 and number == 1:
                break  # leave one epoch early
        seen.append(after())
        del iterator
    return seen


@pytest.mark.parametrize("name", ARGUMENTS)
def test_with_nothing_removed_batches_and_random_draws_are_those_of_the_plain_loader(name):
    results = []
    for make in (lambda loader: loader, wrap):
        plain = plain_loader(ARGUMENTS[name])
        loader = make(plain)
        generators = loader_generators(plain)

        def after(generators=generators):
            states = [torch.get_rng_state(), *(generator.get_state() for generator in generators)]
            return [hash(state.numpy().tobytes()) for state in states]

        results.append(record(loader, 3, after))
        assert len(loader) == len(plain)
    assert results[0] == results[1]


# --- with samples removed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_removed_samples_are_passed_over_and_batches_stay_full(workers, drop_last):
    loader = wrap(DataLoader(Tuples(), 4, num_workers=workers, drop_last=drop_last), without(0, 1, 5, 22))
    batches = [batch[0].tolist() for batch in loader]
    expected = [[2, 3, 4, 6], [7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 21]]
    assert batches == (expected[:-1] if drop_last else expected)
    assert len(loader) == len(batches)


@pytest.mark.parametrize("generator", [None, 7])
def test_the_order_is_that_of_the_users_sampler(generator):
    def make():
        torch.manual_seed(1)
        return DataLoader(Tuples(), 4, shuffle=True, generator=None if generator is None else seeded(generator))

    keep = without(3, 9, 10, 17)
    for _ in range(2):
        plain = [i for i in flat(make()) if keep[i]]
        assert flat(wrap(make(), keep)) == plain


def test_with_samples_removed_the_generators_go_on_as_with_the_plain_loader():
    plain = DataLoader(Tuples(), 4, shuffle=True, generator=seeded())
    sieved = DataLoader(Tuples(), 4, shuffle=True, generator=seeded())
    flat(plain), flat(wrap(sieved, without(1, 2)))
    assert torch.equal(plain.generator.get_state(), sieved.generator.get_state())


@pytest.mark.parametrize(
    "arguments",
    [{}, pytest.param({"num_workers": 2}, marks=pytest.mark.long), {"num_workers": 2, "persistent_workers": True}],
)
def test_each_sample_of_the_partial_set_comes_exactly_once_an_epoch_while_the_sieve_moves_on(arguments):
    plain = DataLoader(Tuples(), 4, shuffle=True, generator=seeded(), **arguments)
    sieve = Sieve(population_of(plain), DataSieving(removed_fraction=0.3), seeded())
    loader = SievedLoader(plain, SievedBatchSampler(plain.sampler, 4, False, keep=sieve.keep))
    orders = []
    for _ in range(4):
        order = flat(loader)
        assert sorted(order) == sieve.partial.tolist()
        orders.append(tuple(order))
        sieve.update(torch.zeros(N))
    assert len(set(orders)) == 4


def test_the_order_of_the_partial_set_is_uniformly_random():
    loader = wrap(DataLoader(Tuples(), 2, shuffle=True, generator=seeded(), collate_fn=ids_of), without(*range(4, N)))
    rounds = 2400
    orders = Counter(tuple(torch.cat(list(loader)).tolist()) for _ in range(rounds))
    assert len(orders) == math.factorial(4)
    expected = rounds / 24
    chi_squared = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_squared < 60  # 23 degrees of freedom: more than 60 comes up less than once in 10,000


def test_a_subset_sampler_hands_out_the_partial_set_of_its_subset():
    plain = DataLoader(Tuples(), 2, sampler=SubsetRandomSampler([2, 3, 5, 7, 11, 13], generator=seeded()))
    sieve = Sieve(population_of(plain), DataSieving(removed_fraction=0.5), seeded())
    loader = SievedLoader(plain, SievedBatchSampler(plain.sampler, 2, False, keep=sieve.keep))
    assert sorted(flat(loader)) == sieve.partial.tolist()
    assert len(loader) == 2


def test_tensor_indices_of_a_subset_are_understood():
    plain = DataLoader(Tuples(), 2, sampler=SubsetRandomSampler(torch.tensor([7, 2, 5])))
    loader = wrap(plain, without(5))
    assert population_of(plain).tolist() == [2, 5, 7]
    batches = list(loader)
    assert sorted(flat(batches)) == [2, 7]
    assert loader.current_indices.tolist() == batches[-1][0].tolist()


def test_a_sampler_of_ones_own_is_filtered_and_started_once_an_epoch():
    sampler = EveryOther()
    loader = wrap(DataLoader(Tuples(), 4, sampler=sampler, num_workers=1), without(0, 4))
    for epoch in (1, 2):
        assert flat(loader) == [2, 6, 8, 10, 12, 14, 16, 18, 20, 22]
        assert sampler.started == epoch


def test_a_sampler_is_read_no_further_than_the_batches_need():
    endless = itertools.count()
    batches = iter(SievedBatchSampler(endless, 3, False, keep=lambda: torch.arange(100) % 2 == 1))
    assert next(batches) == [1, 3, 5]
    assert next(endless) == 6


def test_the_partial_set_of_an_iteration_is_that_of_its_start():
    masks = iter([without(0), without(1)])
    source = SievedBatchSampler(range(N), 4, False, keep=lambda: next(masks))
    first, second = iter(source), iter(source)
    assert next(second) == [0, 2, 3, 4]
    assert next(first) == [1, 2, 3, 4]


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    "sampler",
    [
        SequentialSampler(range(N)),
        RandomSampler(range(N)),
        RandomSampler(range(N), num_samples=2 * N),
        SubsetRandomSampler([0, 1, 2, 9, 9, 20, 21]),
    ],
)
def test_the_length_is_the_number_of_batches_that_come(sampler, drop_last):
    source = SievedBatchSampler(sampler, 4, drop_last, keep=lambda: without(0, 9, 13, 14))
    assert len(source) == len(list(source))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [None, without(1, 2, 3)])
@pytest.mark.parametrize("taken", [None, 2])
def test_whether_a_batch_is_left_is_known_before_it_is_loaded(workers, keep, taken):
    loader = wrap(DataLoader(Tuples(), 4, sampler=EveryOther(), num_workers=workers), keep)
    loader.go_on(taken, loader.started_with)
    left = [loader.has_more for _ in loader]
    assert left == [True] * (2 if taken is None else 0) + [False]
    assert [loader.has_more for _ in loader] == [True, True, False]


@pytest.mark.parametrize(
    ("sampler", "keep", "expected"),
    [
        (SequentialSampler(range(N)), without(0, 9), N - 2),
        (RandomSampler(range(N), num_samples=2 * N), without(0, 9), 2 * (N - 2)),
        (SubsetRandomSampler([0, 1, 2, 9]), without(0, 9), 2),
        (EveryOther(), None, 12),
    ],
)
def test_the_samples_of_an_epoch_are_counted_before_they_are_dealt(sampler, keep, expected):
    assert SievedBatchSampler(sampler, 4, True, keep=lambda: keep, share=(0, 2)).n_samples() == expected
    assert sum(map(len, SievedBatchSampler(sampler, 4, False, keep=lambda: keep))) == expected


@pytest.mark.parametrize(
    "sampler",
    [RandomSampler(range(N), replacement=True), RandomSampler(range(N), num_samples=7), EveryOther()],
)
def test_a_length_that_cannot_be_known_is_a_type_error_and_does_not_hinder_iteration(sampler):
    kept = SievedBatchSampler(sampler, 4, False, keep=lambda: without(0))
    with pytest.raises(TypeError, match=type(sampler).__name__):
        len(kept)
    with pytest.raises(TypeError, match=type(sampler).__name__):
        kept.n_samples()
    assert list(kept)
    assert len(SievedBatchSampler(sampler, 4, False, keep=lambda: None)) == -(-len(sampler) // 4)


def test_a_sampler_that_changes_how_a_known_one_iterates_has_no_known_length():
    class Halved(RandomSampler):
        def __iter__(self):
            return itertools.islice(super().__iter__(), N // 2)

    with pytest.raises(TypeError, match="Halved"):
        len(SievedBatchSampler(Halved(range(N)), 4, False, keep=lambda: without(0)))


# --- arguments --------------------------------------------------------------------------------------------------------


def test_the_new_loader_has_the_arguments_of_the_old_one():
    def start(worker_id):
        pass

    plain = DataLoader(
        Tuples(),
        4,
        shuffle=True,
        num_workers=1,
        collate_fn=ids_of,
        pin_memory=True,
        drop_last=True,
        timeout=30,
        worker_init_fn=start,
        multiprocessing_context="fork",
        generator=seeded(),
        prefetch_factor=5,
        persistent_workers=True,
        in_order=False,
    )
    loader = wrap(plain)
    names = (
        "dataset batch_size sampler num_workers collate_fn pin_memory drop_last timeout worker_init_fn "
        "multiprocessing_context generator prefetch_factor persistent_workers in_order pin_memory_device"
    )
    for name in names.split():
        assert getattr(loader, name) is getattr(plain, name) or getattr(loader, name) == getattr(plain, name), name
    assert isinstance(loader, DataLoader)


def test_arguments_that_a_version_of_pytorch_does_not_have_are_left_out():
    plain = DataLoader(Tuples(), 4)
    del plain.in_order, plain.pin_memory_device
    assert len(list(wrap(plain))) == 6


def test_pinning_memory_works_or_warns_as_the_plain_loader_does():
    messages = []
    for loader in (DataLoader(Tuples(), 8, pin_memory=True), wrap(DataLoader(Tuples(), 8, pin_memory=True))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = list(loader)
        assert len(batches) == 3
        assert batches[0][0].is_pinned() == torch.accelerator.is_available()
        messages.append([str(warning.message) for warning in caught])
    assert messages[0] == messages[1]


def test_dictionaries_and_a_collate_function_come_through():
    batch = next(iter(wrap(DataLoader(Dicts(), 3), without(0))))
    assert batch["id"].tolist() == [1, 2, 3]
    assert batch["x"].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert next(iter(wrap(DataLoader(Tuples(), 3, collate_fn=ids_of), without(1)))).tolist() == [0, 2, 3]


def test_a_data_set_that_fetches_whole_batches_may_change_its_list_of_indices():
    loader = wrap(DataLoader(Batched(), 4), without(2))
    for batch in loader:
        assert loader.current_indices.tolist() == batch[0].tolist()


def test_a_tensor_data_set_works():
    loader = wrap(DataLoader(TensorDataset(torch.arange(N)), 5), without(0))
    assert flat(loader) == list(range(1, N))


# --- what was handed out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 1}]
)
@pytest.mark.parametrize("keep", [None, without(1, 2, 3)])
def test_the_indices_are_those_of_the_batch_in_hand_also_after_a_loop_left_early(arguments, keep):
    loader = wrap(DataLoader(Tuples(), 4, shuffle=True, **arguments), keep)
    assert loader.current_indices is None
    ended = []
    loader.on_event = lambda event: ended.append(event) if event == "end" else None
    for leave_after in (2, 1, None):
        handed = samples = 0
        for batch in loader:
            assert loader.current_indices.tolist() == batch[0].tolist()
            handed, samples = handed + 1, samples + len(batch[0])
            assert loader.samples_handed == samples
            assert not ended
            if handed == leave_after:
                break
        assert bool(ended) == (leave_after is None)
    assert handed == len(loader)
    assert samples == (N if keep is None else N - 3)


def test_starting_again_begins_a_new_count():
    loader = wrap(DataLoader(Tuples(), 4))
    list(loader)
    iterator = iter(loader)
    assert (loader.samples_handed, loader.current_indices) == (0, None)
    assert len(iterator) == len(loader)


def test_events_come_before_the_start_before_each_batch_and_at_the_end():
    events = []
    loader = wrap(DataLoader(Tuples(), 10))
    loader.on_event = lambda event: events.append(loader.current_indices.tolist() if event == "batch" else event)
    for batch in loader:
        events.append(f"batch from {int(batch[0][0])}")
    tens = [list(range(10)), list(range(10, 20)), list(range(20, N))]
    assert events == ["start", tens[0], "batch from 0", tens[1], "batch from 10", tens[2], "batch from 20", "end"]


def test_an_error_at_the_start_prevents_it_before_anything_is_drawn():
    def refuse(event):
        raise UsageError("not now")

    loader = wrap(DataLoader(Tuples(), 4, shuffle=True))
    loader.on_event = refuse
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match="not now"):
        iter(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_out_of_order_have_no_indices_but_are_counted():
    given = []
    loader = wrap(DataLoader(Tuples(), 4, num_workers=2, in_order=False), without(0))
    loader.on_event = lambda event: given.append(loader.current_indices) if event == "batch" else None
    seen = flat(loader)
    assert sorted(seen) == list(range(1, N))
    assert given == [None] * 6
    assert loader.samples_handed == N - 1


def test_without_workers_batches_are_in_order_whatever_the_switch_says():
    loader = wrap(DataLoader(Tuples(), 4, in_order=False))
    next(iter(loader))
    assert loader.current_indices.tolist() == [0, 1, 2, 3]


def test_two_iterations_side_by_side_keep_their_indices_apart():
    loader = wrap(DataLoader(Tuples(), 4, shuffle=True))
    for one, other in zip(loader, loader, strict=True):
        assert loader.current_indices.tolist() == other[0].tolist()
        assert one[0].tolist() != other[0].tolist()


def test_with_persistent_workers_an_iteration_that_a_newer_one_has_ended_says_so():
    loader = wrap(DataLoader(Tuples(), 4, num_workers=1, persistent_workers=True))
    old = iter(loader)
    next(old)
    new = iter(loader)
    with pytest.raises(UsageError, match="persistent"):
        next(old)
    assert next(new)[0].tolist() == [0, 1, 2, 3]
    assert loader.current_indices.tolist() == [0, 1, 2, 3]


def test_workers_that_stay_end_with_the_last_that_holds_the_loader_and_wait_for_no_collector():
    gc.disable()
    try:
        loader = wrap(DataLoader(Tuples(), 4, num_workers=1, persistent_workers=True))
        flat(loader)
        (worker,) = loader._iterator._workers
        del loader
        assert not worker.is_alive()
    finally:
        gc.enable()


def test_after_a_broken_sample_the_indices_still_fit_without_workers():
    loader = wrap(DataLoader(Failing(), 4))
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(ValueError, match="sample 5"):
        next(iterator)
    assert next(iterator)[0].tolist() == loader.current_indices.tolist() == [8, 9, 10, 11]


def test_after_a_broken_sample_in_a_worker_no_indices_are_given_rather_than_wrong_ones():
    loader = wrap(DataLoader(Failing(), 4, num_workers=1))
    iterator = iter(loader)
    next(iterator)
    assert loader.current_indices is not None
    with pytest.raises(ValueError, match="sample 5"):
        next(iterator)
    next(iterator)
    assert loader.current_indices is None
    assert len(list(iterator)) == 3  # to the end, so that the worker is not left waiting
    assert loader.current_indices is None


def test_sample_keys_that_are_no_integers_pass_while_nothing_is_removed():
    letters = {"a": 1, "b": 2, "c": 3}
    loader = wrap(DataLoader(letters, 2, sampler=["c", "a", "b"]))
    assert [batch.tolist() for batch in loader] == [[3, 1], [2]]
    assert loader.current_indices is None


def test_pairs_of_integers_are_no_sample_ids():
    pairs = {(0, 1): 5, (1, 0): 6}
    loader = wrap(DataLoader(pairs, 2, sampler=list(pairs)))
    assert next(iter(loader)).tolist() == [5, 6]
    assert loader.current_indices is None


def test_reading_the_batch_sampler_beside_an_iteration_does_not_disturb_it():
    loader = wrap(DataLoader(Tuples(), 4))
    iterator = iter(loader)
    next(iterator)
    assert len(list(loader.batch_sampler)) == 6
    assert next(iterator)[0].tolist() == loader.current_indices.tolist() == [4, 5, 6, 7]


def test_leaving_a_loop_early_ends_its_workers():
    loader = wrap(DataLoader(Tuples(), 4, num_workers=1))
    iterator = iter(loader)
    next(iterator)
    workers = iterator._inner._workers
    assert all(worker.is_alive() for worker in workers)
    del iterator
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "argument", "rule", "remedy"),
    [
        (lambda: [1, 2], "loader", "must be a DataLoader", "map-style"),
        (lambda: DataLoader(Stream(), 4), "loader.dataset", "iterable-style", "map-style"),
        (lambda: DataLoader([], 4), "loader.dataset", "length 0", "samples"),
        (lambda: DataLoader(type("N", (), {"__getitem__": 0})(), 4, sampler=[0]), "loader.dataset", "length", "len"),
        (lambda: DataLoader(Tuples(), batch_size=None), "loader.batch_size", "no batches", "batch_size"),
        (
            lambda: DataLoader(Tuples(), batch_sampler=BatchSampler(range(N), 4, False)),
            "loader.batch_sampler",
            "your own",
            "sampler=, batch_size= and drop_last=",
        ),
        (lambda: DataLoader(Tuples(), batch_sampler=[[0, 1], [2]]), "loader.batch_sampler", "your own", "sampler="),
        (lambda: OwnIteration(Tuples(), 4), "loader", "its own way", "plain DataLoader"),
        (lambda: wrap(DataLoader(Tuples(), 4)), "loader", "already", "detach"),
        (
            lambda: DataLoader(Tuples(), 4, sampler=SubsetRandomSampler([0, N])),
            "loader.sampler",
            rf"\[0, {N}\)",
            "from 0",
        ),
        (lambda: DataLoader(Tuples(), 4, sampler=SubsetRandomSampler([])), "loader.sampler", "no indices", "indices"),
    ],
)
def test_a_loader_that_cannot_be_sieved_is_refused_with_the_remedy(make, argument, rule, remedy):
    (problem,) = check_loader(make())
    assert problem.argument == argument
    assert re.search(rule, problem.rule)
    assert remedy in problem.remedy


def test_several_problems_of_a_loader_are_named_together():
    problems = check_loader(OwnIteration([], batch_sampler=[[0]]))
    assert [problem.argument for problem in problems] == ["loader.dataset", "loader.batch_sampler", "loader"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_usual_loader_has_no_problems_and_checking_draws_nothing(name):
    loader = plain_loader(ARGUMENTS[name])
    generators = loader_generators(loader)
    before = [torch.get_rng_state(), *(generator.get_state() for generator in generators)]
    assert check_loader(loader) == []
    population_of(loader)
    wrap(loader)
    after = [torch.get_rng_state(), *(generator.get_state() for generator in generators)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_subclass_that_only_sets_arguments_is_accepted():
    class Configured(DataLoader):
        def __init__(self):
            super().__init__(Tuples(), 4, collate_fn=ids_of)

    assert check_loader(Configured()) == []
    assert next(iter(wrap(Configured(), without(0)))).tolist() == [1, 2, 3, 4]


# --- population and generators ----------------------------------------------------------------------------------------


def test_the_population_is_what_the_sampler_draws_from():
    assert population_of(DataLoader(Tuples(), 4)).tolist() == list(range(N))
    assert population_of(DataLoader(Tuples(), 4, shuffle=True)).tolist() == list(range(N))
    assert population_of(DataLoader(Tuples(), 4, sampler=RandomSampler(range(5)))).tolist() == list(range(5))
    assert population_of(DataLoader(Tuples(), 4, sampler=SubsetRandomSampler([9, 2, 2, 5]))).tolist() == [2, 5, 9]
    assert population_of(DataLoader(Tuples(), 4, sampler=EveryOther())).tolist() == list(range(N))


def test_each_generator_of_a_loader_is_found_once():
    one, other = seeded(1), seeded(2)
    assert loader_generators(DataLoader(Tuples(), 4, shuffle=True)) == []
    assert loader_generators(DataLoader(Tuples(), 4, shuffle=True, generator=one)) == [one]
    sampler = RandomSampler(range(N), generator=other)
    assert loader_generators(DataLoader(Tuples(), 4, sampler=sampler)) == [other]
    assert loader_generators(DataLoader(Tuples(), 4, sampler=sampler, generator=one)) == [one, other]
    assert loader_generators(wrap(DataLoader(Tuples(), 4, sampler=sampler, generator=one))) == [one, other]


OWN_ORDER = ("own generator", "workers, own generator, prefetch", "replacement", "subset", "weighted")


@pytest.mark.parametrize("name", ["shuffled", "sequential", *OWN_ORDER])
def test_going_on_gives_the_rest_and_leaves_the_global_generator_to_others_where_the_order_is_its_own(
    name, monkeypatch
):
    torch.manual_seed(1)
    first = wrap(plain_loader(ARGUMENTS[name]))
    batches = [batch[0].tolist() for batch in first]
    second = wrap(plain_loader(ARGUMENTS[name]))
    second.go_on(1, first.started_with)
    begin, after = SievedLoader._begin, []

    def beside_a_thread_that_draws(loader: SievedLoader, passed_over: int) -> None:
        torch.rand(3)
        after.append(torch.get_rng_state())
        begin(loader, passed_over)

    monkeypatch.setattr(SievedLoader, "_begin", beside_a_thread_that_draws)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    rest = iter(second)
    assert torch.equal(torch.get_rng_state(), after[0] if name in OWN_ORDER else before)
    if name in OWN_ORDER:
        assert [batch[0].tolist() for batch in rest] == batches[1:]
