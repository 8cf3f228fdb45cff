"""The way into the blocked layout and out of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.native import needs_kernels, variant_kernels, variants
from spfde.engines.native.layout import Layout, Pool

pytestmark = needs_kernels

HALF = torch.bfloat16


@variants()
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_batch_lies_as_the_layout_says_and_comes_back_as_it_was(variant: str, data: st.DataObject) -> None:
    kernels = variant_kernels(variant)
    batch, channels = data.draw(st.sampled_from([1, 5, 16, 17, 33])), data.draw(st.integers(1, 3))
    height, width = data.draw(st.sampled_from([(1, 1), (2, 8), (4, 4), (3, 7), (5, 16), (9, 9), (4, 34)]))
    outside, inside = (data.draw(st.sampled_from([torch.float32, HALF])) for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    x = torch.randn(batch, channels, height, width, generator=generator).to(HALF).to(outside)
    x.view(-1)[0] = torch.nan
    kind = data.draw(st.sampled_from(["planes", "channels last", "every other column", "rows apart"]))
    if kind == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "every other column":
        x = x.repeat_interleave(2, dim=3)[..., ::2]
    elif kind == "rows apart":
        x = torch.cat([x, x], dim=3)[..., :width]
    layout = Layout(batch, channels, height, width, kernels.lanes, inside)
    tape = kernels.tape(data.draw(st.integers(1, 3)))
    buffer = tape.take(layout)
    tape.copy("pack", tape.given("x"), outside, x.stride(), buffer)
    y = torch.full_like(x, 7)
    tape.copy("unpack", tape.given("y"), outside, y.stride(), buffer)
    tape.finish([buffer])
    [blocked] = tape.play({"x": x, "y": y}, Pool())
    assert torch.equal(y.nan_to_num(9), x.nan_to_num(9))
    wanted = torch.zeros(layout.groups * kernels.lanes, channels, height, width)
    wanted[:batch] = x
    wanted = wanted.view(layout.groups, kernels.lanes, channels, height, width).permute(0, 3, 2, 4, 1)
    found = blocked.view(HALF) if inside == HALF else blocked
    assert torch.equal(found.view(wanted.shape).float().nan_to_num(9), wanted.nan_to_num(9))


def test_numbers_are_rounded_to_the_nearest_on_their_way() -> None:
    kernels = variant_kernels("this processor")
    x = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-9]).repeat(16, 1).view(16, 1, 2, 2).repeat(1, 1, 2, 2)
    layout = Layout(16, 1, 4, 4, kernels.lanes, HALF)
    tape = kernels.tape(1)
    buffer = tape.take(layout)
    tape.copy("pack", tape.given("x"), torch.float32, x.stride(), buffer)
    tape.copy("unpack", tape.given("y"), torch.float32, x.stride(), buffer)
    tape.finish()
    y = torch.zeros_like(x)
    tape.play({"x": x, "y": y}, Pool())
    assert torch.equal(y, x.to(HALF).float())
    assert y.unique().tolist() == pytest.approx([-1.0, 1.0, 1 + 2**-6])
