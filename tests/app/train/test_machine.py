"""What is chosen where nothing was asked for, in which line it is said, and that it is put back."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import spfde
from helpers.commands import Spfde
from helpers.native import needs_kernels
from spfde import presets
from spfde.app.train import machine
from spfde.app.train.machine import COMPILING_PAYS_FROM, Machine, choose, compiling, pick_device
from spfde.app.train.options import TrainOptions
from spfde.planning import Plan

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def bill_of(steps: int = 10) -> Plan:
    """Of a run of so many steps of one sample."""
    return spfde.plan(torch.nn.Linear(2, 2), torch.zeros(1, 2), presets.dense, 1, steps)


@pytest.fixture
def new_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_has_bf16", lambda device: True)


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_has_bf16", lambda device: False)


class TestChoose:
    def test_a_cpu_computes_as_it_always_has(self) -> None:
        options, line = choose(TrainOptions(), CPU, bill_of())
        assert (options.precision, options.compile, options.augment_draws) == ("fp32", False, "batch")
        assert line == "precision fp32 (auto: on a CPU) · channels_last · not compiled"

    @pytest.mark.usefixtures("new_card")
    def test_a_card_with_bf16_gets_it_and_tf32(self) -> None:
        options, line = choose(TrainOptions(), GPU, bill_of())
        assert (options.precision, options.augment_draws) == ("bf16", "sample")
        assert line.startswith("precision bf16 (auto: it has bf16) · tf32 · channels_last · not compiled")

    @pytest.mark.usefixtures("old_card")
    def test_a_card_without_bf16_computes_in_fp32(self) -> None:
        options, line = choose(TrainOptions(), GPU, bill_of())
        assert options.precision == "fp32"
        assert "tf32" not in line
        assert "cuda:0, which has no bf16" in line

    @pytest.mark.usefixtures("new_card")
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("device", [CPU, GPU])
    def test_what_was_asked_for_is_kept_and_needs_no_reason(self, precision: Any, device: torch.device) -> None:
        options, line = choose(TrainOptions(precision=precision, augment_draws="batch"), device, bill_of())
        assert (options.precision, options.augment_draws) == (precision, "batch")
        assert line.startswith(f"precision {precision} · ")
        assert ("tf32" in line) == (device == GPU and precision != "fp32")

    def test_where_images_lie_on_a_cpu_as_on_a_device_they_are_drawn_by_sample(self) -> None:
        assert choose(TrainOptions(data_on="device"), CPU, bill_of())[0].augment_draws == "sample"

    @pytest.mark.usefixtures("new_card")
    @pytest.mark.parametrize(
        ("device", "steps", "asked", "expected"),
        [
            (GPU, COMPILING_PAYS_FROM, None, True),
            (GPU, COMPILING_PAYS_FROM - 1, None, False),
            (GPU, 1, True, True),
            (GPU, COMPILING_PAYS_FROM, False, False),
            (CPU, COMPILING_PAYS_FROM, None, False),
            (CPU, 1, True, True),
        ],
    )
    def test_a_run_is_compiled_where_it_is_long_enough_or_that_was_asked_for(
        self, device: torch.device, steps: int, asked: bool | None, expected: bool
    ) -> None:
        options, line = choose(TrainOptions(compile=asked, batch_size=1), device, bill_of(steps))
        assert options.compile is expected
        assert ("not compiled" in line) is not expected
        assert ("steps, pays from" in line) == (asked is None and device == GPU)
        assert compiling(options) == ({"compile": True} if expected else {})

    def test_what_is_chosen_has_nothing_left_to_choose(self) -> None:
        once, _ = choose(TrainOptions(), CPU, bill_of())
        again, line = choose(once, CPU, bill_of())
        assert again == once
        assert "auto" not in line


class TestMachine:
    def test_autocast_casts_to_the_precision_alone(self) -> None:
        a = torch.ones(2, 2)
        for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            with Machine(CPU, precision).autocast():
                assert (a @ a).dtype == kind

    @pytest.mark.parametrize(("precision", "scales"), [("fp32", False), ("bf16", False), ("fp16", True)])
    def test_the_loss_is_scaled_in_fp16_alone(self, precision: str, scales: bool) -> None:
        assert Machine(CPU, precision).scaler().is_enabled() == scales

    @pytest.mark.parametrize(("precision", "inside"), [("bf16", True), ("fp32", False)])
    @pytest.mark.parametrize("before", [True, False])
    def test_tf32_is_on_while_a_gpu_is_in_use_and_put_back_whatever_happens(
        self, precision: str, inside: bool, before: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        kept = matmul.allow_tf32, cudnn.allow_tf32

        def interrupted() -> None:
            with Machine(GPU, precision).in_use():
                assert matmul.allow_tf32 == cudnn.allow_tf32 == (inside or before)
                raise KeyboardInterrupt

        try:
            matmul.allow_tf32 = cudnn.allow_tf32 = before
            with pytest.raises(KeyboardInterrupt):
                interrupted()
            assert matmul.allow_tf32 == cudnn.allow_tf32 == before
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = kept

    def test_a_cpu_has_no_switches(self) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        with Machine(CPU, "bf16").in_use():
            assert torch.backends.cuda.matmul.allow_tf32 == before


def test_a_device_is_found_by_its_name() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        assert pick_device("auto") == CPU


def test_of_several_processes_each_has_the_gpu_of_its_place_on_the_host_and_none_is_on_mps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", 1) == pick_device("cuda", 1) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 1) == CPU


@pytest.mark.usefixtures("new_card")
def test_several_processes_share_the_steps_and_draw_crops_and_flips_by_sample() -> None:
    once, _ = choose(TrainOptions(batch_size=1), GPU, bill_of(COMPILING_PAYS_FROM))
    shared, _ = choose(TrainOptions(batch_size=1), GPU, bill_of(COMPILING_PAYS_FROM), 2)
    assert (once.compile, shared.compile) == (True, False)
    assert choose(TrainOptions(), CPU, bill_of(), 2)[0].augment_draws == "sample"


@needs_kernels
def test_the_engine_is_chosen_for_the_precision_of_the_run(spfde: Spfde, here: Path, tiny: Path) -> None:
    # Where a third is zero, kernels that leave it out are faster than PyTorch in fp32, and slower than it in bf16.
    chosen = {}
    for precision in ("fp32", "bf16"):
        options = f"--recipe mest --sparsity 0.3 --model resnet8 --epochs 1 --precision {precision} --out {precision}"
        assert spfde("train", "--data", tiny, "--quiet", *options.split()).code == 0
        chosen[precision] = json.loads((here / precision / "summary.json").read_text())["engine"]
    assert chosen == {"fp32": "native", "bf16": "masked"}
