"""The C text of one KAN layer: its constants, the products of each expansion, and the loop over positions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kancompile.targets.c99.arithmetic import mantissas, split_float
from kancompile.targets.c99.c_text import array, bytes_of, comment, for_loop, indented, unsigned_type, word_array
from kancompile.targets.c99.planes import Plane, RowTable, pack, row_table
from kancompile.targets.c99.steps import Buffer, Contract, Read, Store
from kancompile.targets.c99.windows import over_positions, over_taps

_SLOTS_IN_STATEMENT = 5  # more factors and pointers to weights do not stay in registers


@dataclass(frozen=True)
class LayerText:
    """A layer in C.

    Attributes:
        text: definitions, the last of which is ``static void kan_layer<number>(kan_model_state *state)``.
        flash_bytes: of its constants.
        sums: accumulators that it needs.
        lane_bytes: of stack for its partial sums.
        products: multiplications with a weight for one sample.
    """

    text: str
    flash_bytes: int
    sums: int
    lane_bytes: int
    products: int


def render_layer(step: Contract, place: Callable[[Buffer], str], arguments: Sequence[str] = ()) -> LayerText:
    """Write a layer.

    Args:
        step: its plan.
        place: gives the C expression of an array of row numbers.
        arguments: declarations of what its function takes behind the state, where it is called several times.
    """
    return _Layer(step, place, arguments).render()


class _Layer:
    def __init__(self, step: Contract, place: Callable[[Buffer], str], arguments: Sequence[str]) -> None:
        self.step, self.place = step, place
        self.declared = "".join(f", {argument}" for argument in arguments)
        self.arguments = {argument.split()[-1].lstrip("*"): argument for argument in arguments}
        self.name = f"kan_layer{step.number}"
        self.offset = 1 << (step.bits - 1)
        groups, taps, columns, n = step.weight.shape
        self.columns, self.n = taps * columns, n
        self.planes = pack(step.weight.reshape(groups, taps * columns, n), step.bits)
        self.wide = self.planes[0].elements > 0
        self.tables = [row_table(read.table) for read in step.reads]
        self.constants: list[str] = []
        self.flash = 0

    def render(self) -> LayerText:
        self._weights()
        for number, (read, table) in enumerate(zip(self.step.reads, self.tables, strict=True)):
            self._table(number, read, table)
        self._define_array("int32_t", "bias", self.step.bias)
        if self.step.border is not None:
            self._define_array("int32_t", "border", self.step.border)
        finish = self._finish()
        functions = [self._products(number) for number in range(len(self.tables))]
        text = "\n".join([f"/* {self._title()} */", *self.constants, *functions, *finish, self._main()])
        room = max(plane.outputs for plane in self.planes) if self.wide else self.n
        lanes = sum(2 * plane.lanes * plane.outputs for plane in self.planes) if self.wide else 0
        return LayerText(text, self.flash, room, lanes, self._count_products())

    def _title(self) -> str:
        step = self.step
        reads = " + ".join(f"{read.n_in} inputs x {read.k} functions" for read in step.reads)
        form = "wide" if self.wide else "narrow"
        window = f", {'x'.join(map(str, step.window.kernel))} taps" if step.window.taps > 1 else ""
        return f"{comment(step.layer)}: {reads}{window} -> {step.n_out} outputs, {step.bits}-bit weights ({form})"

    def _define_array(self, c_type: str, suffix: str, values: object) -> None:
        found = np.asarray(values)
        self.constants.append(array(c_type, f"{self.name}_{suffix}", found))
        self.flash += found.size * (1 if c_type == "int8_t" else bytes_of(c_type))

    def _weights(self) -> None:
        for number, plane in enumerate(self.planes):
            name = f"{self.name}_weights{number}"
            self.constants.append(word_array(name, plane.data) if self.wide else array("uint8_t", name, plane.data))
            self.flash += plane.data.nbytes

    def _table(self, number: int, read: Read, table: RowTable) -> None:
        self._define_array("uint8_t", f"table{number}", table.codes)
        if table.columns is not None:
            self._define_array("uint8_t", f"columns{number}", table.columns)
        if read.first_row is not None:
            first = read.first_row * table.slots
            self._define_array(unsigned_type(int(first.max())), f"first{number}", first)

    # the products of one expansion

    def _products(self, number: int) -> str:
        read, table = self.step.reads[number], self.tables[number]
        first = ""
        if read.first_row is not None:
            c_type = unsigned_type(int((read.first_row * table.slots).max()))
            first = f", const {c_type} *first"
        body = self._wide_body(number) if self.wide else self._narrow_body(number)
        return "\n".join(
            [
                "/* Add count inputs times their weights, from a column on; return the sum of the table values. */",
                (
                    f"KAN_APART static uint32_t {self.name}_products{number}(uint32_t *restrict sums, "
                    f"const {read.buffer.c_type} *rows{first},"
                ),
                "                                      uint32_t count, uint32_t column)",
                "{",
                *indented(body),
                "}",
                "",
            ]
        )

    def _row(self, number: int, input: str) -> list[str]:
        """Find the slots of an input's row."""
        table = self.tables[number]
        at = f"{table.slots}u * rows[{input}]" + (
            f" + first[{input}]" if self.step.reads[number].first_row is not None else ""
        )
        lines = [f"const uint32_t row = {at};", f"const uint8_t *const codes = {self.name}_table{number} + row;"]
        if table.columns is not None:
            lines.append(f"const uint8_t *const columns = {self.name}_columns{number} + row;")
        return lines

    def _column(self, number: int, slot: int) -> str:
        return f"columns[{slot}]" if self.tables[number].columns is not None else f"{slot}u"

    def _wide_body(self, number: int) -> list[str]:
        table, k = self.tables[number], self.step.reads[number].k
        terms = min(plane.terms(int(table.codes.max())) for plane in self.planes)
        declared, collected = [], []
        for which, plane in enumerate(self.planes):
            declared.append(f"kan_word lanes{which}[KAN_WORDS({plane.outputs})] = {{0}};")
            if plane.splits_products:
                declared.append(f"kan_word high{which}[KAN_WORDS({plane.outputs})] = {{0}};")
                collected.append(f"kan_collect_split(sums, lanes{which}, high{which}, {plane.outputs});")
            else:
                collected.append(f"kan_collect(sums, lanes{which}, {plane.outputs}, {plane.shift});")
        find = [*self._row(number, "i"), f"const uint32_t at = column + {k}u * i;"]
        slots = list(range(table.slots))
        added = " + ".join(f"codes[{slot}]" for slot in slots)
        count_up = f"total += (uint32_t)({added});"
        head = ["uint32_t total = 0;"]
        if len(slots) <= terms:
            block = terms // len(slots)
            inner = [*find, count_up, *self._statements(number, slots)]
            return [
                *head,
                f"for (uint32_t start = 0; start < count; start += {block}) {{",
                *indented(declared),
                f"    const uint32_t end = count - start > {block} ? start + {block} : count;",
                "    for (uint32_t i = start; i < end; i++) {",
                *indented(inner, 2),
                "    }",
                *indented(collected),
                "}",
                "return total;",
            ]
        parts = []
        for begin in range(0, len(slots), terms):
            round_ = [*declared, *self._statements(number, slots[begin : begin + terms]), *collected]
            parts += ["{", *indented(round_), "}"]
        return [*head, *for_loop("i", "count", [*find, count_up, *parts]), "return total;"]

    def _statements(self, number: int, slots: Sequence[int]) -> list[str]:
        """Multiply the weights of some slots, a few at a time, in every plane."""
        lines = []
        for which, plane in enumerate(self.planes):
            pieces = -(-len(slots) // _SLOTS_IN_STATEMENT)
            for piece in np.array_split(np.array(slots), pieces):
                lines += self._plane_statement(number, which, plane, [int(slot) for slot in piece])
        return lines

    def _plane_statement(self, number: int, which: int, plane: Plane, slots: Sequence[int]) -> list[str]:
        size = plane.elements
        lines = []
        for slot in slots:
            at = f"KAN_WORDS({size}) * (at + {self._column(number, slot)})"
            lines.append(f"const kan_word *const w{slot} = {self.name}_weights{which} + {at};")
            lines.append(f"const kan_word a{slot} = codes[{slot}];")
        body = [f"const kan_word {', '.join(f'x{slot} = w{slot}[j]' for slot in slots)};"]
        for field in range(plane.fields):
            shift = f" >> {field * plane.bits}" if field else ""
            at = f"[{f'KAN_WORDS({field * size}) + ' if field else ''}j]"
            terms = {slot: f"KAN_FIELD{plane.bits}(x{slot}{shift}) * a{slot}" for slot in slots}
            lane = f"lanes{which}{at}"
            if not plane.splits_products:
                body.append(f"{lane} = (kan_word)({lane} + {' + '.join(terms.values())});")
                continue
            products = {slot: f"p{field}_{slot}" for slot in slots}
            body += [f"const kan_word {products[slot]} = (kan_word)({term});" for slot, term in terms.items()]
            body.append(f"{lane} = (kan_word)({lane} + {' + '.join(products.values())});")
            high = f"high{which}{at}"
            body.append(
                f"{high} = (kan_word)({high} + {' + '.join(f'KAN_HIGH({name})' for name in products.values())});"
            )
        return ["{", *indented([*lines, *for_loop("j", f"KAN_WORDS({size})", body)]), "}"]

    def _narrow_body(self, number: int) -> list[str]:
        read, table = self.step.reads[number], self.tables[number]
        weight = []
        for which, plane in enumerate(self.planes):
            fields, mask = 8 // plane.bits, (1 << plane.bits) - 1
            byte = f"(uint32_t){self.name}_weights{which}[place / {fields}u]"
            field = f"({byte} >> (place % {fields}u * {plane.bits}u) & {mask}u)"
            weight.append(field + (f" << {plane.shift}" if plane.shift else ""))
        per_output = [
            f"const uint32_t place = at + o * {self.columns}u;",
            f"sums[o] += ({' | '.join(weight)}) * code;",
        ]
        per_slot = [
            "const uint32_t code = codes[s];",
            f"const uint32_t at = begin + {read.k}u * i + {'columns[s]' if table.columns is not None else 's'};",
            "total += code;",
            *for_loop("o", self.n, per_output),
        ]
        return [
            "/* the columns of an output stand one after the other, and so do the outputs of a group, and the groups */",
            f"const uint32_t begin = column / {self.columns}u * {self.n * self.columns}u + column % {self.columns}u;",
            "uint32_t total = 0;",
            *for_loop("i", "count", [*self._row(number, "i"), *for_loop("s", table.slots, per_slot)]),
            "return total;",
        ]

    # what becomes of the sums

    def _finish(self) -> list[str]:
        """Define the constants and the function that turn the sums of one position into what readers want."""
        step = self.step
        several = step.adds_reals
        needs_scale = several or any(store.form != "requantize" for store in step.stores)
        if needs_scale:
            groups = step.scale_groups if several else step.scale_groups[:1]
            self._reals("scale", np.stack([group.scale for group in groups]))
        for number, store in enumerate(step.stores):
            if store.form == "requantize":
                assert store.factor is not None
                self._reals(f"factor{number}", store.factor)
        functions = []
        if several or step.multiplies_sums:
            functions.append(self._group_function())
        lines = []
        if several:
            lines.append("const kan_real y = state->reals[o];")
        else:
            sums = "products[o]" if step.multiplies_sums else f"sums[o] - {self.offset}u * total"
            lines.append(f"const int32_t sum = kan_signed(state->{sums});")
            if step.keeps_sums:
                lines.append(f"{self._if_kept()}state->output[first + o] = sum;")
            if needs_scale:
                lines.append(f"const kan_real y = {self._product('kan_from_int(sum)', 'scale', 'channel + o')};")
        lines += [
            f"{self._if_stored(store)}{self.place(store.buffer)}[first + o] = ({store.buffer.c_type})kan_clipped("
            f"{self._row_number(number, store)}, {store.levels - 1});"
            for number, store in enumerate(step.stores)
        ]
        if several and step.keeps_sums:
            lines.append(f"{self._if_kept()}state->output[first + o] = y;")
        # arrays that it does not write are no parameters of it
        self.passed = [name for name in self.arguments if any(re.search(rf"\b{name}\b", line) for line in lines)]
        declared = "".join(f", {self.arguments[name]}" for name in self.passed)
        unused = ["(void)channel;"] if not any("channel" in line for line in lines) else []
        unused += ["(void)total;"] if several or step.multiplies_sums else []
        functions.append(
            "\n".join(
                [
                    "/* Hand over the outputs of one position and channel group, the first of which is first. */",
                    (
                        f"static void {self.name}_finish(kan_model_state *state, uint32_t total, uint32_t first, "
                        f"uint32_t channel{declared})"
                    ),
                    "{",
                    *indented([*unused, *for_loop("o", self.n, lines)]),
                    "}",
                    "",
                ]
            )
        )
        return functions

    def _if_kept(self) -> str:
        return "if (keeps) " if self.declared else ""

    def _if_stored(self, store: Store) -> str:
        return f"if ({store.buffer.name}) " if self.declared else ""

    def _reals(self, suffix: str, values: object) -> None:
        m, e = mantissas(np.asarray(values), self.step.layer)
        self._define_array("int32_t", f"{suffix}_m", m)
        self._define_array("int8_t", f"{suffix}_e", e)

    def _product(self, value: str, suffix: str, at: str) -> str:
        return f"kan_product({value}, {self.name}_{suffix}_m[{at}], {self.name}_{suffix}_e[{at}])"

    def _row_number(self, number: int, store: Store) -> str:
        if store.form == "requantize":
            factor = self._product("kan_from_int(sum)", f"factor{number}", "channel + o")
            return f"kan_nearest({factor}) + {store.zero_point}"
        m, e = split_float(store.multiplier)
        if store.form == "nearest":
            return f"kan_nearest(kan_quotient(y, {m}, {e})) + {store.zero_point}"
        if store.form == "affine":
            shift_m, shift_e = split_float(store.offset)
            return f"kan_truncated(kan_sum(kan_product(y, {m}, {e}), kan_constant({shift_m}, {shift_e})))"
        return "kan_truncated(y)"

    def _group_function(self) -> str:
        at = f"{self.n}u * group + o"
        sums = f"state->sums[o] - {self.offset}u * total"
        if self.step.multiplies_sums:
            self._define_array(
                "uint8_t",
                "factors",
                np.stack([group.factor for group in self.step.scale_groups if group.factor is not None]),
            )
            body = [f"state->products[o] += {self.name}_factors[{at}] * ({sums});"]
        else:
            term = self._product(f"kan_from_int(kan_signed({sums}))", "scale", at)
            body = [
                f"const kan_real y = {term};",
                "state->reals[o] = group == 0 ? y : kan_sum(state->reals[o], y);",
            ]
        return "\n".join(
            [
                "/* Add what the sums of one scale group stand for to those before, and begin the next. */",
                f"static void {self.name}_scale(kan_model_state *state, uint32_t total, uint32_t group)",
                "{",
                *indented(for_loop("o", self.n, [*body, "state->sums[o] = 0;"])),
                "}",
                "",
            ]
        )

    # the loop over positions

    def _main(self) -> str:
        step = self.step
        groups = step.groups
        begin = [f"state->sums[o] = (uint32_t){self.name}_bias[{self._channel('o')}];"]
        if step.multiplies_sums:
            begin = [begin[0].replace("sums", "products", 1), "state->sums[o] = 0;"]
        body = ["uint32_t total = 0;", *for_loop("o", self.n, begin)]
        if self.wide and max(plane.outputs for plane in self.planes) > self.n:
            room = max(plane.outputs for plane in self.planes)
            body += [f"for (uint32_t o = {self.n}; o < {room}; o++)", "    state->sums[o] = 0;"]
        if step.adds_reals or step.multiplies_sums:
            body += self._scale_groups()
        else:
            inside = self._reads(0, f"group * {self.columns}u + tap * {step.weight.shape[2]}u")
            outside = []
            if step.border is not None:
                added = f"state->sums[o] += (uint32_t){self.name}_border[tap * {step.n_out}u + {self._channel('o')}];"
                # weights of the sums are stored without sign, those of the border with it
                outside = for_loop("o", self.n, [added])
            body += over_taps(step.window, inside, outside)
        first = f"position * {step.n_out}u + group * {self.n}u"
        passed = "".join(f", {name}" for name in self.passed)
        body.append(f"{self.name}_finish(state, total, {first}, group * {self.n}u{passed});")
        lines = over_positions(step.window, for_loop("group", groups, body))
        return "\n".join(
            [f"static void {self.name}(kan_model_state *state{self.declared})", "{", *indented(lines), "}", ""]
        )

    def _channel(self, output: str) -> str:
        return output if self.step.groups == 1 else f"group * {self.n}u + {output}"

    def _scale_groups(self) -> list[str]:
        # a linear layer: its only tap is the position itself
        lines = ["const uint32_t source = position;"]
        column = 0
        for number, group in enumerate(self.step.scale_groups):
            lines.append("total = 0;")
            lines += self._reads(number, f"{column}u")
            lines.append(f"{self.name}_scale(state, total, {number});")
            column += sum(segment.count * self.step.reads[segment.read].k for segment in group.segments)
        return lines

    def _reads(self, scale_group: int, column: str) -> list[str]:
        """Call the products of every segment, which stand one after the other from ``column`` on."""
        lines = []
        groups = self.step.groups
        passed = 0
        for segment in self.step.scale_groups[scale_group].segments:
            read = self.step.reads[segment.read]
            size = read.n_in // groups
            start = f"group * {size}u + {segment.first}u" if groups > 1 else f"{segment.first}u"
            rows = f"{self.place(read.buffer)} + source * {read.n_in}u + {start}"
            first = f", {self.name}_first{segment.read} + {start}" if read.first_row is not None else ""
            lines.append(
                f"total += {self.name}_products{segment.read}(state->sums, {rows}{first}, {segment.count}, "
                f"{column} + {passed}u);"
            )
            passed += segment.count * read.k
        return lines

    def _count_products(self) -> int:
        step = self.step
        slots = sum(
            segment.count * self.tables[segment.read].slots for group in step.scale_groups for segment in group.segments
        )
        return int(step.window.positions * step.window.taps * step.groups * slots * self.n)
