"""The options of ``spfde train``: checked, kept, and turned into a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import spfde
from spfde import presets
from spfde.app.data.datasets import load_data
from spfde.app.train.feed import workers_for
from spfde.app.train.options import TrainOptions, absolute_source, choose_recipe, read_recipe
from spfde.core.errors import InvalidArgument, RunFolderError, StateMismatch
from spfde.freezing import BlockwiseCosine, ProgressiveFreezing
from spfde.sieving import DataSieving, OneTimeRemoval

OF_PRESET = presets.spfde.freezing
assert OF_PRESET is not None


class TestWorkers:
    @pytest.mark.parametrize(
        ("in_memory", "asked", "cores", "expected"),
        [
            (True, None, 4, 0),
            (False, None, 4, 4),
            (False, None, 64, 16),
            (False, None, 1, 1),
            (False, 0, 4, 0),
            (True, 3, 4, 3),
        ],
    )
    def test_images_that_have_to_be_decoded_get_a_worker_a_core(
        self, in_memory: bool, asked: int | None, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        data = replace(load_data("fashion-mini", root="unused"), in_memory=in_memory)
        assert workers_for(data, asked) == expected
        assert TrainOptions().workers is None

    def test_processes_of_one_host_share_its_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        data = replace(load_data("fashion-mini", root="unused"), in_memory=False)
        assert workers_for(data, None) == 3


class TestChooseRecipe:
    def test_with_nothing_given_it_is_the_preset(self) -> None:
        for name, preset in presets.PRESETS.items():
            assert choose_recipe(name) == preset

    def test_a_sparsity_keeps_the_method_and_its_other_settings(self) -> None:
        assert choose_recipe("rigl", sparsity=0.5) == spfde.Recipe(sparsity=spfde.RigL(sparsity=0.5))
        assert choose_recipe("spfde", sparsity=0.5) == presets.spfde.replace(sparsity=spfde.MEST(sparsity=0.5))

    def test_a_sparsity_on_a_dense_recipe_means_mest(self) -> None:
        assert choose_recipe("dense", sparsity=0.8).sparsity == spfde.MEST(sparsity=0.8)
        assert choose_recipe("dense", sparsity=0.8, soft_bound=False).sparsity == spfde.MEST(
            sparsity=0.8, soft_bound=False
        )

    def test_freezing_and_sieving_are_added_or_changed_and_zero_turns_them_off(self) -> None:
        added = choose_recipe("dense", freeze=0.1, sieve=0.3)
        assert added == spfde.Recipe(
            freezing=ProgressiveFreezing(flops_reduction=0.1), sieving=DataSieving(removed_fraction=0.3)
        )
        off = choose_recipe("spfde", sparsity=0, freeze=0, sieve=0)
        assert [off.is_sparse, off.freezes, off.sieves] == [False, False, False]
        assert off.learning_rate == BlockwiseCosine()

    def test_a_criterion_changes_how_the_recipe_sieves_and_keeps_the_rest(self) -> None:
        assert choose_recipe("spfde", sieve_criterion="el2n").sieving == DataSieving(criterion="el2n")
        assert choose_recipe("dense", sieve=0.1, sieve_criterion="loss").sieving == DataSieving(
            removed_fraction=0.1, criterion="loss"
        )
        assert choose_recipe("mest-de", sieve=0.1, sieve_criterion="loss").sieving == OneTimeRemoval(
            removed_fraction=0.1, criterion="loss"
        )

    def test_when_and_how_many_samples_move_changes_how_the_recipe_sieves(self) -> None:
        changed = choose_recipe("spfde", sieve_full_last=0.125, sieve_offset=1, sieve_criterion="top-loss")
        assert changed.sieving == DataSieving(full_last=0.125, offset_epochs=1, criterion="top-loss")
        told = r"--sieve-offset=1: does not go with one-time, the sieving of recipe mest-de\..*--recipe spfde"
        with pytest.raises(InvalidArgument, match=told):
            choose_recipe("mest-de", sieve_offset=1)
        with pytest.raises(InvalidArgument, match=r"--soft-bound=True: does not go with rigl, the sparsity of recipe"):
            choose_recipe("rigl", soft_bound=True)
        with pytest.raises(InvalidArgument, match=r"--sieve-full-last=0\.125.*leaves no samp"):
            choose_recipe("dense", sieve_full_last=0.125)

    def test_a_criterion_that_draws_anew_has_no_use_for_the_share_that_a_file_swaps(self, tmp_path: Path) -> None:
        (tmp_path / "r.toml").write_text(presets.spfde.replace(sieving=DataSieving(swap_fraction=0.1)).to_toml())
        changed = {
            name: choose_recipe(str(tmp_path / "r.toml"), sieve_criterion=name).sieving for name in ("top-loss", "el2n")
        }
        assert changed == {
            "top-loss": DataSieving(criterion="top-loss"),
            "el2n": DataSieving(criterion="el2n", swap_fraction=0.1),
        }

    def test_a_criterion_that_there_is_not_or_with_nothing_to_sieve_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match=r"--sieve-criterion='el2m'.*Did you mean 'el2n'"):
            choose_recipe("spfde", sieve_criterion="el2m")
        with pytest.raises(InvalidArgument, match=r"--sieve-criterion='loss'.*leaves no samples out.*--sieve "):
            choose_recipe("dense", sieve_criterion="loss")

    def test_a_share_to_freeze_overrides_a_fixed_start(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text("[freezing]\nstart_epoch = 3\nfraction = 0.5\n")
        assert choose_recipe(str(path)).freezing == ProgressiveFreezing(start_epoch=3, fraction=0.5)
        assert choose_recipe(str(path), freeze=0.1).freezing == ProgressiveFreezing(flops_reduction=0.1, fraction=0.5)

    def test_a_freezing_scheme_keeps_the_share_and_drops_what_only_another_scheme_knows(self, tmp_path: Path) -> None:
        changed = choose_recipe("spfde", freeze_scheme="periodic")
        assert changed == presets.spfde.replace(freezing=OF_PRESET.model_copy(update={"scheme": "periodic"}))
        both = choose_recipe("dense", freeze=0.1, freeze_scheme="single-shot-resume")
        assert both.freezing == ProgressiveFreezing(flops_reduction=0.1, scheme="single-shot-resume")
        path = tmp_path / "mine.toml"
        path.write_text('[freezing]\nscheme = "single-shot-resume"\nresume_epochs = 4\nfraction = 0.5\n')
        assert choose_recipe(str(path)).freezing == both.freezing.model_copy(
            update={"flops_reduction": 0.2, "resume_epochs": 4, "fraction": 0.5}
        )
        kept = choose_recipe(str(path), freeze_scheme="periodic").freezing
        assert kept == ProgressiveFreezing(scheme="periodic", fraction=0.5)
        with pytest.raises(InvalidArgument, match=r"--freeze-scheme='periodic'.*freezes nothing"):
            choose_recipe("dense", freeze_scheme="periodic")

    def test_a_share_is_met_or_refused_where_it_was_asked_for_by_number_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text("[freezing]\nflops_reduction = 0.2\n")
        by_number = [choose_recipe("spfde", freeze=0.2), choose_recipe("dense", freeze=0.2), choose_recipe(str(path))]
        (tmp_path / "preset.toml").write_text(presets.spfde.to_toml())
        as_can_be = [choose_recipe("spfde"), choose_recipe("spfde", freeze_scheme="periodic", sieve=0)]
        as_can_be.append(choose_recipe(str(tmp_path / "preset.toml")))
        assert [recipe.freezing.as_far_as_possible for recipe in by_number] == [False] * 3
        assert [recipe.freezing.as_far_as_possible for recipe in as_can_be] == [True] * 3

    def test_the_interval_auto_leaves_the_recipe_s_own(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text("update_interval_epochs = 3\n")
        assert choose_recipe(str(path)).update_interval_epochs == 3
        assert choose_recipe(str(path), interval="4").update_interval_epochs == 4

    @pytest.mark.parametrize("text", ["", "0", "-1", "2.5", "two", "²"])
    def test_another_interval_is_refused(self, text: str) -> None:
        with pytest.raises(InvalidArgument, match=r"^update_interval_epochs="):
            choose_recipe("spfde", interval=text)

    def test_a_preset_wins_over_a_file_of_that_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("spfde").write_text("update_interval_epochs = 3\n")
        assert read_recipe("spfde") == presets.spfde
        assert read_recipe("./spfde").update_interval_epochs == 3

    def test_a_file_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InvalidArgument, match="cannot be read"):
            read_recipe(str(path))
        with pytest.raises(InvalidArgument, match="cannot be read"):
            read_recipe(str(tmp_path))


class TestTrainOptions:
    def test_the_defaults_are_the_contract_s(self) -> None:
        options = TrainOptions()
        assert options.load_recipe() == presets.spfde
        assert (options.data, options.model, options.epochs) == ("fashion-mini", "resnet8", 20)
        assert (options.batch_size, options.lr, options.momentum, options.weight_decay) == (64, 0.1, 0.9, 1e-4)

    def test_they_survive_the_config_file(self, tmp_path: Path) -> None:
        options = TrainOptions(data="a.npz", lr=0.3, seed=2**32 - 1, track=("tensorboard",), augment="crop")
        config = json.loads(json.dumps({"command": options.model_dump(mode="json")}))
        assert TrainOptions.from_config(config, tmp_path / "config.json") == options

    def test_a_config_file_of_an_earlier_version_says_by_its_silence_what_that_did(self) -> None:
        command = TrainOptions(precision="bf16").model_dump(mode="json", exclude={"compile", "augment_draws"})
        options = TrainOptions.from_config({"command": command}, Path("config.json"))
        assert (options.precision, options.compile, options.augment_draws) == ("bf16", False, "batch")
        del command["precision"]
        assert TrainOptions.from_config({"command": command}, Path("config.json")).precision == "fp32"

    def test_what_is_left_to_choose_is_as_the_run_that_goes_on_had_it(self) -> None:
        before = TrainOptions(precision="bf16", compile=False, augment_draws="sample")
        assert TrainOptions(workers=1).as_chosen(before) == before.model_copy(update={"workers": 1})
        assert TrainOptions(precision="fp32").as_chosen(before).precision == "fp32"

    @pytest.mark.parametrize(
        "config", [{}, {"command": None}, {"command": {"lr": "fast"}}, {"command": {"recipe": {"sparsity": 1}}}]
    )
    def test_a_config_file_that_is_not_as_it_was_written_is_refused(self, config: dict[str, Any]) -> None:
        with pytest.raises(RunFolderError, match=r"run/config\.json: .*start a new run"):
            TrainOptions.from_config(config, Path("run/config.json"))

    def test_several_mistakes_are_told_together(self) -> None:
        with pytest.raises(InvalidArgument) as refused:
            TrainOptions(epochs=0, lr=-1.0, seed=-1)
        assert [problem.argument for problem in refused.value.problems] == ["epochs", "lr", "seed"]

    def test_a_checkpoint_may_be_taken_to_another_place_but_not_to_another_run(self) -> None:
        saved = TrainOptions().identity()
        moved = TrainOptions(data="/elsewhere/x.npz", data_root="/d", device="cuda", workers=4, track=("wandb",))
        moved.check_identity(saved, Path("c"))
        for change in ({"batch_size": 32}, {"seed": 1}, {"precision": "bf16"}, {"augment": "none"}, {"momentum": 0.5}):
            with pytest.raises(StateMismatch, match=f"checkpoint c: is of another run: there {next(iter(change))} is "):
                TrainOptions(**change).check_identity(saved, Path("c"))

    def test_a_checkpoint_that_says_nothing_of_its_run_is_taken(self) -> None:
        TrainOptions().check_identity({}, Path("c"))


class TestAbsoluteSource:
    def test_a_path_becomes_absolute_and_a_name_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("mine.npz").touch()
        Path("cifar10").mkdir()
        assert absolute_source("mine.npz") == str(tmp_path / "mine.npz")
        assert absolute_source("cifar10") == "cifar10"
        assert absolute_source("./cifar10") == str(tmp_path / "cifar10")
        assert absolute_source("fashion-mni") == "fashion-mni"


class TestStructures:
    def test_a_structure_joins_the_recipes_method(self) -> None:
        assert choose_recipe("set", structure="4x2").sparsity == spfde.SET(
            sparsity=0.9, structure=spfde.Block(rows=4, columns=2)
        )
        assert choose_recipe("set", structure="2x2-inputs").sparsity == spfde.SET(
            sparsity=0.9, structure=spfde.Block(rows=2, columns=2, along="inputs")
        )
        with pytest.raises(InvalidArgument, match="rows"):
            choose_recipe("set", structure="0x2")
        assert choose_recipe("rigl", structure="kernel").sparsity == spfde.RigL(sparsity=0.9, structure=spfde.Kernels())

    def test_n_of_m_brings_its_sparsity_along(self) -> None:
        assert choose_recipe("rigl", structure="1:8").sparsity == spfde.RigL(
            sparsity=0.875, structure=spfde.NM(n=1, m=8)
        )

    def test_weights_that_are_excluded_stay_dense(self) -> None:
        patterns = choose_recipe("mest", structure="pattern", exclude=["*downsample*"]).sparsity
        assert patterns == spfde.MEST(sparsity=0.9, structure=spfde.Patterns(), exclude=("*downsample*",))
        assert choose_recipe("mest", exclude=[]) == choose_recipe("mest")
        with pytest.raises(InvalidArgument, match=r"--exclude=.*: recipe dense has no sparsity"):
            choose_recipe("dense", exclude=["*"])

    def test_an_unknown_structure_is_named_with_the_nearest(self) -> None:
        with pytest.raises(InvalidArgument, match=r"--structure='chanel': is no structure\. Did you mean 'channel'"):
            choose_recipe("set", structure="chanel")

    def test_a_dense_recipe_needs_a_sparsity_beside_it(self) -> None:
        with pytest.raises(InvalidArgument, match="--structure='kernel': recipe dense has no sparsity"):
            choose_recipe("dense", structure="kernel")
