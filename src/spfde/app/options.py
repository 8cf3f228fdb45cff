"""The options of the command line, each declared once: its type, its default, its range and its words.

Typer makes parameters of them, and what checks them inherits them (``spfde.app.declaring``). Nothing here loads
PyTorch: ``--help`` answers at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from spfde.app.declaring import Sets, Words
from spfde.core.numbers import MOST_EPOCHS, MOST_WIDTH

_SAVINGS, _TRAINING, _MACHINE = "What to save", "How to train", "Where to run"


def _save(words: str) -> Words:
    return Words(words, _SAVINGS, shown="recipe")


class PluginOptions:
    """What is imported before a name is looked up."""

    plugin: Annotated[
        tuple[str, ...],
        Words("module to import, which registers methods, criteria, … of its own; may be repeated", shown=False),
    ] = ()


class DataOptions:
    """What is trained, and on what."""

    data: Annotated[
        str, Words("fashion-mini (embedded), a torchvision name (cifar10, …), imagenet, an image folder or an .npz")
    ] = "fashion-mini"
    image_size: Annotated[
        Annotated[int, Ge(8)] | None,
        Words(
            "pixels a side that all images are scaled and cut to, from 8 on",
            shown="the set's own; a folder's first image, 224 at most",
        ),
    ] = None
    model: Annotated[str, Words("resnet8, resnet20, resnet32, vgg19 or timm:NAME")] = "resnet8"
    width: Annotated[
        float,
        Gt(0),
        Le(MOST_WIDTH),
        Words(f"factor on the channels of a built-in model, above 0 and up to {MOST_WIDTH:g}"),
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe by its name, and what is changed about it: None, or nothing, leaves what the recipe says."""

    recipe: Annotated[str, Words("a preset (see `spfde methods`) or a TOML file", _SAVINGS)] = "spfde"
    sparsity: Annotated[
        float | None, Sets("sparsity", "sparsity"), _save("share of the weights to do without, in [0, 1)")
    ] = None
    structure: Annotated[
        str | None,
        Sets("sparsity", "structure"),
        _save("what exists or not as a whole: unstructured, 4x1, 2x2-inputs (blocks), 2:4, kernel, pattern or channel"),
    ] = None
    exclude: Annotated[
        tuple[str, ...],
        Sets("sparsity", "exclude"),
        _save("name pattern of weights that stay dense, such as `*downsample*`; may be repeated"),
    ] = ()
    freeze: Annotated[
        float | None,
        Sets("freezing", "flops_reduction"),
        _save("share of the training FLOPs to save by freezing, in [0, 1)"),
    ] = None
    freeze_scheme: Annotated[
        str | None,
        Sets("freezing", "scheme"),
        _save("single-shot, single-shot-resume, periodic or delayed-periodic"),
    ] = None
    freeze_unit: Annotated[
        str | None,
        Sets("freezing", "unit"),
        _save("what is frozen at once: block, or layer with its norm"),
    ] = None
    freeze_timing: Annotated[
        str | None,
        Sets("freezing", "timing"),
        _save("exact: at any epoch, so that little more is saved than asked for; update: at update epochs alone"),
    ] = None
    freeze_criterion: Annotated[
        str | None,
        Sets("freezing", "criterion"),
        _save("schedule, or earlier where a block has converged: structure or representation"),
    ] = None
    sieve: Annotated[
        float | None, Sets("sieving", "removed_fraction"), _save("share of the samples to leave out, in [0, 1)")
    ] = None
    sieve_criterion: Annotated[
        str | None,
        Sets("sieving", "criterion"),
        _save("which samples are easy: forgetting, loss, el2n or random; or drawn anew: top-loss or repeated-random"),
    ] = None
    sieve_full_last: Annotated[
        float | None,
        Sets("sieving", "full_last"),
        _save("share of the run, at its end, in which all samples are used, and more left out before; in [0, 1)"),
    ] = None
    sieve_offset: Annotated[
        int | None,
        Sets("sieving", "offset_epochs"),
        _save("epochs by which samples move after the structure does, from 0 to less than the interval"),
    ] = None
    soft_bound: Annotated[bool | None, Sets("sparsity", "soft_bound"), _save("MEST's soft memory bound (EM&S)")] = None
    interval: Annotated[
        str,
        Sets("", "update_interval_epochs"),
        Words("epochs between two updates of the structure, or auto", _SAVINGS),
    ] = "auto"


