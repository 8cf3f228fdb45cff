"""What is to be compared: lists, names, and what applies to which recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spfde.app.compare.folder import Comparison
from spfde.app.compare.spec import Spec, packaged_text, read_spec
from spfde.core.errors import InvalidArgument


def names(*candidates: dict[str, object], **options: object) -> list[str]:
    return [name for name, _ in Spec(options=options, candidates=candidates).expanded()]


def test_lists_multiply_and_a_sparsity_is_for_sparse_recipes_alone() -> None:
    found = Spec(candidates=[{"sparsity": [0.9, 0.95], "recipe": ["dense", "mest"]}]).expanded()
    assert found == [
        ("dense", {"recipe": "dense"}),
        ("mest sparsity=0.9", {"recipe": "mest", "sparsity": 0.9}),
        ("mest sparsity=0.95", {"recipe": "mest", "sparsity": 0.95}),
    ]


def test_names_tell_what_varies() -> None:
    assert names({"recipe": "mest", "lr": [0.1, 0.05]}) == ["mest lr=0.1", "mest lr=0.05"]
    assert names({"name": "ours", "recipe": "mest"}) == ["ours"]
    assert names({"name": "ours", "recipe": ["set", "mest"]}) == ["ours set", "ours mest"]
    assert names({"recipe": "mest", "soft_bound": [True, False]}) == ["mest soft_bound=True", "mest soft_bound=False"]


def test_options_of_a_technique_come_to_recipes_that_have_it() -> None:
    found = dict(Spec(candidates=[{"recipe": ["mest", "rigl"], "soft_bound": False}]).expanded())
    assert found == {"mest": {"recipe": "mest", "soft_bound": False}, "rigl": {"recipe": "rigl"}}
    found = dict(Spec(candidates=[{"recipe": ["mest", "spfde"], "freeze": [0, 0.2]}]).expanded())
    assert list(found) == ["mest freeze=0", "mest freeze=0.2", "spfde freeze=0", "spfde freeze=0.2"]
    found = dict(Spec(candidates=[{"recipe": ["mest", "spfde"], "sieve_criterion": "random"}]).expanded())
    assert found["mest"] == {"recipe": "mest"}


@pytest.mark.parametrize(
    ("candidates", "told"),
    [
        ([{"recipe": "dense", "sparsity": [0.8, 0.9]}], "--sparsity=[0.8, 0.9]: is of no use"),
        ([{"recipe": "dense"}, {"recipe": "set", "sieve_criterion": "loss"}], "candidates[2].sieve_criterion='loss'"),
        ([{"recipe": []}], "recipe=[]: is an empty list"),
        ([{"recipe": "set"}, {"recipe": "set", "lr": 0.2}], "candidates='set': is the name of two candidates"),
        ([{"recipe": "sett"}], "Did you mean 'set'"),
        ([{"recipee": "set"}], "recipee='set': is no option of spfde train. Did you mean 'recipe'"),
        ([{"seed": 3}], 'seed=3: is of one run alone. Give "seeds" at the top'),
        ([{"lr": [1.0 + k for k in range(200)], "epochs": list(range(1, 101))}], "are more than 10,000 runs"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(candidates: list[dict[str, object]], told: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(told)):
        Spec(candidates=candidates).expanded()


@pytest.mark.parametrize("seeds", [0, -1, [], [-1], 10_001, True, "two", [2**32]])
def test_seeds_that_are_none_are_refused(seeds: object) -> None:
    with pytest.raises(InvalidArgument, match="seeds"):
        Spec(seeds=seeds, candidates=[{}])


def test_a_number_of_seeds_counts_from_zero_and_a_list_is_taken_as_it_is() -> None:
    assert Spec(seeds=3, candidates=[{}]).seeds == (0, 1, 2)
    assert Spec(seeds=[7, 3, 7], candidates=[{}]).seeds == (7, 3)


def test_candidates_that_come_to_equal_runs_are_one() -> None:
    spec = Spec(candidates=[{"recipe": "spfde"}, {"recipe": "spfde", "sieve": [0.2, 0.1], "name": "sieving"}])
    found = Comparison.of(spec)
    assert [candidate.name for candidate in found.candidates] == ["spfde", "sieving sieve=0.1"]
    assert [candidate.folder for candidate in found.candidates] == ["spfde", "sieving-sieve=0.1"]


def test_the_baseline_is_the_first_dense_candidate_or_the_one_that_is_named() -> None:
    candidates = [{"recipe": ["mest", "dense", "set"]}]
    assert Comparison.of(Spec(candidates=candidates)).baseline == "dense"
    assert Comparison.of(Spec(candidates=candidates, baseline="set")).baseline == "set"
    assert Comparison.of(Spec(candidates=[{"recipe": ["mest", "set"]}])).baseline == "mest"
    with pytest.raises(InvalidArgument, match=r"baseline='sett': is no candidate\. Did you mean 'set'"):
        Comparison.of(Spec(candidates=candidates, baseline="sett"))


def test_names_that_differ_in_letters_a_folder_cannot_have_get_folders_of_their_own() -> None:
    tables = [{"name": name, "recipe": "set", "lr": lr} for lr, name in ((0.1, "a/b"), (0.2, "a:b"), (0.3, "A b"))]
    assert [each.folder for each in Comparison.of(Spec(candidates=tables)).candidates] == ["a-b", "a-b-2", "A-b-3"]


@pytest.mark.parametrize("name", ["spfde_cifar10", "spfde_cifar100"])
def test_the_papers_experiments_come_with_the_package(name: str, tmp_path: Path) -> None:
    spec = read_spec(name)
    assert len(spec.expanded()) > 50
    assert Comparison.of(spec).baseline == "MEST EM&S sparsity=0.9"
    text = packaged_text(name)
    assert text is not None
    copy = tmp_path / "mine.toml"
    copy.write_text(text)
    assert read_spec(str(copy)) == spec


def test_their_short_forms_are_the_same_with_each_method_once() -> None:
    short = [Comparison.of(read_spec(f"spfde_cifar{classes}").quickened("fashion-mini")) for classes in (10, 100)]
    assert short[0] == short[1]
    assert (short[0].seeds, len(short[0].candidates)) == ((0,), 22)
    assert "dense" in [candidate.name for candidate in short[0].candidates]


def test_imagenet_s_table_comes_with_the_package_and_has_a_short_form() -> None:
    spec = read_spec("spfde_imagenet")
    assert len(spec.expanded()) == 26
    assert Comparison.of(spec).baseline == "MEST EM&S epochs=150 sparsity=0.9"
    short = Comparison.of(spec.quickened("fashion-mini"))
    assert len(short.candidates) == 12
    assert all(each.options["augment"] == "random-resized-crop" for each in short.candidates)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[candidates", "is no valid TOML"),
        ("version = 2\n[[candidates]]", "version=2"),
        ("seeds = 3", "candidates"),
        ("[[candidate]]", "is no field of Spec"),
        ("candidates = 3", "candidates=3"),
        ("[[candidates]]\nrecipe = 3", "recipe"),
        ("[[candidates]]\nlr = 'high'", "lr='high'"),
    ],
)
def test_a_file_with_a_mistake_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgument) as error:
        Comparison.of(read_spec(str(path)))
    assert told in str(error.value)
