"""Every reader of a file, with a small valid file for it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import resource
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from kancompile.compiler.manifest import describe, describe_file_bytes, metadata_of
from kancompile.data import load_calibration
from kancompile.data.image_folder import ImageFolder
from kancompile.data.pykan_checkpoint import load as load_pykan
from kancompile.data.state_dict import apply_state_dict, load_state_dict
from kancompile.data.tables import read_table
from kancompile.diagnosis.laboratory import Outcome
from kancompile.diagnosis.tune_cache import TuneCache
from kancompile.errors import KanCompileError
from kancompile.recipe import read_profile, read_recipe
from kancompile.reporting.facts.inspection import describe_file, describe_manifest, file_table, manifest_table
from kancompile.reporting.facts.source import _manifest, recipe_and_seed
from kancompile.runtimes.output_quantum import output_quantum
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets.onnx.export import emit
from kancompile.validation.kernel_audit import audit_kernels
from tests.fuzzing import mutations as mutate
from tests.programs import integer_program

SCREEN_CHARACTERS, SCREEN_LINES = 2_000, 24


@dataclass(frozen=True)
class Case:
    """A reader.

    Attributes:
        name: of the file that is changed.
        read: reads a file; it may raise ``KanCompileError`` alone.
        valid: contents that it reads.
        inside: opens the format for changes.
        beside: other files that have to lie in the folder.
        needs: the tool that it needs, of ``tests/tools.py``.
    """

    name: str
    read: Callable[[Path], Any]
    valid: Callable[[], bytes]
    inside: mutate.Inside | None = None
    beside: Callable[[], Mapping[str, bytes]] = dict
    needs: str | None = None

    def placed(self, folder: Path) -> Path:
        """Write the valid file, and those beside it, into a folder."""
        for name, content in {**self.beside(), self.name: self.valid()}.items():
            (folder / name).write_bytes(content)
        return folder / self.name


def error_of(case: Case, path: Path) -> Exception | None:
    """Read a file and give what its reader raised."""
    try:
        case.read(path)
    except Exception as error:
        return error
    return None


def fault_in(error: Exception, path: Path) -> str | None:
    """Say what is wrong with an error of a reader: it has to be of the one kind, name the file and fit on a screen."""
    text = str(error)
    if not isinstance(error, KanCompileError):
        return f"{type(error).__name__}: {text[:300]}"
    if str(path.parent) not in text:  # of files that belong together it may name any
        return f"the error does not name the file: {text[:300]}"
    if len(text) > SCREEN_CHARACTERS or text.count("\n") >= SCREEN_LINES:
        return f"an error of {len(text)} characters: {text[:300]}"
    return None


@lru_cache
def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"weight": torch.randn(2, 3, generator=generator), "bias": torch.randn(2, generator=generator)}


def _weights(path: Path) -> None:
    apply_state_dict(nn.Linear(3, 2), load_state_dict(path), str(path))


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _npz(compressed: bool = False, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.linspace(-1, 1, 27, dtype=np.float32).reshape(9, 3))
    return buffer.getvalue()


def _samples() -> bytes:
    return _npz(True, x=np.linspace(-1, 1, 27, dtype=np.float32).reshape(9, 3), y=np.arange(9))


_TABLE = b"a,b,label\n" + b"".join(b"%d.5,-1e-%d,%d\n" % (row, row, row % 2) for row in range(6))
_RECIPE = b"""weight_bits = 4
method = "gptq"
levels = 0xFF
range = "percentile"
percentile = 99.9
goal_sqnr = 30
[layers."layers.*"]
weight_bits = 8
"""


@lru_cache
def _compiled() -> tuple[bytes, dict[str, Any]]:
    """Write a file without compiling, with all that is said about it."""
    program = integer_program((3, 4, 2), (17, 17))
    samples = load_calibration(np.linspace(-1, 1, 27, dtype=np.float32).reshape(9, 3))
    facts = describe(program, samples, read_recipe({"weight_bits": 4}), "ort-cpu", 0)
    content = emit(program, metadata_of(facts))
    return content, facts | describe_file_bytes(content)


def _model() -> bytes:
    return _compiled()[0]


def _described(path: Path) -> None:
    file_table(described := describe_file(path))
    json.dumps(described, allow_nan=False)


def _run(path: Path) -> None:
    model = RuntimeModel(path)
    assert model.calibrated_ranges is not None
    if all(0 <= size < 1000 for shape in model.input_shapes.values() for size in shape):
        model(model.zeros())
    output_quantum(path)


def _beside(path: Path) -> None:
    described = describe_manifest(path.with_name("model.c"))
    manifest_table(described)
    json.dumps(described, allow_nan=False)


def _in_reports(path: Path) -> None:
    _manifest(path.with_name("model.onnx"), _model())


_FACT = Outcome(1.0, 0.5, 3.0, None, None, None, 99.0, 10)


def _facts() -> bytes:
    key = TuneCache(Path("absent"), {})._hash({"a": 1})
    line = json.dumps({"key": key, "about": {"a": 1}, "fact": vars(_FACT)})
    return f"{line}\n{line}\n".encode()


def _recall(path: Path) -> None:
    TuneCache(path, {}).get({"a": 1}, Outcome)


def _pictures(path: Path) -> None:
    folder = ImageFolder(path.parent, lambda image: np.asarray(image.convert("L").resize((4, 4)), np.float32), "data")
    for _ in folder:
        pass


def _picture(kind: str) -> Callable[[], bytes]:
    def drawn() -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        pixels = (np.arange(16 * 16 * 3) % 251).astype(np.uint8).reshape(16, 16, 3)
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()

    return drawn


@lru_cache
def _pykan() -> Mapping[str, bytes]:
    """What ``saveckpt`` writes, without its training."""
    import kan

    model = kan.KAN([2, 2, 1], grid=3, k=3, auto_save=False, seed=0)
    widths = b"width:\n- - 2\n  - 0\n- - 2\n  - 0\n- - 1\n  - 0\n"
    config = widths + b"mult_arity: 2\nbase_fun_name: silu\nsymbolic_enabled: true\n"
    names = b"".join(
        b"symbolic.funs_name.%d:\n%s" % (n, rows)
        for n, rows in enumerate((b"- - '0'\n  - '0'\n" * 2, b"- - '0'\n  - '0'\n"))
    )
    return {"k_state": _saved(model.state_dict()), "k_config.yml": config + names}


def _profile() -> bytes:
    from dataclasses import replace

    return replace(read_profile("x86"), name="other").to_toml().encode()


@functools.cache
def _trained() -> Any:
    """A prepared module and its optimizer, made from a program built by hand."""
    from kancompile import qat
    from kancompile.passes import lower
    from tests.programs import calibration_inputs, float_program

    program = float_program()
    x = calibration_inputs(program, 64, seed=0)
    recipe = read_recipe({"weight_bits": 4, "levels": 16, "method": "uniform", "drift": "off"})
    facts = SimpleNamespace(
        captured=program,
        lowered=lower(program, x, recipe),
        recipe=recipe,
        calibration=load_calibration(x.numpy()),
        manifest={"seed": 0},
    )
    module = qat.prepare_compiled(facts)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(qat.parameter_groups(module, 0.01))
    module(x).square().mean().backward()
    optimizer.step()
    return module, optimizer


def _resume(path: Path) -> None:
    from kancompile import qat

    qat.load_checkpoint(_trained()[0], path, _trained()[1])


def _checkpoint() -> bytes:
    from kancompile import qat

    module, optimizer = _trained()
    with tempfile.TemporaryDirectory() as folder:
        return qat.save_checkpoint(module, Path(folder) / "state.safetensors", optimizer).read_bytes()


CASES: dict[str, Case] = {
    "state of a training": Case("state.safetensors", _resume, _checkpoint, mutate.in_safetensors),
    "safetensors": Case("w.safetensors", _weights, lambda: save(_state()), mutate.in_safetensors),
    "weights in .npz": Case("w.npz", _weights, lambda: _npz(**{k: v.numpy() for k, v in _state().items()}), mutate.in_zip),
    "torch checkpoint": Case("w.pt", _weights, lambda: _saved({"model": _state(), "epoch": 1}), mutate.in_zip),
    "old torch checkpoint": Case("w.pth", _weights, lambda: _saved(_state(), _use_new_zipfile_serialization=False)),
    "samples in .npz": Case("x.npz", load_calibration, _samples, mutate.in_zip),
    ".npy": Case("x.npy", load_calibration, _npy, mutate.in_npy),
    ".csv": Case("x.csv", lambda path: read_table(path, ["label"]), lambda: _TABLE, mutate.in_table),
    ".tsv": Case("x.tsv", load_calibration, lambda: _TABLE.replace(b",", b"\t"), mutate.in_table),
    "recipe in TOML": Case("r.toml", read_recipe, lambda: _RECIPE, mutate.in_toml),
    "recipe in JSON": Case(
        "r.json", read_recipe, lambda: json.dumps(read_recipe({"levels": 64, "layers": {"a": {"levels": 9}}}).to_dict()).encode(),
        mutate.in_json,
    ),
    "cost profile": Case("p.toml", read_profile, _profile, mutate.in_toml),
    "manifest": Case(
        "model.manifest.json", _beside, lambda: json.dumps(_compiled()[1]).encode(), mutate.in_json, lambda: {"model.c": _model()}
    ),
    "manifest for reports": Case(
        "model.manifest.json", _in_reports, lambda: json.dumps(_compiled()[1]).encode(), mutate.in_json,
    ),
    "ONNX, inspected": Case("m.onnx", _described, _model, mutate.in_onnx),
    "ONNX, run": Case("m.onnx", _run, _model, mutate.in_onnx),
    "ONNX, kernels": Case("m.onnx", audit_kernels, _model, mutate.in_onnx),
    "ONNX, for reports": Case("m.onnx", recipe_and_seed, _model, mutate.in_onnx),
    "tune cache": Case("facts.jsonl", _recall, _facts, mutate.in_json),
    "pykan state": Case("k_state", load_pykan, lambda: _pykan()["k_state"], mutate.in_zip, _pykan, "pykan"),
    "pykan configuration": Case(
        "k_config.yml", lambda path: load_pykan(path.with_name("k")), lambda: _pykan()["k_config.yml"], None, _pykan, "pykan"
    ),
    **{
        f"image in {kind}": Case(
            f"i{suffix}", _pictures, _picture(kind), mutate.in_png if kind == "PNG" else None, needs="pillow"
        )
        for kind, suffix in {
            "PNG": ".png", "JPEG": ".jpg", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif", "WEBP": ".webp", "PPM": ".ppm"
        }.items()
    },
}  # fmt: skip


@contextlib.contextmanager
def limited_memory(more: int = 1 << 31) -> Iterator[None]:
    """Let the process have that many bytes beyond what it has, so that a size that a file declares is refused as it would be."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
