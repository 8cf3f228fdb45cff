"""How much faster does the native engine train, on a CPU?

Whole training steps through the public API (model, loss, backward, optimizer, `observe`), interleaved in one process,
against the faster of PyTorch's dense layouts, contiguous and channels_last; all step with the same fused SGD. ResNet-32
(widths 32-64-128) unless another model is named; unstructured uniform masks. Also: the same against PyTorch's
fastest dense step, bf16 autocast and compiled ones among them; an epoch of SpFDE's whole schedule; the peak memory of a
step (each in a process of its own); what a mutation costs; how long the kernels take to build and to load; and a
convolution by PyTorch's CSR product.

    python benchmarks/native.py                     # about 20 minutes on two cores
    python benchmarks/native.py --only best-dense   # only this; what is recorded of the others stays
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import spfde
from _common import (
    RESULTS,
    Figure,
    Result,
    Table,
    Timing,
    begin,
    compare,
    interleave,
    parser,
    publish,
    quartiles,
    stamp_line,
)
from spfde.app.train.models import build_model
from spfde.cost import format_bytes
from spfde.cost.memory import peak_bytes, reset_peak
from spfde.engines.base import Job
from spfde.engines.choose import WORTH_IT
from spfde.engines.native import build
from spfde.engines.native.engine import NativeEngine
from spfde.engines.native.model import NativeModel

BATCH, CLASSES, EPOCHS = 64, 100, 160
DENSE = ("dense, contiguous", "dense, channels_last")
# Least speed-ups over dense.
BY_SPARSITY = {0.0: None, 0.25: None, 0.5: 1.0, 0.8: 2.4, 0.9: 3.6, 0.95: 4.6, 0.98: 6.3}
# Least speed-ups of native steps under autocast to bf16 over the fastest dense step that PyTorch has.
BEST_BY_SPARSITY = {0.8: 2.4, 0.9: 3.6, 0.95: 4.8, 0.98: 6.3}
BEST_BY_STRUCTURE = {"2x2 blocks of inputs": (spfde.Block(rows=2, columns=2, along="inputs"), 4.4)}
BEST_BY_FROZEN = {5: 5.0, 10: 7.5}
MOST_HALF_MEMORY, MOST_OF_HALF_MEMORY = 0.40, 0.60
BY_BATCH = {32: 3.4, 128: 3.4}
BY_FROZEN = {5: 5.2, 10: 7.5}
BY_CACHED = {5: 6.5, 10: 14.0}
BY_MODEL = {"VGG-19": 3.0, "ResNet-18": 3.0, "MobileNetV2": 1.3, "ViT-tiny": 1.5}
VARIANTS = 2
LEAST_EPOCH, MOST_REBUILD, MOST_BUILD, MOST_LATER = 5.3, 0.5, 30.0, 0.2
MOST_BREAK_EVEN, MOST_MEMORY = 0.5, 1.0
# Steps that the engine's own estimate of them is compared with: model, sparsity, batch.
ESTIMATED = (
    *(("ResNet-32", sparsity, BATCH) for sparsity in (0.25, 0.5, 0.8, 0.95)),
    *(("ResNet-32", 0.9, size) for size in (1, 2, 4, 8, 16, 33, BATCH)),
    *((name, 0.9, BATCH) for name in BY_MODEL),
)


def resnet32() -> nn.Module:
    """The paper's ResNet-32."""
    return build_model("resnet32", num_classes=CLASSES, in_channels=3, image_size=32, seed=0)


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 with a stem for small images."""
    from torchvision.models import resnet18 as make

    model = make(num_classes=CLASSES)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def mobilenet() -> nn.Module:
    """torchvision's MobileNetV2 with strides for small images."""
    from torchvision.models import mobilenet_v2 as make

    model = make(num_classes=CLASSES, dropout=0.0)
    model.features[0][0].stride = (1, 1)
    return model


def vision_transformer() -> nn.Module:
    """timm's ViT-tiny on patches of 4 x 4 pixels: 65 tokens."""
    import timm

    made: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=CLASSES, pretrained=False
    )
    return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "VGG-19": lambda: build_model("vgg19", num_classes=CLASSES, in_channels=3, image_size=32, seed=0),
    "ResNet-18": resnet18,
    "MobileNetV2": mobilenet,
    "ViT-tiny": vision_transformer,
}


