"""Do gradients still arrive behind a frozen front?

``torch.utils.checkpoint(..., use_reentrant=True)`` gives what it runs gradients only where one of its inputs needs one.
Behind a frozen front none does: the layers inside learn nothing from then on, and PyTorch warns at most.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spfde.core.errors import UsageError
from spfde.core.hooks import remove_from_within, weakly
from spfde.model.blocks import Block

# A block may be left out of a step on purpose, as stochastic depth does.
_ENOUGH_STEPS = 10


class Arrivals:
    """Notices blocks that learned before others froze, and do not any more.

    Each parameter tells of its first gradient, once after each freeze: a step costs nothing.

    Args:
        model: has the parameters that the blocks name.
        blocks: in order of execution.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        parameters = dict(model.named_parameters())
        self._blocks = [(block.name, [parameters[name] for name in block.parameters]) for block in blocks]
        self._arrived: set[int] = set()
        self._expected: dict[str, list[nn.Parameter]] = {}
        self._steps = 0
        self._handles: dict[int, RemovableHandle] = {}
        self._watch()

    def expect(self, n_frozen: int) -> None:
        """Blocks were frozen: so many in all. The others must learn as they did."""
        learn = ((name, [p for p in own if id(p) in self._arrived]) for name, own in self._blocks[n_frozen:])
        self._expected = {name: known for name, known in learn if known}
        self._arrived, self._steps = set(), 0
        self._watch()

    @property
    def n_watched(self) -> int:
        """Parameters whose next gradient is waited for."""
        return len(self._handles)

    def on_step(self) -> None:
        """A step was taken.

        Raises:
            UsageError: see ``check``.
        """
        if self._expected:
            self._steps += 1
            if self._steps == _ENOUGH_STEPS:
                self.check()

    def check(self) -> None:
        """Raise ``UsageError`` where a whole block that learned before has had no gradient since others froze.

        Parameters that the user has frozen meanwhile are not waited for.
        """
        if not self._expected or not self._steps:
            return
        missing = []
        for name, known in self._expected.items():
            learning = [p for p in known if p.requires_grad]
            if learning and not any(id(p) in self._arrived for p in learning):
                missing.append(name)
        self._expected = {}
        if missing:
            raise UsageError(
                f"{', '.join(missing)} got no gradient since the blocks before were frozen, in {self._steps} steps. "
                "Checkpointing with use_reentrant=True gives none where its inputs need none: pass use_reentrant=False "
                "to torch.utils.checkpoint (gradient_checkpointing_kwargs in Transformers)."
            )

    def on_replay(self) -> None:
        """A recorded step is about to be replayed: one like it has run, and what arrived then will arrive."""
        self.check()
        self._expected = {}

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _watch(self) -> None:
        self.close()
        for _, own in self._blocks:
            for parameter in own:
                if parameter.requires_grad:
                    hook = parameter.register_post_accumulate_grad_hook
                    self._handles[id(parameter)] = hook(weakly(self.note))  # type: ignore[no-untyped-call]

    def note(self, parameter: Tensor) -> None:
        """A gradient has arrived."""
        self._arrived.add(id(parameter))
        handle = self._handles.pop(id(parameter), None)
        if handle is not None:
            remove_from_within(handle, parameter)
