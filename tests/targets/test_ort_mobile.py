"""The ORT-format file: bit for bit what the program computes, at every width, with nothing left to the loading."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from kancompile.compiler.emission import check_target, targets_named, write
from kancompile.compiler.manifest import describe_layer
from kancompile.errors.exceptions import KanCompileError
from kancompile.recipe import read_recipe
from kancompile.runtimes import RUNTIMES
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets import TARGETS, ort_mobile
from kancompile.targets.contract import Target
from kancompile.targets.onnx import export as ort_cpu
from kancompile.validation.kernel_audit import audit_kernels
from tests.compiled_kan import compiled_kan, make_inputs
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program

FACTS: dict = {
    "kancompile": {"version": "0"},
    "target": "ort-mobile",
    "seed": 0,
    "recipe": {},
    "recipe_sha256": "",
    "calibration": {"sha256": ""},
    "versions": {},
    "layers": [],
}


def inputs(shape: tuple[int, ...], n: int = 60) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) * 6 - 3


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
def test_every_width_is_exact_and_stored_as_bytes(bits: int) -> None:
    program = integer_program(widths=(16, 40, 10), k=5, weight_bits=bits)
    model = ort_mobile.emit(program, {"key": "value"})
    session = RuntimeModel(model)
    x = inputs((16,))
    np.testing.assert_array_equal(session.run(x.numpy())[0], program(x).numpy())
    assert session.session.get_modelmeta().custom_metadata_map == {"key": "value"}
    audit = audit_kernels(model)
    assert not audit.problems
    # a minimal build folds nothing: no node may be left that widens weights
    assert not {"BitShift", "BitwiseAnd", "Concat", "Expand"} & set(audit.operators)


def test_convolution_is_exact() -> None:
    program = integer_convolutions((3, 8, 8), [square(8, 3, padding=1), square(4, 3)], weight_bits=3, zero_point=9)
    x = inputs((3, 8, 8))
    np.testing.assert_array_equal(RuntimeModel(ort_mobile.emit(program, {})).run(x.numpy())[0], program(x).numpy())


def test_tables_of_pairs_are_stored_on_demand_only() -> None:
    program = integer_program(widths=(512, 4), levels=(200,), k=5)
    small, fast = (ort_mobile.emit(program, {}, storage) for storage in ("smallest", "fastest"))
    assert len(fast) - len(small) > 200 * 200 * 10 - 5000
    x = inputs((512,), 9)
    np.testing.assert_array_equal(RuntimeModel(small).run(x.numpy())[0], RuntimeModel(fast).run(x.numpy())[0])


def test_config_names_kernels_and_types_and_no_path() -> None:
    (suffix, config), *others = ort_mobile.companions(ort_mobile.emit(integer_program(), {})).items()
    assert not others
    assert suffix == ".required_operators_and_types.config"
    assert b"QGemm" in config
    assert b"uint8_t" in config
    assert b"/tmp" not in config


@pytest.mark.parametrize("target", [ort_cpu, ort_mobile])
def test_static_batch(target: ModuleType, tmp_path: Path) -> None:
    program = integer_program(widths=(16, 12, 10), levels=(256, 1024))
    (tmp_path / "model.onnx").write_bytes(target.emit(program, {}, "smallest", 4))
    session = RuntimeModel(tmp_path / "model.onnx")
    assert session.batch == 4
    assert session.session.get_outputs()[0].shape == [4, 10]
    x = inputs((16,), 10)
    np.testing.assert_array_equal(session.run(x.numpy())[0], program(x).numpy())
    np.testing.assert_array_equal(RUNTIMES["ort"].run(tmp_path / "model.onnx", x.numpy()), program(x).numpy())


def test_a_compiled_model_is_written_for_another_target(tmp_path: Path) -> None:
    compiled = compiled_kan()
    mobile = compiled.for_target("ort-mobile")
    mobile.save(tmp_path / "model.ort", shared=True)
    compiled.save(tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.manifest.json",
        "model.onnx",
        "model.ort",
        "model.ort.manifest.json",
        "model.required_operators_and_types.config",
    ]
    manifest = json.loads((tmp_path / "model.ort.manifest.json").read_text())
    assert manifest["target"] == "ort-mobile"
    assert manifest["model_bytes"] == (tmp_path / "model.ort").stat().st_size
    assert manifest["deflated_bytes"] < manifest["model_bytes"]
    assert all(layer["int16_pairs"]["exact"] for layer in manifest["layers"])
    assert (
        RuntimeModel(tmp_path / "model.ort").session.get_modelmeta().custom_metadata_map["kancompile.target"]
        == "ort-mobile"
    )
    x = make_inputs()
    np.testing.assert_array_equal(RuntimeModel(mobile.model_bytes)(x), RuntimeModel(compiled.model_bytes)(x))


def test_what_a_target_cannot_do_is_refused_with_the_nearest_recipe() -> None:
    with pytest.raises(KanCompileError, match=r"target 'ort-mobile': cpu is 'x86-vnni', .* recipe that works has cpu"):
        check_target(TARGETS["ort-mobile"], read_recipe({"cpu": "x86-vnni"}))
    eight_bits = Target("narrow", ".bin", (4, 8), ort_cpu.emit)
    with pytest.raises(KanCompileError, match=r"target 'narrow': batch is 4"):
        check_target(eight_bits, read_recipe({"batch": 4}))
    program = integer_program(weight_bits=3)
    facts = FACTS | {"layers": [describe_layer(program, layer) for layer in program.layers()]}
    with pytest.raises(KanCompileError, match=r"layer 'layers.0': weights of 3 bits .* use weight_bits = 4"):
        write(eight_bits, program, facts, read_recipe(None))
    with pytest.raises(KanCompileError, match="target 'tpu' is unknown"):
        targets_named(["ort-cpu", "tpu"])
    assert targets_named(["ort-mobile", "all"])[0].name == "ort-mobile"
    assert {target.name for target in targets_named(["all"])} == set(TARGETS)