class Trainer:
    """A model, its optimizer and one batch."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model.train(), x, y
        self.optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
        self.session: spfde.Session | None = None
        self.ids: Tensor | None = None
        self.engine: NativeModel | None = None
        self.epochs: Iterator[int] | None = None  # dropped, it would end the epoch
        self.bf16 = False

    def step(self) -> None:
        """One training step."""
        if self.session is not None and self.session.caches_prefix:
            self.session.augmentation_seeds(self.ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.model(self.x)
            loss = F.cross_entropy(logits, self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.session is not None:
            self.session.observe(logits, self.y)

    @property
    def native(self) -> NativeModel:
        if self.engine is not None:
            return self.engine
        assert self.session is not None, "made by sparse() or control()"
        engine = self.session._computing.engine
        assert isinstance(engine, NativeEngine)
        return engine.computes


def dense(model: nn.Module, layout: str, x: Tensor, y: Tensor) -> Trainer:
    """Stock PyTorch."""
    if layout == DENSE[1]:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return Trainer(model, x, y)


def sparse(
    model: nn.Module,
    sparsity: float,
    x: Tensor,
    y: Tensor,
    *,
    frozen: int = 0,
    cached: bool = False,
    engine: str = "native",
    half: bool = False,
    structure: spfde.Structure | None = None,
) -> Trainer:
    """A session at a constant sparsity that has frozen its first ``frozen`` blocks, and keeps their output."""
    made = Trainer(model, x, y)
    made.bf16 = half
    made.ids = torch.arange(len(x))
    freezing = spfde.ProgressiveFreezing(flops_reduction=0.0, start_epoch=1) if frozen else None
    cache = spfde.PrefixCache(1) if frozen and cached else None
    recipe = spfde.Recipe(
        sparsity=spfde.MEST(sparsity=sparsity, soft_bound=False, structure=structure or spfde.Unstructured()),
        freezing=freezing,
        update_interval_epochs=1,
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    made.session = spfde.attach(model, made.optimizer, loader, recipe, epochs=40, engine=engine, cache=cache)
    epochs = made.session.epochs()
    while next(epochs) < frozen:
        made.session.augmentation_seeds(made.ids)
    made.epochs = epochs
    assert made.session.frozen_blocks == frozen
    return made


def control(model: nn.Module, x: Tensor, y: Tensor) -> Trainer:
    """The native engine with every weight active."""
    made = Trainer(model, x, y)
    made.engine = NativeModel(model, masks=dict, dense_gradients=frozenset)
    return made


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator)


class Group:
    """Variants timed together, dense ones among them."""

    def __init__(self, make: Callable[[], nn.Module], size: int) -> None:
        self.make, (self.x, self.y) = make, batch(size)
        self.trainers = {layout: dense(make(), layout, self.x, self.y) for layout in DENSE}
        self.timings: dict[str, Timing] = {}

    def add(self, name: str, sparsity: float, frozen: int = 0, **how: Any) -> None:
        if sparsity == 0.0:
            self.trainers[name] = control(self.make(), self.x, self.y)
        else:
            self.trainers[name] = sparse(self.make(), sparsity, self.x, self.y, frozen=frozen, **how)

    def run(self, rounds: int, *, warmed: bool = False) -> None:
        """Time a step of each; warmed: after another one of the same that is not timed, as in training."""

        @contextmanager
        def after(step: Callable[[], None]) -> Iterator[None]:
            step()
            yield

        around = {name: partial(after, made.step) for name, made in self.trainers.items() if warmed}
        calls = {name: made.step for name, made in self.trainers.items()}
        self.timings = interleave(calls, rounds, warmup=2, around=around)

    @property
    def base(self) -> Timing:
        """The faster dense layout."""
        return min((self.timings[layout] for layout in DENSE), key=lambda timing: timing.median)

    def speed_up(self, what: str, name: str, low: float | None, *, headline: bool = False) -> Figure:
        """How many times faster than dense."""
        return Figure.of(what, compare(self.base, self.timings[name]), low=low, headline=headline)

    def rows(self, label: str) -> Iterable[tuple[str, ...]]:
        for name, timing in self.timings.items():
            first, third = timing.quartiles
            yield label, name, f"{1e3 * timing.median:.0f} ms", f"{1e3 * first:.0f} … {1e3 * third:.0f} ms"


# --- the groups -------------------------------------------------------------------------------------------------------

Found = tuple[list[Figure], list[tuple[str, ...]]]


def by_sparsity(rounds: int) -> Found:
    """Steps at each sparsity, and where the native engine breaks even."""
    group = Group(resnet32, BATCH)
    for sparsity in BY_SPARSITY:
        group.add(f"{sparsity:.0%}", sparsity)
    group.add("90 %, masked engine", 0.9, engine="masked")
    group.run(rounds)
    figures = [
        group.speed_up(
            "control: native step with every weight active, speed over dense" if not sparsity
            else f"native step at {sparsity:.0%}, speed over dense",
            f"{sparsity:.0%}", low, headline=sparsity == 0.9,
        )
        for sparsity, low in BY_SPARSITY.items()
    ]  # fmt: skip
    figures.append(group.speed_up("masked step at 90 %, speed over dense", "90 %, masked engine", None))
    figures.append(
        Figure("break-even sparsity", break_even(group), "share", high=MOST_BREAK_EVEN, n=rounds),
    )
    return figures, list(group.rows(f"ResNet-32, batch {BATCH}"))


def by_best_dense(rounds: int) -> Found:
    """Against the fastest step that PyTorch has for the dense net: autocast to bf16 or not, compiled or not."""
    group = Group(resnet32, BATCH)
    group.trainers = {}
    for compiled, bf16, layout in itertools.product((False, True), (False, True), DENSE):
        made = dense(resnet32(), layout, group.x, group.y)
        made.bf16 = bf16
        if compiled:
            made.model.compile()
        group.trainers[f"{layout}, {'bf16 autocast' if bf16 else 'fp32'}, {'compiled' if compiled else 'eager'}"] = made
    group.add("90 %", 0.9)
    halves: dict[str, tuple[str, float]] = {}  # what each is called, and its least speed-up
    for sparsity, low in BEST_BY_SPARSITY.items():
        halves[f"bf16, {sparsity:.0%}"] = f"native bf16 step at {sparsity:.0%}", low
        group.add(f"bf16, {sparsity:.0%}", sparsity, half=True)
    for words, (structure, low) in BEST_BY_STRUCTURE.items():
        halves[f"bf16, 90 %, {words}"] = f"native bf16 step at 90 %, {words}", low
        group.add(f"bf16, 90 %, {words}", 0.9, half=True, structure=structure)
    for frozen, low in BEST_BY_FROZEN.items():
        halves[f"bf16, 90 %, {frozen} frozen"] = f"native bf16 step at 90 % with {frozen} of 15 blocks frozen", low
        group.add(f"bf16, 90 %, {frozen} frozen", 0.9, frozen, half=True)
    group.run(rounds, warmed=True)  # so many variants that each finds its caches cold
    kinds = {
        "dense fp32": "fp32, eager", "dense bf16": "bf16 autocast, eager",
        "compiled dense fp32": "fp32, compiled", "compiled dense bf16": "bf16 autocast, compiled",
    }  # fmt: skip
    least = {
        kind: min((name for name in group.trainers if name.endswith(ending)), key=lambda n: group.timings[n].median)
        for kind, ending in kinds.items()
    }
    fastest = min(least.values(), key=lambda name: group.timings[name].median)
    against = {"fp32 PyTorch, eager": least["dense fp32"], "the fastest dense PyTorch": fastest}
    figures = [
        Figure.of(f"native step at 90 %, speed over {what}", compare(group.timings[name], group.timings["90 %"]),
                  headline=True)
        for what, name in against.items()
    ]  # fmt: skip
    figures += [
        Figure.of(f"{what}, speed over the fastest dense PyTorch", compare(group.timings[fastest], group.timings[name]),
                  low=low, headline=name == "bf16, 90%")
        for name, (what, low) in halves.items()
    ]  # fmt: skip
    figures.append(
        Figure.of(
            "native step at 90 %: bf16 over fp32, speed", compare(group.timings["90 %"], group.timings["bf16, 90%"])
        )
    )
    figures += [
        Figure.of(f"{kind} step, speed over dense fp32",
                  compare(group.timings[least["dense fp32"]], group.timings[least[kind]]))
        for kind in list(kinds)[1:]
    ]  # fmt: skip
    label = f"ResNet-32, batch {BATCH}"
    return figures, [*group.rows(label), (label, "the fastest dense one", fastest, "")]


def break_even(group: Group) -> float:
    """Sparsity at which the step takes as long as dense; between two measured ones, on a line."""
    points = [(s, group.timings[f"{s:.0%}"].median / group.base.median) for s in BY_SPARSITY]
    if points[0][1] <= 1:
        return 0.0
    for (left, slow), (right, fast) in itertools.pairwise(points):
        if fast <= 1:
            return left + (slow - 1) / (slow - fast) * (right - left)
    return 1.0


def by_batch(rounds: int) -> Found:
    """Other batch sizes."""
    figures, rows = [], []
    for size, low in BY_BATCH.items():
        group = Group(resnet32, size)
        group.add("90 %", 0.9)
        group.run(rounds)
        figures.append(group.speed_up(f"native step at 90 %, batch {size}, speed over dense", "90 %", low))
        rows += group.rows(f"ResNet-32, batch {size}")
    return figures, rows


def by_frozen(rounds: int) -> Found:
    """With a frozen front."""
    group = Group(resnet32, BATCH)
    for frozen in BY_FROZEN:
        group.add(f"90 %, {frozen} frozen", 0.9, frozen)
        group.add(f"90 %, {frozen} frozen and cached", 0.9, frozen, cached=True)
    group.run(rounds)
    figures = [
        group.speed_up(
            f"native step at 90 % with {frozen} of 15 blocks frozen{words}, speed over dense",
            f"90 %, {frozen} frozen{and_cached}", low, headline=True,
        )
        for words, and_cached, targets in (("", "", BY_FROZEN), (", their output cached", " and cached", BY_CACHED))
        for frozen, low in targets.items()
    ]  # fmt: skip
    return figures, list(group.rows(f"ResNet-32, batch {BATCH}"))


def by_epoch(rounds: int) -> Found:
    """The schedule of the preset ``spfde`` over 160 epochs, each state of it timed."""
    sample = torch.zeros(2, 3, 32, 32)
    recipe = spfde.presets.spfde
    bill = spfde.plan(resnet32(), sample, recipe, EPOCHS, 50_000)
    assert isinstance(recipe.sparsity, spfde.MEST)
    states = []
    for epoch in range(EPOCHS):
        frozen = sum(at is not None and at <= epoch for at in bill.freeze_epochs)
        extra = 0.05 if epoch < EPOCHS * 90 / 160 else 0.025 if epoch < EPOCHS * 120 / 160 else 0.0
        states.append((round(recipe.sparsity.sparsity - extra, 4), frozen))
    group = Group(resnet32, BATCH)
    names = {state: f"{state[0]:.1%}, {state[1]} frozen" for state in dict.fromkeys(states)}
    for (sparsity, frozen), name in names.items():
        group.add(name, sparsity, frozen)
        if frozen:
            group.add(f"{name}, cached", sparsity, frozen, cached=True)
    group.run(rounds)
    assert recipe.sieving is not None
    kept = 1 - recipe.sieving.removed_fraction
    # A variant is computed in its first epoch after a freeze step, and read in the others.
    since = [epoch - max((at for at in bill.freeze_epochs if at is not None and at <= epoch), default=epoch)
             for epoch in range(EPOCHS)]  # fmt: skip
    reads = [frozen > 0 and ago >= VARIANTS for (_, frozen), ago in zip(states, since, strict=True)]
    figures = []
    for words, low, cached in (
        ("", LEAST_EPOCH, [False] * EPOCHS),
        (f", with a prefix cache of {VARIANTS} variants", None, reads),
    ):
        chosen = [names[state] + (", cached" if read else "") for state, read in zip(states, cached, strict=True)]
        per_round = [
            group.base.seconds[n] * EPOCHS / sum(kept * group.timings[name].seconds[n] for name in chosen)
            for n in range(rounds)
        ]
        figures.append(
            Figure(
                f"an epoch of SpFDE 20 % + 20 % at 90 %, mean over its schedule, speed over a dense epoch{words}",
                statistics.median(per_round), "ratio", low=low, n=rounds, spread=quartiles(per_round), headline=True,
            )
        )  # fmt: skip
    return figures, list(group.rows("ResNet-32, states of the schedule"))


def by_model(rounds: int) -> Found:
    """Other models."""
    figures, rows = [], []
    for name, low in BY_MODEL.items():
        group = Group(MODELS[name], BATCH)
        group.trainers["dense bf16"] = dense(MODELS[name](), DENSE[1], group.x, group.y)
        group.trainers["dense bf16"].bf16 = True
        group.add("90 %", 0.9)
        group.add("90 %, bf16", 0.9, half=True)
        group.run(rounds)
        half = group.timings["90 %, bf16"]
        figures += [
            group.speed_up(f"{name}: native step at 90 %, speed over dense", "90 %", low),
            Figure.of(f"{name}: native step at 90 %: bf16 over fp32, speed", compare(group.timings["90 %"], half)),
            Figure.of(f"{name}: native bf16 step at 90 %, speed over dense bf16",
                      compare(group.timings["dense bf16"], half)),
        ]  # fmt: skip
        rows += group.rows(f"{name}, batch {BATCH}")
        del group
    return figures, rows


def by_estimate(rounds: int) -> Found:
    """What ``engine="auto"`` expects a native step to take, of a masked one's time, against what it takes."""
    rows, wrong, lost = [], 0, 1.0
    for name, sparsity, size in ESTIMATED:
        made, (x, y) = MODELS.get(name, resnet32), batch(size)
        trainers = {engine: sparse(made(), sparsity, x, y, engine=engine) for engine in ("masked", "native")}
        timings = interleave({engine: trainer.step for engine, trainer in trainers.items()}, rounds, warmup=2)
        session = trainers["masked"].session
        assert session is not None
        blueprint = session.blueprint
        job = Job(made(), blueprint, x[:1], size, density=blueprint.density(session.timeline[0]))
        expected = 1.0 if NativeEngine.supports(job) is not None else NativeEngine.expected_speed(job)
        measured = compare(timings["native"], timings["masked"]).paired
        chosen = "native" if expected <= WORTH_IT else "masked"
        loses = measured if chosen == "native" else 1 / measured
        wrong, lost = wrong + (loses > 1), max(lost, loses)
        rows.append((f"{name}, {sparsity:.0%}, batch {size}", f"auto takes {chosen}",
                     f"expected {expected:.2f}x of masked", f"measured {measured:.2f}x"))  # fmt: skip
    return [
        Figure("steps in which auto takes the slower engine", wrong / len(ESTIMATED), "share", n=len(ESTIMATED)),
        Figure("the slowest of them, over the other engine", lost, "ratio", n=rounds),
    ], rows


