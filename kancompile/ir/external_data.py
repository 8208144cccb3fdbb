"""An ONNX file whose large tensors stand in a second one, since protobuf ends at 2 GB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np
import onnx
from numpy.typing import NDArray

from kancompile.errors import KanCompileError

EXTERNAL_SUFFIX = ".data"
"""What the name of a file gets for that of its second one, as PyTorch's exporter calls it: ``model.onnx.data``."""
MOST_FILE_BYTES = (1 << 31) - 1
"""What protobuf can hold."""


class ModelWithExternalData(bytes):
    """The bytes of the first file, together with those of the second.

    Attributes:
        external: content of the second file, whose tensors the first one names by offset and length.
    """

    external: memoryview

    def __new__(cls, content: bytes, external: memoryview) -> Self:
        """Keep both."""
        made = super().__new__(cls, content)
        made.external = external
        return made

    def tensors(self) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Yield the tensors of the second file by their names, as views.

        Raises:
            KanCompileError: the second file is shorter than the first one says.
        """
        for tensor in external_tensors(onnx.load_model_from_string(bytes(self))):
            said = {entry.key: entry.value for entry in tensor.external_data}
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            count, offset = int(np.prod(tensor.dims, dtype=np.int64)), int(said.get("offset", 0))
            if offset < 0 or offset + count * kind.itemsize > len(self.external):
                raise KanCompileError(
                    f"tensor {tensor.name!r}: found {len(self.external):,} bytes of external data, expected "
                    f"{offset + count * kind.itemsize:,} or more; copy a model together with its {EXTERNAL_SUFFIX} file"
                )
            yield tensor.name, np.frombuffer(self.external, kind, count, offset).reshape(tuple(tensor.dims))

    def renamed(self, location: str) -> Self:
        """Return the same files, of which the first calls the second by another name."""
        proto = onnx.load_model_from_string(bytes(self))
        for tensor in external_tensors(proto):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        return type(self)(proto.SerializeToString(deterministic=True), self.external)


def external_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """List the tensors of a model whose values stand in another file."""
    return [one for one in proto.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]


def file_bytes(content: bytes) -> int:
    """Count the bytes of a file, those of its second one included."""
    return len(content) + (len(content.external) if isinstance(content, ModelWithExternalData) else 0)
