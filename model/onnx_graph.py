"""Write an ONNX graph node by node, its weights streamed to one external data file, the same bytes every time.

Linear layers are plain MatMul at 32 bits and MatMulNBits (com.microsoft, see ONNX Runtime's ContribOperators) at 8 and
4 bits, packed by `model.onnx_weights`. Any linear layer may get a LoRA pair as run-time inputs of rank 0 by default, so
that a graph without an adapter adds nothing and an adapter of any rank is an input, no new export.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

OPSET, IR_VERSION, ALIGNMENT = 21, 10, 4096  # the runtime maps initializers that begin at a page
CONTRIB = "com.microsoft"
_KINDS = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7}  # onnx.TensorProto's element types


class Graph:
    """An ONNX model being written to `folder`/`name`.onnx and `name`.onnx.data; `save` finishes it."""

    def __init__(self, folder: Path, name: str, bits: int, block: int) -> None:
        """Open the data file; linear layers have `bits` unless told otherwise, in blocks of `block` inputs."""
        self.path, self.bits, self.block = folder / f"{name}.onnx", bits, block
        self._data = open(folder / f"{name}.onnx.data", "wb")  # noqa: SIM115 - closed by save and abandon
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._weights: list[Any] = []
        self._known: set[str] = set()
        self.lora: dict[str, tuple[int, int]] = {}

    def node(self, op: str, *inputs: str, outputs: int | list[str] = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or the names where there are several."""
        from onnx import helper

        base = f"{op}_{len(self._nodes)}"
        names = outputs if isinstance(outputs, list) else [f"{base}_{n}" for n in range(outputs)]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(op, list(inputs), names, base, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def input(self, name: str, kind: str, shape: list[int | str]) -> str:
        """Declare an input of the whole graph; names in `shape` are free sizes."""
        from onnx import helper

        self._inputs.append(helper.make_tensor_value_info(name, _KINDS[kind], shape))
        return name

    def output(self, name: str, kind: str, shape: list[int | str]) -> None:
        """Declare an output of the whole graph."""
        from onnx import helper

        self._outputs.append(helper.make_tensor_value_info(name, _KINDS[kind], shape))

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add an array as initializer: small ones lie in the graph, others in the data file. A known name is reused."""
        from onnx import TensorProto, numpy_helper

        if name in self._known:
            return name
        self._known.add(name)
        array = np.ascontiguousarray(array)
        if array.nbytes <= 1024:
            self._weights.append(numpy_helper.from_array(array, name))
            return name
        self._data.write(bytes(-self._data.tell() % ALIGNMENT))
        tensor = TensorProto(name=name, data_type=_KINDS[str(array.dtype)], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": f"{self.path.name}.data", "offset": self._data.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(array.data.cast("B"))
        self._weights.append(tensor)
        return name

    def linear(
        self, x: str, name: str, weight: Any, bias: Any = None, *, bits: int | None = None, lora: bool = False
    ) -> str:
        """`x` (..., in) times `weight` (out, in; torch) plus `bias`; with `lora` plus x A B from inputs."""
        bits = bits or self.bits
        out_features, in_features = (int(side) for side in weight.shape)
        plain = None if bias is None else self.constant(f"{name}.bias", _numpy(bias))
        if bits == 32:
            y = self.node("MatMul", x, self.constant(f"{name}.weight", _numpy(weight.T)))
            y = y if plain is None else self.node("Add", y, plain)
        else:
            from model.onnx_weights import pack

            stored = zip(("packed", "scales", "zeros"), pack(weight, bits, self.block), strict=True)
            inputs = [x, *("" if array is None else self.constant(f"{name}.{part}", array) for part, array in stored)]
            inputs += [] if plain is None else ["", plain]
            sizes = {"K": in_features, "N": out_features, "bits": bits, "block_size": self.block}
            y = self.node("MatMulNBits", *inputs, domain=CONTRIB, accuracy_level=4, **sizes)
        return self._adapted(x, y, name, in_features, out_features) if lora else y

    def _adapted(self, x: str, y: str, name: str, in_features: int, out_features: int) -> str:
        """`y` plus the product of x with a LoRA pair, (in, rank) and (rank, out); `x` and `y` have two dimensions."""
        for factor, shape in (("A", (in_features, 0)), ("B", (0, out_features))):
            free: list[int | str] = [side or f"rank_{name}" for side in shape]
            self.input(f"{name}.lora_{factor}", "float32", free)
            self.constant(f"{name}.lora_{factor}", np.zeros(shape, np.float32))
        self.lora[name] = (in_features, out_features)
        return str(self.node("Gemm", self.node("MatMul", x, f"{name}.lora_A"), f"{name}.lora_B", y))

    def save(self) -> None:
        """Flush the weights and write the graph."""
        from onnx import helper

        graph = helper.make_graph(self._nodes, self.path.stem, self._inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="afya")
        _flush(self._data)
        with open(self.path, "wb") as out:
            out.write(model.SerializeToString(deterministic=True))
            _flush(out, close=False)

    def abandon(self) -> None:
        """Close the data file without a graph."""
        self._data.close()


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    return np.asarray(tensor.to(torch.float32).contiguous().numpy())


def _flush(stream: Any, close: bool = True) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    if close:
        stream.close()
