"""The frozen front of a captured model, whose outputs are kept: then the model is computed in two halves.

The front half runs for samples that nothing is kept of yet, always in batches of one size: what it makes of a sample
does not depend on who else is in the batch, and one recording does for all. The back half runs on what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from spfde.core.errors import InvalidArgument, UsageError
from spfde.core.plain_kernels import PlainKernels, uncompiled
from spfde.core.say import counted
from spfde.core.torch_private import FakeTensorMode, NormBase, has_global_hooks, tree_map_only
from spfde.engines.base import Job, Parts
from spfde.engines.cudagraph.backend import Backend
from spfde.engines.cudagraph.call import switches
from spfde.engines.cudagraph.computation import Computation
from spfde.engines.cudagraph.known import Recordings
from spfde.engines.cudagraph.stage import Stage
from spfde.engines.guards import Guards
from spfde.engines.halves import Halves, fixed_nodes, halve, owned
from spfde.engines.kept_outputs import CachedPrefix, FrozenNumbers, check_batch, moved
from spfde.engines.trace import Traced, copy_shared, trace
from spfde.model.sample import Sample, call_arguments
from spfde.model.trace import like_the_model
from spfde.model.twin import fake_copy

_MOST_CUTS = 4  # states of the model: modes, hooks, attributes
_SHARE_OF_FREE = 0.5
"""How much of the GPU's free memory the kept outputs may take; recordings and activations need the rest."""

