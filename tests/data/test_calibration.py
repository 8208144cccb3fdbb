"""Calibration data in every form that users hold, and what is said about data that cannot be used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from kancompile.data.calibration import load_calibration, stream_batches
from kancompile.errors.exceptions import KanCompileError


def _values(n: int = 10, features: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, features)).astype(np.float32)


def _forms(x: np.ndarray, folder: Path) -> dict[str, Any]:
    np.savez(folder / "x.npz", x=x, y=np.arange(len(x)))
    np.savez(folder / "only.npz", inputs=x)
    np.save(folder / "x.npy", x)
    tensor = torch.from_numpy(x)
    return {
        "array": x,
        "tensor": tensor,
        "float64": x.astype(np.float64),
        "npz": folder / "x.npz",
        "npz of one array": str(folder / "only.npz"),
        "npy": str(folder / "x.npy"),
        "pair": (x, np.arange(len(x))),
        "list of arrays": [x[:4], x[4:]],
        "loader": DataLoader(TensorDataset(tensor, torch.arange(len(x))), batch_size=4),
        "generator": (tensor[i : i + 3] for i in range(0, len(x), 3)),
        "mappings": [{"x": x[:4], "y": np.arange(4)}, {"x": x[4:], "y": np.arange(len(x) - 4)}],
        "calibration": load_calibration(x),
    }


FORMS = [
    "array", "tensor", "float64", "npz", "npz of one array", "npy", "pair", "list of arrays", "loader", "generator",
    "mappings", "calibration",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches_again_and_again(form: str, tmp_path: Path) -> None:
    x = _values()
    samples = load_calibration(_forms(x, tmp_path)[form], (3,), batch_size=4)
    for _ in range(2):
        batches = list(samples)
        assert [tuple(batch.shape) for batch in batches] == [(4, 3), (4, 3), (2, 3)]
        assert all(batch.dtype == torch.float32 for batch in batches)
        np.testing.assert_array_equal(torch.cat(batches).numpy(), x)
    assert samples.input_shape == (3,)
    assert len(samples) == 10


@pytest.mark.parametrize("form", FORMS)
def test_streaming_gives_the_same_samples(form: str, tmp_path: Path) -> None:
    x = _values()
    streamed = torch.cat([batch for batch, _ in stream_batches(_forms(x, tmp_path)[form], (3,), batch_size=4)])
    np.testing.assert_array_equal(streamed.numpy(), x)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), batch=st.integers(1, 7))
def test_ragged_batches_lose_and_invent_nothing(sizes: list[int], batch: int) -> None:
    x = _values(sum(sizes), 2)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    if len(x) < 2:
        with pytest.raises(KanCompileError, match="expected at least 2"):
            load_calibration(parts)
        return
    np.testing.assert_array_equal(torch.cat(list(load_calibration(parts, batch_size=batch))).numpy(), x)


def test_labels_come_with_pairs_files_and_loaders_and_follow_every_choice_of_samples(tmp_path: Path) -> None:
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(20, dtype=np.uint8))
    loader = DataLoader(TensorDataset(torch.from_numpy(x), torch.arange(20)), batch_size=7)
    for samples in (
        load_calibration(tmp_path / "d.npz"),
        load_calibration(loader),
        load_calibration(x, labels=list(range(20))),
    ):
        assert samples.labels is not None
        assert samples.labels.dtype == torch.int64
        small = samples.subset(6, torch.Generator().manual_seed(1))
        fit, judge = samples.split(5, torch.Generator().manual_seed(1))
        assert len(small) == 6
        assert len(fit) == 15
        assert len(judge) == 5
        for part in (small, fit, judge):
            assert part.labels is not None
            assert torch.equal(part.samples[:, 0], 2.0 * part.labels)
        together = torch.cat([fit.samples[:, 0], judge.samples[:, 0]]).sort().values
        assert torch.equal(together, samples.samples[:, 0])


def test_subset_depends_on_the_generator_alone() -> None:
    samples = load_calibration(_values(50))
    torch.manual_seed(1)
    first = samples.subset(10, torch.Generator().manual_seed(3)).samples
    torch.manual_seed(2)
    assert torch.equal(first, samples.subset(10, torch.Generator().manual_seed(3)).samples)
    assert not torch.equal(first, samples.subset(10, torch.Generator().manual_seed(4)).samples)
    assert samples.subset(50, torch.Generator()) is samples


def test_nobody_can_change_the_samples() -> None:
    x = _values()
    samples = load_calibration(x)
    expected, fingerprint = samples.samples, samples.sha256()
    x[:] = 0
    for batch in samples:
        batch.zero_()
    samples.samples.zero_()
    assert torch.equal(samples.samples, expected)
    assert samples.sha256() == fingerprint
    with pytest.raises(ValueError, match="read-only"):
        samples.inputs[0] = 1


def test_a_loader_that_reuses_its_buffer_is_copied() -> None:
    def batches() -> Iterator[torch.Tensor]:
        buffer = torch.empty(2, 1)
        for value in range(3):
            yield buffer.fill_(value)

    assert load_calibration(batches()).samples.flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_an_endless_iterable_is_read_only_as_far_as_needed() -> None:
    read = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal read
        while True:
            read += 1
            yield torch.full((8, 2), float(read))

    samples = load_calibration(endless(), max_samples=20)
    assert len(samples) == 20
    assert read == 3
    assert "reading stopped after the first 20 samples" in samples.notes[0]
    assert len(load_calibration(endless(), max_bytes=80)) == 10  # 8 bytes a sample


def test_large_arrays_are_thinned_by_a_seeded_choice() -> None:
    x = np.arange(2000, dtype=np.float32).reshape(1000, 2)
    first, again, other = (load_calibration(x, max_samples=50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.samples, again.samples)
    assert not torch.equal(first.samples, other.samples)
    assert first.samples[:, 0].max() > 1800
    assert first.samples[:, 0].min() < 200
    assert "50 of 1000 samples used" in first.notes[0]


def test_integers_and_booleans_are_converted_with_a_note() -> None:
    for dtype in (np.int64, np.int8, np.uint16, np.bool_):
        samples = load_calibration(np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype))
        assert samples.samples.tolist() == [[0, 1], [1, 0], [1, 1]]
        assert samples.notes == (f"calibration: {np.dtype(dtype)} converted to float32",)


def test_half_precision_tensors_are_read() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert load_calibration(torch.ones(3, 2, dtype=dtype) / 2).samples.tolist() == [[0.5, 0.5]] * 3


def test_constant_features_work_and_are_noted() -> None:
    x = _values(20, 4)
    x[:, 1:3] = 0.5
    whole = load_calibration(x)
    assert whole.notes == ("calibration: 2 of 4 features are constant",)
    x[:, 0], x[7, 0] = 0.0, 1.0
    halves = load_calibration(x).split(10, torch.Generator().manual_seed(0))
    found = sorted(load_calibration(half).notes for half in halves)  # only one of them has sample 7
    assert found == [(f"calibration: {count} of 4 features are constant",) for count in (2, 3)]


def test_image_shapes_are_kept() -> None:
    assert load_calibration(np.zeros((4, 3, 8, 8), np.float32), (3, 8, 8)).input_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("source", "shape", "text"),
    [
        (np.zeros((4, 3), np.uint8), None, r"found uint8.*scaled as in training.*/ 255"),
        (np.zeros((4, 3), complex), None, "found dtype 'complex128', expected float32"),
        (np.array([["a"], ["b"]]), None, "found dtype '<U1'"),
        (np.array([[1, None], [2, 3]]), None, "found dtype 'object'"),
        (np.full((4, 3), 1 << 30), None, "float32 cannot hold exactly"),
        (np.zeros((0, 3), np.float32), None, "found 0 samples, expected at least 2"),
        (np.zeros((1, 3), np.float32), None, "found 1 sample, expected at least 2"),
        ([], None, "found no batches"),
        (np.zeros((4, 0), np.float32), None, "at least one feature"),
        (np.zeros(3, np.float32), None, r"x\[None\] for one sample"),
        (np.zeros((4, 5), np.float32), (3,), r"found shape \(4, 5\), expected \[n, 3\]"),
        (np.zeros((4, 6), np.float32), (2, 3), r"reshape them, x.reshape\(-1, 2, 3\)"),
        (np.zeros((4, 8, 9, 3), np.float32), (3, 8, 9), r"channels last.* pass x.transpose\(0, 3, 1, 2\)"),
        (np.zeros((4, 3, 8, 9), np.float32), (8, 9, 3), r"channels first.* pass x.transpose\(0, 2, 3, 1\)"),
        (np.zeros((4, 9, 8, 3), np.float32), (3, 8, 9), "transpose the dimensions"),
        (np.zeros((3, 8, 8), np.float32), (3, 8, 8), "add the batch dimension"),
        ([np.zeros((4, 3)), np.zeros((4, 2))], None, r"batch 1: found shape \(4, 2\), expected \[n, 3\]"),
        ([[1.0, 2.0], [3.0, 4.0]], None, "batch 0: found list, expected a tensor"),
        ([(np.zeros((2, 1)), np.zeros(2), np.zeros(2))], None, "found 3 parts"),
        ([(np.zeros((2, 1)), np.zeros(3))], None, "found 3 labels for 2 samples"),
        ([(np.zeros((2, 1)), np.zeros(2)), np.zeros((2, 1))], None, "labels in 1 of 2 batches"),
        ((np.zeros((4, 3)), np.zeros((4, 3))), None, "two arrays of the same shape"),
        ((np.zeros((4, 3)), np.zeros(5)), None, "expected 4 labels for 4 samples"),
        ((np.zeros((4, 3)), np.array([0, np.nan, 0, 0])), None, "NaN or infinity at sample 1"),
        (7, None, "found int, expected an array"),
        ("data.txt", None, "suffix '.txt', expected '.npz', '.npy', '.csv' or '.tsv'"),
        ("absent.csv", None, "cannot be read"),
        ("absent.npz", None, "cannot be read"),
    ],
)  # fmt: skip
def test_unusable_data_is_refused_with_what_to_do(source: Any, shape: tuple[int, ...] | None, text: str) -> None:
    with pytest.raises(KanCompileError, match=text):
        load_calibration(source, shape)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_located(value: float) -> None:
    x = _values(9, 5)
    x[6, 2] = x[7, 0] = value
    text = rf"found {value} at sample 6, feature 2 \(2 such values in 2 samples\)"
    with pytest.raises(KanCompileError, match=text):
        load_calibration(x)
    with pytest.raises(KanCompileError, match="at sample 6, feature 2"):
        load_calibration([x[:4], x[4:]])
    with pytest.raises(KanCompileError, match="at sample 6, feature 2"):
        list(stream_batches([x[:4], x[4:]]))


def test_float64_beyond_float32_is_reported_as_infinite() -> None:
    with pytest.raises(KanCompileError, match="found inf at sample 1, feature 0"):
        load_calibration(np.array([[1.0], [1e300]]))


def test_thinning_keeps_original_sample_numbers_in_errors() -> None:
    x = np.zeros((1000, 1), np.float32)
    x[500:] = np.nan
    with pytest.raises(KanCompileError, match=r"at sample (5|6)\d\d,"):
        load_calibration(x, max_samples=100)


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", x=np.array([[1, None], [2, 3]], dtype=object))
    np.save(tmp_path / "bad.npy", np.array([{}], dtype=object))
    for name in ("bad.npz", "bad.npy"):
        with pytest.raises(KanCompileError, match=r"array of Python objects.*never loaded"):
            load_calibration(tmp_path / name)


def test_keys_of_npz_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=_values(), b=_values(seed=1), y=np.arange(10))
    with pytest.raises(KanCompileError, match=r"found arrays \['a', 'b', 'y'\], expected one named 'x'"):
        load_calibration(tmp_path / "two.npz")
    with pytest.raises(KanCompileError, match="expected one named 'c'"):
        load_calibration(tmp_path / "two.npz", key="c")
    assert torch.equal(load_calibration(tmp_path / "two.npz", key="b").samples, torch.from_numpy(_values(seed=1)))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really a zip")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("bad.npz", "bad.npy", "empty.npz"):
        with pytest.raises(KanCompileError, match="found no NumPy data"):
            load_calibration(tmp_path / name)


@pytest.mark.parametrize(
    ("low", "high", "is_hinted"), [(0, 255, True), (0, 200, True), (0, 16, False), (-3, 255, False)]
)
def test_raw_pixels_are_hinted_at(low: int, high: int, is_hinted: bool) -> None:
    x = np.linspace(low, high, 40).round().astype(np.float32).reshape(20, 2)
    assert any("look like raw pixels" in note for note in load_calibration(x).notes) is is_hinted
    assert not any("raw pixels" in note for note in load_calibration(x / 255 + 0.001).notes)
