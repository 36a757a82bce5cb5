"""Graphs written to a folder, one file a pass, so that they load with ``onnx.load`` and open in Netron."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from ..errors import ModelFileError
from .exchange import stand_in_name
from .graph_diff import diff

WEIGHTS_LIMIT_BYTES = 256 << 20
"""Models with more weights than this are written with zeros for them."""

WEIGHTS_KEY = "trtbridge.weights"
"""Key of the model's metadata that says whether the weights are real: "values" or "zeros"."""

_VALUES_FILE, _ZEROS_FILE = "weights.data", "zeros.data"
_OURS = re.compile(r"\d\d+_\w+(\.before|\.after)?\.(onnx|diff)|weights\.data|zeros\.data")


class GraphDump:
    """Writes models to a folder.

    Initializers that are stand-ins become external data: of ``weights.data``, where each weight stands once however
    many files read it, or, in a model with more than `WEIGHTS_LIMIT_BYTES` of weights, of ``zeros.data``, a file of
    zeros as long as the largest weight, which takes no room on file systems with sparse files.

    Args:
        folder: made where it is missing. Files in it that an earlier dump wrote are removed, others stay.
        total_bytes: size of all weights of the model.

    Raises:
        ModelFileError: the folder cannot be written.
    """

    def __init__(self, folder: Path, total_bytes: int) -> None:
        self.folder = folder
        self._real = total_bytes <= WEIGHTS_LIMIT_BYTES
        self._places: dict[str, tuple[ir.TensorProtocol, int]] = {}
        self._last: onnx.ModelProto | None = None
        self._end = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if _OURS.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise ModelFileError(f"Cannot write graphs into the folder {folder}: {error}.") from error

    def add(self, stem: str, proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], head: str = "") -> None:
        """Write the model after a pass, and how it differs from the one before.

        Args:
            stem: name of the files: ``stem.onnx``, ``stem.diff``.
            proto: the model.
            weights: values of its stand-ins.
            head: what the difference begins with.
        """
        self.write(f"{stem}.onnx", proto, weights)
        if self._last is not None:
            self.write_text(f"{stem}.diff", f"{head}\n\n{diff(self._last, proto) or 'nothing changed'}\n".lstrip())
        self._last = proto

    def write(self, name: str, proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol]) -> Path:
        """Write one model.

        Raises:
            ModelFileError: it cannot be written.
        """
        model = onnx.ModelProto()
        model.CopyFrom(proto)
        model.metadata_props.add(key=WEIGHTS_KEY, value="values" if self._real else "zeros")
        try:
            for tensor in model.graph.initializer:
                key = stand_in_name(tensor)
                if key is not None:
                    self._place(tensor, weights[key])
            path = self.folder / name
            path.write_bytes(model.SerializeToString())
        except OSError as error:
            raise ModelFileError(f"Cannot write {self.folder / name}: {error}.") from error
        return path

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file.

        Raises:
            ModelFileError: it cannot be written.
        """
        path = self.folder / name
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ModelFileError(f"Cannot write {path}: {error}.") from error
        return path

    def _place(self, tensor: onnx.TensorProto, weight: ir.TensorProtocol) -> None:
        """Make a stand-in external data of the file of weights."""
        size, offset = int(weight.nbytes), 0
        if self._real:
            known, offset = self._places.get(tensor.name, (None, 0))
            if known is not weight:
                offset = -(-self._end // 64) * 64
                with (self.folder / _VALUES_FILE).open("ab") as file:
                    file.truncate(offset)
                    file.write(weight.tobytes())
                self._end = offset + size
                self._places[tensor.name] = weight, offset
        elif size > self._end or not self._end:
            with (self.folder / _ZEROS_FILE).open("ab") as file:
                file.truncate(size)
            self._end = size
        tensor.ClearField("external_data")
        location = _VALUES_FILE if self._real else _ZEROS_FILE
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
