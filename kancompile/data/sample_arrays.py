"""Turn what users hold (arrays, tensors, files, loader batches) into checked float32 arrays, or say what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kancompile.data.archive_sizes import check_unpacked
from kancompile.data.entries import ONE, Entries
from kancompile.errors import KanCompileError, reason

_FLOAT32_INTEGERS = 1 << 24  # integers up to here are exact in float32
_MOST_UNPACKED = 1 << 31


def is_plain(value: Tensor) -> bool:
    """Whether a tensor holds dense numbers that can be copied: not sparse, nested or quantized, and not of the device "meta"."""
    return not (value.is_nested or value.is_quantized or value.layout is not torch.strided or value.is_meta)


def kind_of(value: Tensor) -> str:
    """Name a tensor's kind for errors."""
    layout = "nested" if value.is_nested else str(value.layout)
    return f"{value.dtype}, {layout}{', without values (device meta)' if value.is_meta else ''}"


def to_array(value: Any, name: str) -> NDArray[Any]:
    """View a tensor or array as NumPy, without the types that NumPy lacks."""
    if isinstance(value, Tensor) and (not is_plain(value) or value.is_complex()):
        raise KanCompileError(f"{name}: found a tensor of {kind_of(value)}, expected dense real values")
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
        return np.asarray(value)
    except Exception as error:  # lists of any content, and objects with an idea of their own of what their array is
        raise KanCompileError(
            f"{name}: found a value that is not an array, such as rows of different lengths, expected one array ({reason(error)})"
        ) from error


def read_arrays(
    path: Path, choose: Callable[[Sequence[str], str], Entries], name: str
) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None]:
    """Read samples and, where there are any, labels from an ``.npz`` or ``.npy`` file, without unpickling.

    Args:
        path: of the file.
        choose: gives for the names in an ``.npz`` what is read, and takes what errors call the file.
        name: what errors call the data.
    """
    where = f"{name} {str(path)!r}"
    if path.suffix not in (".npz", ".npy"):
        raise KanCompileError(f"{where}: found suffix {path.suffix!r}, expected '.npz', '.npy', '.csv' or '.tsv'")
    try:
        # NumPy leaves an archive open that it opened itself and could not read
        with path.open("rb") as file:
            if file.read(2) != b"PK":  # an .npy, be it under the other name
                return {ONE: np.load(path, mmap_mode="r", allow_pickle=False)}, None
            if path.suffix == ".npy":
                raise KanCompileError(f"{where}: found an archive, expected one array; rename it to .npz")
            file.seek(0)
            with np.load(file, allow_pickle=False) as content:
                chosen = choose(content.files, where)
                check_unpacked(path, where, _MOST_UNPACKED, lambda entry: entry.removesuffix(".npy") in chosen.all)
                arrays = {entry: content[entry] for entry in chosen.all}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise KanCompileError(f"{where}: found an entry that is no array; write it with numpy.savez")
        inputs = {name: arrays[entry] for name, entry in chosen.inputs.items()}
        return inputs, None if chosen.labels is None else arrays[chosen.labels]
    except KanCompileError:
        raise
    except OSError as error:
        raise KanCompileError(
            f"{where}: cannot be read ({reason(error)}); give an existing .npz or .npy file"
        ) from error
    except Exception as error:  # whatever else breaks inside NumPy is the file's fault
        if any(words in str(error) for words in ("allow_pickle", "Object arrays", "Python objects")):
            raise KanCompileError(
                f"{where}: found an array of Python objects, expected numbers; object arrays are pickles "
                "and are never loaded: save a numeric array, such as x.astype('float32')"
            ) from error
        raise KanCompileError(
            f"{where}: found no NumPy data ({reason(error)}); write it with numpy.savez or numpy.save"
        ) from error


def check_samples(
    array: NDArray[Any], shape: tuple[int, ...] | None, name: str, least: int = 2, is_one_of_several: bool = False
) -> None:
    """Refuse samples of a type, shape or number that cannot be meant; one of several inputs may be a number a sample."""
    if array.dtype == np.uint8:
        raise KanCompileError(
            f"{name}: found uint8, which usually is raw image data, expected floats scaled as in training; "
            "pass for instance x.astype('float32') / 255, or numbers that the model looks up as x.astype('int64')"
        )
    if array.dtype.kind not in "fiub":
        way_out = "; leave out columns of text, or encode them as in training" if array.dtype.kind in "OSU" else ""
        raise KanCompileError(f"{name}: found dtype {str(array.dtype)!r}, expected float32{way_out}")
    if array.ndim < (1 if is_one_of_several else 2):
        raise KanCompileError(
            f"{name}: found shape {array.shape!r}, expected [n, *input_shape]; add the dimension that is missing, "
            "such as x[None] for one sample or x[:, None] for one feature"
        )
    if shape is not None and array.shape[1:] != shape:
        raise KanCompileError(_shape_message(array.shape, shape, name))
    if 0 in array.shape[1:]:
        raise KanCompileError(f"{name}: found shape {array.shape!r}, expected at least one feature")
    if len(array) < least:
        raise KanCompileError(
            f"{name}: found {len(array)} sample{'' if len(array) == 1 else 's'}, expected at least {least} "
            "(a few hundred are better)"
        )


