"""The trainer from Python, with torch, numpy and pydantic alone."""

from __future__ import annotations

from pathlib import Path

from helpers.processes import start

SCRIPT = """
import sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "click", "rich", "accelerate", "safetensors", "matplotlib", "jinja2", "timm",
                                  "torchvision", "PIL", "transformers", "lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuses())
import importlib.util
usual = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return usual(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec

from pathlib import Path
from spfde.app.train.loop import train
from spfde.app.train.options import TrainOptions

data, out = sys.argv[1:]
for place in ("host", "device"):
    options = TrainOptions(data=data, epochs=2, batch_size=16, engine="masked", data_on=place, profile=2)
    summary = train(options, Path(out, place))
    again = train(options, Path(out, place), resume=True)
    print(summary["epochs"], again["epochs"], summary["test_accuracy"] == again["test_accuracy"])
"""


def test_it_trains_and_resumes_without_what_the_command_line_needs(tiny: Path, tmp_path: Path) -> None:
    ended = start("-c", SCRIPT, str(tiny), str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["2", "2", "True"] * 2
    for place in ("host", "device"):
        assert (tmp_path / place / "checkpoints" / "latest" / "model.pt").is_file()
