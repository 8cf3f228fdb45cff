"""How fast does a sparse net answer, on a CPU?

A ResNet-32 (widths 32-64-128) with random weights, 90 % of those of its convolutions zero, exported and read again with
``spfde.export.load(..., engine="native")``, in fp32 and in bf16. Against it, the same weights with their zeros: PyTorch
in evaluation mode, eager and compiled, in fp32 and under autocast to bf16, contiguous and channels_last where eager;
ONNX Runtime in fp32 and in int8, whose dynamic quantisation takes convolutions by ConvInteger. Its static quantisation
is faster; it wants images to calibrate with, and rounds weights and values to 8 bits, so it has figures of its own. All
are timed turn by turn in one process, with as many threads as each other; a call is one batch from tensor to tensor,
right after another one.

    python benchmarks/inference.py                  # about ten minutes on two cores
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _common import Figure, Result, Table, Timing, begin, compare, interleave, parser, publish, show
from spfde.app.train.models import build_model
from spfde.export import load, save_compressed, save_onnx

SPARSITY, CLASSES = 0.9, 100
BATCHES = {1: (1.0, 1.5), 8: (None, None), 64: (3.0, 4.5)}
"""Least speed-up over the best other way that needs no calibration, and what is aimed at, by batch."""
NATIVE, HALF = "native, fp32", "native, bf16"
CALIBRATED = "ONNX Runtime, static int8"
PAUSE = 0.02  # seconds
COLUMNS = ("batch", "computed by", "latency, median", "images a second")
Call = Callable[[], object]


def net() -> nn.Module:
    """A dense ResNet-32."""
    return build_model("resnet32", num_classes=CLASSES, in_channels=3, image_size=32, seed=0).eval()


def make_sparse(model: nn.Module) -> None:
    """Zero a random share of the weights of every convolution."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < SPARSITY, 0)


def in_pytorch(model: nn.Module, x: Tensor, *, half: bool = False) -> Call:
    """A call of the model, without gradients."""

    def call() -> object:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(x)

    return call


def in_onnx_runtime(path: Path, x: Tensor) -> Call:
    """A call of a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batch = x.numpy()
    return lambda: session.run(None, {"input": batch})


def quantise_dynamically(graph: Path, to: Path) -> None:
    """Weights in 8 bits, and values where they are multiplied."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Unsigned weights: of signed ones with unsigned activations ONNX Runtime has no ConvInteger on CPUs.
    quantize_dynamic(graph, to, weight_type=QuantType.QUInt8)


