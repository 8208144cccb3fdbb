"""Where arrays of row numbers stand in memory: two whose lives do not overlap may stand in the same place."""

from __future__ import annotations

from dataclasses import dataclass

from kancompile.targets.c99.steps import Buffer, Contract, Plan, Step


@dataclass(frozen=True)
class Arena:
    """Offsets of arrays in ``rows8`` and ``rows16`` of the state; inputs have arrays of their own.

    Attributes:
        offsets: by the name of an array.
        sizes: elements of ``rows8`` and ``rows16``.
    """

    offsets: dict[str, int]
    sizes: tuple[int, int]

    @staticmethod
    def of(plan: Plan) -> Arena:
        """Place every array, in the order of their births, as low as arrays alive at the same time allow."""
        births: dict[str, int] = {}
        deaths: dict[str, int] = {}
        buffers: dict[str, Buffer] = {}
        for number, step in enumerate(plan.steps):
            for buffer in _written(step):
                births[buffer.name], buffers[buffer.name] = number, buffer
                deaths[buffer.name] = number
            for buffer in _read(step):
                deaths[buffer.name] = number
        if plan.output.source is not None:
            deaths[plan.output.source.name] = len(plan.steps)
        offsets: dict[str, int] = {}
        sizes = [0, 0]
        for name, birth in births.items():
            buffer = buffers[name]
            alive = sorted(
                (offsets[other], offsets[other] + buffers[other].size)
                for other in offsets
                if buffers[other].wide == buffer.wide and deaths[other] >= birth
            )
            start = 0
            for low, high in alive:
                if start + buffer.size <= low:
                    break
                start = max(start, high)
            offsets[name] = start
            sizes[buffer.wide] = max(sizes[buffer.wide], start + buffer.size)
        return Arena(offsets, (sizes[0], sizes[1]))

    def place(self, buffer: Buffer) -> str:
        """Give the C expression of the address of an array."""
        if buffer.name not in self.offsets:
            return f"state->{buffer.name}"
        return f"(state->{'rows16' if buffer.wide else 'rows8'} + {self.offsets[buffer.name]})"

    def arrays(self) -> list[tuple[str, str, int]]:
        """List the arrays that the state needs: name, type and elements; wider ones first."""
        found = [("rows16", "uint16_t", self.sizes[1]), ("rows8", "uint8_t", self.sizes[0])]
        return [entry for entry in found if entry[2]]


def _written(step: Step) -> list[Buffer]:
    return [store.buffer for store in step.stores] if isinstance(step, Contract) else [step.target]


def _read(step: Step) -> list[Buffer]:
    return [read.buffer for read in step.reads] if isinstance(step, Contract) else [step.source]
