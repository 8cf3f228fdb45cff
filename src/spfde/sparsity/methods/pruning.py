"""Pruning at initialisation: one mask for all layers together, found before training and never changed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from spfde.core.errors import InvalidArgument, Problem, Problems
from spfde.core.numbers import round_half_up
from spfde.core.registry import register
from spfde.model.sample import Sample, unwrap
from spfde.sparsity import saliency
from spfde.sparsity.methods.base import SparsityMethod
from spfde.sparsity.saliency import ScoreLoss, Scores, Weights

Masks = Mapping[str, Tensor] | None


class PruningAtInitialisation(SparsityMethod):
    """What SNIP, GraSP and SynFlow share: a score for every weight, and the highest of all layers together.

    How many weights a layer keeps follows from the scores; ``sparsity`` is that of all masked layers together.

    Departure: the best unit of each layer always stays, so that no layer collapses.

    Attributes:
        n_batches: batches of the loader that are scored.

    Example:
        >>> isinstance(spfde.SNIP(sparsity=0.9), spfde.sparsity.PruningAtInitialisation)
        True
    """

    cost: ClassVar[str] = "3 sparse passes a step, and 3 dense ones for each sample that is scored"
    counts_known: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    """Whether the model is scored in training mode."""
    passes: ClassVar[int] = 3
    """FLOPs of scoring a sample, in forward passes: as a training step."""

    n_batches: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _scores_decide(self) -> PruningAtInitialisation:
        for field, default in (("distribution", "uniform"), ("overrides", {}), ("init", "random")):
            if getattr(self, field) != default:
                raise ValueError(f"{field} must keep its default, for the scores decide what each layer keeps")
        return self

    def select(
        self,
        model: nn.Module,
        weights: Weights,
        *,
        units: int,
        batches: Sequence[Any],
        loss: ScoreLoss,
        sample: Sample,
    ) -> dict[str, Tensor]:
        """Masks with exactly ``units`` units in all, at least one in each layer; the model is left as it was.

        Args:
            model: the user's module, on the device of its weights; what wraps it is taken off.
            weights: the masked weights by name; a tied weight once.
            units: units of the method's structure that exist in all layers together.
            batches: what ``loss`` takes, ``n_batches`` of them.
            loss: the mean loss of a batch, as a function of the unwrapped model and the batch.
            sample: what the model is called with.

        Returns:
            Boolean masks of the weights' shapes, on their devices.

        Raises:
            InvalidArgument: there are no batches, the loss is no number, a weight is listed twice, or scores overflow.
        """
        self._check(weights, batches)
        # A data-parallel wrapper would wait for a backward pass that never comes.
        model = unwrap(model)
        structure = self.structure
        total = sum(structure.n_units(weight.shape) for weight in weights.values())
        rounds = self.rounds(units, total)
        masks: dict[str, Tensor] | None = None
        with saliency.untouched(model, training=self.trains):
            for n in rounds[-1:] if structure.fixed_count else rounds:
                scores = self._scores(model, weights, batches, loss, sample, masks)
                self._check_scores(scores)
                masks = saliency.choose_units(scores, structure, n, masks=masks)
        assert masks is not None, "there is at least one round"
        return masks

    def scoring_flops(self, forward_flops: int, *, samples: int, batch_size: int) -> int:
        return self.passes * forward_flops * min(samples, self.n_batches * batch_size)

    def rounds(self, units: int, total: int) -> list[int]:
        """Units that are left after each round of scoring, ``units`` of ``total`` at last."""
        return [units]

    @abstractmethod
    def _scores(
        self, model: nn.Module, weights: Weights, batches: Sequence[Any], loss: ScoreLoss, sample: Sample, masks: Masks
    ) -> Scores:
        """A score of each weight, of which the highest are kept; ``masks`` is what earlier rounds have left."""

    def _check(self, weights: Weights, batches: Sequence[Any]) -> None:
        problems = Problems()
        if self.n_batches and not batches:
            remedy = f"Pass {self.n_batches} batches of the loader."
            problems.add("batches", batches, f"is empty, and {type(self).__name__} scores by data", remedy)
        first: dict[int, str] = {}
        for name, weight in weights.items():
            other = first.setdefault(id(weight), name)
            if other != name:
                problems.add("weights", name, f"is the same tensor as {other}", "List a tied weight under one name.")
        problems.raise_if_any()

    def _check_scores(self, scores: Scores) -> None:
        for name, score in scores.items():
            if not bool(score.isfinite().all()):
                rule = f"gives scores of {name} that are not finite"
                remedy = "Look for NaN in the weights and the first batches, and for a loss that overflows."
                raise InvalidArgument(Problem("sparsity", type(self).__name__, rule, remedy))
        if not any(bool(score.any()) for score in scores.values()):
            rule = "scores every weight 0, so that there is nothing to choose by"
            remedy = "Look for a layer of zeros that cuts the network in two, or use another method."
            raise InvalidArgument(Problem("sparsity", type(self).__name__, rule, remedy))


@register("method")
class SNIP(PruningAtInitialisation):
    """Keep the weights to which the loss is most sensitive: the highest ``|w * g|`` of all layers together.

    The model is scored in training mode, as it is initialised.

    Departure: the paper initialises by variance scaling; here the weights are the user's.

    Attributes:
        n_batches: batches of the loader whose gradients are added up; one in the paper.

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.SNIP(sparsity=0.9, n_batches=4))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "snip"
    summary: ClassVar[str] = "Prunes at initialisation what the loss is least sensitive to."
    references: ClassVar[tuple[str, ...]] = ("lee2019snip",)

    n_batches: Annotated[int, Field(ge=1, description="a number of batches, at least 1")] = 1

    def _scores(
        self, model: nn.Module, weights: Weights, batches: Sequence[Any], loss: ScoreLoss, sample: Sample, masks: Masks
    ) -> Scores:
        return saliency.connection_sensitivity(model, weights, batches, loss)


