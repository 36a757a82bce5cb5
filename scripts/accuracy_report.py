"""Write the pages of docs/accuracy.md: mixed-precision models compared with PyTorch in float64, layer by layer.

    python scripts/accuracy_report.py resnet50 bert_base --out docs        # on a GPU: accuracy-resnet50.html, ...
    python scripts/accuracy_report.py example --out docs --screenshots     # anywhere: accuracy-example.html, .png

Screenshots need Chromium. On a machine without a GPU models run in ONNX Runtime (``--backend onnxruntime``).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import trtbridge as tb

HERE = Path(__file__).resolve().parent
WIDTHS = (1280, 400)
"""Of the screenshots, in pixels; each is as high as the page is at its width."""
RULER = """<!DOCTYPE html><meta charset="utf-8"><body><script>
const frame = document.createElement("iframe");
frame.style = "border:0;height:10px;width:WIDTHpx";
frame.srcdoc = PAGE;
frame.onload = () => document.body.dataset.height = frame.contentDocument.documentElement.scrollHeight;
document.body.append(frame);
</script>"""
"""A page that measures another, which itself may hold no script."""


class Block(torch.nn.Module):
    """What the example is made of: adds to its input what it makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.gelu(self.norm(self.conv(x)))


class Example(torch.nn.Module):
    """A small network whose energies are large numbers: the limit that they get below is too narrow for float16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(4)))
        self.head = torch.nn.Linear(32, 100)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.blocks(torch.relu(self.conv(x)))
        logits = self.head(y.mean((2, 3)))
        return {"logits": logits, "label": logits.argmax(1), "energy": torch.exp(y.abs().mean((1, 2, 3)) * 10)}


def example_report(backend: str) -> tuple[tb.CompareReport, Sequence[Any]]:
    """The page that shows all parts: outputs and layers within and out of tolerance, and several shapes.

    Nothing is wrong with the example: limits narrower than float16 is exact mark some of it.
    """
    device = torch.device("cpu") if backend == "onnxruntime" else torch.device("cuda")
    net = Example().eval().to(device)
    shapes = {"x": {0: tb.Dim("batch", min=1, opt=4, max=16)}}
    args = (torch.randn(4, 3, 32, 32, device=device),)
    fast = tb.convert(net, args, dynamic_shapes=shapes, backend=backend, precision="fp16")
    narrow = {"energy": tb.Tolerance(rtol=2.5e-5)}
    report = tb.compare(net, fast, samples=12, top_k=True, golden="float64", tolerance=narrow)
    return report, tb.localize(net, fast, args, tolerance=3.7e-4).layers


def model_report(name: str, backend: str, samples: int) -> tuple[tb.CompareReport, Sequence[Any]]:
    """A model of the GPU tests in mixed precision, and its layers."""
    sys.path.insert(0, str(HERE.parent / "tests" / "gpu"))
    import zoo

    case = next(case for case in zoo.CASES if case.name == name)
    device = torch.device("cpu") if backend == "onnxruntime" else torch.device("cuda")
    module = case.module().to(device)
    args, kwargs = case.example(2, 0, torch.float32, device)
    shapes = case.dynamic_shapes
    converted = tb.convert(module, args, kwargs, dynamic_shapes=shapes, backend=backend, precision="fp16")

    def inputs() -> Iterator[Any]:
        for index in range(samples):
            yield case.example((1, 2, 4)[index % 3], 100 + index, torch.float32, device)

    report = tb.compare(module, converted, inputs(), golden="float64", top_k=name.startswith("resnet"))
    return report, tb.localize(module, converted, (args, kwargs)).layers


def take_screenshots(page: Path, folder: Path, stem: str) -> None:
    """Pictures of a whole page in a wide and in a narrow window.

    Raises:
        SystemExit: there is no Chromium, or it could not measure the page.
    """
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise SystemExit("There is no Chromium here: apt-get install chromium, or leave --screenshots out.")
    for width in WIDTHS:
        with tempfile.TemporaryDirectory() as scratch:
            command = [program, "--headless=new", "--disable-gpu", "--no-sandbox", "--hide-scrollbars"]
            command += ["--disable-background-networking", f"--user-data-dir={scratch}/profile"]
            ruler = Path(scratch) / "ruler.html"
            text = json.dumps(page.read_text()).replace("</", "<\\/")
            ruler.write_text(RULER.replace("WIDTH", str(width)).replace("PAGE", text))
            measured = _run([*command, "--virtual-time-budget=5000", "--dump-dom", ruler.as_uri()])
            height = re.search(r'data-height="(\d+)"', measured)
            if height is None:
                raise SystemExit(f"{program} could not measure {page}: {measured[-500:]}")
            picture = folder / f"{stem}-{width}.png"
            _run([*command, f"--window-size={width},{height[1]}", f"--screenshot={picture}", page.resolve().as_uri()])


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="example, or a model of tests/gpu/zoo.py: resnet50")
    parser.add_argument("--backend", default="tensorrt_rtx" if torch.cuda.is_available() else "onnxruntime")
    parser.add_argument("--samples", type=int, default=20, help="inputs that a model is compared on")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    parser.add_argument("--screenshots", action="store_true", help="and a picture of each page, by Chromium")
    chosen = parser.parse_args()
    for name in chosen.models:
        if name == "example":
            report, layers = example_report(chosen.backend)
        else:
            report, layers = model_report(name, chosen.backend, chosen.samples)
        page = chosen.out / f"accuracy-{name}.html"
        report.to_html(page, layers=layers)
        print(report)
        print(f"wrote {page}")
        if chosen.screenshots:
            take_screenshots(page, chosen.out, f"accuracy-{name}")


if __name__ == "__main__":
    main()
