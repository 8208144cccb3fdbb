"""Quantization-aware training: a compiled model as a module to train, which ends in the same file.

module = kancompile.qat.prepare(model, calibration, recipe)
...  # your own loop: any optimizer of torch.optim
compiled = kancompile.qat.convert(module)
"""

from kancompile.qat.checkpoint import load_checkpoint, save_checkpoint
from kancompile.qat.choices import Training
from kancompile.qat.conversion import convert
from kancompile.qat.elastic import ElasticModel, prepare_elastic
from kancompile.qat.fitting import Labelled, Schedule, fit, state_files
from kancompile.qat.optimization import BestState, distillation_loss, held_out_loss, parameter_groups
from kancompile.qat.oscillation import OscillationFreezer, dampening_loss
from kancompile.qat.preparation import prepare, prepare_compiled
from kancompile.qat.training_module import TrainedModel

__all__ = [
    "BestState",
    "ElasticModel",
    "Labelled",
    "OscillationFreezer",
    "Schedule",
    "TrainedModel",
    "Training",
    "convert",
    "dampening_loss",
    "distillation_loss",
    "fit",
    "held_out_loss",
    "load_checkpoint",
    "parameter_groups",
    "prepare",
    "prepare_compiled",
    "prepare_elastic",
    "save_checkpoint",
    "state_files",
]
