"""The report page: whole, in one file, without script or network, and true to the numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.compare_report import CompareReport, OutputReport
from trtbridge.bridge.compare_statistics import OutputStatistics
from trtbridge.bridge.report_plots import histogram, layers, power

_VOID = {"meta"}


class Page(HTMLParser):
    """Tags, attributes and words; complains of what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def reported(error: float, label: str = "logits", samples: int = 3) -> CompareReport:
    torch.manual_seed(1)
    found = OutputStatistics(label, top_k=(1, 5))
    for index in range(samples):
        reference = torch.randn(8 + index % 3, 20)
        found.add(index, f"{8 + index % 3}x3x32x32", reference, reference + error * torch.randn_like(reference))
    return CompareReport("Net in PyTorch", "Net on tensorrt_rtx", "3 random", samples, (OutputReport.of(found),))


@pytest.mark.parametrize("error", [0.0, 1e-6, 0.5, float("nan"), float("inf")])
def test_a_whole_page_without_network(error: float, tmp_path: Path) -> None:
    report = reported(error)
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    words = " ".join(page.words)
    assert ("within tolerance" if report.ok else "out of tolerance") in words
    assert str(report.outputs[0].tolerance) in words
    assert ("svg" in page.tags) == bool(report.outputs[0].histogram)
    assert text.count('class="fill') == (3 if report.outputs[0].max_abs else 0), "a bar for each shape"


def test_names_are_escaped() -> None:
    report = reported(0.5, label="<script>alert('x')</script>[0]")
    text = report.to_html()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    Page(text)


def test_many_shapes_and_failures_are_cut_short() -> None:
    found = OutputStatistics("y")
    for index in range(40):
        found.add(index, f"{index + 1}x4", torch.zeros(2), torch.full((2,), float(index + 1)))
    report = CompareReport("a", "b", "40", 40, (OutputReport.of(found),))
    words = " ".join(Page(report.to_html()).words)
    assert "and 30 more" in words
    assert "and 28 shapes with smaller errors" in words
    assert "40x4" in words
    assert " 1x4:" not in words


@dataclass
class FakeLayer:
    tensor: str
    error: float | None
    wrong: str = ""
    op_type: str = "MatMul"
    place: str = "net.py:12 (encoder.0)"


def test_layers_are_drawn_and_the_wrong_one_is_named() -> None:
    found = [FakeLayer(f"t{index}", 1e-6 * (index + 1)) for index in range(100)]
    found[40] = FakeLayer("culprit<1>", 0.3, "0.3 instead of 1e-3")
    found[41] = FakeLayer("unknown", None)
    text = reported(0.5).to_html(layers=found)
    words = " ".join(Page(text).words)
    assert "culprit<1>" in words
    assert "; alone: 0.3 instead of 1e-3" in words
    assert "net.py:12 (encoder.0)" in words
    assert "unknown" not in words
    assert text.count('class="wrong"') == 1
    assert "Error by layer" not in reported(0.5).to_html()


def test_plots_are_xml_and_stay_inside_their_frame() -> None:
    bars = [(-8 + 0.25 * index, index * index) for index in range(30)]
    pictures = [
        histogram(bars, [("0.5", 1e-6), ("0.99", 2e-6), ("1", 0.0)], 'title "quoted" <b>'),
        histogram(bars, [("50 %", 1.3e-7), ("99 %", 1.4e-7)], "two marks that nearly meet"),
        histogram(bars, [("50 %", 1e-8), ("99 %", 1e-8)], "both at the left edge"),
        histogram(bars, [("50 %", 0.1), ("99 %", 0.3)], "both at the right edge"),
        histogram([(0.0, 1)], [("0.5", 1e9)], "one bar"),
        histogram([(-40.0, 5), *((-39.75 + 0.25 * index, 0) for index in range(250)), (23.0, 1)], [], "all decades"),
        layers([0.0, 1e-7, float("inf"), 1e-2], [False, False, True, False], "layers"),
        layers([0.0], [False], "one layer"),
        layers([1e-5] * 500, [False] * 500, "many"),
    ]
    for picture in pictures:
        root = ET.fromstring(picture)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        labels: list[tuple[float, float, float]] = []
        for element in root:
            for name, limit in (("x", width), ("x1", width), ("x2", width), ("cx", width)):
                assert 0 <= float(element.attrib.get(name, 0)) <= limit
            for name in ("y", "y1", "y2", "cy"):
                assert 0 <= float(element.attrib.get(name, 0)) <= height
            if element.tag == "text":
                words = element.text or ""
                size = 6.5 * len(words)  # a wide guess of 11 px letters
                share = {"start": 0.0, "middle": 0.5, "end": 1.0}[element.attrib["text-anchor"]]
                left = float(element.attrib["x"]) - share * size
                assert left >= -1, words
                assert left + size <= width + 1, words
                labels.append((float(element.attrib["y"]), left, left + size * 0.75))
        for one in labels:
            for other in labels:
                if one is not other and abs(one[0] - other[0]) < 8:
                    assert one[2] <= other[1] or other[2] <= one[1], "two labels lie over each other"