def quantise_statically(graph: Path, to: Path) -> None:
    """Weights and values in 8 bits, scaled by channel and by what calibration sees: its fastest on AVX512_VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Noise(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            generator = torch.Generator().manual_seed(0)
            self._batches = iter([torch.randn(16, 3, 32, 32, generator=generator).numpy() for _ in range(4)])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"input": batch}

    quant_pre_process(str(graph), str(to))
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(str(to), str(to), Noise(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)


def graphs(model: nn.Module, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """ONNX graphs by name, and what could not be made."""
    plain = folder / "net.onnx"
    made, notes = {"ONNX Runtime, fp32": plain}, []
    save_onnx(model, torch.zeros(2, 3, 32, 32), plain)
    for name, quantise in (("ONNX Runtime, dynamic int8", quantise_dynamically), (CALIBRATED, quantise_statically)):
        path = folder / f"{quantise.__name__}.onnx"
        try:
            quantise(plain, path)
            in_onnx_runtime(path, torch.zeros(1, 3, 32, 32))()
            made[name] = path
        except Exception as error:  # its quantiser raises whatever it likes
            notes.append(f"{name} does not take this net: {str(error).splitlines()[0][:200]}")
    return made, notes


def compiled(model: nn.Module, x: Tensor, *, half: bool) -> Call:
    """A call of the model, compiled for one shape."""
    torch._dynamo.reset()
    call = in_pytorch(torch.compile(model, dynamic=False), x, half=half)
    call()
    return call


def variants(
    models: Mapping[str, nn.Module], onnx: Mapping[str, Path], x: Tensor, *, compile: bool
) -> tuple[dict[str, Call], list[str]]:
    """What is timed for a batch, by name, and what could not be had."""
    plain, channels_last = models["plain"], models["channels_last"]
    last, notes = x.contiguous(memory_format=torch.channels_last), []
    calls: dict[str, Call] = {name: partial(models[name], x) for name in (NATIVE, HALF)}
    for half, word in ((False, "fp32"), (True, "bf16")):
        calls[f"PyTorch, {word}"] = in_pytorch(plain, x, half=half)
        calls[f"PyTorch, {word}, channels_last"] = in_pytorch(channels_last, last, half=half)
        if compile:
            try:
                calls[f"PyTorch, {word}, compiled"] = compiled(channels_last, last, half=half)
            except Exception as error:  # without a compiler, or with one that fails
                notes.append(f"PyTorch's compiler fails in {word}: {str(error).splitlines()[0][:200]}")
    calls.update((name, in_onnx_runtime(path, x)) for name, path in onnx.items())
    return calls, notes


def check(calls: Mapping[str, Call], expected: Tensor) -> None:
    """Raise where a variant does not give about what PyTorch gives in fp32."""
    for name, call in calls.items():
        found: Any = call()
        found = found if isinstance(found, Tensor) else torch.from_numpy(found[0])
        error = float((found.float() - expected).norm() / expected.norm())
        if error > (0.2 if "int8" in name else 0.05 if "bf16" in name else 1e-4):
            raise RuntimeError(f"{name} is off by {error:.1%}")


@contextmanager
def steady(call: Call) -> Iterator[None]:
    """As where one call follows another: what it reads is in the caches, and the threads of the other ways, which spin
    for a while after their work, have gone to sleep."""
    time.sleep(PAUSE)
    call()
    yield


def figures_of(size: int, timings: Mapping[str, Timing]) -> list[Figure]:
    """Speed-ups of the faster native way over the best of the others, over static int8, and of fp32 over fp32."""
    native = min((timings[name] for name in (NATIVE, HALF)), key=lambda timing: timing.median)
    others = {name: timing for name, timing in timings.items() if name not in (NATIVE, HALF, CALIBRATED)}
    best, single = (
        min((name for name in others if word in name), key=lambda name: others[name].median) for word in ("", "fp32")
    )
    low, aim = BATCHES[size]
    found = [
        Figure.of(
            f"batch {size}, best other way ({best}) over native",
            compare(others[best], native), headline=True, low=low, aim=aim,
        ),
        Figure.of(
            f"batch {size}, best other way in fp32 ({single}) over native in fp32",
            compare(others[single], timings[NATIVE]),
        ),
    ]  # fmt: skip
    if CALIBRATED in timings:
        found.append(Figure.of(f"batch {size}, {CALIBRATED}, over native", compare(timings[CALIBRATED], native)))
    return found


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds of one call of each (101)")
    made.add_argument("--no-compile", action="store_true", help="leave PyTorch's compiler out")
    options = made.parse_args(argv)
    stamped = begin(options)
    rounds = options.rounds or (3 if options.quick else 101)
    figures, rows, notes = list[Figure](), list[tuple[str, ...]](), list[str]()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and quantisers
        folder, models = Path(place), {"plain": net()}
        make_sparse(models["plain"])
        save_compressed(models["plain"].state_dict(), folder / "net.safetensors")
        models["channels_last"] = load(folder / "net.safetensors", model=net()).to(memory_format=torch.channels_last)
        models[NATIVE] = load(folder / "net.safetensors", model=net(), engine="native")
        models[HALF] = load(folder / "net.safetensors", model=net(), engine="native", precision="bf16")
        onnx, missing = graphs(models["plain"], folder)
        notes += missing
        for size in BATCHES:
            x = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(size))
            calls, missing = variants(models, onnx, x, compile=not (options.no_compile or options.quick))
            notes += [note for note in missing if note not in notes]
            check(calls, in_pytorch(models["plain"], x)())  # type: ignore[arg-type]
            timings = interleave(
                calls, rounds, warmup=2, around={name: partial(steady, call) for name, call in calls.items()}
            )
            figures += figures_of(size, timings)
            rows += [
                (str(size), name, show(timing.median, "seconds"), f"{size / timing.median:,.0f}")
                for name, timing in timings.items()
            ]
    publish(
        Result(
            name="inference",
            title="Inference",
            question="How fast does a ResNet-32 at 90 % sparsity answer by the native kernels, against PyTorch and "
            "ONNX Runtime with the same weights, zeros included?",
            command="python benchmarks/inference.py",
            figures=tuple(figures),
            tables=(Table("A call", COLUMNS, tuple(rows)),),
            settings={"rounds": rounds, "sparsity": SPARSITY},
            notes=tuple(notes),
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