class LengthOptions:
    """How long the run is, and of how many samples an epoch."""

    epochs: Annotated[
        int, Ge(1), Le(MOST_EPOCHS), Words(f"length of the run in epochs, from 1 to {MOST_EPOCHS:,}", _TRAINING)
    ] = 20
    batch_size: Annotated[
        int, Ge(1), Words("samples per step, of each process where there are several; from 1 on", _TRAINING)
    ] = 64
    validation_share: Annotated[
        float,
        Ge(0),
        Lt(1),
        Words(
            "share of the training set, in [0, 1), that is held out to choose the best epoch by; the test set is then "
            "looked at once, at the end",
            _TRAINING,
        ),
    ] = 0.0


class UpdateOptions:
    """How weights are stepped."""

    optimizer: Annotated[Literal["sgd", "adamw"], Words("sgd (with momentum) or adamw", _TRAINING)] = "sgd"
    lr: Annotated[
        Annotated[float, Gt(0)] | None,
        Words("initial learning rate, above 0", _TRAINING, shown="0.1; 0.001 with adamw"),
    ] = None
    schedule: Annotated[
        Literal["cosine", "step", "constant"],
        Words(
            "of the learning rate: cosine (by block where the recipe says so), step (a tenth at half and at three "
            "quarters of the run) or constant",
            _TRAINING,
        ),
    ] = "cosine"
    warmup: Annotated[
        Annotated[int, Ge(0)] | None,
        Words("epochs in which the learning rate rises linearly, 0 or more", _TRAINING, shown="the recipe's, or 0"),
    ] = None
    momentum: Annotated[float, Ge(0), Lt(1), Words("of sgd, in [0, 1)", _TRAINING)] = 0.9
    nesterov: Annotated[bool, Words("Nesterov's form of the momentum", _TRAINING)] = False
    weight_decay: Annotated[
        float, Ge(0), Words("L2 penalty of sgd, decoupled decay of adamw; 0 or more", _TRAINING)
    ] = 1e-4
    clip_norm: Annotated[
        float, Ge(0), Words("largest norm of all gradients of a step together; 0 for any", _TRAINING)
    ] = 0.0
    accumulate: Annotated[int, Ge(1), Words("batches of a step, from 1 on", _TRAINING)] = 1


class TrainingOptions(UpdateOptions, LengthOptions):
    """How the model is trained."""

    weights: Annotated[
        str | None,
        Words(
            "what training starts from: pretrained (of timm's models), or a .safetensors or .pt file of weights",
            _TRAINING,
            shown="fresh weights",
        ),
    ] = None
    label_smoothing: Annotated[
        float, Ge(0), Lt(1), Words("share of each label that goes to all classes alike, in [0, 1)", _TRAINING)
    ] = 0.0
    ema: Annotated[
        float,
        Ge(0),
        Lt(1),
        Words(
            "decay of a moving average of the weights, in [0, 1), which is evaluated in their place; 0 for none",
            _TRAINING,
        ),
    ] = 0.0
    reestimate_bn: Annotated[
        int,
        Ge(0),
        Words(
            "training samples, at most, on which the statistics of batch norms are estimated anew before each "
            "evaluation; 0 for none",
            _TRAINING,
        ),
    ] = 0
    augment: Annotated[
        Literal["auto", "none", "crop", "crop+flip", "random-resized-crop"],
        Words("auto (as the data allow), none, crop, crop+flip or random-resized-crop (and flip)", _TRAINING),
    ] = "auto"
    randaugment: Annotated[
        Annotated[int, Ge(0), Le(30)] | None,
        Words("magnitude of RandAugment's operations on each image, from 0 to 30", _TRAINING, shown="none"),
    ] = None
    randaugment_ops: Annotated[
        int, Ge(1), Le(14), Words("operations of RandAugment on each image, from 1 to 14", _TRAINING)
    ] = 2
    mixup: Annotated[
        float, Ge(0), Le(100), Words("parameter of mixup's beta distribution, up to 100; 0 for none", _TRAINING)
    ] = 0.0
    cutmix: Annotated[
        float, Ge(0), Le(100), Words("parameter of CutMix's beta distribution, up to 100; 0 for none", _TRAINING)
    ] = 0.0
    crop_share: Annotated[
        Annotated[float, Ge(0.25), Le(1)] | None,
        Words(
            "share of an image's shorter side, from 0.25 to 1, that is within the cut at its centre, as in evaluation",
            _TRAINING,
            shown="the set's own: 1 but for imagenet",
        ),
    ] = None
    seed: Annotated[
        int, Ge(0), Lt(2**32), Words("seed of weights, masks, sieving and batches, from 0 to 2^32 - 1", _TRAINING)
    ] = 0
    keep_every: Annotated[
        Annotated[int, Ge(1)] | None,
        Words("keep weights and masks every so many epochs, for `spfde analyze`", _TRAINING, shown="none"),
    ] = None


