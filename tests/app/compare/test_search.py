"""``spfde search``: budgets, the lengths and widths that fit, and searches from the command line."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spfde as package
from helpers.commands import Spfde, start
from spfde.app.compare.folder import Comparison
from spfde.app.compare.search_budget import Budget, Cost, longest, planned, widest
from spfde.app.compare.search_state import Search, Trial
from spfde.app.compare.search_study import Study, rungs_after
from spfde.app.compare.spec import read_spec
from spfde.app.train import loop
from spfde.app.train.models import build_model
from spfde.app.train.options import TrainOptions, choose_recipe
from spfde.core.errors import InvalidArgument

WORDS = [
    "search", "--budget", "50% flops", "--trials", "5", "--epochs", "4", "--batch-size", "16", "--lr", "0.05",
    "--validation-share", "0.25", "--sparsity", "0.5,0.9", "--freeze", "0", "--sieve", "0,0.2", "--width", "1",
    "--engine", "masked", "--device", "cpu",
]  # fmt: skip


DENSE_TRIALS = [
    {"name": f"dense, {how}", "values": {"recipe": "dense", "width": 0.5}} for how in ("shorter", "narrower")
]


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("10% flops", "flops", 10),
        (" 12.5 %FLOPs ", "flops", 12.5),
        ("600 seconds", "seconds", 600),
        ("90s", "seconds", 90),
        ("1.5 h", "seconds", 5400),
        ("2 min", "seconds", 120),
        ("2 GiB", "memory", 2 * 1024**3),
        ("512 kib", "memory", 512 * 1024),
    ],
)
def test_a_budget_is_read_with_its_unit(text: str, kind: str, limit: float) -> None:
    assert Budget.read(text) == Budget(kind, limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "10%", "10 flops", "10% seconds", "0% flops", "-1 s", "2 GB", "ten s", "1e3 s", "٣ s"]
)
def test_what_is_no_budget_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidArgument, match="10% flops"):
        Budget.read(text)


def options(data: Path, **changes: Any) -> TrainOptions:
    dense = {"recipe_name": "dense", "recipe": package.presets.dense.to_dict()}
    return TrainOptions(**(dense | {"data": str(data), "batch_size": 16, "epochs": 20} | changes))


def cost_of(given: TrainOptions) -> Cost:
    cost = planned(given)
    assert isinstance(cost, Cost)
    return cost


@pytest.mark.parametrize(("percent", "epochs"), [(100, 20), (99, 19), (50, 10), (25, 5), (24.9, 4), (5, 1)])
def test_of_a_dense_run_so_many_epochs_fit_as_the_share_is(percent: float, epochs: int, tiny: Path) -> None:
    dense = options(tiny)
    fits = Budget("flops", percent).fits(dense_flops=cost_of(dense).flops, seconds_per_flop=0)
    found = longest(dense, fits)
    assert isinstance(found, TrainOptions)
    assert found.epochs == epochs


def test_where_one_epoch_is_too_much_no_length_fits(tiny: Path) -> None:
    dense = options(tiny)
    flops = cost_of(dense).flops
    assert longest(dense, Budget("flops", 4.9).fits(dense_flops=flops, seconds_per_flop=0)) == "one epoch costs more"


def test_seconds_are_those_of_a_flop_times_the_plan(tiny: Path) -> None:
    dense = options(tiny)
    flops_of_epoch = cost_of(dense).flops / 20
    found = longest(dense, Budget("seconds", 7.5).fits(dense_flops=1, seconds_per_flop=1 / flops_of_epoch))
    assert isinstance(found, TrainOptions)
    assert found.epochs == 7


def test_a_length_at_which_nothing_can_be_frozen_is_no_length(tiny: Path) -> None:
    freezing = options(tiny, recipe=choose_recipe("spfde", freeze=0.3).to_dict())
    assert isinstance(planned(freezing.model_copy(update={"epochs": 2})), InvalidArgument)
    dense_flops = cost_of(options(tiny)).flops
    told = longest(freezing, Budget("flops", 1).fits(dense_flops=dense_flops, seconds_per_flop=0))
    assert isinstance(told, str)
    assert "cannot be reached" in told


def test_a_length_that_is_all_warm_up_is_no_length(tiny: Path) -> None:
    dense = options(tiny, warmup=8)
    fits = Budget("flops", 30).fits(dense_flops=cost_of(dense).flops, seconds_per_flop=0)
    assert longest(dense, fits) == "in 8 epochs warmup=8: must be shorter than the run (8 epochs). Shorten it."
    freezing = options(tiny, warmup=8, recipe_name="spfde", recipe=package.presets.spfde.to_dict())
    told = longest(freezing, Budget("flops", 5).fits(dense_flops=cost_of(options(tiny)).flops, seconds_per_flop=0))
    assert isinstance(told, str)
    assert "warmup" in told


def test_a_plan_refuses_a_warm_up_that_is_not_over_when_a_block_is_frozen(tiny: Path) -> None:
    given = options(tiny, warmup=19, recipe_name="spfde", recipe=package.presets.spfde.to_dict())
    assert "must be less than every block's freeze epoch" in str(planned(given))


def test_the_widest_net_that_fits_is_found_in_steps_of_a_32nd(tiny: Path) -> None:
    dense = options(tiny)
    half = cost_of(dense.model_copy(update={"width": 0.5}))
    for limit, width in ((half.flops, 0.5), (half.flops - 1, 15 / 32)):
        found = widest(dense, Budget("flops", 100).fits(dense_flops=limit, seconds_per_flop=0))
        assert isinstance(found, TrainOptions)
        assert cost_of(found).flops <= limit
        assert found.width == width
    found = widest(dense, Budget("memory", half.step_bytes).fits(dense_flops=1, seconds_per_flop=0))
    assert isinstance(found, TrainOptions)
    assert found.width == 0.5
    assert widest(dense, lambda cost: True) == "the dense run as it is costs no more"


def test_memory_is_that_of_the_largest_epoch_as_pytorch_stores_it(tiny: Path) -> None:
    recipe = choose_recipe("spfde", sparsity=0.9)
    model = build_model("resnet8", num_classes=3, in_channels=1, image_size=8)
    bill = package.plan(model, torch.zeros(1, 1, 8, 8), recipe, 20, 96, batch_size=16)
    assert cost_of(options(tiny, recipe=recipe.to_dict())).step_bytes == bill.memory["actual"].per_epoch[0]


def test_the_dense_nets_have_nothing_of_what_the_others_save() -> None:
    dense = Trial(name="dense, narrower", values={"recipe": "dense", "width": 0.5}, epochs=3)
    given = {"sparsity": 0.9, "freeze": 0.2, "structure": "4x1", "recipe": "rigl", "lr": 0.05}
    search = Search(budget="10% flops", wanted=3, options=given, space={"sieve": (0.1, 0.2), "batch_size": (32, 128)})
    found = search.options_of(dense)
    assert found.load_recipe().is_neutral
    assert (found.width, found.epochs, found.lr, found.batch_size) == (0.5, 3, 0.05, 32)


# --- Optuna ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "reached"), [(9, {1: [0], 3: [1]}), (10, {2: [0], 4: [1]}), (2, {1: [0, 1]}), (1, {})])
def test_rungs_are_shares_of_each_runs_own_length(of: int, reached: dict[int, list[int]]) -> None:
    assert {epochs: found for epochs in range(1, of + 1) if (found := rungs_after(epochs, of))} == reached


def test_of_three_trials_at_a_rung_the_best_goes_on() -> None:
    study, verdicts = Study({"sparsity": [0.5, 0.9]}, 0), []
    for accuracy in (0.5, 0.4, 0.6, 0.55, 0.58):
        proposal = study.again({"sparsity": 0.9})
        verdicts.append(study.goes_on(proposal, 0, accuracy))
        study.tell(proposal, None)
    assert verdicts == [True, False, True, False, False]


def test_what_is_proposed_follows_from_the_seed_and_from_what_was_told() -> None:
    space = {"sparsity": [0.5, 0.8, 0.9], "recipe": ["mest", "rigl"]}
    one, other = Study(space, 7), Study(space, 7)
    tried: list[dict[str, Any]] = []
    while (found := one.new(tried)) is not None:
        proposal, values = found
        again = other.new(tried)
        assert again is not None
        assert again[1] == values
        for study, asked in ((one, proposal), (other, again[0])):
            study.tell(asked, values["sparsity"])
        tried.append(values)
    assert len(tried) == 6, "all there are, and none twice"


# --- the command -----------------------------------------------------------------------------------------------------


def found_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "search.json").read_text())
    return content


def without_seconds(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in trial.items() if "seconds" not in name} for trial in trials]


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nobody stopped."""
    place = tmp_path_factory.mktemp("searched")
    ended = start([*WORDS, "--data", str(tiny), "--out", "s"], log=place / "log", cwd=place).end()
    assert ended.code == 0, ended.err
    (place / "s" / "printed").write_text(ended.out)
    return place / "s"


