"""Every public function and class shows an example, and the examples do what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import spfde
from spfde.core import registry

ROOMS = ("errors", "presets", "sparsity", "freezing", "sieving", "cost", "analysis", "export")
NOT_YET: frozenset[str] = frozenset(
    {
        "spfde.BlockwiseCosine",
        "spfde.DataSieving",
        "spfde.OneTimeRemoval",
        "spfde.ProgressiveFreezing",
        "spfde.analysis.BlockOutputs",
        "spfde.analysis.MinibatchCKA",
        "spfde.analysis.batch_grams",
        "spfde.analysis.centred_gram",
        "spfde.analysis.gradient_norms",
        "spfde.analysis.linear_cka",
        "spfde.analysis.linear_hsic",
        "spfde.analysis.minibatch_cka",
        "spfde.analysis.native_outputs",
        "spfde.analysis.output_graph",
        "spfde.analysis.output_modules",
        "spfde.analysis.structural_overlap",
        "spfde.analysis.structural_similarity",
        "spfde.analysis.successive_differences",
        "spfde.analysis.unbiased_hsic",
        "spfde.cost.backward_flops",
        "spfde.export.Encoded",
        "spfde.export.WeightBytes",
        "spfde.export.decode",
        "spfde.export.encode",
        "spfde.export.is_two_four",
        "spfde.export.load",
        "spfde.export.save_compressed",
        "spfde.export.save_dense",
        "spfde.export.save_onnx",
        "spfde.export.to_semi_structured",
        "spfde.export.weight_bytes",
        "spfde.freezing.FreezePlan",
        "spfde.freezing.Freezer",
        "spfde.freezing.GroupRates",
        "spfde.freezing.Savings",
        "spfde.freezing.blocks_to_freeze",
        "spfde.freezing.check_rates",
        "spfde.freezing.freezing_saving",
        "spfde.freezing.is_held",
        "spfde.freezing.learning_rate_factor",
        "spfde.freezing.paused",
        "spfde.freezing.rate",
        "spfde.freezing.recompile_warning",
        "spfde.freezing.solve",
        "spfde.sieving.ClassLabels",
        "spfde.sieving.ForgettingCounter",
        "spfde.sieving.MeanScore",
        "spfde.sieving.Observer",
        "spfde.sieving.RandomScore",
        "spfde.sieving.Scorer",
        "spfde.sieving.Sieve",
        "spfde.sieving.SievedBatchSampler",
        "spfde.sieving.SievedLoader",
        "spfde.sieving.SievingMethod",
        "spfde.sieving.Turnover",
        "spfde.sieving.build_loader",
        "spfde.sieving.check_fraction",
        "spfde.sieving.check_loader",
        "spfde.sieving.correct_from",
        "spfde.sieving.correct_from_logits",
        "spfde.sieving.correct_from_loss",
        "spfde.sieving.el2n_from_logits",
        "spfde.sieving.find_labels",
        "spfde.sieving.inclusion_probabilities",
        "spfde.sieving.label_bounds",
        "spfde.sieving.loader_generators",
        "spfde.sieving.loss_from_logits",
        "spfde.sieving.loss_weights",
        "spfde.sieving.make_scorer",
        "spfde.sieving.population_of",
    }
)


def public() -> dict[str, Callable[..., object]]:
    """Public functions and classes once each, by the first name that offers them."""
    found: dict[str, Callable[..., object]] = {}
    for module in (spfde, *(importlib.import_module(f"spfde.{room}") for room in ROOMS)):
        for name in module.__all__:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isroutine(value)) and value not in found.values():
                found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = public()


def docstrings(name: str) -> Iterator[tuple[str, str]]:
    """The docstring of a public name, and of a class's public methods and properties."""
    value = PUBLIC[name]
    yield name, inspect.cleandoc(value.__doc__ or "")
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if not attribute.startswith("_") and isinstance(getattr(member, "__doc__", None), str):
            yield f"{name}.{attribute}", inspect.cleandoc(member.__doc__)


def has_example(name: str) -> bool:
    _, text = next(docstrings(name))
    return re.search(r"^Examples?:\n(?:\n|    .*\n)*?    >>> ", text, re.MULTILINE) is not None


def test_every_public_function_and_class_shows_an_example() -> None:
    assert {name for name in PUBLIC if not has_example(name)} == NOT_YET


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in NOT_YET])
def test_the_examples_do_what_they_say(
    name: str, new_names: Callable[[], dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # What an example registers is forgotten with it.
    monkeypatch.setattr(registry, "_CLASSES", {kind: dict(classes) for kind, classes in registry._CLASSES.items()})
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    for owner, text in docstrings(name):
        runner.run(doctest.DocTestParser().get_doctest(text, new_names(), owner, None, 0), out=told.append)
    assert not told, "".join(told)
