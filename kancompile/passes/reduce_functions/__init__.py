"""Few functions in place of all, by singular values of what a layer computes on the calibration data.

What an input adds to a layer's outputs needs fewer functions than the basis has. Which ones can be shared is a matter of scope:

* ``across_inputs``: functions that all inputs share, where every edge has its own;
* ``within_inputs``: functions of each input, where it has as many as there are outputs;
* ``channels``: functions that the channels of a convolution share, with the weights fitted again;
* ``join_inputs``: functions of inputs that share an index.

:class:`ReduceFunctions` runs the first three, on which neither rows nor bits have a say. :class:`JoinInputs` weighs what joint
tables cost against what they save, so it comes once these are known.
"""

from kancompile.passes.reduce_functions.join import JoinOptions
from kancompile.passes.reduce_functions.join_inputs import JoinInputs
from kancompile.passes.reduce_functions.look_up_time import BALANCE, time_of_each, time_of_joint
from kancompile.passes.reduce_functions.reduction import ReduceFunctions

__all__ = ["BALANCE", "JoinInputs", "JoinOptions", "ReduceFunctions", "time_of_each", "time_of_joint"]