def test_the_dense_nets_are_tried_first_and_to_the_end(whole: Path) -> None:
    shorter, narrower = found_in(whole)["trials"][:2]
    assert (shorter["name"], shorter["values"]) == ("dense, shorter", {"recipe": "dense", "width": 1.0})
    assert (shorter["state"], shorter["epochs"], len(shorter["val_accuracy"])) == ("finished", 2, 2)  # half of 4
    assert (narrower["name"], narrower["state"], narrower["epochs"]) == ("dense, narrower", "finished", 4)
    assert narrower["values"]["recipe"] == "dense"
    assert 0 < narrower["values"]["width"] < 1
    half = shorter["planned_flops"]
    assert all(trial["planned_flops"] <= half for trial in found_in(whole)["trials"])
    assert narrower["planned_flops"] > 0.9 * half


def test_trials_are_pruned_and_told_with_what_they_cost(whole: Path) -> None:
    found, printed = found_in(whole), (whole / "printed").read_text()
    trials = [trial for trial in found["trials"] if trial["state"] != "unfit"]
    assert len(trials) == 5
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    assert pruned
    for trial in trials:
        assert (trial["state"] == "pruned") == (len(trial["val_accuracy"]) < trial["epochs"])
        rows = (whole / "runs" / trial["name"].replace(", ", "-").replace(" ", "-") / "metrics.jsonl").read_text()
        assert [json.loads(row)["val_accuracy"] for row in rows.splitlines()] == trial["val_accuracy"]
        assert (trial["test_accuracy"] is None) == (trial["state"] == "pruned")
        assert f"{trial['name']} (" in printed
    cost = found["result"]["cost"]
    assert cost["training_flops"] == sum(trial["training_flops"] for trial in found["trials"])
    assert cost["dense_training_flops"] == 2 * trials[0]["training_flops"]
    assert (whole / "table.md").read_text() in printed
    assert "One seed decides little" in printed


