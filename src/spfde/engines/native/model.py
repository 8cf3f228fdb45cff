"""A model whose forward pass runs the regions that the kernels take, and PyTorch the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from spfde.core.errors import InvalidArgument, UsageError
from spfde.core.torch_private import has_global_hooks
from spfde.engines.guards import ModeGuards
from spfde.engines.halves import Halves
from spfde.engines.kept_outputs import CachedPrefix, FrozenNumbers, check_batch
from spfde.engines.native import build
from spfde.engines.native.fusion import fuse
from spfde.engines.native.graph import Capture, Region, capture, region_name
from spfde.engines.native.kernels import Kernels
from spfde.engines.native.layout import Pool
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.runner import RegionRunner
from spfde.engines.stand_in import bypassed, put_on, take_off
from spfde.engines.trace import check_forward
from spfde.model.sample import Sample, call_arguments

_MOST_CAPTURES = 8  # states of the model: modes, hooks, attributes
_MANY_CAPTURES = 64


class NativeModel:
    """Computes a model's convolutions, and what lies between them, with the active weights alone.

    Args:
        model: the model. Its ``forward`` is replaced on the instance; nothing is registered on it.
        kernels: the loaded library; by default the one for float32, built if need be.
        masks, dense_gradients, masked_already, frozen: see ``engines.base.Parts``; the latter is asked for only with
            ``cached``.
        cached: runs the frozen front of batches that ``announce`` tells of.
        sample: what the model is called with; None: the inputs of the first call.
        captured: the model cut before; None: it is traced now if the sample is known.
        for_inference: see ``RegionRunner``.

    Attributes:
        kernels: the library.

    Raises:
        InvalidArgument: the model cannot be traced.
    """

    name = "native"

    def __init__(
        self,
        model: nn.Module,
        kernels: Kernels | None = None,
        *,
        masks: Callable[[], Mapping[str, Tensor]],
        dense_gradients: Callable[[], frozenset[str]],
        masked_already: Callable[[Mapping[str, Tensor]], None] = lambda gradients: None,
        frozen: Callable[[], frozenset[str]] = frozenset,
        cached: CachedPrefix | None = None,
        sample: Sample | None = None,
        captured: Capture | None = None,
        for_inference: bool = False,
    ) -> None:
        check_forward(model)
        self.model = model
        self._frozen, self._cached, self._for_inference = frozen, cached, for_inference
        self._frozen_then: frozenset[str] = frozenset()
        self._numbers: FrozenNumbers | None = None
        self._announced: tuple[Tensor, int] | None = None
        kernels = Kernels(build.load()) if kernels is None else kernels
        self.kernels, self._pool = kernels, Pool()
        self._masks, self._weights = masks, PackedWeights(masks, dense_gradients, masked_already, kernels.vectors)
        self._sample = sample
        self._captures: list[Capture] = []  # the last used first
        self._n_captures = 0
        if captured is not None and captured.is_current:
            self._take(captured)
        elif sample is not None:
            self._trace()
        put_on(self.model, self)

    @property
    def taken(self) -> tuple[Region, ...]:
        """What the engine computes in the model's present mode."""
        return self._capture().regions

    @property
    def left(self) -> tuple[str, ...]:
        """What stays in PyTorch, with the reason where there is one."""
        return self._capture().left

    def rebuild(self) -> None:
        """Make the lists of active weights anew, as the first step after a mutation does."""
        self._weights.rebuild()

    def announce(self, samples: Tensor | None, variant: int = 0) -> None:
        """The next forward pass in training mode is of these samples [N], each in this variant; None: of any."""
        self._announced = None if samples is None else (samples, variant)

    def prefix_variants(self) -> int:
        """How many variants of each sample the cache of the present frozen front keeps; 0 where there is none."""
        cached, halves = self._cached, self._capture().halves
        if cached is None or halves is None:
            return 0
        if cached.store is None and cached.variants:
            assert self._sample is not None, "it was traced with one"
            args, kwargs = call_arguments(self._sample)
            with torch.no_grad():
                cached.make_room([tuple(value.shape[1:]) for value in halves.front(*args, **kwargs)])
        return cached.variants

    def bypass(self) -> AbstractContextManager[None]:
        """The model computes as its class says."""
        return bypassed(self.model)

    def detach(self) -> None:
        """Give the model its forward pass back and free the buffers."""
        if not take_off(self.model, self):
            return
        self._captures.clear()
        if self._cached is not None:
            self._cached.clear()
        self._pool.release()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._sample is None:
            self._sample = kwargs if kwargs and not args else args
        captured = self._known()
        if has_global_hooks() or (captured is None and _has_stand_ins(self.model)):
            return type(self.model).forward(self.model, *args, **kwargs)
        self._pool.begin_pass()
        self._weights.refresh()
        captured = self._capture() if captured is None else captured
        if self.model.training and self._announced is not None:
            (samples, variant), self._announced = self._announced, None
            if captured.halves is not None and self._cached is not None and self._cached.store is not None:
                return self._from_cache(captured.halves, samples, variant, args, kwargs)
        if captured.graph_module is None:
            return type(self.model).forward(self.model, *args, **kwargs)
        return captured.graph_module.forward(*args, **kwargs)

    def _from_cache(
        self,
        halves: Halves,
        samples: Tensor,
        variant: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        check_batch(samples, args, kwargs)

        def compute(at: Tensor) -> list[Tensor]:
            some = slice(None) if len(at) == len(samples) else at
            with torch.no_grad():
                found = halves.front(*(value[some] for value in args), **{k: v[some] for k, v in kwargs.items()})
            return [(value.float() if value.is_floating_point() else value).contiguous() for value in found]

        assert self._cached is not None
        if self._numbers is None:
            self._numbers = FrozenNumbers(self.model, self._frozen_then)
        elif not self._numbers.are_the_same():
            self._cached.forget()
        return halves.back(*self._cached(samples, variant, compute), *halves.given(*args, **kwargs))

    def _known(self) -> Capture | None:
        """The graph of the model as it is now, where it was in this state before."""
        if self._cached is not None and (frozen := self._frozen()) != self._frozen_then:
            self._captures.clear()
            self._cached.clear()
            self._frozen_then, self._numbers = frozen, None
        for position, seen in enumerate(self._captures):
            if seen.is_current:
                if position:
                    self._pool.begin_phase()
                    self._captures.insert(0, self._captures.pop(position))
                return seen
        return None

    def _capture(self) -> Capture:
        """The graph of the model as it is now."""
        known = self._known()
        if known is not None:
            return known
        try:
            return self._trace()
        except InvalidArgument as error:
            # It could be traced when the engine was attached: in the other mode, or before a change.
            rule = error.problems[0].rule
            warnings.warn(f"The native engine leaves the model to PyTorch as it is now: {rule}.", stacklevel=2)
            return self._take(Capture(None, (f"the model ({rule})",), ModeGuards(self.model)))

    def _trace(self) -> Capture:
        if self._sample is None:
            raise UsageError("The native engine has not seen the model's inputs yet. Call the model once.")
        frozen = None if self._cached is None else self._frozen_then
        with torch.inference_mode(False):  # its tensors do not tell who writes into them
            return self._take(capture(self.model, self._sample, self._masks(), frozen))

    def _take(self, captured: Capture) -> Capture:
        """Compute by this capture from now on, for as long as the model is as it is."""
        self._fill(captured)
        self._pool.begin_phase()
        self._captures.insert(0, captured)
        del self._captures[_MOST_CAPTURES:]
        self._n_captures += 1
        if self._n_captures == _MANY_CAPTURES:
            warnings.warn(
                f"The native engine has traced the model {_MANY_CAPTURES} times, each time because a module, hook or "
                "attribute of it was another one. Change them less often, or keep what changes outside of the model.",
                stacklevel=2,
            )
        return captured

    def _fill(self, captured: Capture) -> None:
        """Put what computes each region in its place."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for index, (region, plain) in enumerate(zip(captured.regions, captured.plain, strict=True)):
            runner = RegionRunner(
                region, fuse(region, modules), plain, self.kernels, self._pool, self._weights,
                for_inference=self._for_inference,
            )  # fmt: skip
            for made in (captured.graph_module, *(captured.halves or ())):
                if hasattr(made, region_name(index)):
                    made.add_submodule(region_name(index), runner)


def _has_stand_ins(model: nn.Module) -> bool:
    """Are there tensors in the place of parameters, as ``torch.func.functional_call`` puts them there?"""
    return not all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
