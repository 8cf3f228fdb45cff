"""The command line: what it makes, what it prints, and how it refuses what cannot work."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spfde as package
from helpers import commands
from helpers.commands import Spfde
from spfde import presets
from spfde.app.data import folders
from spfde.app.data.datasets import DATASETS
from spfde.app.train import models, setup
from spfde.core.registry import registered
from spfde.engines.native import build
from spfde.freezing import BlockwiseCosine, ProgressiveFreezing
from spfde.freezing.plan import FREEZE_CRITERIA
from spfde.recipe.citation import describe
from spfde.sieving import DataSieving

METHODS = registered("method")
STRUCTURES = registered("structure")

METRICS = (
    "epoch train_loss train_accuracy test_accuracy learning_rate density frozen_blocks partial_samples "
    "training_flops seconds"
)
SUMMARY = {
    "test_accuracy": float,
    "best_test_accuracy": float,
    "epochs": int,
    "training_flops": int,
    "dense_training_flops": int,
    "flops_ratio": float,
    "seconds": float,
    "samples_seen": int,
    "peak_memory_bytes": int,
    "final_sparsity": float,
    "frozen_blocks": int,
    "total_blocks": int,
    "engine": str,
    "recipe": str,
    "seed": int,
    "versions": dict,
}
PLAN = "training_flops dense_training_flops flops_ratio start_epoch freeze_epochs savings memory"


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, commands.Outcome]:
    """A run by the real command with nearly all options left as they are."""
    folder = tmp_path_factory.mktemp("trained")
    ended = commands.run(
        "train", "--data", str(tiny), "--epochs", "8", "--batch-size", "16", "--track", "tensorboard", cwd=folder
    )
    return folder, ended


@pytest.fixture(scope="module")
def run_folder(trained: tuple[Path, commands.Outcome]) -> Path:
    folder, ended = trained
    assert ended.code == 0, ended.err
    return folder / "runs" / "tiny-resnet8-spfde-seed0"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.cli
class TestTrain:
    def test_it_ends_well_and_tells_nothing_but_its_progress(self, trained: tuple[Path, commands.Outcome]) -> None:
        _, ended = trained
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.endswith("run folder: runs/tiny-resnet8-spfde-seed0\n")

    def test_the_folder_holds_what_the_contract_says(self, run_folder: Path) -> None:
        files = {str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file()}
        assert {"recipe.toml", "config.json", "metrics.jsonl", "summary.json"} <= files
        assert {f"checkpoints/{name}/model.safetensors" for name in ("latest", "best")} <= files
        rest = {name for name in files if "/" not in name}
        assert rest == {"recipe.toml", "config.json", "metrics.jsonl", "summary.json", ".lock"}

    def test_the_metrics_have_a_line_an_epoch_with_the_keys_of_the_contract(self, run_folder: Path) -> None:
        rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == list(range(8))
        for row in rows:
            assert set(METRICS.split()) <= row.keys()
            assert 0 <= row["test_accuracy"] <= 1
            assert 0 <= row["train_accuracy"] <= 1
        assert rows[-1]["density"] == pytest.approx(0.1, abs=1e-3)
        assert 0.14 < rows[0]["density"] <= 0.1501, "the soft bound adds 5 points at first"
        assert rows[-1]["frozen_blocks"] > 0
        assert {row["partial_samples"] for row in rows} == {77}

    def test_the_summary_has_the_keys_and_types_of_the_contract_and_adds_up(self, run_folder: Path) -> None:
        summary = read(run_folder / "summary.json")
        rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
        for name, kind in SUMMARY.items():
            assert type(summary[name]) is kind, name
        assert summary["versions"].keys() == {"spfde", "torch"}
        assert summary["epochs"] == 8
        assert summary["training_flops"] == sum(row["training_flops"] for row in rows)
        assert summary["flops_ratio"] == summary["training_flops"] / summary["dense_training_flops"]
        assert summary["samples_seen"] == 8 * 77
        sparsest = [row["test_accuracy"] for row in rows if row["density"] <= 1.02 * min(r["density"] for r in rows)]
        assert summary["best_test_accuracy"] == max(sparsest)
        assert summary["final_sparsity"] == pytest.approx(0.9, abs=1e-3)
        expected = "native" if build.available() is None else "masked"
        assert (summary["engine"], summary["recipe"], summary["seed"]) == (expected, "spfde", 0)

    def test_the_bill_is_the_one_that_the_plan_foretold(self, run_folder: Path) -> None:
        summary, plan = read(run_folder / "summary.json"), read(run_folder / "config.json")["plan"]
        assert (summary["training_flops"], summary["dense_training_flops"]) == (
            plan["training_flops"],
            plan["dense_training_flops"],
        )

    def test_the_recipe_is_kept_as_toml(self, run_folder: Path) -> None:
        assert package.Recipe.from_toml((run_folder / "recipe.toml").read_text()) == presets.spfde

    def test_the_tracker_writes_into_the_run_folder(self, run_folder: Path) -> None:
        assert list(run_folder.rglob("events.out.tfevents*"))

    def test_lines_fit_into_eighty_columns_and_figures_say_what_they_are(
        self, trained: tuple[Path, commands.Outcome]
    ) -> None:
        _, ended = trained
        lines = ended.out.splitlines()
        assert max(map(len, lines)) <= 80
        assert sum(line.lstrip().startswith(f"{epoch}/8 ") for line in lines for epoch in range(1, 9)) == 8
        [heading] = [line.split() for line in lines if line.split()[:1] == ["modelled"]]
        assert heading == ["modelled", "measured", "dense", "of", "dense"]
        assert "(measured)" in next(line for line in lines if line.startswith("test accuracy"))
        assert "extrapolated" in ended.out

    def test_resuming_a_finished_run_does_nothing_and_is_no_error(self, run_folder: Path, spfde: Spfde) -> None:
        before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
        ended = spfde("train", "--resume", run_folder)
        assert ended.code == 0
        assert "is finished: test accuracy" in ended.out
        assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before

    def test_a_second_run_without_a_name_takes_the_next_one(self, tiny: Path, spfde: Spfde, here: Path) -> None:
        for _ in range(2):
            assert spfde("train", "--data", tiny, "--recipe", "dense", "--epochs", 1, "--quiet").code == 0
        assert sorted(path.name for path in (here / "runs").iterdir()) == [
            "tiny-resnet8-dense-seed0",
            "tiny-resnet8-dense-seed0-2",
        ]

    def test_options_change_the_recipe(self, tiny: Path, spfde: Spfde, here: Path) -> None:
        argv = "--sparsity 0.5 --freeze 0 --sieve 0.25 --sieve-criterion el2n --interval 2 --no-soft-bound"
        rest = "--epochs 2 --batch-size 16 --out run"
        assert spfde("train", "--data", tiny, *argv.split(), *rest.split()).code == 0
        recipe = package.Recipe.from_toml((here / "run" / "recipe.toml").read_text())
        assert recipe.sparsity == package.MEST(sparsity=0.5, soft_bound=False)
        assert not recipe.freezes
        assert recipe.sieving == DataSieving(removed_fraction=0.25, criterion="el2n")
        assert recipe.update_interval_epochs == 2

    def test_all_samples_come_back_for_the_last_epochs_at_the_cost_that_was_planned(
        self, tiny: Path, spfde: Spfde, here: Path
    ) -> None:
        """A quarter of 96 in each of 4 epochs are 96: 32 in each of the 3 before the last one."""
        own = ["--sieve", 0.25, "--sieve-full-last", 0.25, "--sieve-offset", 1, "--sieve-criterion", "top-loss"]
        argv = ["--data", tiny, "--recipe", "dense", *own, "--interval", 2, "--epochs", 4, "--batch-size", 16]
        plan = json.loads(spfde("plan", *argv, "--json").out)
        assert spfde("train", *argv, "--out", "run").code == 0
        rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
        assert [(row["partial_samples"], row["removed_samples"]) for row in rows] == [(64, 32)] * 3 + [(96, 0)]
        assert [row["sieve_moved"] > 0 for row in rows] == [False, True, False, True]
        summary = read(Path("run/summary.json"))
        assert summary["samples_seen"] == 3 * 64 + 96 == 4 * 72
        assert summary["training_flops"] == plan["training_flops"]
        cited = spfde("cite", "run").out
        assert all(key in cited for key in ("yuan2022spfde", "jin2026orderdp", "qin2024infobatch"))

    def test_a_run_freezes_layers_between_two_updates(self, tiny: Path, spfde: Spfde, here: Path) -> None:
        options = "--freeze 0.15 --freeze-unit layer --sieve 0 --epochs 8 --batch-size 16"
        argv = ["--data", tiny, *options.split()]
        plan = json.loads(spfde("plan", *argv, "--json").out)
        assert spfde("train", *argv, "--out", "run").code == 0
        recipe = package.Recipe.from_toml((here / "run" / "recipe.toml").read_text())
        assert recipe.freezing == package.ProgressiveFreezing(flops_reduction=0.15, unit="layer")
        lines = (here / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["frozen_blocks"] for line in lines] == plan["frozen_blocks"] == [0] * 4 + [2, 3, 5, 5]

    def test_the_recipe_of_an_earlier_run_can_be_used_again(self, tiny: Path, run_folder: Path, spfde: Spfde) -> None:
        argv = ["--recipe", run_folder / "recipe.toml", "--epochs", 8, "--batch-size", 16, "--out", "again"]
        assert spfde("train", "--data", tiny, *argv).code == 0
        again = read(Path("again/summary.json"))
        assert again["test_accuracy"] == read(run_folder / "summary.json")["test_accuracy"]

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_another_seed_and_precision_train_too(self, precision: str, tiny: Path, spfde: Spfde, here: Path) -> None:
        argv = ["--precision", precision, "--seed", 7, "--recipe", "rigl", "--epochs", 4, "--batch-size", 16]
        assert spfde("train", "--data", tiny, "--out", "run", *argv).code == 0
        assert read(here / "run" / "summary.json")["seed"] == 7

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where more is chosen")
    def test_what_was_chosen_is_said_and_kept_beside_what_was_asked_for(
        self, trained: tuple[Path, commands.Outcome], run_folder: Path
    ) -> None:
        _, ended = trained
        assert "precision fp32 (auto: on a CPU) · channels_last · not compiled" in ended.out.splitlines()
        config = read(run_folder / "config.json")
        chosen = {name: config["command"][name] for name in config["asked"]}
        assert config["asked"] == {"precision": "auto", "compile": None, "augment_draws": "auto"}
        assert chosen == {"precision": "fp32", "compile": False, "augment_draws": "batch"}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where more is chosen")
    def test_a_run_folder_of_an_earlier_version_goes_on_in_its_precision(
        self, run_folder: Path, spfde: Spfde, here: Path
    ) -> None:
        shutil.copytree(run_folder, here / "run")
        (here / "run" / "summary.json").unlink()
        config = read(here / "run" / "config.json")
        for name in ("compile", "data_on", "augment_draws"):
            del config["command"][name]
        del config["asked"]
        (here / "run" / "config.json").write_text(json.dumps(config))
        ended = spfde("train", "--resume", "run")
        assert ended.code == 0, ended.err
        assert "precision fp32 · channels_last · not compiled" in ended.out.splitlines()

    def test_images_on_the_device_are_told_with_their_size(self, tiny: Path, spfde: Spfde) -> None:
        argv = ["--recipe", "dense", "--epochs", 1, "--data-on", "device", "--device", "cpu"]
        ended = spfde("train", "--data", tiny, *argv)
        assert ended.code == 0
        assert "data: 9 KiB of images and labels in the memory of cpu" in ended.out  # 128 x (64 + 8)

    def test_a_tracker_goes_on_in_the_same_folder_after_a_resume(
        self, tiny: Path, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from spfde.app.train.display import ConsoleDisplay

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        argv = ["--recipe", "dense", "--epochs", 2, "--track", "tensorboard", "--out", "run"]
        with monkeypatch.context() as patch:
            patch.setattr(ConsoleDisplay, "epoch_done", interrupt)
            ended = spfde("train", "--data", tiny, *argv)
        assert ended.code == 130
        assert ended.err == "spfde: interrupted. Go on with `spfde train --resume run`.\n"
        before = set((here / "run" / "spfde").glob("events*"))
        assert spfde("train", "--resume", "run").code == 0
        assert before < set((here / "run" / "spfde").glob("events*"))

    def test_warnings_of_the_package_are_one_plain_line(self, tiny: Path, spfde: Spfde) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            argv = ["--recipe", "dense", "--sieve", 0.2, "--interval", 1, "--epochs", 2, "--batch-size", 16]
            ended = spfde("train", "--data", tiny, *argv)
        assert ended.code == 0
        [line] = ended.err.splitlines()
        assert line.startswith("spfde: warning: --interval is 1")

    def test_a_stream_that_lacks_characters_is_no_error(
        self, tiny: Path, spfde: Spfde, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        assert spfde("train", "--data", tiny, "--recipe", "dense", "--epochs", 1).code == 0
        stream.flush()
        assert "spfde ? tiny.npz" in stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


@pytest.mark.cli
class TestOtherCommands:
    def test_plan_prints_one_json_object_and_needs_no_data(self, here: Path, tmp_path: Path) -> None:
        argv = ["plan", "--model", "resnet20", "--data", "cifar100", "--json"]
        ended = commands.start(argv, log=tmp_path / "plan", cwd=here).end()
        assert (ended.code, ended.err) == (0, "")
        plan = json.loads(ended.out)
        assert set(PLAN.split()) <= plan.keys()
        assert {"sparsity", "freezing", "sieving"} <= plan["savings"].keys()
        frozen = [at for at in plan["freeze_epochs"] if at is not None]
        assert frozen[0] == plan["start_epoch"]
        assert all(after - before >= 5 for before, after in itertools.pairwise(frozen))
        assert len(plan["freeze_epochs"]) == len(plan["block_names"]) == 9
        assert list(here.iterdir()) == []

    def test_a_plan_saves_what_was_asked_for_and_at_update_epochs_up_to_five_points_more(self, spfde: Spfde) -> None:
        found = {}
        for unit, timing in itertools.product(("block", "layer"), ("exact", "update")):
            options = ["--freeze", 0.2, "--freeze-unit", unit, "--freeze-timing", timing]
            ended = spfde("plan", "--model", "resnet8", "--epochs", 20, "--json", *options)
            found[unit, timing] = plan = json.loads(ended.out)
            assert plan["recipe"]["freezing"]["unit"] == unit
            assert plan["recipe"]["freezing"]["timing"] == timing
        saved = [round(100 * plan["freezing_reduction"], 1) for plan in found.values()]
        assert saved == [20.3, 24.9, 20.0, 21.0]
        assert found["block", "exact"]["block_names"] == ["layer1.0", "layer2.0", "layer3.0"]
        assert found["layer", "exact"]["block_names"][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]

    def test_a_plan_for_a_person_fits_into_a_hundred_columns(self, spfde: Spfde) -> None:
        ended = spfde("plan", "--model", "resnet20", "--data", "cifar10")
        assert ended.code == 0
        assert "modelled" in ended.out
        assert max(map(len, ended.out.splitlines())) <= 100

    def test_a_plan_is_refused_for_what_training_would_be_refused(self, tiny: Path, spfde: Spfde) -> None:
        for options, told in (
            ("--freeze 0.9", "--freeze=0.9: cannot be reached"),
            ("--freeze-unit channel", "--freeze-unit='channel': input should be 'block' or 'layer'"),
            ("--freeze-timing late", "--freeze-timing='late': input should be 'exact' or 'update'"),
            ("--sieve 0.95", "--sieve=0.95: leaves 5 of 96 samples"),
            ("--interval 9", "--interval=9: must not be longer than the run of 8 epochs"),
            ("--epochs 0", "--epochs=0: "),
            ("--batch-size 0", "--batch-size=0: "),
        ):
            assert_refused(spfde("plan", "--data", tiny, "--epochs", 8, *options.split()), told)

    def test_what_a_structure_does_not_fit_is_left_dense_as_the_error_says(self, spfde: Spfde) -> None:
        ended = spfde("plan", "--structure", "pattern", "--epochs", 20)
        assert ended.code == 2
        remedies = re.findall(r"--exclude '([^']+)'", ended.err)
        assert len(remedies) == 2
        options = [part for name in remedies for part in ("--exclude", name)]
        assert spfde("plan", "--structure", "pattern", "--epochs", 20, *options).code == 0

    def test_a_plan_takes_an_archive_s_shapes(self, tiny: Path, spfde: Spfde) -> None:
        ended = spfde("plan", "--data", tiny, "--epochs", 8, "--json")
        assert json.loads(ended.out)["samples"] == 96

    @pytest.mark.usefixtures("few_plots")
    def test_report_compares_runs_in_one_file(self, run_folder: Path, spfde: Spfde, here: Path, tiny: Path) -> None:
        assert spfde("train", "--data", tiny, "--recipe", "dense", "--epochs", 2, "--out", "b").code == 0
        ended = spfde("report", run_folder, "b", "--out", "report.html")
        assert ended.code == 0, ended.err
        page = (here / "report.html").read_text()
        assert "tiny-resnet8-spfde-seed0" in page
        assert list(here.glob("**/*.png"))

    def test_report_refuses_what_is_no_run_folder(self, spfde: Spfde, here: Path) -> None:
        ended = spfde("report", "nothing")
        assert_refused(ended, "nothing: is no run folder")
        assert list(here.iterdir()) == []

    def test_methods_lists_all_there_is_with_its_cost_and_its_citation(self, spfde: Spfde) -> None:
        printed = spfde("methods").out
        assert max(map(len, printed.splitlines())) <= 80
        listed = " ".join(printed.split())
        for name in [*presets.PRESETS, *METHODS]:
            assert f"\n  {name} " in printed
        for name in [
            *STRUCTURES,
            *registered("freezing-scheme"),
            *registered("drop"),
            *registered("grow"),
            *registered("engine"),
            *FREEZE_CRITERIA,
            BlockwiseCosine.name,
        ]:
            assert re.search(rf"^  {name}\b", printed, re.MULTILINE), name
        for technique in [*METHODS.values(), ProgressiveFreezing, *registered("sieving-method").values()]:
            assert technique.summary in listed
            assert f"Cost: {technique.cost}." in listed
            assert all(describe(key).split(".")[0] in listed for key in technique.references)
        for summary, cost in FREEZE_CRITERIA.values():
            assert f"{summary} Cost: {cost}." in listed
        for criterion, summary in ((name, each.summary) for name, each in registered("sieving-criterion").items()):
            assert f"{criterion} " in listed
            assert summary in listed

    def test_the_version_is_printed(self, spfde: Spfde) -> None:
        assert spfde("--version").out == f"{package.__version__}\n"

    def test_help_imports_neither_torch_nor_what_needs_it(self) -> None:
        script = (
            "import sys, spfde.app.cli\ntry:\n    spfde.app.cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
            "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'accelerate')))"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert ended.returncode == 0
        assert "--no-soft-bound" in ended.stdout

    def test_help_names_all_that_an_option_may_be(self, spfde: Spfde) -> None:
        words = spfde("train", "--help").out.replace("│", " ").split()
        named = [*models.MODELS, "fashion-mini", "4x1", "2:4", *FREEZE_CRITERIA]
        for kind in ("structure", "freezing-scheme", "sieving-criterion"):
            own = [name for name, made in registered(kind).items() if made.__module__.startswith("spfde.")]
            named += [name for name in own if name not in ("block", "nm")]
        assert {word.strip(",:;()") for word in words} >= set(named)


def assert_refused(ended: commands.Outcome, *told: str) -> None:
    """Exit code 2, nothing but one message on stderr, no traceback."""
    assert ended.code == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("spfde: ")
    for words in told:
        assert words in ended.err


BAD_OPTIONS = [
    ("--sparsity 1.0", "--sparsity=1.0: ", "less than 1", "[0, 1)"),
    ("--sparsity -0.1", "--sparsity=-0.1: ", "greater than or equal to 0", "[0, 1)"),
    ("--sparsity nan", "--sparsity=nan: ", "finite"),
    ("--freeze 0.9", "--freeze=0.9: cannot be reached: the most possible is 0.", "Ask for --freeze 0."),
    ("--freeze 1", "--freeze=1.0: ", "[0, 1)"),
    ("--engine masked --cache-variants 2", "--cache-variants=2: cannot be kept by the masked engine", "Leave it out"),
    ("--recipe mest --cache-variants 2", "--cache-variants=2: recipe mest freezes nothing", "--freeze 0.2"),
    ("--cache-limit 0", "--cache-limit=0.0: ", "greater than 0", "GiB"),
    ("--cache-precision fp8", "--cache-precision='fp8': ", "int8"),
    ("--cache-variants -1", "--cache-variants=-1: ", "greater than or equal to 0"),
    ("--sieve 0.95", "--sieve=0.95: leaves 5 of 96 samples, no full batch of 16", "Take --sieve 0.833 "),
    ("--sieve 1.5", "--sieve=1.5: ", "[0, 1)"),
    ("--interval 30", "--interval=30: must not be longer than the run of 8 epochs", "auto"),
    ("--interval 0", "--interval=0: ", "from 1 on"),
    ("--interval often", "--interval='often': ", "whole number", "auto"),
    ("--epochs 0", "--epochs=0: ", "from 1 to 100,000"),
    ("--epochs 100001", "--epochs=100001: ", "from 1 to 100,000"),
    ("--batch-size 0", "--batch-size=0: ", "from 1 on"),
    ("--lr 0", "--lr=0.0: ", "above 0"),
    ("--lr inf", "--lr=inf: ", "finite"),
    ("--momentum 1", "--momentum=1.0: ", "[0, 1)"),
    ("--weight-decay -1", "--weight-decay=-1.0: ", "0 or more"),
    ("--seed -1", "--seed=-1: ", "from 0"),
    ("--seed 4294967296", "--seed=4294967296: ", "2^32 - 1"),
    ("--workers -1", "--workers=-1: ", "0 or more"),
    ("--augment crp", "--augment='crp': ", "'crop'"),
    ("--precision fp8", "--precision='fp8': ", "bf16"),
    ("--data-on disk", "--data-on='disk': ", "'host'"),
    ("--profile 0", "--profile=0: ", "from 1 on"),
    ("--recipe spfd", "--recipe='spfd': is no preset", "Did you mean 'spfde'?"),
    ("--recipe nothing.toml", "--recipe='nothing.toml': cannot be read", "preset"),
    ("--model resnet9", "--model='resnet9': ", "Did you mean 'resnet8'?"),
    ("--model timm:resnet_18", "--model='timm:resnet_18': ", "Did you mean 'timm:resnet18"),
    ("--engine nativ", "--engine='nativ': ", "Did you mean 'native'?"),
    ("--device cudaa", "--device='cudaa': ", "Did you mean 'cuda'?"),
    ("--device cuda:x", "--device='cuda:x': ", "Did you mean 'cuda:0'?"),
    ("--track tensorbord", "--track='tensorbord': ", "Did you mean 'tensorboard'?"),
    ("--sieve-criterion el2m", "--sieve-criterion='el2m'", "Did you mean 'el2n'"),
    ("--sieve-full-last 1", "--sieve-full-last=1.0: ", "in [0, 1)"),
    ("--sieve-offset -1", "--sieve-offset=-1: ", "from 0 to less than"),
    ("--sieve-offset 2 --interval 2", "--sieve-offset=2: ", "Take 1 at most, or --interval 3 or more"),
    ("--sieve 0.95 --sieve-full-last 0.125", "--sieve=0.95: ", "Take --sieve 0.8"),
    ("--recipe mest --sieve-criterion loss", "--sieve-criterion='loss'", "leaves no samples out"),
    ("--recipe rigl --soft-bound", "--soft-bound=True: ", "the sparsity of recipe rigl"),
    ("--recipe dense --no-soft-bound", "--soft-bound", "recipe dense has no sparsity"),
    ("--structure 2:4", "--structure='2:4': ", "mest varies it", "Use --no-soft-bound, or another method, such"),
    ("--recipe gmp --structure 2:4", "--structure='2:4': ", "gmp varies it", "Use another method, such as set"),
    ("--recipe str --structure 4x1", "--structure='4x1': ", "str works", "Use another method"),
]


def planned_and_trained(spfde: Spfde, data: Path, epochs: int) -> Iterator[list[str]]:
    """What `spfde plan` and `spfde train` say of a run of so many epochs on the standard error, line by line."""
    for command in (["plan"], ["train", "--quiet", "--out", "run"]):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            ended = spfde(*command, "--data", data, "--batch-size", 16, "--epochs", epochs)
        assert ended.code == 0, ended.err
        yield ended.err.splitlines()


class TestBadInput:
    @pytest.mark.parametrize(("options", "told"), [(bad[0], bad[1:]) for bad in BAD_OPTIONS], ids=lambda bad: str(bad))
    def test_a_bad_option_is_refused_with_value_rule_and_remedy_and_nothing_is_left(
        self, options: str, told: tuple[str, ...], tiny: Path, spfde: Spfde, here: Path
    ) -> None:
        argv = ["train", "--data", tiny, "--epochs", 8, "--batch-size", 16, "--out", "run", *options.split()]
        assert_refused(spfde(*argv), *told)
        assert list(here.iterdir()) == []

    @pytest.mark.parametrize(
        ("epochs", "remedy"),
        [
            (1, "Train for more epochs, or freeze nothing (--freeze 0)."),
            (
                4,
                "Ask for --freeze 0.135 at most, raise fraction in a recipe file, train for more epochs, or",
            ),
        ],
    )
    def test_a_run_too_short_for_a_share_that_was_asked_for_is_refused_with_options_as_the_remedy(
        self, epochs: int, remedy: str, tiny: Path, spfde: Spfde, here: Path
    ) -> None:
        for command in ("plan", "train"):
            ended = spfde(command, "--epochs", epochs, "--freeze", 0.2)
            assert_refused(ended, "--freeze=0.2: cannot be reached", remedy)
            assert "update_interval_epochs" not in ended.err
        assert list(here.iterdir()) == []

    def test_a_batch_that_the_sieve_does_not_fill_is_refused_with_options_that_do(
        self, tiny: Path, spfde: Spfde, here: Path
    ) -> None:
        for command in ("plan", "train"):
            ended = spfde(command, "--data", tiny, "--epochs", 8, "--batch-size", 512)
            assert_refused(ended, "leaves 77 of 96 samples, no full batch of 512", "--batch-size 77 ", "--sieve 0 ")
        assert list(here.iterdir()) == []

    # In three epochs, with an interval of one, 20 % can be frozen.
    @pytest.mark.parametrize(
        ("epochs", "at_random", "freezes"),
        [(1, 0, 1), (2, 1, 1), (3, 1, 0), pytest.param(5, 0, 1, marks=pytest.mark.long)],
    )
    def test_a_run_too_short_to_choose_samples_or_to_freeze_as_asked_says_so_in_a_line_each(
        self, epochs: int, at_random: int, freezes: int, tiny: Path, spfde: Spfde
    ) -> None:
        for told in planned_and_trained(spfde, tiny, epochs):
            said = [line for line in told if "at random" in line]
            assert len(said) == at_random
            assert all("4 epochs" in line and "--interval" not in line for line in said)
            assert len([line for line in told if "freez" in line]) == freezes

    def test_several_bad_options_are_told_together(self, tiny: Path, spfde: Spfde) -> None:
        ended = spfde("train", "--data", tiny, "--epochs", 0, "--lr", -1)
        assert ended.code == 2
        assert [line.split("=")[0] for line in ended.err.splitlines()] == ["spfde: --epochs", "spfde: --lr"]

    def test_bad_options_of_different_kinds_are_told_together(self, spfde: Spfde, here: Path) -> None:
        options = {
            "--sparsity": 2,
            "--freeze": 1,
            "--sieve": 1,
            "--interval": "often",
            "--lr": -1,
            "--precision": "fp8",
            "--track": "tensorbord",
            "--engine": "zzz",
            "--device": "tpu",
            "--model": "foo",
            "--data": "fasion-mini",
        }
        ended = spfde("train", *(word for option in options.items() for word in option))
        assert ended.code == 2
        assert [line.split("=")[0] for line in ended.err.splitlines()] == [f"spfde: {option}" for option in options]
        ended = spfde("train", "--device", "tpu", "--model", "foo", "--data", "fasion-mini")
        told = [line.split("=")[0] for line in ended.err.splitlines()]
        assert told == ["spfde: --device", "spfde: --model", "spfde: --data"]
        assert list(here.iterdir()) == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.parametrize(("options", "told"), [("--device cuda", "--device cpu"), ("--precision fp16", "bf16")])
    def test_what_needs_a_gpu_is_refused_without_one(
        self, options: str, told: str, tiny: Path, spfde: Spfde, here: Path
    ) -> None:
        assert_refused(spfde("train", "--data", tiny, *options.split()), options.replace(" ", "='"), told)
        assert list(here.iterdir()) == []

    @pytest.mark.parametrize(
        ("argv", "told"),
        [
            (["train", "--sparsty", "0.9"], "--sparsity"),
            (["tran"], "train"),
            (["train", "--epochs", "many"], "--epochs"),
        ],
    )
    def test_a_mistyped_command_line_names_the_nearest(self, argv: list[str], told: str, spfde: Spfde) -> None:
        ended = spfde(*argv)
        assert ended.code == 2
        assert told in ended.err
        assert "Traceback" not in ended.err

    def test_the_name_of_a_data_set_is_checked_against_the_known_ones(self, spfde: Spfde, here: Path) -> None:
        for command in ("train", "plan"):
            ended = spfde(command, "--data", "fasion-mini")
            assert_refused(ended, "--data='fasion-mini'", "Did you mean 'fashion-mini'?", *DATASETS)
        assert list(here.iterdir()) == []

    def test_options_are_checked_before_a_data_set_is_fetched(
        self, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fetch(*_: object, **__: object) -> None:
            raise AssertionError("the data were asked for")

        monkeypatch.setattr(setup, "load_data", fetch)
        for options in ("--model resnet9", "--engine nativ", "--freeze 0.9", "--sieve 0.9999", "--interval 30"):
            assert spfde("train", "--data", "cifar10", *options.split()).code == 2
        assert list(here.iterdir()) == []

    def test_a_recipe_file_with_a_mistake_is_refused(self, tiny: Path, spfde: Spfde, here: Path) -> None:
        recipe = here / "mine.toml"
        for text, told in (
            ("[sparsty]", "Did you mean 'sparsity'?"),
            ('[sparsity]\nmethod = "mst"', "Did you mean 'mest'?"),
            ("[sparsity]\nsparsity = 2", "sparsity=2"),
            ("[sparsity", "is no valid TOML"),
        ):
            recipe.write_text(text)
            assert_refused(spfde("train", "--data", tiny, "--recipe", recipe), told)
        assert list(here.iterdir()) == [recipe]
        recipe.unlink()
        assert_refused(spfde("train", "--data", tiny, "--recipe", recipe), f"--recipe='{recipe}'", "cannot be read")
        assert_refused(spfde("cite", recipe), f"recipe='{recipe}'", "cannot be read")
        assert_refused(spfde("cite", "runs/gone"), "runs/gone: there is no such folder")


class TestBadData:
    @pytest.fixture
    def arrays(self, tiny: Path) -> dict[str, np.ndarray[Any, Any]]:
        with np.load(tiny) as archive:
            return dict(archive)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda a: a | {"x_train": a["x_train"][:0], "y_train": a["y_train"][:0]}, ("x_train is empty",)),
            (lambda a: a | {"y_train": a["y_train"] - 1}, ("y_train[0] is -1",)),
            (lambda a: a | {"y_train": a["y_train"].astype(float)}, ("y_train is float64, but labels are integers",)),
            (lambda a: a | {"y_test": a["y_test"] + 5}, ("out of range: y_train ends at 2",)),
            (lambda a: a | {"y_train": a["y_train"] * 10**6}, ("y_train[2] is 2000000", "have no training image")),
            (lambda a: a | {"y_train": a["y_train"][:-1]}, ("96 images and y_train 95 labels",)),
            (lambda a: {"x_train": a["x_train"]}, ("has no y_train, x_test, y_test",)),
        ],
        ids=["empty", "negative", "not whole", "unknown class", "huge", "too few", "missing"],
    )
    def test_an_archive_that_cannot_be_trained_on_is_refused(
        self, change: Any, told: tuple[str, ...], arrays: Any, spfde: Spfde, here: Path
    ) -> None:
        np.savez(here / "bad.npz", **change(arrays))
        for command in ("train", "plan"):
            assert_refused(spfde(command, "--data", "bad.npz"), "bad.npz", *told)
        assert [path.name for path in here.iterdir()] == ["bad.npz"]

    def test_a_damaged_or_missing_archive_is_refused(self, tiny: Path, spfde: Spfde, here: Path) -> None:
        (here / "cut.npz").write_bytes(tiny.read_bytes()[:1000])
        assert_refused(spfde("train", "--data", "cut.npz"), "is no readable .npz archive")
        assert_refused(spfde("train", "--data", "none.npz"), "spfde: --data='none.npz': does not exist")
        assert_refused(spfde("plan", "--data", "/nonexist/x"), "spfde: --data='/nonexist/x': does not exist")
        (here / "photos").mkdir()
        assert_refused(spfde("train", "--data", "photos"), f"spfde: --data='{here / 'photos'}': needs a train folder")
        (here / "photos").rmdir()
        assert [path.name for path in here.iterdir()] == ["cut.npz"]

    def test_an_unreadable_image_is_named(self, spfde: Spfde, here: Path) -> None:
        image_module = pytest.importorskip("PIL.Image")
        for part in ("train", "test"):
            for label in ("cat", "dog"):
                folder = here / "photos" / part / label
                folder.mkdir(parents=True)
                for number in range(20):
                    image_module.new("RGB", (12, 12), (number, 0, 0)).save(folder / f"{number}.png")
        argv = ["train", "--data", "photos", "--recipe", "mest", "--epochs", 1, "--batch-size", 8, "--out", "run"]
        assert spfde(*argv, "--quiet").code == 0
        on_device = spfde(*argv[:-1], "other", "--data-on", "device", "--quiet")
        assert on_device.code == 0, "so few images are decoded into memory"
        shutil.rmtree(here / "other")
        broken = here / "photos" / "train" / "cat" / "7.png"
        broken.write_bytes(broken.read_bytes()[:30])
        assert_refused(spfde(*argv[:-1], "other"), str(broken), "cannot be read as an image", "Repair or remove")
        assert not (here / "other").exists()

    def test_an_unreadable_image_that_a_loaders_worker_meets_is_named_in_one_line(
        self, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image_module = pytest.importorskip("PIL.Image")
        noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        for part, label in itertools.product(("train", "test"), ("cat", "dog")):
            folder = here / "photos" / part / label
            folder.mkdir(parents=True)
            for number in range(8):
                image_module.fromarray(noise).save(folder / f"{number}.png")
        broken = here / "photos" / "train" / "cat" / "5.png"
        broken.write_bytes(broken.read_bytes()[:200])
        monkeypatch.setattr(folders, "STATISTICS_SAMPLES", 2)
        monkeypatch.setattr(setup, "load_data", lambda data, **_: folders.load_folder(data, in_memory_bytes=0))
        # What a loader that raised waits for its worker's end.
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        argv = ["train", "--data", "photos", "--recipe", "mest", "--epochs", 1, "--batch-size", 8, "--out", "run"]
        ended = spfde(*argv, "--quiet", "--workers", 1)
        assert_refused(ended, f"{broken}", "cannot be read as an image", "Repair or remove")
        assert not (here / "run").exists()


class TestBadFolders:
    def test_a_folder_that_holds_a_run_or_other_things_is_refused(
        self, run_folder: Path, tiny: Path, spfde: Spfde, here: Path
    ) -> None:
        (here / "notes").mkdir()
        (here / "notes" / "todo.txt").touch()
        for out, told in (
            (run_folder, "holds a run already. Go on with `spfde train --resume"),
            ("notes", "is not empty (todo.txt)"),
            ("notes/todo.txt", "must be a folder, and is a file"),
        ):
            assert_refused(spfde("train", "--data", tiny, "--out", out), f"--out={out}: ", told)
        assert [path.name for path in (here / "notes").iterdir()] == ["todo.txt"]

    def test_resuming_what_is_no_run_folder_is_refused(self, spfde: Spfde, here: Path) -> None:
        for folder in ("nothing", "."):
            assert_refused(spfde("train", "--resume", folder), f"{folder}: is no run folder")
        assert list(here.iterdir()) == []

    def test_resuming_takes_no_other_options(self, run_folder: Path, spfde: Spfde) -> None:
        ended = spfde("train", "--resume", run_folder, "--epochs", 9, "--soft-bound")
        assert_refused(ended, "takes no other options, and --epochs, --soft-bound was given")

    def test_resuming_takes_another_engine_and_warns(self, run_folder: Path, spfde: Spfde, here: Path) -> None:
        shutil.copytree(run_folder, here / "run")
        (here / "run" / "summary.json").unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            ended = spfde("train", "--resume", "run", "--engine", "masked", "--quiet")
        assert ended.code == 0
        [line] = ended.err.splitlines()
        assert line.startswith("spfde: warning: ")
        assert 'saved with engine="native" and goes on with engine="masked", as asked' in line
        assert json.loads((here / "run" / "summary.json").read_text())["engine"] == "masked"

    def test_a_damaged_config_is_refused(self, run_folder: Path, spfde: Spfde, here: Path) -> None:
        (here / "run").mkdir()
        (here / "run" / "config.json").write_text((run_folder / "config.json").read_text()[:-20])
        assert_refused(spfde("train", "--resume", "run"), "run/config.json: is damaged")


class TestDivergence:
    def test_a_loss_that_is_no_number_stops_the_run_and_a_run_without_an_epoch_leaves_nothing(
        self, tiny: Path, spfde: Spfde, here: Path
    ) -> None:
        ended = spfde("train", "--data", tiny, "--recipe", "dense", "--lr", 1e30, "--out", "run", "--quiet")
        assert_refused(ended, "the loss became nan in epoch ", "There is no checkpoint yet", "smaller --lr", "1e+30")
        assert list(here.iterdir()) == []

    def test_the_last_good_checkpoint_is_named(
        self, tiny: Path, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usual = setup.TrainingRun.batch

        def batch(run: Any, handed: Any) -> Any:
            x, y = usual(run, handed)
            return (x * float("nan") if run.session.epoch == 2 else x), y

        monkeypatch.setattr(setup.TrainingRun, "batch", batch)
        ended = spfde("train", "--data", tiny, "--recipe", "dense", "--out", "run", "--quiet")
        assert_refused(ended, "in epoch 2. The last good checkpoint is run/checkpoints/latest. ")
        assert read(here / "run" / "checkpoints" / "latest" / "manifest.json")["epoch"] == 2

    def test_weights_broken_by_an_epoch_s_last_step_are_not_kept_as_good(
        self, tiny: Path, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from spfde.app.train import loop

        usual = loop.evaluate

        def evaluate(run: Any) -> Any:
            if run.session.epoch == 1:
                next(run.model.parameters()).data.fill_(float("nan"))
            return usual(run)

        monkeypatch.setattr(loop, "evaluate", evaluate)
        ended = spfde("train", "--data", tiny, "--recipe", "dense", "--out", "run", "--quiet")
        assert_refused(ended, "in epoch 1. The last good checkpoint is run/checkpoints/latest. ")
        assert read(here / "run" / "checkpoints" / "latest" / "manifest.json")["epoch"] == 1
