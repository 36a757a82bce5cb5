"""A few nodes with their inputs as a folder that anyone can run: for a bug report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import ml_dtypes
import numpy as np
import onnx
import torch

from ..errors import ModelFileError, TrtBridgeError
from ..nodes import DOMAIN
from .activations import to_numpy
from .model import OnnxModel, TensorSpec, iterate_nodes

_SCRIPT = Template('''\
"""$title"""
import os, sys
import numpy as np
$imports
os.chdir(os.path.dirname(os.path.abspath(__file__)))
inputs, expected, limit, wrong = dict(np.load("inputs.npz")), dict(np.load("expected.npz")), $limit, False
$run
for name, got in zip(expected, results):
    a, b = np.asarray(got, np.float64), np.asarray(expected[name], np.float64)
    good = a.shape == b.shape and np.array_equal(np.isfinite(a), np.isfinite(b))
    a, b = (np.nan_to_num(x, nan=0, posinf=0, neginf=0) for x in (a, b))
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) if good else np.inf
    wrong |= not error <= limit
    print(f"{name}: relative error {error:.3g}, up to {limit} is right")
sys.exit(int(wrong))
''')

_ONNXRUNTIME = (
    "import onnxruntime",
    'results = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])'
    ".run(list(expected), inputs)",
)
_PLUGINS = (
    "import trtbridge.bridge.repro  # plugin nodes: import the modules that register their ops here, too",
    'results = trtbridge.bridge.repro.run_model("model.onnx", inputs)',
)
_ENGINE = (
    "import torch, trtbridge",
    'module = trtbridge.convert("model.onnx", backend="$backend"$options)\n'
    "made = module(*[torch.from_numpy(inputs[x.name]).to(module.device) for x in module.program.signature.inputs])\n"
    "results = [(made[name] if isinstance(made, dict) else made).float().cpu().numpy() for name in expected]",
)


@dataclass(frozen=True)
class Repro:
    """Some nodes of a graph, what they read and what they should give.

    Attributes:
        model: the nodes as a graph of their own, sizes fixed to those of the inputs.
        inputs: a tensor for each input.
        expected: the reference's value of each output.
        limit: largest relative error that is right.
        title: where the nodes come from.
        backend: the backend whose engine is wrong; "" where ONNX Runtime shows it.
        tf32: whether that engine may use TF32.
    """

    model: OnnxModel
    inputs: Mapping[str, torch.Tensor]
    expected: Mapping[str, torch.Tensor]
    limit: float
    title: str
    backend: str = ""
    tf32: bool = False

    def save(self, folder: Path) -> Path:
        """Write model.onnx, inputs.npz, expected.npz and run.py, which ends with status 1 where the error is seen.

        NumPy has no bfloat16: such inputs are float32 in the file, and the graph begins with a Cast.

        Returns:
            The folder.

        Raises:
            ModelFileError: it cannot be written.
        """
        arrays = {name: to_numpy(tensor) for name, tensor in self.inputs.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._standalone(arrays).save(folder / "model.onnx")
            given = {_stored_name(name, array): _storable(array) for name, array in arrays.items()}
            wanted = {name: _storable(to_numpy(tensor)) for name, tensor in self.expected.items()}
            for file, held in (("inputs.npz", given), ("expected.npz", wanted)):
                np.savez(folder / file, **held)  # type: ignore[arg-type]
            (folder / "run.py").write_text(self._script())
        except OSError as error:
            raise ModelFileError(f"Cannot write the repro into {folder}: {error}.") from error
        return folder

    def _script(self) -> str:
        imports, run = _ONNXRUNTIME
        if self.backend:
            imports, run = _ENGINE
            run = Template(run).substitute(backend=self.backend, options=", tf32=True" if self.tf32 else "")
        elif any(node.domain == DOMAIN for node in iterate_nodes(self.model.proto.graph)):
            imports, run = _PLUGINS
        title = self.title.replace("\\", "/").replace('"', "'")
        return _SCRIPT.substitute(title=title, imports=imports, limit=f"{self.limit:.6g}", run=run)

    def fixed(self) -> OnnxModel:
        """The graph for inputs of just these sizes."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.proto)
        for values, held in ((proto.graph.input, self.inputs), (proto.graph.output, self.expected)):
            for value in values:
                shape = value.type.tensor_type.shape
                del shape.dim[:]
                shape.SetInParent()  # of a scalar, too
                for size in held[value.name].shape:
                    shape.dim.add(dim_value=size)
        signature = self.model.signature
        inputs = (TensorSpec.make(s.name, s.dtype, tuple(self.inputs[s.name].shape), {}) for s in signature.inputs)
        outputs = (TensorSpec.make(s.name, s.dtype, tuple(self.expected[s.name].shape), {}) for s in signature.outputs)
        signature = dataclasses.replace(signature, inputs=tuple(inputs), outputs=tuple(outputs), dims={})
        return dataclasses.replace(self.model, proto=proto, signature=signature)

    def _standalone(self, arrays: Mapping[str, np.ndarray]) -> OnnxModel:
        """The graph as it goes into a file: inputs that NumPy has no type for are float32."""
        model = self.fixed()
        graph = model.proto.graph
        casts = []
        for value in graph.input:
            array = arrays[value.name]
            if array.dtype == ml_dtypes.bfloat16:
                name, value.name = value.name, _stored_name(value.name, array)
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
                casts.append(onnx.helper.make_node("Cast", [value.name], [name], to=onnx.TensorProto.BFLOAT16))
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*casts, *graph.node)]
        del graph.node[:]
        graph.node.extend(kept)
        del graph.value_info[:]  # shapes with names that are fixed now
        return model


def run_model(path: str | Path, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run an .onnx file that may hold plugin nodes on the CPU.

    Args:
        path: the file.
        inputs: an array for each input.

    Returns:
        Its outputs in order.
    """
    from .activations import run_graph
    from .onnx_file import read_onnx
    from .partition import tensor_types

    model = read_onnx(path)
    names = [value.name for value in model.proto.graph.output]
    dtypes = {name: dtype for name, (dtype, _) in tensor_types(model.proto).items() if dtype is not None}
    seen = run_graph(model, {name: torch.from_numpy(array) for name, array in inputs.items()}, names, dtypes)
    return [to_numpy(seen[name]) for name in names]


def no_repro() -> TrtBridgeError:
    """The error of a report that has nothing to save."""
    return TrtBridgeError("No layer is wrong by itself, so there is no repro to save: see the report's verdict.")


def _stored_name(name: str, array: np.ndarray) -> str:
    return f"{name}__float32" if array.dtype == ml_dtypes.bfloat16 else name


def _storable(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
