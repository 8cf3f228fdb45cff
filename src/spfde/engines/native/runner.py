"""A region of a model as a module: programs by shape and state, PyTorch where the kernels do not take the inputs."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spfde.engines.native.fusion import ConvStep, FusedStep, PointStep, Unsupported, parameters_of
from spfde.engines.native.graph import Region
from spfde.engines.native.kernels import Kernels
from spfde.engines.native.layout import Pool
from spfde.engines.native.op import RegionFunction
from spfde.engines.native.packed import PackedWeights
from spfde.engines.native.program import Program
from spfde.engines.native.region_plan import Mode, RegionPlan, is_tracked
from spfde.engines.native.upkeep import Outside

_MOST_PROGRAMS = 32  # shapes and states of the model that are kept ready


@dataclass(frozen=True, eq=False)
class State:
    """Masks, parameters and statistics as they are: another one whenever one of them is another.

    Attributes:
        version: of the masks.
        told: of each tensor how often it was written to, and where and how it lies.
        memory: theirs. While the state is known, no other tensor comes to lie there.
    """

    version: int
    told: Sequence[object]
    memory: Sequence[Tensor]


class RegionRunner(nn.Module):
    """A region in the place of the modules that it computes.

    Args:
        region: what is computed.
        steps: from ``fuse``.
        plain: the same in PyTorch.
        kernels, pool, weights: those of the model.
        for_inference: parameters and statistics are only written to in ways that PyTorch's version counters tell, so
            that what the kernels make of them is kept until then; and the last digits of a result may depend on how
            many images came with it, so that few of them are cut into cells.
    """

    def __init__(
        self,
        region: Region,
        steps: Sequence[FusedStep],
        plain: nn.Module,
        kernels: Kernels,
        pool: Pool,
        weights: PackedWeights,
        *,
        for_inference: bool = False,
    ) -> None:
        super().__init__()
        self._region, self._steps, self._plain = region, tuple(steps), plain
        self._kernels, self._pool, self._weights = kernels, pool, weights
        self._norms = [step.norm for step in steps if isinstance(step, PointStep) and step.norm is not None]
        self._convolutions = [step for step in steps if isinstance(step, ConvStep)]
        self._trainable = parameters_of(steps)
        statistics = (kept for norm in self._norms for kept in (norm.running_mean, norm.running_var))
        self._own = [*self._trainable, *(kept for kept in statistics if kept is not None)]
        self._counts = [norm.num_batches_tracked for norm in self._norms if norm.running_mean is not None]
        # Tensors that were made in inference mode have no counters.
        self._for_inference = for_inference
        self._tells_changes = for_inference and not any(map(torch.is_inference, self._own))
        self._state: State | None = None
        self._checked: State | None = None
        self._version = weights.version
        self._programs: OrderedDict[Mode, Program] = OrderedDict()
        self._outside: Outside | None = None

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The region's outputs: a tensor, or a tuple for several."""
        storage = self._kernels.dtype
        if torch.is_autocast_enabled("cpu"):
            if storage == torch.float32 and torch.get_autocast_dtype("cpu") == torch.bfloat16:
                storage = torch.bfloat16
            else:
                asked = str(torch.get_autocast_dtype("cpu")).removeprefix("torch.")
                warnings.warn(f"The native engine computes in float32 under autocast to {asked}.", stacklevel=2)
            taken = (self._kernels.dtype, storage)
            inputs = tuple(tensor if tensor.dtype in taken else tensor.to(taken[0]) for tensor in inputs)
        state = self._state = self._state_now() if self._tells_changes else None
        try:
            self._check_inputs(inputs, storage)
            is_checked = state is not None and state is self._checked
            if not is_checked:
                self._check_own()
            is_denser = not is_checked and self._is_denser_than_its_masks()
            self._checked = None if is_denser else state
            program = None if is_denser else self._program(inputs, storage)
        except Unsupported as error:
            warnings.warn(f"The native engine leaves a part of the model to PyTorch: it {error}.", stacklevel=2)
            program = None
        if program is None:
            found: Tensor | tuple[Tensor, ...] = self._plain(*inputs)
            return found
        if any(program.plan.needs_grad.values()):
            outputs = RegionFunction.apply(program, *inputs, *program.plan.parameters)
        else:
            outputs = program.forward(inputs, state)[: len(self._region.outputs)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _state_now(self) -> State:
        """The state of the last pass where nothing is another."""
        version, told = self._weights.version, [(one._version, one.data_ptr(), one.stride()) for one in self._own]
        last = self._state
        if last is not None and (version, told) == (last.version, last.told):
            return last
        return State(version, told, [one.detach() for one in self._own])

    def _is_denser_than_its_masks(self) -> bool:
        """Has somebody loaded or averaged weights that the kernels would leave out?

        Only the weights tell: what is written through ``p.data`` leaves PyTorch's version counters as they were.
        """
        found = [
            (step.module.weight, mask)
            for step in self._convolutions
            if (mask := self._weights.mask_of(step)) is not None
        ]
        weights, masks = [weight for weight, _ in found], [mask for _, mask in found]
        if self._outside is None or not self._outside.is_of(weights, masks):
            self._outside = self._kernels.outside(weights, masks)
        if self._outside is None:
            return any(bool(((weight.detach() != 0) & ~mask).any()) for weight, mask in found)
        return self._outside.is_any()

    def _check_inputs(self, inputs: Sequence[Tensor], storage: torch.dtype) -> None:
        for tensor in inputs:
            if not (tensor.dim() >= 2 if self._region.is_tokens else tensor.dim() == 4):
                raise Unsupported(f"got {tensor.dim()} dimensions")
            self._check_kind(tensor, storage)

    def _check_kind(self, tensor: Tensor, storage: torch.dtype) -> None:
        if tensor.dtype not in (self._kernels.dtype, storage) or tensor.device.type != "cpu":
            raise Unsupported(f"got {tensor.dtype} on {tensor.device}")

    def _check_own(self) -> None:
        dtype = self._kernels.dtype
        # The kernels read a bias, and what belongs to a norm, from the first number on.
        if not all(t.dtype is dtype and t.is_cpu and (t.dim() != 1 or t.is_contiguous()) for t in self._own):
            for tensor in self._own:
                self._check_kind(tensor, dtype)
            raise Unsupported("has a bias, or numbers of a norm, that do not lie one after the other")
        if all(count is not None and count.dtype is torch.int64 and count.is_cpu for count in self._counts):
            return
        if any(map(is_tracked, self._norms)):
            raise Unsupported("has a norm that does not count its batches in int64, on the CPU")

    def _program(self, inputs: Sequence[Tensor], storage: torch.dtype) -> Program:
        self._follow_masks()
        mode = self._mode(inputs, storage)
        if mode not in self._programs:
            kernels = self._kernels
            plan = RegionPlan(
                self._region, self._steps, mode, lanes=kernels.lanes, threads=torch.get_num_threads(),
                cells=self._for_inference,
            )  # fmt: skip
            if any(count <= 1 and norm.training for norm, _, count in plan.norms):
                raise Unsupported("normalises by a batch of one number")
            self._programs[mode] = Program(plan, weights=self._weights, kernels=kernels, pool=self._pool)
            if len(self._programs) > _MOST_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(mode)
        return self._programs[mode]

    def _follow_masks(self) -> None:
        """Where a mask is another one, what was written for the former goes, in waiting programs too."""
        if self._version != self._weights.version:
            self._version = self._weights.version
            for program in self._programs.values():
                program.forget()

    def _mode(self, inputs: Sequence[Tensor], storage: torch.dtype) -> Mode:
        with_gradients = torch.is_grad_enabled()
        return Mode(
            tuple(tuple(tensor.shape) for tensor in inputs),
            tuple(tensor.dtype for tensor in inputs),
            storage,
            tuple(with_gradients and tensor.requires_grad for tensor in inputs),
            frozenset(id(p) for p in self._trainable if with_gradients and p.requires_grad),
            frozenset(id(norm) for norm in self._norms if norm.training or norm.running_mean is None),
        )
