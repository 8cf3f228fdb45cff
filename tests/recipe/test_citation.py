"""What to cite: exactly the methods in use, each once."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest

import spfde
from helpers import ROOT
from spfde import presets
from spfde.core.registry import registered
from spfde.core.technique import Technique
from spfde.recipe import citation
from spfde.recipe.recipe import Recipe

METHODS = registered("method")


def keys(text: str) -> list[str]:
    return re.findall(r"^@\w+\{([^,]+),", text, re.MULTILINE)


def test_the_whole_system_cites_its_method_its_paper_once_and_the_software() -> None:
    assert keys(spfde.cite(presets.spfde)) == ["yuan2021mest", "yuan2022spfde", "toneva2019forgetting", "spfde"]


def test_a_structure_is_cited_and_its_absence_is_not() -> None:
    structured = Recipe(sparsity=spfde.RigL(sparsity=0.5, structure=spfde.NM(n=2, m=4)))
    assert keys(spfde.cite(structured)) == ["evci2020rigl", "zhou2021nm", "spfde"]
    assert keys(spfde.cite(presets.rigl)) == ["evci2020rigl", "spfde"]


def test_what_a_field_calls_for_is_cited_too_and_only_then() -> None:
    by_cka = spfde.ProgressiveFreezing(criterion="representation")
    assert keys(spfde.cite(Recipe(freezing=by_cka))) == [
        "yuan2022spfde", "kornblith2019similarity", "nguyen2021wide", "spfde",
    ]  # fmt: skip
    assert keys(spfde.cite(Recipe(freezing=spfde.ProgressiveFreezing()))) == ["yuan2022spfde", "spfde"]
    erk = Recipe(sparsity=spfde.SET(sparsity=0.9, distribution="erk"))
    assert keys(spfde.cite(erk)) == ["mocanu2018set", "evci2020rigl", "spfde"]
    assert keys(spfde.cite(presets.set)) == ["mocanu2018set", "spfde"]


def test_a_dense_recipe_cites_the_software_alone() -> None:
    assert keys(spfde.cite(Recipe())) == ["spfde"]


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_cited_with_its_own_entry(name: str) -> None:
    method = METHODS[name](sparsity=0.9)
    text = spfde.cite(Recipe(sparsity=method))
    assert method.references
    assert set(method.references) <= set(keys(text))
    assert "yuan2022spfde" not in keys(text)


def test_what_saves_nothing_is_not_cited() -> None:
    idle = Recipe(
        sparsity=spfde.RigL(sparsity=0.0),
        freezing=spfde.ProgressiveFreezing(flops_reduction=0.0),
        sieving=spfde.DataSieving(removed_fraction=0.0),
    )
    assert keys(spfde.cite(idle)) == ["spfde"]


@pytest.mark.parametrize("recipe", presets.PRESETS.values(), ids=presets.PRESETS)
def test_every_preset_has_whole_entries_and_none_twice(recipe: Recipe) -> None:
    text = spfde.cite(recipe)
    assert len(set(keys(text))) == len(keys(text))
    for entry in text.split("\n\n"):
        assert entry.count("{") == entry.count("}")
        assert re.search(r"\btitle\s*=", entry)


class Inner(Technique):
    references: ClassVar[tuple[str, ...]] = ("@article{inner,\n  title = {Inner}\n}\n@misc{more,\n  title = {More}\n}",)


class Outer(Technique):
    """Its sources depend on a field, and there are techniques inside it."""

    variant: str = "a"
    inner: Inner = Inner()
    several: tuple[Inner, ...] = (Inner(), Inner())

    @property
    def cited(self) -> tuple[str, ...]:
        return (f"@article{{outer_{self.variant},\n  title = {{Outer}}\n}}",)


def test_techniques_inside_others_and_several_sources_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(citation, "_in_use", lambda recipe: citation._techniques({"x": Outer(variant="b")}))
    assert keys(spfde.cite(Recipe())) == ["outer_b", "inner", "more", "spfde"]


def test_a_reference_is_told_in_one_line() -> None:
    assert citation.describe("dettmers2019sparse") == (
        "T. Dettmers, L. Zettlemoyer: Sparse Networks from Scratch: Faster Training without Losing Performance. "
        "arXiv preprint arXiv:1907.04840, 2019."
    )
    assert citation.describe("lee2019snip").startswith("N. Lee, T. Ajanthan, P. H. S. Torr: SNIP: Single-shot")
    assert citation.describe("lee2019snip").endswith("Learning Representations, 2019. arXiv 1810.02340")


def test_the_software_is_cited_as_the_citation_file_says() -> None:
    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    words = " ".join(citation.SOFTWARE.split())
    abstract = re.search(r"^abstract: >-\n  (.+)$", cff, re.MULTILINE)
    assert abstract is not None
    assert abstract[1].rstrip(".") in words
    for field, written in (("version", "version = {{{}}}"), ("license", "license = {{{}}}"), ("title", "{{{}:")):
        found = re.search(rf"^{field}: (.+)$", cff, re.MULTILINE)
        assert found is not None
        assert written.format(found[1]) in words
    assert re.findall(r"^  - name: (.+)$", cff, re.MULTILINE) == ["The spfde authors"]
    assert "{{The spfde authors}}" in words
