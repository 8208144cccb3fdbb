"""Say why a compiled model is worse than the float one, what to change, and change it."""

from kancompile.diagnosis.comparison import CELLS, COMPARED_BITS, COMPARED_METHODS
from kancompile.diagnosis.comparison import Comparison as Comparison
from kancompile.diagnosis.comparison import compare as compare
from kancompile.diagnosis.diagnosing import diagnose as diagnose
from kancompile.diagnosis.diagnosing import examine, open_laboratory, samples_for
from kancompile.diagnosis.result import Diagnosis as Diagnosis
from kancompile.diagnosis.tuning import CACHE_NAME
from kancompile.diagnosis.tuning import Tuning as Tuning
from kancompile.diagnosis.tuning import tune as tune

__all__ = [
    "CACHE_NAME",
    "CELLS",
    "COMPARED_BITS",
    "COMPARED_METHODS",
    "compare",
    "diagnose",
    "examine",
    "open_laboratory",
    "samples_for",
    "tune",
]