class MachineOptions:
    """Where the run computes, and who is told."""

    engine: Annotated[str, Words("auto, masked, native (CPUs), cudagraph or blocks (GPUs)", _MACHINE)] = "auto"
    device: Annotated[str, Words("auto, cpu, cuda, cuda:N or mps", _MACHINE)] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Words("auto (bf16 and tf32 on a GPU that has them, else fp32), fp32, bf16 or fp16 (on a GPU)", _MACHINE),
    ] = "auto"
    compile: Annotated[
        bool | None,
        Words("compile the model's repeated blocks; auto: on a GPU, if the run is long enough", _MACHINE, shown="auto"),
    ] = None
    data_on: Annotated[
        Literal["auto", "device", "host"],
        Words("where images in memory lie: device, host or auto (on a GPU that has the room)", _MACHINE),
    ] = "auto"
    profile: Annotated[
        Annotated[int, Ge(1)] | None,
        Words(
            "record so many steps, from 1 on, into trace.json, and print how busy the GPU was", _MACHINE, shown=False
        ),
    ] = None
    workers: Annotated[
        Annotated[int, Ge(0)] | None,
        Words("loader processes, 0 or more", _MACHINE, shown="none for images in memory, else one a core"),
    ] = None
    data_root: Annotated[
        Path, Words("where torchvision's sets lie or are put, and imagenet's train and val lie", _MACHINE)
    ] = Path("data")
    track: Annotated[tuple[str, ...], Words("tensorboard, wandb, …; may be repeated", _MACHINE, shown=False)] = ()


class CacheOptions:
    """What is kept of the outputs of the frozen front; a setting of the machine, like the engine."""

    cache_variants: Annotated[
        int,
        Ge(0),
        Words(
            "variants of each sample whose output of the frozen front is kept, 0 or more (engines native, cudagraph)",
            _MACHINE,
        ),
    ] = 0
    cache_precision: Annotated[Literal["fp16", "int8"], Words("of what is kept: fp16 or int8", _MACHINE)] = "fp16"
    cache_limit: Annotated[float, Gt(0), Words("room for what is kept, in GiB, above 0", _MACHINE)] = 8.0
    cache_folder: Annotated[
        Path | None, Words("folder of a memory-mapped file for it (engine native)", _MACHINE, shown="in memory")
    ] = None


OF_RUNS = (DataOptions, PluginOptions, RecipeOptions, TrainingOptions, MachineOptions, CacheOptions)
"""What ``spfde train`` takes, and what trains many runs."""
LISTS = (DataOptions, RecipeOptions, TrainingOptions)
"""Those whose options may have several values where many runs are trained."""


class AnalysisOptions:
    """What is measured by ``spfde analyze``."""

    samples: Annotated[int, Ge(4), Words("test images that CKA is measured on, at most; from 4 on")] = 2000
    batch_size: Annotated[int, Ge(4), Words("images per minibatch of CKA, at most; from 4 on")] = 128
    gradient_samples: Annotated[
        int, Ge(0), Words("training images that gradient norms are measured on, at most; 0 for none")
    ] = 256
    data_root: Annotated[Path | None, Words("where torchvision's sets lie", shown="the run's")] = None


class EvaluationOptions:
    """What a run's weights are evaluated on by ``spfde evaluate``."""

    data: Annotated[
        str | None,
        Words("other data of the same shape and classes, whose test part is taken", shown="the run's own"),
    ] = None
    image_size: Annotated[
        Annotated[int, Ge(8)] | None,
        Words("pixels a side that other data are scaled and cut to, from 8 on", shown="the data's own"),
    ] = None
    batch_size: Annotated[int, Ge(1), Words("images per batch, from 1 on")] = 256
    device: Annotated[str, Words("auto, cpu, cuda, cuda:N or mps")] = "auto"
    data_root: Annotated[Path | None, Words("where torchvision's sets lie", shown="the run's")] = None


class PredictionOptions:
    """How ``spfde predict`` computes."""

    top: Annotated[int, Ge(1), Words("most probable classes of each image, from 1 on")] = 1
    batch_size: Annotated[int, Ge(1), Words("images per batch, from 1 on")] = 64
    engine: Annotated[
        Literal["auto", "masked", "native"],
        Words("auto (native on a CPU that can, for 64 images or more), masked or native"),
    ] = "auto"
    device: Annotated[str, Words("auto, cpu, cuda, cuda:N or mps")] = "auto"


def recipe_fields() -> dict[str, Sets]:
    """For each option that changes a recipe the field that it sets."""
    hints = get_type_hints(RecipeOptions, include_extras=True)
    return {name: note for name, hint in hints.items() for note in get_args(hint) if isinstance(note, Sets)}