@register("method")
class GraSP(PruningAtInitialisation):
    """Keep the weights without which the gradient would shrink most: the highest ``w * Hg`` of all layers together.

    The paper says the same with the sign turned: of ``S = -w * Hg`` the highest are removed. The model is scored in
    training mode.

    Departures: the samples are drawn at random from the loader's, not the same number from each class; the paper's
    code draws new weights for linear layers before it scores them, here they are the user's.

    Attributes:
        n_batches: batches of the loader that are scored, about 10 samples a class of CIFAR-10 or more.
        temperature: divides the model's output, which makes the softmax flat; 1 leaves it alone.

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.GraSP(sparsity=0.9, n_batches=4))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "grasp"
    summary: ClassVar[str] = "Prunes at initialisation what the gradient's norm can spare."
    references: ClassVar[tuple[str, ...]] = ("wang2020grasp",)

    cost: ClassVar[str] = "3 sparse passes a step, and 12 dense ones for each sample that is scored"
    passes: ClassVar[int] = 12
    """Two gradients at three, and the derivative of the second at six: it differentiates the two products of the
    backward pass, each by two factors, and the product of the forward pass once more by both of its factors."""

    n_batches: Annotated[int, Field(ge=1, description="a number of batches, at least 1")] = 8
    temperature: Annotated[float, Field(gt=0.0, description="a positive number")] = 200.0

    def _scores(
        self, model: nn.Module, weights: Weights, batches: Sequence[Any], loss: ScoreLoss, sample: Sample, masks: Masks
    ) -> Scores:
        return saliency.gradient_flow(model, weights, batches, loss, temperature=self.temperature)


@register("method")
class SynFlow(PruningAtInitialisation):
    """Keep the weights that carry most of the flow through the network, pruning a little at a time; needs no data.

    In each of ``iterations`` rounds the flow is taken through the absolute values of what is left, from ones to the
    sum of the outputs, in evaluation mode and double precision; the density falls exponentially from round to round.

    Departures: a weight that is pruned does not come back; N:M, whose density is fixed, takes one round.

    Attributes:
        n_batches: no data: 0.
        iterations: rounds of scoring and pruning.

    Example:
        >>> recipe = spfde.Recipe(sparsity=spfde.SynFlow(sparsity=0.9, iterations=20))
        >>> session = spfde.attach(model, optimizer, loader, recipe, epochs=10)
        >>> round(session.density, 2)
        0.09
    """

    name: ClassVar[str] = "synflow"
    summary: ClassVar[str] = "Prunes at initialisation, without data, by the flow through absolute weights."
    references: ClassVar[tuple[str, ...]] = ("tanaka2020synflow",)

    cost: ClassVar[str] = "3 sparse passes a step, and 3 dense ones for one sample a round"
    trains: ClassVar[bool] = False

    n_batches: Annotated[int, Field(ge=0, le=0, description="0, for SynFlow looks at no data")] = 0
    iterations: Annotated[int, Field(ge=1, description="a number of rounds, at least 1")] = 100

    def scoring_flops(self, forward_flops: int, *, samples: int, batch_size: int) -> int:
        """Three forward passes' worth a round on one sample, whatever there is."""
        return self.passes * forward_flops * (1 if self.structure.fixed_count else self.iterations)

    def rounds(self, units: int, total: int) -> list[int]:
        """``total * (units / total) ** (k / iterations)`` units after round ``k``, counted from 1."""
        share = units / total
        falling = [round_half_up(total * share ** (k / self.iterations)) for k in range(1, self.iterations)]
        return [max(units, n) for n in falling] + [units]

    def _scores(
        self, model: nn.Module, weights: Weights, batches: Sequence[Any], loss: ScoreLoss, sample: Sample, masks: Masks
    ) -> Scores:
        return saliency.synaptic_flow(model, weights, sample, masks=masks)
