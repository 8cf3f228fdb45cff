"""Which parameters learn, as the user has it: ``requires_grad`` may change in the run, by a line between epochs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import nn

from spfde.cost.flops import model_cost
from spfde.model.sample import Sample
from spfde.model.trace import Untraceable, trace
from spfde.planning.blueprint import Blueprint


class Learning:
    """Looks at ``requires_grad`` before some steps of an epoch, beside what the session freezes itself.

    Args:
        model: the user's own module.
        paused: gives the identities of the parameters that train when the blocks frozen by the session thaw.
    """

    def __init__(self, model: nn.Module, paused: Callable[[], Collection[int]]) -> None:
        self._model, self._paused = model, paused
        self._parameters = dict(model.named_parameters())
        self._at_attach = self._now()
        self._priced: dict[frozenset[str], Blueprint] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """An epoch begins."""
        self._seen: set[str] = set()
        self._n_looks = 0

    def before_step(self) -> None:
        """An optimizer is about to step: those that take turns may each see the others' parameters switched off."""
        self._n_looks += 1
        if not self._n_looks & (self._n_looks - 1):
            self._seen |= self._now()

    def _now(self) -> frozenset[str]:
        paused = self._paused()
        return frozenset(name for name, p in self._parameters.items() if p.requires_grad or id(p) in paused)

    def changed(self) -> tuple[list[str], list[str]]:
        """Names of the parameters that learned in this epoch and did not at ``attach``, and the other way round."""
        learned = self._learned()
        begun, stopped = learned - self._at_attach, self._at_attach - learned
        return [name for name in self._parameters if name in begun], [n for n in self._parameters if n in stopped]

    def _learned(self) -> frozenset[str]:
        return frozenset(self._seen) if self._n_looks else self._now()

    def priced(self, blueprint: Blueprint, sample: Sample | None) -> Blueprint:
        """The blueprint with the backward passes of this epoch: another parameter that learns needs others before it.

        Args:
            blueprint: as of ``attach``.
            sample: what the model is called with.
        """
        learned = self._learned()
        if learned == self._at_attach or sample is None or blueprint.untraced is not None:
            return blueprint
        if learned not in self._priced:
            self._priced[learned] = self._priced_anew(blueprint, sample, learned)
        return self._priced[learned]

    def _priced_anew(self, blueprint: Blueprint, sample: Sample, learned: frozenset[str]) -> Blueprint:
        before = {name: p.requires_grad for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.requires_grad_(name in learned)
            cost = model_cost(trace(self._model, sample), self._model)
        except Untraceable:
            return blueprint
        finally:
            for name, p in self._parameters.items():
                p.requires_grad_(before[name])
        by_name = {layer.name: layer for layer in cost.layers}
        layers = tuple(
            replace(layer, learns=by_name[layer.name].learns, input_gradients=by_name[layer.name].input_gradients)
            if layer.name in by_name
            else layer
            for layer in blueprint.cost.layers
        )
        return replace(blueprint, cost=replace(blueprint.cost, layers=layers))
