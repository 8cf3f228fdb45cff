"""Loops of others that benchmarks/crash.py kills: Lightning's, Hugging Face's Trainer, and one with Accelerate.

Each saves by its framework's own checkpoints every few steps, amid an epoch too, and goes on from the newest one in its
framework's own way, as docs/integrations.md says. A checkpoint that was cut off is refused by an error of this package,
which ends the process with ``REFUSED``; whoever started it then takes that checkpoint away and starts it again.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spfde
from spfde.app.train.models import build_model
from spfde.errors import SpfdeError
from spfde.recipe import presets

EPOCHS, BATCH, SAVE_EVERY = 4, 16, 3
REFUSED = 3
RESULT = "result.pt"
_LAST_FILES = {"transformers": "trainer_state.json", "accelerate": "custom_checkpoint_0.pkl"}
"""What is written last into a checkpoint that is a folder."""


def run(framework: str, preset: str, engine: str, data: Path, out: Path) -> None:
    """Train to the end, from the newest checkpoint where there is one, and leave what came of it in ``RESULT``."""
    if (out / RESULT).is_file():
        return
    warnings.simplefilter("ignore")
    tempfile.tempdir = str(out / "drafts")  # Lightning's drafts: on the disk of its checkpoints, and seen by unfinished
    Path(tempfile.tempdir).mkdir(parents=True, exist_ok=True)
    recipe = presets.PRESETS[preset].replace(update_interval_epochs=1)
    try:
        model, session = LOOPS[framework](recipe, engine, _images(data), out)
    except SpfdeError as error:
        print(f"{framework}: {error}", flush=True)
        sys.exit(REFUSED)
    found = {
        "weights": model.state_dict(),
        "masks": dict(session.masks),
        "cost": [[row.epoch, row.samples, str(row.cost)] for row in session.cost.rows],
    }
    draft = out / f"{RESULT}.part"
    torch.save(found, draft)
    draft.replace(out / RESULT)


def checkpoints(framework: str, out: Path) -> list[Path]:
    """What the run has saved, whole or not, the newest last."""
    pattern = {"lightning": "last*.ckpt", "transformers": "checkpoint-*", "accelerate": "step*"}[framework]
    found = list(out.glob(pattern))
    if framework == "lightning":
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)
    return sorted(found, key=lambda path: int("".join(filter(str.isdigit, path.name))))


def may_be_cut_off(framework: str, out: Path) -> bool:
    """Whether the newest checkpoint may be refused: a folder, which is written file by file."""
    return framework in _LAST_FILES and bool(checkpoints(framework, out))


def take_away_newest(framework: str, out: Path) -> None:
    """Remove the newest checkpoint."""
    shutil.rmtree(checkpoints(framework, out)[-1])


def unfinished(framework: str, out: Path) -> set[Path]:
    """What is being written, or was when its process was killed."""
    if framework == "lightning":
        return set((out / "drafts").glob("*"))
    last = _LAST_FILES[framework]
    return {path for path in checkpoints(framework, out) if not (path / last).is_file()}


def compare(whole: Path, killed: Path) -> str | None:
    """What differs between two runs that ended; None for nothing."""
    one, other = (torch.load(out / RESULT, weights_only=True) for out in (whole, killed))
    for what in ("weights", "masks"):
        if one[what].keys() != other[what].keys():
            return f"different: names of {what}"
        for name, tensor in one[what].items():
            if not torch.equal(tensor, other[what][name]):
                return f"different: {what}, {name}"
    return None if one["cost"] == other["cost"] else "different: cost"


# --- the loops -----------------------------------------------------------------------------------------------------


def _images(data: Path) -> TensorDataset:
    with np.load(data) as arrays:
        pixels, labels = arrays["x_train"], arrays["y_train"]
    return TensorDataset(torch.from_numpy(pixels)[:, None].float() / 255, torch.from_numpy(labels))


def _net() -> nn.Module:
    return build_model("resnet8", num_classes=3, in_channels=1, image_size=8, seed=0)


def _loader(images: TensorDataset) -> DataLoader[Any]:
    return DataLoader(images, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def _lightning(recipe: spfde.Recipe, engine: str, images: TensorDataset, out: Path) -> tuple[nn.Module, Any]:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from spfde.integrations.lightning import SpfdeCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _sgd(self.net)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
            logits = self.net(batch[0])
            return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "y": batch[1]}

    callback, module = SpfdeCallback(recipe, engine=engine), Module()
    saving = ModelCheckpoint(out, save_last=True, every_n_train_steps=SAVE_EVERY, enable_version_counter=False)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=[callback, saving], accelerator="cpu", **quiet)
    trainer.fit(module, _loader(images), ckpt_path="last")
    return module.net, callback.session


def _transformers(recipe: spfde.Recipe, engine: str, images: TensorDataset, out: Path) -> tuple[nn.Module, Any]:
    from transformers import Trainer, TrainingArguments

    from spfde.integrations.transformers import SpfdeCallback

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    options: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "logging_strategy": "no"}
    options |= {"lr_scheduler_type": "constant", "learning_rate": 0.01, "save_strategy": "steps"}
    args = TrainingArguments(
        str(out), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, save_steps=SAVE_EVERY, **options
    )
    callback = SpfdeCallback(recipe, engine=engine)
    items: Any = [{"x": x, "labels": y} for x, y in images]
    trainer = Trainer(model=Classifier(), args=args, train_dataset=items, callbacks=[callback])
    trainer.train(resume_from_checkpoint=bool(checkpoints("transformers", out)))
    return trainer.model, callback.session


def _accelerate(recipe: spfde.Recipe, engine: str, images: TensorDataset, out: Path) -> tuple[nn.Module, Any]:
    from accelerate import Accelerator

    from spfde.integrations.accelerate import attach

    accelerator, net = Accelerator(cpu=True), _net()
    model, optimizer, loader = accelerator.prepare(net, _sgd(net), _loader(images))
    session = attach(accelerator, model, optimizer, loader, recipe, epochs=EPOCHS, engine=engine)
    accelerator.register_for_checkpointing(session)
    if found := checkpoints("accelerate", out):
        accelerator.load_state(str(found[-1]))
    for _ in session.epochs():
        model.train()
        for x, y in session.loader:
            logits = model(x)
            accelerator.backward(F.cross_entropy(logits, y))
            optimizer.step()
            optimizer.zero_grad()
            session.observe(logits, y)
            if session.step % SAVE_EVERY == 0:
                accelerator.save_state(str(out / f"step{session.step}"))
    return net, session


LOOPS: dict[str, Callable[[spfde.Recipe, str, TensorDataset, Path], tuple[nn.Module, Any]]] = {
    "lightning": _lightning,
    "transformers": _transformers,
    "accelerate": _accelerate,
}
