"""Capture of KANs that are written in unusual ways, and of networks that are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kancompile.errors.exceptions import KanCompileError
from kancompile.frontend import capture
from kancompile.ir import show
from tests.frontend import odd_models
from tests.frontend.capturing import branches, captured, contraction, draw, expansions, functions_are_shared


def test_reshape_that_reinterprets_memory() -> None:
    program = captured(odd_models.ReinterpretingReshape(), (4,))
    (expansion,) = expansions(program)
    assert (expansion.in_shape, expansion.k) == ((4,), 5)
    assert not functions_are_shared(expansion)
    assert contraction(program).weight.shape == (3, 20)


def test_columns_ordered_by_degree() -> None:
    model = odd_models.DegreeMajor()
    program = captured(model, (4,))
    assert functions_are_shared(expansions(program)[0])
    expected = model.linear.weight.detach().reshape(3, 3, 4).transpose(1, 2)  # [o, k, i] to [o, i, k]
    assert torch.equal(contraction(program).weight.reshape(3, 4, 3), expected)
    assert torch.equal(contraction(program).bias, model.linear.bias.detach())


def test_features_before_the_batch() -> None:
    program = captured(odd_models.TransposedFeatures(), (4,), export_again=True)
    assert [expansion.k for expansion in expansions(program)] == [4]
    assert functions_are_shared(expansions(program)[0])


def test_basis_dimension_first() -> None:
    program = captured(odd_models.BasisFirst(), (4,))
    assert [expansions(program, number)[0].k for number in (0, 1)] == [3, 3]
    assert [layer.name for layer in program.layers()] == ["layer0", "layer1"]


def test_tensors_filled_in_place() -> None:
    program = captured(odd_models.FilledInPlace(), (4,), export_again=True)
    assert len(program.layers()) == 1
    assert contraction(program).n_out == 3
    assert expansions(program)[0].k == 3  # degree 0 is constant
    assert functions_are_shared(expansions(program)[0])


def test_functions_of_each_edge() -> None:
    program = captured(odd_models.PerEdge(), (4,))
    assert expansions(program)[0].k == 3  # one for each output, the batch norm in the weights
    assert not functions_are_shared(expansions(program)[0])


def test_tables_with_interpolation() -> None:
    program = captured(odd_models.TableKAN(), (4,))
    assert len(program.layers()) == 1


def test_skip_connections_stay() -> None:
    program = captured(odd_models.Residual(), (4,))
    assert [layer.name for layer in program.layers()] == ["first", "second"]
    assert [entry.reason for entry in program.unrecognized] == ["skip connection", "skip connection"]
    assert all(expansion.k == 3 for number in (0, 1) for expansion in expansions(program, number))


def test_functions_without_weight_are_left_out() -> None:
    program = captured(odd_models.ZeroBranch(), (4,))
    assert [branch.k for branch in branches(expansions(program)[0])] == [3]
    assert functions_are_shared(expansions(program)[0])  # not the functions of each edge, although they are fewer


def test_repeated_functions_are_merged() -> None:
    assert expansions(captured(odd_models.RepeatedFunctions(), (4,)))[0].k == 2


def test_product_of_features_is_reported() -> None:
    program = captured(odd_models.TwoInputsMultiplied(), (4,))
    assert [layer.name for layer in program.layers()] == ["first", "second"]
    (entry,) = program.unrecognized
    assert (entry.operator, entry.reason) == ("aten.mul.Tensor", "nonlinear function of several features")
    assert entry.source.startswith("odd_models.py:")


def test_groups_keep_a_layer_each() -> None:
    program = captured(odd_models.Grouped(), (6,), export_again=True)
    assert [layer.name for layer in program.layers()] == ["left", "right", "top"]
    assert [expansions(program, number)[0].in_shape for number in range(3)] == [(3,), (3,), (4,)]
    assert [contraction(program, number).weight.shape for number in range(3)] == [(2, 9), (2, 9), (2, 12)]


@pytest.mark.parametrize("model", [odd_models.SharedRational(), odd_models.PerFeatureSnake()])
def test_learnable_activation_counts(model: nn.Module) -> None:
    program = captured(model, (4,))
    assert [expansion.k for expansion in expansions(program)] == [1]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.GELU(approximate="tanh"), nn.PReLU()])
def test_ordinary_network_is_no_kan(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), activation, nn.Linear(5, 3))
    with pytest.raises(KanCompileError, match=r"found no KAN layer.*plain linear layer.*plain activation"):
        capture(model, (4,))


def test_grouped_rational_of_tokens() -> None:
    program = captured(odd_models.GroupedRational(), (5, 8))
    (expansion,) = expansions(program)
    assert (expansion.in_shape, expansion.k, contraction(program).n_out) == ((5, 8), 1, 3)


def test_transformer_block_with_kans() -> None:
    program = captured(odd_models.TransformerBlock(), (5, 8), export_again=True)
    assert [layer.name for layer in program.layers()] == ["mlp", "head"]
    assert [expansions(program, number)[0].in_shape for number in (0, 1)] == [(6, 8), (8,)]
    assert contraction(program).weight.shape == (8, 24)
    reasons = {entry.reason for entry in program.unrecognized}
    assert reasons == {
        "normalization over several features",
        "plain linear layer",
        "product of two data-dependent matrices",
        "depends on several features at once",
        "skip connection",
    }


def test_search_in_knots_and_local_weights() -> None:
    program = captured(odd_models.LocalSpline(), (4,))
    assert len(program.layers()) == 1
    assert expansions(program)[0].k == 3  # the functions of each edge, not all three parts of each
    assert "aten.searchsorted" not in show(program)


def test_bags_of_weighted_rows() -> None:
    program = captured(odd_models.BagOfRows(), (4,))
    (expansion,) = expansions(program)
    assert (expansion.in_shape, expansion.k) == ((4,), 6)
    assert "aten._embedding_bag" not in show(program)


def test_bags_of_unequal_length_are_refused() -> None:
    with pytest.raises(KanCompileError, match=r"found an embedding_bag whose bags differ in length, expected .* equal"):
        capture(odd_models.BagOfRows(ragged=True), (4,))


def test_normalisation_within_the_basis() -> None:
    program = captured(odd_models.SoftmaxBasis(), (4,))
    assert [expansion.k for expansion in expansions(program)] == [3]


def test_batch_dependence_is_refused_with_its_line() -> None:
    line = _line_of(odd_models, "low, high = x.min()")
    with pytest.raises(KanCompileError, match=rf"odd_models.py:{line}: found node 'min.*aten.min.*other samples"):
        capture(odd_models.MinMaxOverBatch(), (4,))
    with pytest.raises(KanCompileError, match=r"aten.mean"):
        capture(odd_models.CenteredOverBatch(), (4,))


def test_choice_by_data_is_refused_with_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    line = _line_of(odd_models, "if x.sum() > 0")
    with pytest.raises(KanCompileError, match=rf"BranchOnData.*odd_models.py:{line}.*data-dependent"):
        capture(odd_models.BranchOnData(), (4,))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("widths", [(1, 4, 1), (3, 1, 2)])
def test_width_one(widths: tuple[int, ...]) -> None:
    from examples.zoo import efficient_kan

    captured(efficient_kan.build(widths), (widths[0],))


def test_module_called_twice_has_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kan = odd_models.DegreeMajor(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.kan(self.kan(x))

    program = captured(Twice(), (4,))
    assert [(layer.name, layer.uses) for layer in program.layers()] == [("kan", 2)]


def test_normalised_input_keeps_functions_alike() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kan = odd_models.DegreeMajor()
            self.register_buffer("mean", draw(4, seed=1))
            self.register_buffer("std", draw(4, seed=2).abs() + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.kan((x - self.mean) / self.std))

    program = captured(Normalised(), (4,))
    assert functions_are_shared(expansions(program)[0])
    assert "aten.div" in show(program)
    assert "aten.sigmoid" in show(program)


def test_channels_before_tokens() -> None:
    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(draw(3, 4, 2, seed=3))

        def forward(self, x: Tensor) -> Tensor:  # [b, channel, token]
            basis = torch.stack([torch.sin(x), torch.cos(x)], dim=-1)
            return torch.einsum("bctk,dck->bdt", basis, self.weight)

    program = captured(ChannelsFirst(), (4, 5))
    assert expansions(program)[0].in_shape == (5, 4)
    assert contraction(program).out_shape == (5, 3)


def _line_of(module: object, text: str) -> int:
    with open(module.__file__) as file:  # type: ignore[attr-defined]
        return next(number for number, line in enumerate(file, 1) if text in line)