Compute = Callable[[Computation, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(eq=False)
class _Cut:
    """A model in two halves, for as long as it is as it was; None: it has no frozen front."""

    guards: Guards
    halves: Halves | None
    front: Computation | None = None
    back: Computation | None = None


class CachedFront:
    """Keeps what the frozen front of a model makes of each sample.

    Args:
        model: the model.
        cached: what is kept; ``kept_on`` says where.
        sample: what the model is called with.
        batch_size: that the front is run with.
        backend: records the halves.
        parts: see ``engines.base``.
        reads: the attributes that the forward pass reads, by name of the module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> cached = CachedPrefix(4, spfde.PrefixCache(1))
        >>> front = CachedFront(model, cached, torch.zeros(1, 3), 2, lambda: frozenset({"0.weight", "0.bias"}), {})
        >>> front.variants(), cached.store.shapes
        (1, [(2,)])
        >>> front.announce(torch.tensor([3, 0]), 0)
        >>> half, inputs = front.split((torch.ones(2, 3),), {}, lambda what, args, kwargs: what.run(*args, **kwargs))
        >>> half.run(*inputs).shape, cached.store.has(torch.arange(4)).tolist()
        (torch.Size([2, 1]), [True, False, False, True])
    """

    def __init__(
        self,
        model: nn.Module,
        cached: CachedPrefix,
        sample: Sample,
        batch_size: int,
        backend: Backend,
        parts: Parts,
        reads: Mapping[str, Collection[str]],
    ) -> None:
        self._model, self._cached, self._sample, self._batch_size = model, cached, sample, batch_size
        self._backend, self._parts, self._reads = backend, parts, reads
        self._announced: tuple[Tensor, int] | None = None
        self._cuts: list[_Cut] = []  # the last used first
        self._begin(frozenset())

    def _begin(self, frozen: frozenset[str]) -> None:
        """Another front is frozen: nothing is known of it."""
        self._frozen_then = frozen
        self._forget(self._cuts)
        self._numbers: FrozenNumbers | None = None
        self._switches: tuple[Any, ...] | None = None
        self._looks = True

    def clear(self) -> None:
        """Forget everything, and give the memory back."""
        self._begin(frozenset())
        self._cached.clear()

    def announce(self, samples: Tensor | None, variant: int = 0) -> None:
        """The next forward pass in training mode is of these samples [N], each in this variant; None: of any."""
        self._announced = None if samples is None else (samples, variant)

    def look(self) -> None:
        """Before the next pass, look whether the front has other numbers; the GPU is waited for."""
        self._looks = True

    def variants(self) -> int:
        """How many variants of each sample are kept of the present frozen front; 0 where there is none."""
        frozen = self._parts.frozen()
        if frozen != self._frozen_then:
            self._cached.clear()
            self._begin(frozen)
        if self._cached.store is None and self._cached.variants:
            halves = self._cut().halves
            if halves is None:
                return 0
            found = outputs_of(halves.front.graph, self._model, self._sample)
            if isinstance(found, str):
                raise UsageError(f"The prefix cache cannot keep what the frozen front computes: {found}.")
            self._cached.make_room([shape for shape, _ in found], [dtype for _, dtype in found])
        return self._cached.variants

    def split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], compute: Compute
    ) -> tuple[Computation, tuple[Tensor, ...]] | None:
        """The half that is left to compute of a call, and its inputs; None where the call is to run as a whole.

        Args:
            args, kwargs: of the call.
            compute: computes a half.

        Raises:
            UsageError: the batch is not the one that was announced.
        """
        if not self._model.training or self._announced is None or has_global_hooks():
            return None
        (samples, variant), self._announced = self._announced, None
        cut = self._cut()
        if cut.halves is None or cut.front is None or cut.back is None or self._cached.store is None:
            return None
        check_batch(samples, args, kwargs)
        self._forget_what_is_wrong()
        front = cut.front
        with torch.no_grad():
            kept = self._cached(samples, variant, lambda at: self._run(front, compute, args, kwargs, at))
            given = cut.halves.given.forward(*args, **kwargs)
        return cut.back, (*kept, *given)

    def describe(self) -> list[str]:
        """A line for ``print(session)``."""
        store = self._cached.store
        if store is None:
            return ["cached: nothing of the frozen front yet" if self._cached.variants else "cached: nothing fits"]
        where = "on the GPU" if store.device.type == "cuda" else "in main memory"
        variants = counted(self._cached.variants, "variant")
        return [
            f"cached: what the frozen front makes of {self._cached.n_samples:,} samples in {variants}, "
            f"as {store.precision}: {store.n_bytes / 2**30:.2f} GiB {where}"
        ]

    def _cut(self) -> _Cut:
        """The model in halves, as it is now."""
        for cut in self._cuts:
            if cut.guards.hold:
                self._cuts.remove(cut)
                break
        else:
            cut = self._trace()
            self._looks = True  # a tensor may be another one
            self._forget(self._cuts[_MOST_CUTS - 1 :])
        self._cuts.insert(0, cut)
        return cut

    def _forget(self, cuts: list[_Cut]) -> None:
        for cut in list(cuts):
            self._cuts.remove(cut)
            for half in (cut.front, cut.back):
                if half is not None:
                    half.recordings.clear()

    def _trace(self) -> _Cut:
        guards = Guards(self._model, self._reads, ())
        traced = trace(self._model, self._sample)
        copy_shared(traced)
        halves = in_halves(traced, self._model, fixed_nodes(traced, self._model, self._frozen_then))
        if halves is None:
            return _Cut(guards, None)

        def half(module: fx.GraphModule) -> Computation:
            recordings: Recordings[Stage] = Recordings(self._backend, self._parts)
            return Computation(module.forward, recordings, lambda: guards, modules=(module,), is_checked=True)

        return _Cut(guards, halves, half(halves.front), half(halves.back))

    def _forget_what_is_wrong(self) -> None:
        """What is kept holds for the front's numbers and PyTorch's switches at the time."""
        if self._numbers is None:
            self._numbers = FrozenNumbers(self._model, self._frozen_then)
        elif (self._looks or self._numbers.may_differ()) and not self._numbers.are_the_same():
            self._cached.forget()
        self._looks = False
        with torch.no_grad():
            now = switches(next(self._model.parameters()).device)
        if now != self._switches:
            self._cached.forget()
            self._switches = now

    def _run(
        self, front: Computation, compute: Compute, args: tuple[Any, ...], kwargs: dict[str, Any], at: Tensor
    ) -> list[Tensor]:
        """The front's outputs for the samples at these positions of the batch."""
        found = []
        for some in torch.split(at, self._batch_size):
            rows = torch.cat([some, some[-1:].expand(self._batch_size - len(some))])
            taken = [_taken(value, rows) for value in args], {name: _taken(v, rows) for name, v in kwargs.items()}
            found.append([output[: len(some)] for output in compute(front, tuple(taken[0]), taken[1])])
        return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)]


def _taken(value: Tensor, rows: Tensor) -> Tensor:
    """These rows, laid out as ``value`` is."""
    taken = value.index_select(0, moved(rows, value.device))
    is_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if is_last and not value.is_contiguous() else taken