def test_close_marks_have_both_names() -> None:
    bars = [(-8 + 0.25 * index, 1) for index in range(30)]
    picture = histogram(bars, [("50 %", 1.3e-7), ("99 %", 1.4e-7)], "title")
    assert picture.count('class="mark"') == 2
    assert [picture.count(f">{name}<") for name in ("50 %", "99 %")] == [1, 1]


def test_exact_layers_and_infinite_ones_have_lines_of_their_own() -> None:
    def heights(errors: list[float]) -> tuple[list[str], list[float], list[float]]:
        root = ET.fromstring(layers(errors, [False] * len(errors), "layers"))
        ticks = [one for one in root if one.tag == "text" and one.attrib["text-anchor"] == "end"][:-1]
        dots = [float(one.attrib["cy"]) for one in root if one.tag == "circle"]
        return [one.text or "" for one in ticks], [float(one.attrib["y"]) - 4 for one in ticks], dots

    names, ticks, dots = heights([0.0, 1e-7, float("inf"), 1e-5])
    assert names == ["0", "10⁻⁷", "10⁻⁶", "10⁻⁵", "∞"]
    assert dots == [ticks[0], ticks[1], ticks[4], ticks[3]]
    assert heights([1e-7, 1e-5])[0] == ["10⁻⁷", "10⁻⁶", "10⁻⁵"]
    names, ticks, dots = heights([0.0, 1e-30, float("nan"), 1.0])
    assert names[0] == "0"
    assert names[-1] == "∞"
    assert dots[0] - dots[1] > 10, "names would lie over one another"
    assert dots[3] - dots[2] > 10


def test_powers_of_ten() -> None:
    assert power(-12) == "10⁻¹²"
    assert power(3) == "10³"


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(tb.ModelFileError, match="Cannot write"):
        reported(0.1).to_html(tmp_path / "missing" / "report.html")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><script>
const frame = document.createElement("iframe");
frame.style = "border:0;height:900px;width:WIDTHpx";
frame.srcdoc = PAGE;
frame.onload = () => {
  const page = frame.contentDocument, cut = [];
  if (page.documentElement.scrollWidth > WIDTH) cut.push("the page scrolls sideways");
  for (const part of page.querySelectorAll("main *")) {
    const box = part.getBoundingClientRect();
    if (box.width && (box.right > WIDTH + 0.5 || box.left < -0.5)) cut.push(part.tagName + " " + part.textContent);
    if (part.scrollWidth > part.clientWidth + 1 && part.clientWidth) cut.push("inside " + part.tagName);
    if (part.tagName == "text") {
      const edge = part.ownerSVGElement.getBoundingClientRect();
      if (box.right > edge.right + 0.5 || box.left < edge.left - 0.5) cut.push("label " + part.textContent);
      if (box.height < 7) cut.push("too small to read: " + part.textContent);
    }
  }
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = "parts " + page.querySelectorAll("main *").length + "; cut: " + cut.join("; ") + ".";
  document.body.append(found);
};
document.body.append(frame);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_cut_in_a_browser(width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    found = [FakeLayer(f"a_name_without_any_space_{index}" * 3, 10.0 ** -(index % 9)) for index in range(80)]
    found[40] = FakeLayer("culprit", 0.3, "0.3 instead of 1e-3")
    report = reported(float("nan"), label="hidden_states['a_long_name_without_spaces'].last_hidden_state[0]")
    both = dataclasses.replace(report, outputs=(*report.outputs, *reported(1e-3, samples=40).outputs))
    page = both.to_html(layers=found)
    harness = tmp_path / "harness.html"
    text = HARNESS.replace("WIDTH", str(width)).replace("PAGE", json.dumps(page).replace("</", "<\\/"))
    harness.write_text(text)
    command = [CHROMIUM, "--headless=new", "--disable-gpu", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width + 100},1000", "--virtual-time-budget=5000", "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said is not None, done.stdout[-500:]
    count, cut = re.fullmatch(r"parts (\d+); cut: (.*)\.", said[1], re.DOTALL).groups()  # type: ignore[union-attr]
    assert int(count) > 100
    assert cut == ""