def memory(rounds: int) -> Found:
    """Peak resident memory of a step over what the process had before its first one."""
    found: dict[str, list[int]] = {}
    for name in (*DENSE, "dense bf16", "90 %", "90 %, bf16"):
        found[name] = [_child("--peak-of", name) for _ in range(rounds)]
    middle = {name: statistics.median(values) for name, values in found.items()}
    least = min(middle[layout] for layout in DENSE)
    figures = [
        Figure(what, middle[name] / of, "ratio", high=high, n=rounds, headline=True)
        for what, name, of, high in (
            ("peak memory of a native step at 90 % over the smaller dense one", "90 %", least, MOST_MEMORY),
            ("peak memory of a native bf16 step at 90 % over dense fp32", "90 %, bf16", least, MOST_HALF_MEMORY),
            ("peak memory of a native bf16 step at 90 % over dense bf16", "90 %, bf16", middle["dense bf16"],
             MOST_OF_HALF_MEMORY),
        )
    ]  # fmt: skip
    rows = [
        ("peak memory", name, format_bytes(int(middle[name])), f"{format_bytes(min(v))} to {format_bytes(max(v))}")
        for name, v in found.items()
    ]  # fmt: skip
    return figures, rows


def peak_of(name: str) -> int:
    """What the child process measures."""
    x, y = batch(BATCH)
    layout = name if name in DENSE else DENSE[1]
    made = dense(resnet32(), layout, x, y) if name.startswith("dense") else sparse(resnet32(), 0.9, x, y)
    made.bf16 = name.endswith("bf16")
    reset_peak(torch.device("cpu"))
    before = peak_bytes(torch.device("cpu"))
    for _ in range(3):
        made.step()
    return peak_bytes(torch.device("cpu")) - before


