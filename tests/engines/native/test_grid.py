"""Passes without gradients over few images: each image is cut into cells, and a vector holds a pixel of all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.native import needs_kernels, random_masks, relative_error, twin, variant_kernels, variants
from helpers.short import by_form
from spfde.engines.native import packed, region_plan
from spfde.engines.native.fusion import ConvStep, GlobalPoolStep, PoolStep
from spfde.engines.native.geometry import Geometry
from spfde.engines.native.grid import best_grid, fitting_grids
from spfde.engines.native.layout import Layout
from spfde.engines.native.model import NativeModel

pytestmark = needs_kernels
Grid = tuple[int, int]


def conv(channels: int, size: int, **options: Any) -> tuple[list[ConvStep], dict[str, Layout]]:
    """A convolution of a square image, and the layouts of what it reads and writes, for 16 lanes."""
    module = nn.Conv2d(channels, channels, options.pop("kernel", 3), **options)
    geometry, lay = Geometry.of(module), Layout(1, channels, size, size, 16, torch.float32)
    height, width = geometry.output_size(size, size)
    to = Layout(1, channels, height, width, 16, torch.float32)
    return [ConvStep("x", "y", "conv", module, geometry)], {"x": lay, "y": to}


@pytest.mark.parametrize(
    ("batch", "grid"),
    [(1, (4, 4)), (2, (4, 2)), (3, (2, 2)), (4, (2, 2)), (5, (2, 1)), (8, (2, 1)), (12, (1, 1)), (64, (1, 1))],
)  # fmt: skip
def test_the_fewer_images_the_more_cells(batch: int, grid: Grid) -> None:
    # Of 8x8 pixels, with a border: 100 vectors of a whole image, 60 of a half, 36 of a quarter, 24 of an eighth and 16
    # of a sixteenth. Three images are one group of quarters, or three of sixteenths; twelve are two groups of halves.
    steps, layouts = conv(4, 8, padding=1)
    many = {name: replace(layout, batch=batch) for name, layout in layouts.items()}
    assert best_grid(steps, many) == grid


def test_what_a_cell_needs_must_lie_in_it_or_in_those_around_it() -> None:
    def along(steps: Any, layouts: dict[str, Layout]) -> int:
        return max(down for down, _ in fitting_grids(steps, layouts))

    assert along(*conv(1, 16, padding=1)) == 16
    assert along(*conv(1, 16, kernel=7, padding=3)) == 4  # of four rows each: three beyond
    assert along(*conv(1, 16, kernel=3, padding=4, dilation=4)) == 4
    assert along(*conv(1, 16, padding=1, stride=2)) == 8
    assert along(*conv(1, 12, padding=1)) == 4
    assert along(*conv(1, 15, padding=1)) == 1
    assert along(*conv(1, 16)) == 1  # 14 rows come of 16
    assert along(*conv(1, 16, kernel=4, padding="same")) == 8
    plane = Layout(1, 1, 16, 16, 16, torch.float32)
    half = Layout(1, 1, 8, 8, 16, torch.float32)
    assert along([GlobalPoolStep("x", "y", keepdim=False)], {"x": plane}) == 16
    assert along([PoolStep("x", "y", "max_pool", ((2, 2), (2, 2), (0, 0)))], {"x": plane, "y": half}) == 8
    assert along([PoolStep("x", "y", "max_pool", ((3, 3), (2, 2), (1, 1)))], {"x": plane, "y": half}) == 1


@contextmanager
def grids(chosen: Grid | None = None) -> Iterator[list[Grid]]:
    """The grids that regions get; a chosen one where it fits."""
    found: list[Grid] = []

    def best(*args: Any) -> Grid:
        grid = chosen if chosen in fitting_grids(*args) else best_grid(*args)
        found.append(grid)
        return grid

    with patch.object(region_plan, "best_grid", best):
        yield found


def test_a_hand_worked_convolution_reads_across_cells() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False)).double()
    weight = model[0].weight.data.zero_()
    weight[0, 0, 0, 0], weight[0, 0, 1, 2] = 1.0, 10.0  # the pixel above to the left, and the one to the right
    twin(model, {"0.weight": weight != 0}, for_inference=True)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).view(1, 1, 2, 2)
    with torch.no_grad(), grids() as found:
        assert model(x).flatten().tolist() == [20.0, 0.0, 40.0, 1.0]
    assert found == [(2, 2)]


class Drawn(nn.Module):
    """Convolutions, norms, a residual, pooling and a stage change, as they are drawn."""

    def __init__(self, kernel: int, dilation: int, groups: int, stride: int, pools: bool, plane: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, kernel, padding="same", dilation=dilation)
        self.n1, self.n2 = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.a = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False)
        self.b = nn.Conv2d(4, 6, 3, stride, 1)
        self.skip = nn.Conv2d(4, 6, 1, stride)
        self.pools, self.plane = pools, plane

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.n1(self.stem(x)))
        x = F.relu(self.a(x) + x)
        x = F.relu(self.n2(self.b(x)) + self.skip(x))
        if self.pools:
            x = F.avg_pool2d(F.max_pool2d(x, 2), 1)
        return x if self.plane else x.mean((2, 3))


@given(
    batch=st.integers(1, 17),
    size=st.tuples(st.sampled_from([8, 12, 16, 20]), st.sampled_from([7, 8, 16, 24])),
    grid=st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 2), (1, 4), (4, 4), (8, 1)]),
    kernel=st.integers(1, 5),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    pools=st.booleans(),
    plane=st.booleans(),
    threads=st.sampled_from([1, 2, 3, 8]),
)
@settings(max_examples=by_form(20, 40), deadline=None)
def test_in_any_cells_the_result_is_pytorch_s(
    batch: int, size: Grid, grid: Grid, kernel: int, dilation: int, groups: int, stride: int, pools: bool, plane: bool,
    threads: int,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    model = Drawn(kernel, dilation, groups, stride, pools, plane)
    model(torch.randn(8, 3, 8, 8))
    model = model.double().eval()
    reference, engine = twin(model, random_masks(model, 0.4), for_inference=True)
    x, before = torch.randn(batch, 3, *size).double(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), grids(grid):
            assert relative_error(model(x), reference(x)) < 1e-12
            assert relative_error(model(x.to(memory_format=torch.channels_last)), reference(x)) < 1e-12
    finally:
        torch.set_num_threads(before)
        engine.detach()


@variants()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_each_build_and_precision_the_result_is_pytorch_s(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Drawn(3, 1, 1, 2, pools=True, plane=False)
    model(torch.randn(8, 3, 16, 16))
    masks = random_masks(model.eval(), 0.4)
    reference = copy.deepcopy(model)
    NativeModel(model, variant_kernels(variant), masks=lambda: masks, dense_gradients=frozenset, for_inference=True)
    for batch in (1, 2, 3, 5, 17):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad(), grids() as found, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert relative_error(model(x), reference(x).float()) < (1e-6 if dtype == torch.float32 else 0.02)
        assert found != [(1, 1)] or batch > 8


@variants(long=("this processor", "bf16 without products of pairs", "AVX2"))
@given(
    batch=st.integers(1, 17),
    grid=st.sampled_from([(2, 1), (2, 2), (4, 2), (4, 4)]),
    stride=st.integers(1, 2),
    half=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_cells_and_whole_images_agree(variant: str, batch: int, grid: Grid, stride: int, half: bool) -> None:
    torch.manual_seed(0)
    model = Drawn(3, 1, 1, stride, pools=False, plane=True).eval()
    masks, x, found = random_masks(model, 0.4), torch.randn(batch, 3, 16, 16), []
    for each in (grid, (1, 1)):
        again = copy.deepcopy(model)
        NativeModel(again, variant_kernels(variant), masks=lambda: masks, dense_gradients=frozenset, for_inference=True)
        with torch.no_grad(), grids(each), torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(again(x))
    assert relative_error(*found) < (0.01 if half else 1e-6)


def test_nan_stays_in_its_image_and_zeros_around_an_image_stay_zeros() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU()).double()
    reference, _ = twin(model, random_masks(model, 0.9), for_inference=True)
    x = torch.ones(3, 1, 8, 8).double()
    x[1, 0, 3, 3] = float("nan")
    with torch.no_grad(), grids((2, 2)):
        found, expected = model(x), reference(x)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_what_learns_or_measures_the_batch_keeps_whole_images() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)).double()
    twin(model, random_masks(model, 0.5), for_inference=True)
    x = torch.randn(2, 2, 8, 8).double()
    with grids() as found:
        model(x).sum().backward()
        with torch.no_grad():
            model(x)
            assert not found
            model.eval()(x)
        assert len(found) == 1
        model(x).sum().backward()
    assert len(found) == 1


def test_batches_of_other_sizes_in_turn_make_no_lists_anew() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)).double()
    twin(model, random_masks(model, 0.5), for_inference=True)
    with torch.no_grad(), patch.object(packed, "WeightLists", side_effect=packed.WeightLists) as built:
        for batch in (1, 2, 64):  # in cells of three sizes, with eight lanes and with sixteen
            model(torch.randn(batch, 2, 8, 8).double())
        first = built.call_count
        assert first == 2 * 3
        for batch in (2, 1, 64, 1, 2):
            model(torch.randn(batch, 2, 8, 8).double())
    assert built.call_count == first


def test_in_a_session_a_sample_comes_out_the_same_whatever_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    twin(model, random_masks(model, 0.4), torch.float32)
    x = torch.randn(20, 3, 8, 8)
    with torch.no_grad(), grids() as found:
        assert torch.equal(model(x)[:1], model(x[:1]))
    assert not found
