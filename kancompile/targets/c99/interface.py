"""What a program sees of a model: the comment at the top, the macros, the state and the functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kancompile.targets.c99.arena import Arena
from kancompile.targets.c99.c_text import bytes_of, comment, is_range
from kancompile.targets.c99.steps import Plan

INTERFACE_BEGINS = "/* ---- interface ---- */\n"
INTERFACE_ENDS = "/* ---- end of the interface ---- */\n"


@dataclass(frozen=True)
class Sizes:
    """What a model takes: bytes of constants, of stack for partial sums, and products with a weight for one sample."""

    flash_bytes: int
    stack_bytes: int
    products: int


@dataclass(frozen=True)
class State:
    """Fields of ``kan_model_state`` as ``(name, type, elements)``, in their order."""

    fields: tuple[tuple[str, str, int], ...]

    @property
    def size(self) -> int:
        """``sizeof`` where types are aligned to their own size, or to 4 bytes."""
        offset = 0
        for _, c_type, count in self.fields:
            size, alignment = (8, 4) if c_type == "kan_real" else (bytes_of(c_type),) * 2
            offset = -(-offset // alignment) * alignment + size * count
        return -(-offset // 4) * 4


def state_of(plan: Plan, arena: Arena, sums: int) -> State:
    """Lay out the state: inputs and output first, then working memory with ``sums`` accumulators."""
    fields = [(input.target.name, input.target.c_type, input.target.size) for input in plan.inputs]
    last = next((step for step in plan.contractions() if step.keeps_sums), None)
    if last is not None:
        c_type = "kan_real" if last.adds_reals else "int32_t"
        fields.append(("output", c_type, last.window.positions * last.n_out))
    fields.append(("sums", "uint32_t", sums))
    reals = max((step.n_out for step in plan.contractions() if step.adds_reals), default=0)
    products = max((step.n_out for step in plan.contractions() if step.multiplies_sums), default=0)
    if products:
        fields.append(("products", "uint32_t", products))
    if reals:
        fields.append(("reals", "kan_real", reals))
    return State((*fields, *arena.arrays()))


def title(metadata: Mapping[str, str], sizes: Sizes, state: State) -> str:
    """Write the comment at the top."""
    version = metadata.get("kancompile.version", "")
    lines = [
        f"A Kolmogorov-Arnold Network in integer C99, written by kancompile {version}; do not edit.",
        "",
        f"constants {sizes.flash_bytes:,} bytes, state {state.size:,} bytes, partial sums {sizes.stack_bytes:,} bytes of stack,",
        f"{sizes.products:,} multiplications with a weight for one sample, whatever the sample",
        "",
        *(f"{key}: {value}" for key, value in metadata.items()),
    ]
    return "/*\n" + "".join(f" * {comment(line)}".rstrip() + "\n" for line in lines) + " */\n\n"


def interface(plan: Plan, sizes: Sizes, state: State) -> str:
    """Write what a header holds."""
    lines = [
        INTERFACE_BEGINS.rstrip(),
        "#ifndef KAN_MODEL_H",
        "#define KAN_MODEL_H",
        "",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"#define KAN_MODEL_INPUTS {plan.input_size}",
        f"#define KAN_MODEL_OUTPUTS {len(plan.output.order)}",
        f"#define KAN_MODEL_OUTPUT_SHAPE {{{', '.join(map(str, plan.output.shape))}}}",
        f"#define KAN_MODEL_FLASH_BYTES {sizes.flash_bytes} /* of constants, without code */",
        f"#define KAN_MODEL_RAM_BYTES {state.size} /* sizeof(kan_model_state) */",
        f"#define KAN_MODEL_STACK_BYTES {sizes.stack_bytes} /* of partial sums, without registers and addresses */",
        f"#define KAN_MODEL_PRODUCTS {sizes.products} /* multiplications with a weight for one sample */",
        "",
        "/* A real number m * 2^e: float32 without a floating-point unit. 2^23 <= |m| < 2^24, or m = 0. */",
        "typedef struct {",
        "    int32_t m;",
        "    int32_t e;",
        "} kan_real;",
        "",
        "/* All memory that the model needs.",
        *_input_meaning(plan),
        *_output_meaning(plan),
        "   The rest is working memory. */",
        "typedef struct {",
        *(f"    {c_type} {name}[{count}];" for name, c_type, count in state.fields),
        "} kan_model_state;",
        "",
        "/* Round real inputs to row numbers; the only float arithmetic besides kan_model_output. */",
        "void kan_model_quantize(kan_model_state *state, const float x[KAN_MODEL_INPUTS]);",
        "",
        "/* Compute, in integers, the output from the inputs in the state. The inputs stay as they are. */",
        "void kan_model_run(kan_model_state *state);",
        "",
        "/* Give the output as real numbers. */",
        "void kan_model_output(const kan_model_state *state, float y[KAN_MODEL_OUTPUTS]);",
        "",
        "/* Give the number of the largest output, the first of equal ones, in integer arithmetic. */",
        "uint32_t kan_model_largest(const kan_model_state *state);",
        "",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "",
        "#endif",
        INTERFACE_ENDS,
    ]
    return "\n".join(lines)


def _input_meaning(plan: Plan) -> list[str]:
    lines = []
    for input in plan.inputs:
        index = input.index
        formula = f"clip(rint(x / {index.scale!r}) + {index.zero_point}, 0, {index.levels - 1})"
        if index.truncates:
            formula = f"trunc(clip(x, 0, {index.levels - 1}))"
        order = "" if is_range(input.order) else "; inputs stand in the order in which kan_model_quantize writes them"
        real = "real input x" if not input.steps else "real input, normalized to x in kan_model_quantize"
        lines.append(f"   {input.target.name}: row numbers of tables, {formula} of each {real}{order}.")
    return lines


def _output_meaning(plan: Plan) -> list[str]:
    output = plan.output
    if output.source is not None:
        return ["   The output are 8-bit codes among the working memory; kan_model_output knows what they stand for."]
    last = next(step for step in plan.contractions() if step.keeps_sums)
    if last.adds_reals:
        return []
    return ["   output: sums in units that differ between channels; kan_model_output and kan_model_largest know them."]