def rebuild(rounds: int) -> Found:
    """The lists of all layers, made anew as after a mutation."""
    group = Group(resnet32, BATCH)
    group.add("90 %", 0.9)
    group.trainers["rebuild"] = group.trainers["90 %"]
    native = group.trainers["90 %"].native
    calls: dict[str, Callable[[], object]] = {"90 %": group.trainers["90 %"].step, "rebuild": native.rebuild}
    group.timings = interleave(calls, rounds, warmup=2)
    figure = Figure.of(
        "lists of all layers after a mutation, in native steps at 90 %",
        compare(group.timings["rebuild"], group.timings["90 %"]),
        high=MOST_REBUILD,
    )
    return [figure], list(group.rows(f"ResNet-32, batch {BATCH}"))


def start(rounds: int) -> Found:
    """Building the kernels, and loading them later."""
    first, later = [], []
    for _ in range(max(1, rounds)):
        with tempfile.TemporaryDirectory() as folder:
            first.append(_child("--load", folder) / 1e9)
            later.append(_child("--load", folder) / 1e9)
    figures = [
        Figure("first build of the kernels", statistics.median(first), "seconds", high=MOST_BUILD, n=len(first)),
        Figure("later start of the kernels", statistics.median(later), "seconds", high=MOST_LATER, n=len(later)),
    ]
    return figures, []


