"""The straight line from a model to a file, with the error gate and the budget of bytes."""

from kancompile.compiler.allocated_point import change_text
from kancompile.compiler.allocation import Allocator
from kancompile.compiler.atomic_write import check_destinations, write_atomically
from kancompile.compiler.compile import compile
from kancompile.compiler.compiled_model import MANIFEST_SUFFIX, CompiledModel, manifest_path
from kancompile.compiler.emission import check_target, target_named, targets_named, write
from kancompile.compiler.ladder import FREE, KIND_OF_KEY, Rung, rungs
from kancompile.compiler.layer_options import ROWS as ROW_LADDER
from kancompile.compiler.layer_trials import LayerTrials, trials_for
from kancompile.compiler.left_in_float import left_in_float
from kancompile.compiler.manifest import (
    MANIFEST_FORM,
    METADATA_FORM,
    constant_bytes,
    describe,
    describe_file_bytes,
    describe_interface,
    describe_layer,
)
from kancompile.compiler.pair import own_hash_fits, why_torn
from kancompile.compiler.preparation import Preparation, prepare_model
from kancompile.compiler.reproduction import changed_facts, changed_versions, first_difference
from kancompile.compiler.sampled_inputs import sampled_inputs

__all__ = [
    "FREE",
    "KIND_OF_KEY",
    "MANIFEST_FORM",
    "MANIFEST_SUFFIX",
    "METADATA_FORM",
    "ROW_LADDER",
    "Allocator",
    "CompiledModel",
    "LayerTrials",
    "Preparation",
    "Rung",
    "change_text",
    "changed_facts",
    "changed_versions",
    "check_destinations",
    "check_target",
    "compile",
    "constant_bytes",
    "describe",
    "describe_file_bytes",
    "describe_interface",
    "describe_layer",
    "first_difference",
    "left_in_float",
    "manifest_path",
    "own_hash_fits",
    "prepare_model",
    "rungs",
    "sampled_inputs",
    "target_named",
    "targets_named",
    "trials_for",
    "why_torn",
    "write",
    "write_atomically",
]
