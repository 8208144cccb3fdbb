"""The methods of quantization-aware training by name, one file each."""

from kancompile.qat.methods.dorefa import DoReFaIndex, DoReFaWeight
from kancompile.qat.methods.dsq import DsqIndex, DsqWeight
from kancompile.qat.methods.lsq import LsqIndex, LsqWeight
from kancompile.qat.methods.lsq_plus import LsqPlusIndex, LsqPlusWeight
from kancompile.qat.methods.pact import PactIndex
from kancompile.qat.methods.qil import QilIndex, QilWeight
from kancompile.qat.methods.straight_through import (
    IndexMethod,
    SharedChange,
    WeightQuantizer,
    rounded,
    with_scaled_gradient,
)

WEIGHT_METHODS: dict[str, type[WeightQuantizer]] = {
    "lsq": LsqWeight,
    "lsq+": LsqPlusWeight,
    "dorefa": DoReFaWeight,
    "qil": QilWeight,
    "dsq": DsqWeight,
}
"""Methods for weights."""
INDEX_METHODS: dict[str, type[IndexMethod]] = {
    "lsq": LsqIndex,
    "lsq+": LsqPlusIndex,
    "pact": PactIndex,
    "dorefa": DoReFaIndex,
    "qil": QilIndex,
    "dsq": DsqIndex,
}
"""Methods for the row index of a table."""

__all__ = [
    "INDEX_METHODS",
    "WEIGHT_METHODS",
    "DoReFaIndex",
    "IndexMethod",
    "SharedChange",
    "WeightQuantizer",
    "rounded",
    "with_scaled_gradient",
]
