"""Export the float model as a user would without kancompile, in a process of its own that may not take for ever."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.export import ExportedProgram

from kancompile.data import arguments, dynamic_dimensions, evaluating, in_float32, register_dataclasses
from kancompile.errors import KanCompileError, reason
from kancompile.ir import NamedTensors, Values, by_name

EXPORT_SECONDS = 60.0
"""How long an export may take, after which its process is ended."""
_MODEL, _REASON = "float.onnx", "reason.txt"
# a weak key: an export lives as long as its model does
_made: WeakKeyDictionary[nn.Module, tuple[str, bytes]] = WeakKeyDictionary()


def export_float(reference: nn.Module | ExportedProgram, example: Values | Sequence[int]) -> bytes:
    """Export a float model with ``torch.onnx.export`` and a dynamic batch; raises whatever the exporter does."""
    with _without_exporter_notes(), evaluating(reference):
        if isinstance(reference, ExportedProgram):
            program = torch.onnx.export(reference, dynamo=True, verbose=False)
        else:
            example = _rows(example)
            args, kwargs = arguments(reference, example)
            shapes = dynamic_dimensions(reference, args, kwargs, example)
            if isinstance(example, NamedTensors):  # only torch.export takes every structure of arguments
                register_dataclasses((args, kwargs, reference(*args, **kwargs)))
                traced = torch.export.export(reference, args, kwargs, dynamic_shapes=shapes, strict=False)
                program = torch.onnx.export(traced, dynamo=True, verbose=False)
            else:
                program = torch.onnx.export(reference, args, dynamo=True, verbose=False, dynamic_shapes=shapes)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


class FloatExport:
    """An export under way: it starts at once, and :meth:`result` waits for it.

    The same model with the same weights is exported once. Where processes with threads cannot be forked (Windows, macOS) the
    export is made when the result is asked for, in this process and without a limit.
    """

    def __init__(
        self,
        reference: nn.Module | ExportedProgram,
        example: Values | Sequence[int],
        seconds: float = EXPORT_SECONDS,
    ) -> None:
        """Start it.

        Args:
            reference: the float model.
            example: samples to trace with, or the shape of one.
            seconds: that it may take.
        """
        self.example, self.seconds = _rows(example), seconds
        self.reference = reference = in_float32(reference, self.example)
        self._key = _state(reference, self.example)
        self._process: BaseProcess | None = None
        self._started = time.monotonic()
        if self._cached() is None and sys.platform == "linux":
            self._folder = tempfile.TemporaryDirectory()
            context = multiprocessing.get_context("fork")
            self._process = context.Process(  # type: ignore[attr-defined]
                target=_export_into, args=(Path(self._folder.name), reference, self.example), daemon=True
            )
            self._process.start()

    def result(self) -> bytes:
        """Return the exported file.

        Raises:
            KanCompileError: the model cannot be exported, or not in time.
        """
        content = self._cached()
        if content is not None:
            self.close()
            return content
        if self._process is None:
            try:
                content = export_float(self.reference, self.example)
            except Exception as error:  # the exporter runs user code and raises what it likes
                raise KanCompileError(_cause(error)) from error
        else:
            content = self._awaited(self._process)
        if isinstance(self.reference, nn.Module):
            _made[self.reference] = self._key, content
        return content

    def close(self) -> None:
        """End an export that nobody waits for."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
            self._folder.cleanup()

    def _awaited(self, process: BaseProcess) -> bytes:
        process.join(max(0.0, self.seconds - (time.monotonic() - self._started)))
        try:
            if process.is_alive():
                raise KanCompileError(f"torch.onnx.export did not end within {self.seconds:g} seconds")
            files = {path.name: path for path in Path(self._folder.name).iterdir()}
            if _MODEL in files:
                return files[_MODEL].read_bytes()
            said = files[_REASON].read_text() if _REASON in files else f"its process ended with {process.exitcode}"
            raise KanCompileError(said)
        finally:
            self.close()

    def _cached(self) -> bytes | None:
        found = _made.get(self.reference) if isinstance(self.reference, nn.Module) else None
        return found[1] if found is not None and found[0] == self._key else None


def _export_into(folder: Path, reference: nn.Module | ExportedProgram, example: Values) -> None:
    """Export in a forked process, whose threads are not those of its parent: with one thread PyTorch needs none of them."""
    torch.set_num_threads(1)
    try:
        content = export_float(reference, example)
    except Exception as error:
        (folder / _REASON).write_text(_cause(error))
        return
    part = folder / "part"
    part.write_bytes(content)
    part.rename(folder / _MODEL)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"


def _rows(example: Values | Sequence[int]) -> Values:
    """Give two samples: zeros where only their shape is known."""
    if isinstance(example, torch.Tensor | NamedTensors):
        return example[:2].clone()  # of a view torch.export traces what it is a view of as well
    return torch.zeros(2, *example)


def _state(reference: nn.Module | ExportedProgram, example: Values) -> str:
    """Hash shapes and weights."""
    shapes = [(name, value.shape[1:], value.dtype) for name, value in by_name(example, ["input"]).items()]
    digest = hashlib.sha256(repr(shapes).encode())
    if isinstance(reference, nn.Module):
        for name, value in reference.state_dict().items():
            digest.update(name.encode())
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _without_exporter_notes() -> Iterator[None]:
    """Silence what the exporter says about packages that are not installed; its errors are raised, not logged."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
