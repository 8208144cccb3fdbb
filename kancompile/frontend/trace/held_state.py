"""What the inputs of an exported program's graph hold that are no inputs of the model."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram


def held_state(program: ExportedProgram) -> dict[str, tuple[str, Any]]:
    """Give for every placeholder of a parameter, a buffer or a constant the model's name of it, and its value."""
    signature = program.graph_signature
    keys = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    state = {**program.state_dict, **program.constants}
    return {name: (key, state[key]) for name, key in keys.items() if key in state}