def load(folder: str) -> int:
    """Nanoseconds to have the kernels, with ``folder`` as their cache."""
    os.environ["SPFDE_CACHE_DIR"] = folder
    begun = time.perf_counter_ns()
    build.load()
    return time.perf_counter_ns() - begun


def csr(rounds: int) -> Found:
    """One convolution (64 channels, 3 x 3, 16 x 16 pixels, batch 64) forward by a CSR matrix."""
    torch.manual_seed(0)
    x, conv = torch.randn(BATCH, 64, 16, 16), nn.Conv2d(64, 64, 3, padding=1, bias=False)
    mask = torch.rand(conv.weight.shape) < 0.1
    conv.weight.data.mul_(mask)
    ours = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False))
    ours.load_state_dict({"0.weight": conv.weight})
    NativeModel(ours, masks=lambda: {"0.weight": mask}, dense_gradients=frozenset)
    matrix = conv.weight.detach().view(64, -1).to_sparse_csr()

    def by_csr() -> Tensor:
        patches = F.unfold(x, 3, padding=1).transpose(0, 1).reshape(576, -1)
        return matrix @ patches

    with torch.no_grad():
        timings = interleave({"dense": lambda: conv(x), "CSR": by_csr, "native": lambda: ours(x)}, 5 * rounds, warmup=3)
    figures = [
        Figure.of("one convolution at 90 %, forward: native, packing and unpacking included, speed over dense",
                  compare(timings["dense"], timings["native"])),
        Figure.of("one convolution at 90 %, forward: PyTorch's CSR product of unfolded patches, speed over dense",
                  compare(timings["dense"], timings["CSR"])),
    ]  # fmt: skip
    return figures, []


