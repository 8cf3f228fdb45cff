"""What do masks cost a large model, in time and in memory?

ResNet-50's weights at 90 %: one mutation of all its masks by each method, with weights and gradients that are there
already, against a dense training step of 8 images of 224 pixels (a small one: a step of 64 takes about eight times as
long). Rounds are interleaved; each has an update epoch of its own, after a step with random gradients that is not
timed, and is checked to have changed the masks. Target: at most 5 steps. Memory is counted in bytes of the tensors:
masks packed as they are saved, and as they run, against the fp32 weights; what a method keeps beside its masks has a
column of its own.

    python benchmarks/mutation.py                   # about 10 minutes on two cores
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim import SGD

import spfde
from _common import Figure, Result, Table, begin, compare, interleave, parser, publish, show
from spfde.core.registry import registered
from spfde.planning.blueprint import draw
from spfde.planning.timeline import Timeline
from spfde.sparsity import PruningAtInitialisation, SparsityMethod
from spfde.sparsity.masker import Masker
from spfde.sparsity.masks import pack

METHODS = registered("method")

SPARSITY, MOST_STEPS, PACKED, RUNNING = 0.9, 5.0, 1 / 32, 1 / 4
EPOCHS, INTERVAL, FIRST_UPDATE = 100, 2, 10
STRUCTURES: dict[str, SparsityMethod] = {
    "set, 4x1 blocks": spfde.SET(sparsity=SPARSITY, structure=spfde.Block(rows=4, columns=1)),
    "set, kernels": spfde.SET(sparsity=SPARSITY, structure=spfde.Kernels()),
    "rigl, 2:4": spfde.RigL(sparsity=0.5, structure=spfde.NM(n=2, m=4)),
}


class Mutating:
    """A model's masks, which mutate by one method at one update epoch after the other."""

    def __init__(self, make: Callable[[], nn.Module], method: SparsityMethod, sample: Tensor) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        recipe = spfde.Recipe(sparsity=method, update_interval_epochs=INTERVAL)
        blueprint = draw(self.model, sample, recipe, EPOCHS)
        self.timeline, self.layers = Timeline(blueprint, recipe, samples=1), blueprint.sparse_layers
        self.masker = Masker(self.layers, self.optimizer, method, generator=torch.Generator().manual_seed(0))
        self.masker.begin_epoch(self.timeline[0].masks)
        self.epoch = FIRST_UPDATE - INTERVAL
        self.random = torch.Generator().manual_seed(1)
        self.gradients: dict[str, Tensor] = {}

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Before a mutation a step and the next update epoch; after it the check that masks have changed."""
        self.gradients = {n: 0.01 * torch.randn(p.shape, generator=self.random) for n, p in self.layers.items()}
        self._step(self.optimizer.step)
        self.epoch += INTERVAL
        masks = self.masker.masks
        yield
        changed = any(not torch.equal(masks[name], mask) for name, mask in self.masker.masks.items())
        assert changed, f"{self.masker.method.name} changed no mask at epoch {self.epoch}: ask for fewer rounds"

    def mutate(self) -> None:
        """What an update epoch does, without the optimizer's own step."""
        self.masker.begin_epoch(self.timeline[self.epoch].masks)
        strategy = self.masker.strategy
        if getattr(strategy, "pending", False) or strategy.changes_every_step:
            self._step()

    def _step(self, of_optimizer: Callable[[], object] = lambda: None) -> None:
        for name, parameter in self.layers.items():
            parameter.grad = self.gradients[name].clone()
        self.masker._before_step(self.optimizer, (self.optimizer,), {})
        of_optimizer()
        self.masker._after_step(self.optimizer, (self.optimizer,), {})

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.layers.values())

    @property
    def packed_bytes(self) -> int:
        return sum(pack(mask).nbytes for mask in self.masker.masks.values())

    @property
    def running_bytes(self) -> int:
        return sum(mask.nbytes for mask in self.masker.masks.values())

    @property
    def beside_bytes(self) -> int:
        """Tensors that the method keeps beside the masks: which weights were explored, latents, smoothed gradients."""
        state = self.masker.state_dict()
        return sum(tensor.nbytes for part in ("explored", "strategy") for tensor in tensors(state[part]))

    @property
    def explored_bytes(self) -> int:
        """The record of which weights were explored, that every method keeps."""
        return sum(tensor.nbytes for tensor in tensors(self.masker.state_dict()["explored"]))


def methods() -> dict[str, SparsityMethod]:
    """Everything that mutates, by name."""
    dynamic = {
        name: method(sparsity=SPARSITY)
        for name, method in METHODS.items()
        if not issubclass(method, PruningAtInitialisation) and name not in ("static", "drop-grow")
    }
    return dynamic | STRUCTURES


def tensors(nested: object) -> Iterator[Tensor]:
    """All tensors in nested dictionaries."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from tensors(value)


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="timed rounds (5)")
    options = made.parse_args(argv)
    stamped = begin(options)
    rounds = options.rounds or (1 if options.quick else 5)
    make: Callable[[], nn.Module] = torchvision.models.resnet18 if options.quick else torchvision.models.resnet50
    batch, side = (2, 64) if options.quick else (8, 224)

    model = make().train()
    optimizer = SGD(model.parameters(), lr=1e-6, momentum=0.9)
    x, y = torch.randn(batch, 3, side, side), torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    figures, rows, shares = [], [], []
    for name, method in methods().items():
        # One at a time: the copies of the weights of all methods together would not fit everywhere.
        mutating = Mutating(make, method, x[:1])
        timings = interleave({"step": step, name: mutating.mutate}, rounds, around={name: mutating.checked})
        ratio = compare(timings[name], timings["step"])
        figures.append(Figure.of(f"mutation by {name}, in dense steps of {batch}", ratio, high=MOST_STEPS))
        weights = mutating.weight_bytes
        at_rest, in_use, explored = mutating.packed_bytes, mutating.running_bytes, mutating.explored_bytes
        shares.append((at_rest / weights, in_use / weights, (in_use + explored) / weights))
        beside = f"{mutating.beside_bytes / weights:.3f}x"
        rows.append((name, show(timings[name].median, "seconds"), show(timings["step"].median, "seconds"), beside))
        del mutating
    slowest = max(figures, key=lambda figure: figure.value)
    packed, running, with_explored = (max(column) for column in zip(*shares, strict=True))
    publish(
        Result(
            name="mutation",
            title="Masks of a large model",
            question="What do a mutation of all masks and the masks themselves cost ResNet-50?",
            command="python benchmarks/mutation.py",
            figures=(
                replace(slowest, what="slowest mutation of ResNet-50's masks, in dense steps", headline=True),
                Figure("masks packed, over the weights", packed, "share", high=PACKED + 1e-6, n=1),
                Figure("masks running, over the weights", running, "share", high=RUNNING, n=1),
                *figures,
            ),
            tables=(
                Table(
                    "Each method",
                    ("method", "mutation (median)", "dense step (median)", "kept beside the masks, over the weights"),
                    tuple(rows),
                ),
            ),
            settings={"model": make.__name__, "batch": batch, "pixels": side, "sparsity": SPARSITY, "rounds": rounds},
            notes=(
                f"Running, every method keeps {with_explored:.3f}x of the weights' bytes: {running:.3f}x are masks, "
                "and the rest is the record of which weights were explored. More than that is the method's own.",
                "The masks' bytes are those of the tensors; a mask is applied through a copy of one layer's at a time.",
            ),
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
