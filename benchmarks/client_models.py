"""Models from the KAN packages on PyPI, as their users build them."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from types import ModuleType
from unittest.mock import MagicMock

from torch import nn

from benchmarks.digit_models import FamilyModel


@contextmanager
def stand_ins(packages: Sequence[str]) -> Iterator[None]:
    """Let packages be missing that a client imports for its training scripts, but whose layers never use them.

    Args:
        packages: modules, with their parents, that get a stand-in for the time of the import.
    """
    put = []
    put = [name for name in packages if name not in sys.modules]
    sys.modules.update({name: MagicMock(name=name) for name in put})
    try:
        yield
    finally:
        for name in put:
            del sys.modules[name]


def import_client(name: str, without: Sequence[str] = ()) -> ModuleType:
    """Import a client's module.

    Args:
        name: of the module, such as ``"ikan"``.
        without: packages that get a stand-in while it is imported.

    Raises:
        ImportError: the client is not installed.
    """
    folder = os.getcwd()
    try:
        with stand_ins(without), redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        os.chdir(folder)  # one of the clients changes the folder while it is imported


def ikan(name: str) -> type[nn.Module]:
    """Give a network class of ``ikan``; without Triton, its kernels for GPUs are left out."""
    without = ("torchinfo", "timm", "timm.layers", "triton", "triton.language")
    found: type[nn.Module] = getattr(import_client("ikan", without), name)
    return found


def deepkan(name: str) -> type[nn.Module]:
    """Give a network class of ``Deep-KAN``, whose module imports torchvision for its examples."""
    found: type[nn.Module] = getattr(import_client("deepkan", ("torchvision", "torchvision.transforms", "tqdm")), name)
    return found


def _image_classifier() -> nn.Module:
    """A convkan classifier as in its documentation: KAN convolutions, layer norms over channels, pooling."""
    package = import_client("convkan")
    return nn.Sequential(
        package.ConvKAN(1, 8, kernel_size=3, padding=1),
        package.LayerNorm2D(8),
        package.ConvKAN(8, 8, kernel_size=3, stride=2, padding=1),
        package.LayerNorm2D(8),
        package.ConvKAN(8, 10, kernel_size=3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def _with_activations(make: type[nn.Module], *arguments: int) -> nn.Module:
    """Put a learnable activation behind every linear layer but the last."""
    return nn.Sequential(nn.Linear(64, 32), make(*arguments), nn.Linear(32, 32), make(*arguments), nn.Linear(32, 10))


def _fkan() -> nn.Module:
    return _with_activations(import_client("fkan.torch").FractionalJacobiNeuralBlock, 3)


def _pade() -> nn.Module:
    return _with_activations(import_client("rkan.torch").PadeRKAN, 3, 2)


def _jacobi() -> nn.Module:
    return _with_activations(import_client("rkan.torch").JacobiRKAN, 3)


def _chebyshev() -> nn.Module:
    layer = deepkan("ChebyshevKANLayer")
    return nn.Sequential(layer(64, 32, 4), nn.LayerNorm(32), layer(32, 10, 4))


def _inkan(contraction: str) -> nn.Module:
    """An inKAN network; compiling its functions for training takes minutes and changes nothing that is captured."""
    network: nn.Module = import_client("inkan").KANNetwork([64, 32, 10], contraction=contraction, compile_basis=False)
    return network


def _flashkan() -> nn.Module:
    network: nn.Module = import_client("flashkan").KANNetwork([64, 32, 10])
    return network


def _torchkan() -> nn.Module:
    network: nn.Module = import_client("torchkan").KAN([64, 32, 10])
    return network


def _client(
    package: str,
    name: str,
    family: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...] = (64,),
    limits: str = "",
) -> FamilyModel:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    return FamilyModel(family, f"{package} {version} {name}".rstrip(), build, shape, 6, limits=limits)


CLIENTS = (
    _client("convkan", "", "B-spline convolution", _image_classifier, (1, 8, 8)),
    _client("Deep-KAN", "DeepKAN", "B-spline", lambda: deepkan("DeepKAN")(64, [32, 10])),
    _client("Deep-KAN", "ChebyshevKANLayer", "Chebyshev", _chebyshev),
    _client("Deep-KAN", "RBFKAN", "radial basis", lambda: deepkan("RBFKAN")([64, 32, 10])),
    _client("fkan", "", "fractional Jacobi activation", _fkan),
    _client("rkan", "PadeRKAN", "rational (Pade) activation", _pade),
    _client("rkan", "JacobiRKAN", "rational Jacobi activation", _jacobi),
    _client("inKAN", "KANNetwork", "B-spline, local", lambda: _inkan("auto")),
    _client("inKAN", "KANNetwork direct", "B-spline, gathered weights", lambda: _inkan("direct")),
    _client("flashkan", "KANNetwork", "B-spline", _flashkan),
    _client("ikan", "KAN", "B-spline", lambda: ikan("KAN")([64, 32, 10])),
    _client("ikan", "ChebyKAN", "Chebyshev", lambda: ikan("ChebyKAN")([64, 32, 10])),
    _client("ikan", "FourierKAN", "Fourier", lambda: ikan("FourierKAN")([64, 32, 10])),
    _client("ikan", "JacobiKAN", "Jacobi", lambda: ikan("JacobiKAN")([64, 32, 10])),
    _client("ikan", "TaylorKAN", "Taylor", lambda: ikan("TaylorKAN")([64, 32, 10])),
    _client("ikan", "WaveletKAN", "wavelet of each edge", lambda: ikan("WaveletKAN")([64, 32, 10])),
    _client(
        "ikan",
        "GroupKAN",
        "rational of each group",
        lambda: ikan("GroupKAN")([64, 32, 16]),
        limits="its wheel lacks the file of initial values",
    ),
    _client("torchkan", "KAN", "B-spline", _torchkan, limits="its wheel holds no Python module"),
)
"""Networks of every package, in the order of the table."""