RUN: dict[str, Callable[[int], Found]] = {
    "sparsity": by_sparsity, "best-dense": by_best_dense, "batch": by_batch, "frozen": by_frozen, "epoch": by_epoch,
    "models": by_model, "estimate": by_estimate, "memory": memory, "rebuild": rebuild, "start": start, "csr": csr,
}  # fmt: skip
GROUPS = tuple(RUN)


def _child(*arguments: str) -> int:
    """One number from a process of its own."""
    command = [sys.executable, str(Path(__file__)), *arguments, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds of one step of each variant (15)")
    made.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="some of the questions")
    made.add_argument("--peak-of", default=None, help=argparse.SUPPRESS)
    made.add_argument("--load", default=None, help=argparse.SUPPRESS)
    return made.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    options = options_of(argv)
    missing = build.available()
    if missing is not None:  # torch.compile needs the same C++ compiler
        sys.exit(f"Nothing can be measured here: {missing}.")
    stamped = begin(options)
    if options.peak_of is not None or options.load is not None:
        print(peak_of(options.peak_of) if options.peak_of is not None else load(options.load))
        return
    rounds = options.rounds or (2 if options.quick else 15)
    figures: list[Figure] = []
    rows: list[tuple[str, ...]] = []
    for name in options.only:
        print(f"{name} …", file=sys.stderr, flush=True)
        count = min(rounds, 5) if name in ("memory", "start") else rounds
        more, told = RUN[name](count)
        figures += more
        rows += [(f"{name}: {label}", *cells) for label, *cells in told]
    found = result(options, rounds, figures, rows, stamped)
    recorded = (options.results or RESULTS) / "native.json"
    if tuple(options.only) != GROUPS and recorded.is_file():
        found = beside_recorded(found, Result.from_json(recorded.read_text(encoding="utf-8")), options.only)
    publish(found, options)