def kept_on(device: torch.device, n_bytes: int) -> torch.device:
    """Where kept outputs are to lie: on the model's device if there is room, else in main memory."""
    if device.type != "cuda":
        return device
    torch.cuda.empty_cache()  # what PyTorch has set aside counts as taken
    free, _ = torch.cuda.mem_get_info(device)
    return device if n_bytes <= _SHARE_OF_FREE * free else torch.device("cpu")


def in_halves(traced: Traced, model: nn.Module, fixed: Collection[fx.Node]) -> Halves | None:
    """The model in halves; None where nothing is computed before the first thing that is not fixed."""
    whole = fx.GraphModule(model, traced.graph)
    # A graph that belongs to a module already is copied, node by node.
    return halve(traced, whole, dict(zip(whole.graph.nodes, traced.graph.nodes, strict=True)), fixed)


def outputs_of(graph: fx.Graph, model: nn.Module, sample: Sample) -> list[tuple[tuple[int, ...], torch.dtype]] | str:
    """Shape, for one sample, and type of each of a front's outputs; or why they cannot be kept, as a clause."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        twin, _ = fake_copy(model, fake)
    for module in twin.modules():
        if isinstance(module, NormBase):
            module.training = False
    front, shapes = fx.GraphModule(twin, graph), []
    for size in (2, 3):

        def of_size(value: Tensor, size: int = size) -> Tensor:
            return like_the_model(model, fake)(value)[:1].expand(size, *value.shape[1:]) if value.dim() else value

        with fake, PlainKernels(), torch.no_grad(), uncompiled():
            args, kwargs = tree_map_only(Tensor, of_size, call_arguments(sample))
            outputs = front.forward(*args, **kwargs)
        if any(not output.dim() or len(output) != size for output in outputs):
            return "what it hands over is not one value for each sample of the batch"
        shapes.append([tuple(output.shape[1:]) for output in outputs])
    if shapes[0] != shapes[1]:
        return "the size of what it hands over depends on the batch"
    return [(shape, output.dtype) for shape, output in zip(shapes[0], outputs, strict=True)]


# --- before anything is attached -------------------------------------------------------------------------------------


def reason_against(job: Job) -> str | None:
    """Why outputs of the job's frozen fronts cannot be kept, as a clause; None where they can."""
    model, blueprint = job.model, job.blueprint
    try:
        traced = trace(model, job.sample, training=True)
    except InvalidArgument as error:
        return "; ".join(problem.rule for problem in error.problems)
    copy_shared(traced)
    for count in sorted({count for count in blueprint.freeze_plan.frozen if count}):
        blocks = blueprint.partition.blocks[:count]
        frozen = {name for block in blocks for name in block.parameters}
        fixed = fixed_nodes(traced, model, frozen, {name for block in blocks for name in block.modules})
        left = next((node for node in traced.graph.nodes if node not in fixed and owned(node, model) & frozen), None)
        if left is not None:
            return _why_left(left, traced, model, frozen, fixed)
        halves = in_halves(traced, model, fixed)
        if halves is None:
            return f"the first {count} blocks compute nothing"
        found = outputs_of(halves.front.graph, model, job.sample)
        if isinstance(found, str):
            return f"of the front that ends with {blocks[-1].name}, {found}"
    return None


def _why_left(
    left: fx.Node, traced: Traced, model: nn.Module, frozen: Collection[str], fixed: Collection[fx.Node]
) -> str:
    """Why a node with frozen parameters is no function of the inputs and of such parameters alone."""
    name = str(left.target)
    if not owned(left, model) <= set(frozen):
        kind, why = type(model.get_submodule(name)).__name__, traced.leaves.get(name)
        return f"{name} ({kind}) runs as a whole, of which a part is frozen" + (f": it {why}" if why else "")
    behind, waiting = set[fx.Node](), [left]
    while waiting:
        node = waiting.pop()
        if node not in behind and node not in fixed:
            behind.add(node)
            waiting += node.all_input_nodes
    for node in traced.graph.nodes:
        if node in behind and node in traced.facts and traced.facts[node].draws:
            owner = traced.owner(node)
            kind = type(model.get_submodule(owner)).__name__
            return (
                f"a frozen block must make the same of a sample each time, and {owner or 'the model'} ({kind}) draws "
                "random numbers"
            )
    return f"{name} is frozen, and runs behind what learns"