def test_the_best_finished_trial_is_trained_again_by_the_command_that_is_printed(
    whole: Path, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, trials = found_in(whole)["result"], found_in(whole)["trials"]
    best = max((trial for trial in trials if trial["state"] == "finished"), key=lambda trial: trial["val_accuracy"][-1])
    assert best["val_accuracy"][-1] == next(t for t in trials if t["name"] == result["best"])["val_accuracy"][-1]
    assert result["command"] in (whole / "printed").read_text()
    monkeypatch.chdir(whole.parent)
    ended = spfde(*shlex.split(result["command"])[1:], "--out", here / "again", "--quiet")
    assert ended.code == 0, ended.err
    again = json.loads((here / "again" / "summary.json").read_text())
    chosen = next(trial for trial in trials if trial["name"] == result["best"])
    assert (again["val_accuracy"], again["test_accuracy"]) == (chosen["val_accuracy"][-1], chosen["test_accuracy"])
    compared = Comparison.of(read_spec(str(whole / "confirm.toml")))
    assert {"dense, shorter", "dense, narrower", result["best"]} <= {each.name for each in compared.candidates}


def test_a_search_that_was_killed_comes_to_the_same(
    whole: Path, tiny: Path, spfde: Spfde, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = start(
        [*WORDS, "--data", str(tiny), "--out", "s"], log=here.parent / "log", cwd=here, wait_at="among later batches"
    )
    command.reach()
    command.kill(signal.SIGKILL)
    before = sum(len(path.read_text().splitlines()) for path in here.glob("s/runs/*/metrics.jsonl"))
    trained: list[int] = []
    usual = loop.train_epoch
    monkeypatch.setattr(
        loop,
        "train_epoch",
        lambda run, step, epoch, *rest, **more: trained.append(epoch) or usual(run, step, epoch, *rest, **more),
    )
    ended = spfde("search", "--resume", "s")
    assert ended.code == 0, ended.err
    trials = found_in(here / "s")["trials"]
    assert without_seconds(trials) == without_seconds(found_in(whole)["trials"])
    assert before + len(trained) == sum(len(trial["val_accuracy"]) for trial in trials)
    trained.clear()
    assert spfde("search", "--resume", "s").code == 0
    assert trained == [], "what is finished is not repeated"


def test_a_pruned_trial_is_a_run_that_can_be_resumed(whole: Path, spfde: Spfde, here: Path) -> None:
    trial = next(trial for trial in found_in(whole)["trials"] if trial["state"] == "pruned")
    folder = here / "copied"
    shutil.copytree(whole / "runs" / trial["name"].replace(" ", "-"), folder)
    ended = spfde("train", "--resume", folder, "--quiet")
    assert ended.code == 0, ended.err
    assert json.loads((folder / "summary.json").read_text())["epochs"] == trial["epochs"]


def test_seconds_are_measured_before_a_length_is_chosen(tiny: Path, spfde: Spfde, here: Path) -> None:
    words = ["--budget", "1000 s", "--trials", 3, "--epochs", 2, "--batch-size", 16, "--engine", "masked"]
    words += ["--sparsity", "0.5,0.9", "--freeze", 0.3, "--sieve", 0, "--width", 1]
    ended = spfde("search", "--data", tiny, "--out", "s", *words)
    assert ended.code == 0, ended.err
    first, *others = found_in(here / "s")["trials"]
    assert (first["state"], first["epochs"]) == ("finished", 2)
    assert first["timing_seconds"] > 0
    assert first["timing_flops"] == first["training_flops"]
    assert not (here / "s" / "timing").exists()
    assert "of the budget, measured" in ended.out
    assert [trial["state"] for trial in others] == ["unfit"] * 3
    assert "costs no more" in others[0]["why"]
    assert "cannot be reached" in others[1]["why"]
    assert "Nothing is left to try." in ended.out


def test_trials_whose_warm_up_is_too_long_do_not_end_the_search(tiny: Path, spfde: Spfde, here: Path) -> None:
    words = ["--budget", "60% flops", "--trials", 1, "--epochs", 5, "--batch-size", 16, "--engine", "masked"]
    ended = spfde("search", "--data", tiny, "--out", "s", *words, "--warmup", 3)
    assert ended.code == 0, ended.err
    shorter, narrower = found_in(here / "s")["trials"]
    assert (shorter["state"], narrower["state"]) == ("unfit", "finished")
    assert "warmup=3: must be shorter than the run (3 epochs)" in shorter["why"]


def test_a_loss_that_diverges_ends_a_trial_and_not_the_search(tiny: Path, spfde: Spfde, here: Path) -> None:
    words = ["--budget", "50% flops", "--trials", 1, "--epochs", 2, "--batch-size", 16, "--engine", "masked"]
    ended = spfde("search", "--data", tiny, "--out", "s", *words, "--lr", "1e30")
    assert ended.code == 2
    assert [trial["state"] for trial in found_in(here / "s")["trials"]] == ["failed"]
    assert "no trial was finished" in ended.err
    assert "the loss became" in ended.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--budget=None: is missing"),
        (["--budget", "10%"], "is no budget"),
        (["--budget", "0.0001% flops"], "is less than what the cheapest trial costs"),
        (["--budget", "1 B"], "is less than what the cheapest trial costs"),
        (["--budget", "10% flops", "--trials", 0], "--trials=0: must be 1 or more"),
        (["--budget", "10% flops", "--validation-share", 0], "--validation-share=0: must be above 0"),
        (["--budget", "10% flops", "--sparsity", "0.5,1.5"], "--sparsity=1.5"),
        (["--budget", "10% flops", "--sparsity", "much"], "--sparsity='much'"),
        (["--budget", "10% flops", "--seed", "0,1"], "--seed='0,1': is one for all trials"),
        (["--budget", "10% flops", "--recipe", "mets,rigl"], "Did you mean 'mest'?"),
        (["--budget", "10% flops", "--model", "resnet9"], "is no known model"),
        (["--budget", "10% flops", "--track", "wandb"], "No such option: --track"),
        (["--budget", f"{'9' * 400} seconds"], "is no budget"),
        (
            ["--budget", "9% flops", *("--sparsity", 0.9, "--freeze", 0, "--sieve", 0, "--width", 1)],
            "leave nothing to search",
        ),
        (["--resume", "gone"], "is no folder of `spfde search`"),
        (["--resume", "gone", "--epochs", 3], "takes no --epochs"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(
    words: list[Any], told: str, tiny: Path, spfde: Spfde, here: Path
) -> None:
    data = [] if "--resume" in words else ["--data", tiny, "--batch-size", 16]
    ended = spfde("search", *data, *words)
    assert (ended.code, ended.out) == (2, "")
    assert told in ended.err
    assert list(here.iterdir()) == []


def test_without_optuna_the_extra_is_named(spfde: Spfde, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'spfde[search]'" in spfde("search", "--budget", "10% flops").err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 2}, "version"),
        ({"budget": "much"}, "is no budget"),
        ({"options": {"model": 3}}, "model"),
        ({"trials": [{"name": "../elsewhere", "values": {}}]}, "trials.0.name"),
        ({"trials": [{"name": "trial 1", "values": {}}]}, "the first trials are not the dense ones"),
        ({"trials": [*DENSE_TRIALS, {"name": "trial 3", "values": {}}]}, "other options"),
        ({"trials": [*DENSE_TRIALS, {"name": "trial 3", "values": {"sparsity": 0.7}}]}, "a value of sparsity"),
    ],
)
def test_a_damaged_file_is_no_search(change: dict[str, Any], told: str, spfde: Spfde, here: Path) -> None:
    content = {"budget": "10% flops", "wanted": 3, "options": {}, "space": {"sparsity": [0.5, 0.9]}, "trials": []}
    (here / "search.json").write_text(json.dumps({"version": 1} | content | change))
    ended = spfde("search", "--resume", ".")
    assert (ended.code, ended.out) == (2, "")
    assert "is damaged" in ended.err
    assert told in ended.err