def beside_recorded(new: Result, recorded: Result, groups: Iterable[str]) -> Result:
    """What is recorded, with what some of the groups found just now in its place, and when that was."""
    whats = {figure.what: figure for figure in new.figures}
    figures = [whats.pop(figure.what, figure) for figure in recorded.figures]
    rows = [row for table in new.tables for row in table.rows]
    table = recorded.tables[0]
    again = tuple(f"{group}: " for group in groups)
    rows = [*(row for row in table.rows if not row[0].startswith(again)), *rows]
    apart = {**recorded.data.get("apart", {}), **dict.fromkeys(groups, f"`{new.command}` · {stamp_line(new.stamp)}")}
    return replace(
        recorded,
        figures=(*figures, *whats.values()),
        tables=(replace(table, rows=tuple(rows)),),
        notes=(*new.notes, *(f"Taken apart from the rest: {group}, {how}." for group, how in apart.items())),
        data={**recorded.data, "apart": apart},
    )


def result(
    options: argparse.Namespace,
    rounds: int,
    figures: list[Figure],
    rows: list[tuple[str, ...]],
    stamped: dict[str, Any],
) -> Result:
    """What is published."""
    only = "" if tuple(options.only) == GROUPS else " --only " + " ".join(options.only)
    return Result(
        name="native",
        title="The native engine",
        question="How much faster is a whole training step with kernels that compute with the active weights alone, "
        "against the faster of PyTorch's dense layouts, on a CPU?",
        command=f"python benchmarks/native.py{only}",
        figures=tuple(figures),
        tables=(Table("Each variant", ("what", "variant", "median", "quartiles"), tuple(rows)),) if rows else (),
        settings={"batch": BATCH, "rounds": rounds, "masks": "uniform, unstructured"},
        notes=(
            "A speed is dense over native: 4x means a quarter of the time. Dense is PyTorch with all weights, in the "
            "faster of contiguous and channels_last.",
            "An epoch of the schedule is made of timed steps at each sparsity and depth that it passes through; "
            "loading images is not in it.",
            "With the prefix cache the sieve's newcomers, who must be computed once, are not in an epoch's figure.",
            "Against the fastest dense PyTorch a timed step follows an untimed one of its variant, as in training.",
            "Peak memory is that of the process over what it had before its first step.",
            "sparseprop could not be installed here, and is not compared.",
        ),
        stamp=stamped,
    )


if __name__ == "__main__":
    main()
