"""The C text of a whole model: interface, arithmetic, layers, and the functions that a program calls."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from kancompile.targets.c99 import arithmetic
from kancompile.targets.c99.arena import Arena
from kancompile.targets.c99.c_text import array, bytes_of, float_array, for_loop, indented, is_range, unsigned_type
from kancompile.targets.c99.interface import Sizes, interface, state_of, title
from kancompile.targets.c99.shared_layers import render_layers
from kancompile.targets.c99.steps import Array, Contract, Gather, Input, MaxPool, Plan, Recode
from kancompile.targets.c99.windows import over_positions, over_taps

_WORDS = r"""
/* Weights are multiplied in 16-bit lanes of words: by vector registers where a compiler has them (words of 16 bits, of which it
   fills a register), else two to a 32-bit register. Define KAN_WORD_BITS as 16 or 32 to choose. */
#ifndef KAN_WORD_BITS
#if defined(__SSE2__) || defined(__ARM_NEON) || defined(__ARM_FEATURE_MVE) || defined(__riscv_vector) || defined(__wasm_simd128__)
#define KAN_WORD_BITS 16
#else
#define KAN_WORD_BITS 32
#endif
#endif
#if KAN_WORD_BITS == 16
typedef uint16_t kan_word;
#define P(a, b) (a), (b)
#define KAN_FIELD1(x) ((x) & 0x0001)
#define KAN_FIELD2(x) ((x) & 0x0003)
#define KAN_FIELD4(x) ((x) & 0x000F)
#define KAN_FIELD8(x) ((x) & 0x00FF)
#define KAN_HIGH(x) ((x) >> 8)
#else
typedef uint32_t kan_word;
#define P(a, b) ((uint32_t)(a) | (uint32_t)(b) << 16)
#define KAN_FIELD1(x) ((x) & 0x00010001u)
#define KAN_FIELD2(x) ((x) & 0x00030003u)
#define KAN_FIELD4(x) ((x) & 0x000F000Fu)
#define KAN_FIELD8(x) ((x) & 0x00FF00FFu)
#define KAN_HIGH(x) ((x) >> 8 & 0x00FF00FFu)
#endif
/* The loops over weights keep their registers to themselves. */
#ifdef __GNUC__
#define KAN_APART __attribute__((noinline))
#else
#define KAN_APART
#endif
#define KAN_WORDS(elements) ((elements) / (KAN_WORD_BITS / 16))
"""

_EXACT = r"""
#ifdef __FAST_MATH__
#error "inputs are rounded by exact float arithmetic: compile this file without -ffast-math"
#endif
"""

_COLLECT = r"""
/* Add 16-bit lanes to 32-bit sums. */
static void kan_collect(uint32_t *restrict sums, const kan_word *restrict lanes, uint32_t outputs, uint32_t shift)
{
#if KAN_WORD_BITS == 16
    for (uint32_t o = 0; o < outputs; o++)
        sums[o] += (uint32_t)lanes[o] << shift;
#else
    for (uint32_t o = 0; o < outputs; o += 2) {
        const uint32_t pair = lanes[o / 2];
        sums[o] += (pair & 0xFFFFu) << shift;
        sums[o + 1] += pair >> 16 << shift;
    }
#endif
}
"""

_COLLECT_SPLIT = r"""
/* Add to 32-bit sums what lanes, sums of products modulo the size of a lane, and the sums of their upper bytes stand for. */
static void kan_collect_split(uint32_t *restrict sums, const kan_word *restrict lanes, const kan_word *restrict high, uint32_t outputs)
{
#if KAN_WORD_BITS == 16
    for (uint32_t o = 0; o < outputs; o++)
        sums[o] += ((uint32_t)high[o] << 8) + (kan_word)(lanes[o] - (kan_word)(high[o] << 8));
#else
    for (uint32_t o = 0; o < outputs; o += 2) {
        const uint32_t upper = high[o / 2], pair = lanes[o / 2];
        const uint32_t first = (upper & 0xFFFFu) << 8, second = upper >> 16 << 8;
        const uint32_t low = first + ((pair - first) & 0xFFFFu);
        sums[o] += low;
        sums[o + 1] += second + ((((pair - low) >> 16) - second) & 0xFFFFu);
    }
#endif
}
"""  # noqa: E501 (C)

_CONSTANT = r"""
static kan_real kan_constant(int32_t m, int32_t e)
{
    kan_real r;
    r.m = m;
    r.e = e;
    return r;
}
"""

_BELOW = r"""
static int kan_below(kan_real a, kan_real b)
{
    if (a.m == 0 || b.m == 0 || (a.m < 0) != (b.m < 0) || a.e == b.e)
        return a.m < b.m;
    return (a.e < b.e) == (a.m > 0);
}
"""


def render(plan: Plan, metadata: Mapping[str, str]) -> str:
    """Write the file, interface included."""
    return _File(plan, metadata).render()


class _File:
    def __init__(self, plan: Plan, metadata: Mapping[str, str]) -> None:
        self.plan, self.metadata = plan, metadata
        self.arena = Arena.of(plan)
        self.shared = render_layers(plan.contractions(), self.arena.place)
        self.layers = [layer.text for layer in self.shared]
        self.flash = sum(layer.flash_bytes for layer in self.layers)
        self.last = next((step for step in plan.contractions() if step.keeps_sums), None)
        self.keeps_reals = self.last is not None and self.last.adds_reals

    def render(self) -> str:
        steps, calls = self._steps()
        body = [
            *(self._input(number, input) for number, input in enumerate(self.plan.inputs)),
            *steps,
            self._run(calls),
            self._output(),
        ]
        used = "\n".join(body)
        sizes = Sizes(
            self.flash,
            max((layer.lane_bytes for layer in self.layers), default=0),
            sum(layer.products for layer in self.layers),
        )
        state = state_of(self.plan, self.arena, max((layer.sums for layer in self.layers), default=1))
        return "".join(
            [
                title(self.metadata, sizes, state),
                interface(self.plan, sizes, state),
                _EXACT,
                self._arithmetic(used),
                "\n",
                used,
            ]
        )

    # functions

    def _arithmetic(self, used: str) -> str:
        """Include what is used, what that uses, and nothing else: an unused static function is a warning."""
        pieces = [
            ("KAN_APART", _WORDS),
            ("kan_collect(", _COLLECT),
            ("kan_collect_split(", _COLLECT_SPLIT),
            ("kan_rounded(", arithmetic.ROUNDED),
            ("kan_from_int(", arithmetic.FROM_INT),
            ("kan_product(", arithmetic.PRODUCT),
            ("kan_quotient(", arithmetic.QUOTIENT),
            ("kan_sum(", arithmetic.SUM),
            ("kan_constant(", _CONSTANT),
            ("kan_nearest(", arithmetic.NEAREST),
            ("kan_truncated(", arithmetic.TRUNCATED),
            ("kan_clipped(", arithmetic.CLIPPED),
            ("kan_signed(", arithmetic.SIGNED),
            ("kan_float(", arithmetic.FLOAT),
            ("kan_below(", _BELOW),
        ]
        magnitude = ("kan_magnitude(", arithmetic.MAGNITUDE)
        chosen: list[str] = []
        text = used
        for name, piece in [*reversed(pieces), magnitude]:
            if name in text:
                chosen.insert(0, piece)
                text += piece
        return "".join(chosen)

    def _input(self, number: int, input: Input) -> str:
        index, target = input.index, input.target
        low, high = -index.zero_point, index.levels - 1 - index.zero_point
        source, table = self._ordered(f"kan_order{number}", input.order)
        real = f"values[{source}]"
        before: list[str] = []
        for place, step in enumerate(input.steps):
            constant = step.constant.numpy()
            name = f"kan_before{number}_{place}"
            if (constant == constant[0]).all():
                c = f"{float(constant[0]).hex()}f"
            else:
                c = f"{name}[i]"
                table.append(float_array(name, constant))
                self.flash += 4 * constant.size
            # a compiler that may join a product and a sum to one operation would round once where the program does twice
            kind = "const volatile float" if "*" in step.form else "const float"
            before.append(f"{kind} real{place} = {_applied(step.form, real, c)};")
            real = f"real{place}"
        rounded = [
            f"const float x = {real} / {float(np.float32(index.scale)).hex()}f;",
            "/* clipped first, which also settles NaN, then rounded half to even by leaving no bits below 1 */",
            f"const float bounded = x > {low}.0f ? (x < {high}.0f ? x : {high}.0f) : {low}.0f;",
            "const float shifted = bounded + 12582912.0f;",
            f"target[i] = ({target.c_type})((int32_t)(shifted - 12582912.0f) + {index.zero_point});",
        ]
        truncated = [  # NaN too is the first row
            f"const float x = {real};",
            f"target[i] = ({target.c_type})(x > 0.0f ? (x < {high}.0f ? x : {high}.0f) : 0.0f);",
        ]
        body = [*before, *(truncated if index.truncates else rounded)]
        head = f"static void kan_quantize{number}({target.c_type} *restrict target, const float *restrict values)"
        return "\n".join([*table, head, "{", *indented(for_loop("i", target.size, body)), "}", ""])

    def _steps(self) -> tuple[list[str], list[str]]:
        texts: list[str] = []
        calls: list[str] = []
        layers = {next(iter(layer.calls)): layer.text.text for layer in self.shared}
        of_layers = {use: call for layer in self.shared for use, call in layer.calls.items()}
        for number, step in enumerate(self.plan.steps):
            if isinstance(step, Contract):
                texts += [layers[step.number]] if step.number in layers else []
                calls.append(of_layers[step.number])
                continue
            head = f"static void kan_step{number}(kan_model_state *state)"
            if isinstance(step, Gather):
                texts.append(self._constant(f"kan_positions{number}", step.positions))
                lines = self._gather(number, step)
            elif isinstance(step, Recode):
                texts.append(self._constant(f"kan_codes{number}", step.codes))
                lines = self._recode(number, step)
            else:
                lines = self._max_pool(step)
            texts.append("\n".join([head, "{", *indented(lines), "}", ""]))
            calls.append(f"kan_step{number}(state);")
        return texts, calls

    def _constant(self, name: str, values: Array) -> str:
        c_type = unsigned_type(int(values.max()))
        self.flash += values.size * bytes_of(c_type)
        return array(c_type, name, values)

    def _recode(self, number: int, step: Recode) -> list[str]:
        line = f"{self.arena.place(step.target)}[i] = kan_codes{number}[{self.arena.place(step.source)}[i]];"
        return for_loop("i", step.target.size, [line])

    def _gather(self, number: int, step: Gather) -> list[str]:
        line = f"{self.arena.place(step.target)}[i] = {self.arena.place(step.source)}[kan_positions{number}[i]];"
        return for_loop("i", step.target.size, [line])

    def _max_pool(self, step: MaxPool) -> list[str]:
        source, target = self.arena.place(step.source), self.arena.place(step.target)
        inside = [
            f"const {step.source.c_type} row = {source}[source * {step.channels}u + channel];",
            "if (row > largest)",
            "    largest = row;",
        ]
        body = [
            f"{step.source.c_type} largest = 0;",
            *over_taps(step.window, inside, []),
            f"{target}[position * {step.channels}u + channel] = largest;",
        ]
        return over_positions(step.window, for_loop("channel", step.channels, body))

    def _run(self, calls: Sequence[str]) -> str:
        quantize = [
            f"kan_quantize{number}(state->{input.target.name}, x);" for number, input in enumerate(self.plan.inputs)
        ]
        return "\n".join(
            [
                "void kan_model_quantize(kan_model_state *state, const float x[KAN_MODEL_INPUTS])",
                "{",
                *indented(quantize),
                "}",
                "",
                "void kan_model_run(kan_model_state *state)",
                "{",
                *indented(calls),
                "}",
                "",
            ]
        )

    def _output(self) -> str:
        output = self.plan.output
        count = len(output.order)
        source, table = self._ordered("kan_output_order", output.order)
        if self.last is None:
            assert output.source is not None
            assert output.values is not None
            table.append(float_array("kan_output_values", output.values))
            self.flash += 4 * output.values.size
            real = [f"y[i] = kan_output_values[{self.arena.place(output.source)}[{source}]];"]
            # codes ascend with the values that they stand for
            code = f"(int32_t){self.arena.place(output.source)}[{source}]"
            better = [f"if ({code} > best) {{", f"    best = {code};", "    at = i;", "}"]
            start = "int32_t best = -1;"
        elif self.keeps_reals:
            real = [f"y[i] = kan_float(state->output[{source}]);"]
            better = [
                f"if (kan_below(best, state->output[{source}])) {{",
                f"    best = state->output[{source}];",
                "    at = i;",
                "}",
            ]
            first = source.replace("[i]", "[0]") if "[i]" in source else source.replace("i", "0")
            start = f"kan_real best = state->output[{first}];"
        else:
            scales = self.last.scale_groups[0].scale
            m, e = arithmetic.mantissas(scales, self.last.layer)
            table += [
                float_array("kan_output_scale", scales),
                array("int32_t", "kan_output_m", m),
                array("int8_t", "kan_output_e", e),
            ]
            self.flash += 9 * scales.size
            channel = f"place % {self.last.n_out}u" if self.last.window.positions > 1 else "place"
            place = f"const uint32_t place = {source};"
            real = [place, f"y[i] = (float)state->output[place] * kan_output_scale[{channel}];"]
            value = f"kan_product(kan_from_int(state->output[place]), kan_output_m[{channel}], kan_output_e[{channel}])"
            better = [
                place,
                f"const kan_real y = {value};",
                "if (i == 0 || kan_below(best, y)) {",
                "    best = y;",
                "    at = i;",
                "}",
            ]
            start = "kan_real best = {0, 0};"
        return "\n".join(
            [
                *table,
                "void kan_model_output(const kan_model_state *state, float y[KAN_MODEL_OUTPUTS])",
                "{",
                *indented(for_loop("i", count, real)),
                "}",
                "",
                "uint32_t kan_model_largest(const kan_model_state *state)",
                "{",
                *indented([start, "uint32_t at = 0;", *for_loop("i", count, better), "return at;"]),
                "}",
                "",
            ]
        )

    def _ordered(self, name: str, order: Array) -> tuple[str, list[str]]:
        """Say where element ``i`` is found: at ``i``, by a formula for channels last or first, or by a table."""
        if is_range(order):
            return "i", []
        columns = _transposed(order)
        if columns is not None:
            return f"i / {columns}u + i % {columns}u * {len(order) // columns}u", []
        c_type = unsigned_type(int(order.max()))
        self.flash += order.size * bytes_of(c_type)
        return f"{name}[i]", [array(c_type, name, order)]


def _applied(form: str, x: str, c: str) -> str:
    """Put an input and a constant into a form."""
    return "".join({"x": x, "c": c}.get(part, part) for part in re.split(r"\b([xc])\b", form))


def _transposed(order: Array) -> int | None:
    """Recognize ``order[i] = i / columns + i % columns * rows``; give the columns."""
    size = len(order)
    rows = int(order[1]) if size > 1 else 0
    if rows < 2 or size % rows:
        return None
    columns = math.prod([size]) // rows
    i = np.arange(size)
    return columns if np.array_equal(order, i // columns + i % columns * rows) else None