def to_float32(array: NDArray[Any], name: str, notes: list[str]) -> NDArray[np.float32]:
    """Copy samples to float32, noting what was converted; values beyond float32 become infinite."""
    if array.dtype.kind in "iu" and int(np.abs(array.astype(np.float64)).max()) > _FLOAT32_INTEGERS:
        raise KanCompileError(
            f"{name}: found {array.dtype} values beyond {_FLOAT32_INTEGERS}, which float32 cannot hold exactly; "
            "scale them as in training"
        )
    if array.dtype.kind in "iub":
        notes.append(f"{name}: {array.dtype} converted to float32")
    with np.errstate(over="ignore"):  # the check for infinity reports what does not fit
        return np.array(array, dtype=np.float32, order="C")


def to_integers(array: NDArray[Any]) -> NDArray[Any]:
    """Copy integers to int32 or int64 and booleans to bool, as PyTorch and ONNX Runtime know them."""
    kept = array.dtype in (np.bool_, np.int32, np.int64)
    return np.array(array, dtype=array.dtype.newbyteorder("=") if kept else np.int64, order="C")


def _shape_message(found: tuple[int, ...], shape: tuple[int, ...], name: str) -> str:
    text = f"{name}: found shape {found!r}, expected [n, {', '.join(map(str, shape))}]"
    if found == shape:
        return f"{text}; add the batch dimension, x[None]"
    return f"{text}; {shape_hint(found[1:], shape) or 'prepare the data as for training'}"


def shape_hint(found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Say how samples of one shape become samples of another one, empty where nothing simple does.

    Args:
        found, shape: of one sample.
    """
    if len(found) == len(shape) == 3 and found == (*shape[1:], shape[0]):
        return "these have the channels last, the model reads them first: pass x.transpose(0, 3, 1, 2)"
    if len(found) == len(shape) == 3 and found == (shape[-1], *shape[:-1]):
        return "these have the channels first, the model reads them last: pass x.transpose(0, 2, 3, 1)"
    if sorted(found) == sorted(shape):
        return "transpose the dimensions as the model reads them"
    if int(np.prod(found)) == int(np.prod(shape)):
        return f"reshape them, x.reshape(-1, {', '.join(map(str, shape))})"
    return ""


def check_labels(labels: NDArray[Any], n: int, name: str) -> None:
    """Refuse labels of the wrong type or number, or with NaN or infinity."""
    if labels.dtype.kind not in "fiub":
        raise KanCompileError(f"{name} labels: found dtype {str(labels.dtype)!r}, expected integers or floats")
    if labels.ndim == 0 or len(labels) != n:
        raise KanCompileError(
            f"{name} labels: found shape {labels.shape!r}, expected {n} labels for {n} samples; give one label for each sample"
        )
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        row = int(np.argwhere(~np.isfinite(labels))[0][0])
        raise KanCompileError(f"{name} labels: found NaN or infinity at sample {row}, expected finite values")


def to_label_type(labels: NDArray[Any]) -> NDArray[Any]:
    """Copy labels to int64 or float32."""
    # torch has no arithmetic for the wider unsigned types
    return np.array(labels, dtype=np.int64 if labels.dtype.kind in "iub" else np.float32, order="C")


def check_finite(inputs: NDArray[np.float32], rows: NDArray[np.int64], name: str) -> None:
    """Refuse NaN and infinity, telling the sample's number (``rows`` gives it for each input) and feature."""
    bad = ~np.isfinite(inputs)
    if bad.any():
        sample, *feature = (int(i) for i in np.argwhere(bad)[0])
        value = inputs[(sample, *feature)]
        where = feature[0] if len(feature) == 1 else tuple(feature)
        raise KanCompileError(
            f"{name}: found {value} at sample {int(rows[sample])}, feature {where} ({int(bad.sum())} such values in "
            f"{int(bad.reshape(len(inputs), -1).any(1).sum())} samples), expected finite float32 values; "
            "drop or repair those samples"
        )


def note_constants(inputs: NDArray[np.float32], name: str) -> list[str]:
    """Count features that never change."""
    flat = inputs.reshape(len(inputs), -1)
    constant = int((flat.min(0) == flat.max(0)).sum())
    return [f"{name}: {constant} of {flat.shape[1]} features are constant"] if constant else []


def note_raw_pixels(inputs: NDArray[np.float32], name: str) -> list[str]:
    """Hint at whole numbers from 0 up to 255, the form of images before they are scaled."""
    low, high = float(inputs.min()), float(inputs.max())
    if low < 0 or not 128 <= high <= 255 or not np.array_equal(inputs, np.rint(inputs)):
        return []
    found = f"{name}: whole numbers {low:.0f} ... {high:.0f}, which look like raw pixels"
    return [f"{found}; where the model was trained on 0 ... 1, pass x / 255"]
