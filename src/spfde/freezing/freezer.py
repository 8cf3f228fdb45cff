"""Freezing a prefix of a model's blocks, and thawing it again.

Frozen means: no gradient is computed, nothing in the optimizer can move the parameters (neither momentum nor weight
decay), their optimizer state is freed, and normalisation layers use and keep the statistics that they have, although
the training loop calls ``model.train()``. SpFDE does not say what BatchNorm does in a frozen layer; that frozen layers
"remain unchanged" needs this.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spfde.core.checksum import checksums
from spfde.core.errors import StateMismatch
from spfde.core.optimizers import Optimizers
from spfde.core.state import check_entries
from spfde.core.torch_private import is_compiled, recompile_limit
from spfde.model.blocks import Block
from spfde.model.sample import unwrap

_WANTED_MODE = "_spfde_wanted_mode"
# Buffers that a forward pass in training mode changes, beside "running_…": of norms, the vectors of spectral norm.
_UPDATED_IN_TRAINING = ("num_batches_tracked", "_u", "weight_u")


@dataclass(frozen=True)
class _Frozen:
    """What freezing a block changed."""

    trained: list[nn.Parameter]  # those that required gradients
    held: list[tuple[nn.Module, object]]  # norms, each with the ``train`` that a user had put on it
    content: dict[str, int]  # what tells values apart: copies of weights and tables would take their memory twice


class Freezer:
    """Freezes blocks front to back, and thaws them back to front.

    Args:
        model: the model; parameters and modules are found by the names in the blocks.
        blocks: in order of execution.
        optimizer: one or several; their state for frozen parameters is freed. Parameter groups are left alone, so that
            schedulers and checkpoints go on fitting.
        updating: names of modules whose forward pass changes buffers in training, beside PyTorch's own norms.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        optimizer: torch.optim.Optimizer | Optimizers,
        updating: Collection[str] = (),
    ) -> None:
        model = unwrap(model)
        parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        self._optimizers = Optimizers.of(optimizer)
        self._blocks = tuple(blocks)
        self._parameters = [[parameters[name] for name in block.parameters] for block in blocks]
        self._norms = [
            [modules[name] for name in block.modules if name in updating or _changes_in_training(modules[name])]
            for block in blocks
        ]
        self._modules = [[(name, modules[name]) for name in block.modules] for block in blocks]
        self._warned: set[str] = set()
        self._frozen: list[_Frozen] = []

    @property
    def n_frozen(self) -> int:
        """Number of frozen blocks; they are the first ones."""
        return len(self._frozen)

    @property
    def n_paused(self) -> int:
        """Parameters in frozen blocks that train when these thaw."""
        return sum(len(block.trained) for block in self._frozen)

    @property
    def paused(self) -> frozenset[int]:
        """Identities of the parameters that ``n_paused`` counts."""
        return frozenset(id(p) for block in self._frozen for p in block.trained)

    @property
    def frozen_parameters(self) -> frozenset[str]:
        """Names of the parameters in frozen blocks."""
        return self.parameters_of_front(self.n_frozen)

    def parameters_of_front(self, n_blocks: int) -> frozenset[str]:
        """Names of the parameters in the first ``n_blocks`` blocks."""
        return frozenset(name for block in self._blocks[:n_blocks] for name in block.parameters)

    def freeze_to(self, n_blocks: int) -> None:
        """Freeze the first ``n_blocks`` blocks and no others; those that are frozen already stay so.

        A block that thaws trains on from its weights; optimizer state, which was freed, begins anew.
        What freezing changed is put back: ``requires_grad`` as each parameter had it, and the modes of the norms.
        """
        while self.n_frozen > n_blocks:
            _thaw(self._frozen.pop())
        for index in range(self.n_frozen, n_blocks):
            self._frozen.append(self._freeze(index))

    def _freeze(self, index: int) -> _Frozen:
        trained = [parameter for parameter in self._parameters[index] if parameter.requires_grad]
        for parameter in self._parameters[index]:
            parameter.requires_grad_(False)
            # Without a gradient every optimizer skips it; zero_grad(set_to_none=False) leaves None alone.
            parameter.grad = None
            self._optimizers.forget(parameter)
        held = [(norm, vars(norm).get("train")) for norm in self._norms[index]]
        for norm, _ in held:
            hold_in_eval(norm)
        return _Frozen(trained, held, checksums(self._values(index)))

    def _values(self, index: int) -> dict[str, torch.Tensor]:
        """What a block keeps as it is now, by name and kind: parameters, buffers and plain attributes of its modules.

        Counters are left out, and what autograd has made: activations that somebody looks at later. A kind is part of
        the key, so that a model that is converted has nothing to be compared with.
        """
        names = zip(self._blocks[index].parameters, self._parameters[index], strict=True)
        found: list[tuple[str, torch.Tensor]] = [(name, p.detach()) for name, p in names]
        for path, module in self._modules[index]:
            own = f"{path}." if path else ""
            label = f" of {type(module).__name__}"
            buffers = ((f"{own}{name}{label}", b) for name, b in module._buffers.items() if b is not None)
            found += [(name, b) for name, b in buffers if not _is_counter(b)]
            found += [(f"{own}{name}{label}, a plain attribute,", t) for name, t in vars(module).items() if _is_kept(t)]
        return {f"{name}\n{t.dtype} {tuple(t.shape)}": t for name, t in found if not t.is_meta}

    def changed(self) -> list[str]:
        """What has changed in frozen blocks since they were frozen, each named once; counters are left out.

        Something changes it in evaluation mode, too, or from outside the block.
        """
        changed = []
        for index, frozen in enumerate(self._frozen):
            # Versions do not tell: what is written by way of ``.data`` leaves them as they were.
            for key, number in checksums(self._values(index)).items():
                name = key.partition("\n")[0]
                if name not in self._warned and frozen.content.get(key, number) != number:
                    self._warned.add(name)
                    changed.append(name)
        return changed

    def state_dict(self) -> dict[str, Any]:
        """The number of frozen blocks, and the names of the blocks to check against when it is loaded."""
        return {"n_frozen": self.n_frozen, "blocks": [block.name for block in self._blocks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Freeze as many blocks as the state says.

        Raises:
            StateMismatch: the state was taken with other blocks, or is none of ours.
        """
        check_entries(state, "freezing", {"n_frozen": int, "blocks": list})
        mine = [block.name for block in self._blocks]
        if state["blocks"] != mine or not 0 <= state["n_frozen"] <= len(mine):
            raise StateMismatch(
                f"the state of freezing has {state['n_frozen']} frozen of the blocks {state['blocks']}, and the model "
                f"has the blocks {mine}. Load it into the model and the recipe that it was saved with."
            )
        self.freeze_to(state["n_frozen"])


def _thaw(frozen: _Frozen) -> None:
    for parameter in frozen.trained:
        parameter.requires_grad_(True)
    for norm, own_train in frozen.held:
        release(norm)
        if own_train is not None:
            norm.train = own_train  # type: ignore[assignment,method-assign]


def hold_in_eval(module: nn.Module) -> None:
    """Keep ``module`` in evaluation mode whatever ``train()`` is called with; its children go on following.

    The method is replaced on the instance and never flips the flag, so that compiled code need not be compiled anew at
    each ``model.train()`` and ``model.eval()``. The mode that was asked for last is remembered for ``release``.
    """
    if _WANTED_MODE not in vars(module):
        setattr(module, _WANTED_MODE, module.training)
        module.train = types.MethodType(train, module)  # type: ignore[method-assign]
        module.training = False


def is_held(module: nn.Module) -> bool:
    """Is ``module`` kept in evaluation mode by ``hold_in_eval``?"""
    return _WANTED_MODE in vars(module)


def release(module: nn.Module) -> None:
    """Undo ``hold_in_eval``: the module takes the mode that was asked for last."""
    if _WANTED_MODE in vars(module):
        module.training = vars(module).pop(_WANTED_MODE)
        del module.train


# A bound method is copied and pickled by its name, so this one has the name of the method that it stands in for: a deep
# copy of a frozen model stays frozen, and a pickled one loads as a plain model where this package is not installed.
def train(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for ``module.train`` while it is held."""
    if not isinstance(mode, bool):
        raise ValueError("training mode is expected to be boolean")
    setattr(module, _WANTED_MODE, mode)
    for child in module.children():
        child.train(mode)
    return module


def recompile_warning(model: nn.Module, n_fronts: int) -> str | None:
    """A warning for users of ``torch.compile`` whose run has ``n_fronts`` frozen fronts; None when it is not needed.

    A compiled model is compiled anew for each front that it has not had yet, none included, once for training and once
    for evaluation; beyond torch's limit it runs without compilation.
    """
    if not is_compiled(model):
        return None
    setting, limit = recompile_limit()
    needed = 2 * (n_fronts + 1)
    if needed <= limit:
        return None
    return (
        f"The compiled model will have {n_fronts} frozen fronts, and is compiled anew for each, for training and for "
        f"evaluation. Beyond {setting}={limit} torch runs it uncompiled: set the limit to {needed}."
    )


def _is_kept(value: object) -> bool:
    """Whether a plain attribute of a module is a tensor that holds something, and no activation that has a gradient."""
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        return False
    return not value.requires_grad and value.layout == torch.strided and not _is_counter(value)


def _is_counter(buffer: torch.Tensor) -> bool:
    """One whole number, as layers count their calls."""
    is_integer = not (buffer.is_floating_point() or buffer.is_complex() or buffer.dtype == torch.bool)
    return is_integer and buffer.numel() == 1


def _changes_in_training(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return any(name.startswith("running_") or name in _UPDATED_IN_TRAINING for name in names)
