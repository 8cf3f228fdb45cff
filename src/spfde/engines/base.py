"""What an engine is: how a model is computed while it trains.

An engine is a class with a name, registered with ``@spfde.register("engine")``. ``attach(engine="auto")`` asks each one
whether it can take the job and how long a step would be; ``engine="its-name"`` asks for one by name. The session knows
none of them: it calls what stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from spfde.core.torch_private import is_compiled_whole
from spfde.model.sample import Sample, unwrap

if TYPE_CHECKING:
    from spfde.engines.cudagraph.backend import Backend
    from spfde.engines.prefix_cache import PrefixCache
    from spfde.planning.blueprint import Blueprint


@dataclass(frozen=True)
class Job:
    """A model to be trained, as far as an engine must know it to say whether it can compute it.

    Attributes:
        given: the model as attached, wrappers included.
        blueprint: which parameters are masked, which layers there are, and how dense each is in the first epoch.
        sample: what the model is called with.
        batch_size: samples of a training batch.
        density: of each layer in ``blueprint.cost.layers``, in the first epoch.
        n_samples: of the data set: indices of samples are below it.
        cache: what is to be kept of a frozen front's outputs; None: nothing.
        compiles: the model's blocks are compiled one by one.
        is_strict: the engine was asked for by name: what it cannot compute is an error.
        found: what engines found out about the job, each under its own name, so that nothing is traced twice.
    """

    given: nn.Module
    blueprint: Blueprint
    sample: Sample
    batch_size: int
    density: Sequence[float] = ()
    n_samples: int = 0
    cache: PrefixCache | None = None
    compiles: bool = False
    is_strict: bool = False
    found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def model(self) -> nn.Module:
        """The user's own module, without wrappers."""
        return unwrap(self.given)

    @property
    def is_compiled(self) -> bool:
        """Whether ``torch.compile`` compiles the model as a whole: then nothing can stand in for parts of it."""
        return is_compiled_whole(self.given) or is_compiled_whole(self.model)


@dataclass(frozen=True)
class Parts:
    """What an engine reads of a session before each pass.

    Attributes:
        masks: gives the masks by parameter name; a mask that changes is replaced by another tensor.
        dense_gradients: gives the names of the parameters whose next gradient must be dense.
        frozen: gives the names of the frozen parameters.
        coming: gives what ``frozen`` gives now and in each epoch that is left.
        masked_already: for engines that mask gradients themselves: called within a backward pass, before the gradients
            arrive, with those, by parameter name, that have zeros where the mask has no weight. They are left as they
            come, unless anything was added to them or they add to anything. Whoever does not call it has every
            gradient masked.
    """

    masks: Callable[[], Mapping[str, Tensor]]
    dense_gradients: Callable[[], frozenset[str]] = frozenset
    frozen: Callable[[], frozenset[str]] = frozenset
    coming: Callable[[], Collection[frozenset[str]]] = lambda: (frozenset(),)
    masked_already: Callable[[Mapping[str, Tensor]], None] = lambda gradients: None


@dataclass(frozen=True)
class Recorder:
    """What an engine gives to have whole steps of its model recorded.

    Attributes:
        backend: records, where the model is.
        reads: the attributes that the model's forward pass reads, by name of the module.
        bypass: gives a context in which the model computes by its own modules: then its passes are part of the step.
        before_replay: see ``Engine``.
    """

    backend: Backend
    reads: Mapping[str, Collection[str]]
    bypass: Callable[[], AbstractContextManager[None]]
    before_replay: Callable[[], Hashable]


class Engine(ABC):
    """Computes one model. It is made without arguments, and attached once.

    Attributes:
        name: by which it is asked for.
        summary: what it does, in a line.
        needs_masks: it has nothing to do where no weight is masked.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_masks: ClassVar[bool] = False

    # --- before it is chosen -----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def supports(cls, job: Job) -> str | None:
        """Why it cannot compute the job's model, as a clause; None where it can. Nothing is changed."""

    @classmethod
    @abstractmethod
    def expected_speed(cls, job: Job) -> float:
        """Modelled time of a training step over that of the masked engine; asked where ``supports`` has no reason."""

    @classmethod
    def expectation(cls, job: Job) -> str:
        """The same in words, as the reason for taking it."""
        return f"about {1 / cls.expected_speed(job):.1f}x faster than masked"

    @classmethod
    def supports_cache(cls, job: Job) -> str | None:
        """Why it cannot keep what ``job.cache`` wants kept, as a clause; None where it can."""
        return "it keeps nothing of what frozen blocks compute"

    @classmethod
    def prepare(cls, job: Job, tell: Callable[[str], None] | None = None) -> str | None:
        """Do what takes a while, such as compiling; asked last. Why that failed, as a clause; None where it did not.

        Args:
            job: see ``supports``.
            tell: called with one line before the wait.
        """
        return None

    # --- while it is attached ----------------------------------------------------------------------------------------

    @abstractmethod
    def attach(self, job: Job, parts: Parts) -> None:
        """Make the model compute this way.

        Raises:
            InvalidArgument: the model cannot be computed.
        """

    @abstractmethod
    def detach(self) -> None:
        """Leave the model as it was before ``attach``. Called again, or without ``attach``, it does nothing."""

    def bypass(self) -> AbstractContextManager[None]:
        """A context in which the model runs through its own modules, hooks included."""
        return nullcontext()

    def describe(self) -> list[str]:
        """What was replaced, made or hooked, a line each, for ``print(session)``."""
        return []

    @property
    def recorder(self) -> Recorder | None:
        """What records whole steps of the model; None: nothing does."""
        return None

    def before_replay(self) -> Hashable:
        """Bring up to date what passes of the model read beside its parameters and buffers, such as lists of weights.

        Whoever records passes calls it before each recording and each replay: what was recorded holds for as long as
        what this returns is equal.
        """
        return ()

    def clears(self, tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> Callable[[], None] | None:
        """A call that zeroes tensors, as they lie now, outside of their masks; None: products with the masks do it.

        Args:
            tensors: weights and what of optimizers' state is of their shape.
            masks: bool, of each.
        """
        return None

    def on_batch(self) -> None:
        """The next batch was drawn: what was announced is over."""
        return

    def on_epoch(self) -> None:
        """An epoch begins."""
        return

    def prefix_variants(self) -> int:
        """How many variants of each sample are kept of the front that is frozen now; 0 where none is."""
        return 0

    def announce(self, samples: Tensor, variant: int) -> None:
        """The next forward pass in training mode is of these samples [N], each in this variant."""
        raise NotImplementedError(f"the {self.name} engine keeps no variants")


class StandIn(Protocol):
    """What computes a model, or parts of it, in their place."""

    def detach(self) -> None: ...

    def bypass(self) -> AbstractContextManager[None]: ...


Computes = TypeVar("Computes", bound=StandIn)


class StandInEngine(Engine, Generic[Computes]):
    """An engine that puts something in the place of a model's forward pass, or of its parts.

    ``attach`` sets ``_attached``.
    """

    def __init__(self) -> None:
        self._attached: Computes | None = None

    def detach(self) -> None:
        if self._attached is not None:
            self._attached.detach()
            self._attached = None

    def bypass(self) -> AbstractContextManager[None]:
        return self.computes.bypass()

    @property
    def computes(self) -> Computes:
        """What stands in for the model that this is attached to."""
        assert self._attached is not None, "attach() comes first"
        return self._attached
