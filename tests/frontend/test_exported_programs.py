"""Programs of torch.export as users bring them: accepted, or refused by name with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import kancompile
from kancompile.errors import KanCompileError
from kancompile.frontend import capture

N_IN = 4
X = torch.randn(60, N_IN, generator=torch.Generator().manual_seed(0))


class Rbf(nn.Module):
    def __init__(self, n_out: int = N_IN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, 6 * N_IN, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("centers", torch.linspace(-2, 2, 6))

    def basis(self, x: Tensor) -> Tensor:
        return torch.exp(-((x[..., None] - self.centers) ** 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.basis(x).flatten(1), self.weight)


class Tied(nn.Module):
    """One layer under two names, and one that shares its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Rbf()
        self.again = self.first
        self.like = Rbf()
        self.like.weight, self.like.centers = self.first.weight, self.first.centers
        self.total = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.like(self.again(self.first(x))) * self.total.mean()  # type: ignore[no-any-return]


class Counting(Rbf):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


class Overwriting(Rbf):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1))


@torch.library.custom_op("kancompile_tests::bumps", mutates_args=())
def bumps(x: Tensor, centers: Tensor) -> Tensor:
    return formula(x, centers)


@bumps.register_fake
def _(x: Tensor, centers: Tensor) -> Tensor:
    return x.new_empty(*x.shape, centers.shape[0])


def formula(x: Tensor, centers: Tensor) -> Tensor:
    return torch.exp(-((x[..., None] - centers) ** 2))


class Custom(Rbf):
    def basis(self, x: Tensor) -> Tensor:
        return torch.ops.kancompile_tests.bumps(x, self.centers)  # type: ignore[no-any-return]


def exported(model: nn.Module, strict: bool = False, x: Tensor = X) -> ExportedProgram:
    return torch.export.export(model, (x[:4],), dynamic_shapes=({0: Dim("batch")},), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_tied_parameters(strict: bool, tmp_path: Path) -> None:
    model = Tied().eval()
    program = exported(model, strict)
    for source in (program, program.run_decompositions()):
        found = capture(source, (N_IN,))
        torch.testing.assert_close(found(X), model(X), rtol=1e-4, atol=1e-4)
        assert [layer.uses for layer in found.layers()] == [2, 1]
    torch.export.save(program, tmp_path / "tied.pt2")
    found = capture(tmp_path / "tied.pt2", (N_IN,), trust=True)
    torch.testing.assert_close(found(X), model(X), rtol=1e-4, atol=1e-4)


def test_batch_norm_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(N_IN), Rbf()).eval()
    for source in (exported(model), exported(model, strict=True), exported(model).module()):
        torch.testing.assert_close(capture(source, (N_IN,))(X), model(X), rtol=1e-4, atol=1e-4)


REFUSED = {
    "batch norm": (
        lambda: nn.Sequential(nn.BatchNorm1d(N_IN), Rbf()).train(),
        r"found batch normalization in training mode, which writes to \[.*running_mean.*call model.eval\(\) before torch.export",
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Dropout(), Rbf()).train(),
        r"random operator .*call model.eval\(\) before torch.export",
    ),
    "counter": (
        lambda: Counting().eval(),
        r"found writes to \['calls'\], expected a function of the input alone; remove",
    ),
    "input": (lambda: Overwriting().eval(), r"found writes to \['x'\], expected a function of the input alone; remove"),
    "custom operator": (
        lambda: Custom().eval(),
        r"a custom operator, whose formula .*run_decompositions\(\{torch.ops.kancompile_tests.bumps.default: FORM",
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, strict: bool) -> None:
    make, said = REFUSED[case]
    with pytest.raises(KanCompileError, match=said):
        capture(exported(make(), strict), (N_IN,))


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_other_precisions_are_refused(kind: torch.dtype) -> None:
    with pytest.raises(
        KanCompileError, match=rf"input of {kind} on cpu.*convert the model with .float\(\).cpu\(\) before"
    ):
        capture(exported(Rbf().to(kind), x=X.to(kind)), (N_IN,))
    with pytest.raises(KanCompileError, match=r"static input shape \(4, 4\), expected a dynamic batch; export with"):
        capture(torch.export.export(Rbf(), (X[:4],)), (N_IN,))


def test_a_custom_operator_compiles_with_its_formula() -> None:
    model = Custom().eval()
    program = exported(model).run_decompositions({torch.ops.kancompile_tests.bumps.default: formula})
    torch.testing.assert_close(capture(program, (N_IN,))(X), model(X), rtol=1e-4, atol=1e-4)
    with pytest.raises(
        KanCompileError, match=r"custom operator 'kancompile_tests.bumps.default' outside the KAN layers"
    ):
        kancompile.compile(nn.Sequential(Rbf(), Custom()).eval(), X)


def test_wrappers_are_taken_off_and_scripts_refused() -> None:
    model = Rbf().eval()
    for wrapped in (torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):  # type: ignore[arg-type]
        torch.testing.assert_close(capture(wrapped, (N_IN,))(X), model(X), rtol=1e-4, atol=1e-4)
    for script in (torch.jit.trace(model, X[:4]), torch.jit.script(model)):
        with pytest.raises(KanCompileError, match=r"found a TorchScript module .* expected the torch.nn.Module"):
            kancompile.compile(script, X)
