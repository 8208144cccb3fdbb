"""Classes of processors that must compute the same as the simulation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CpuPreset:
    """A class of processors.

    Attributes:
        name: how recipes call it.
        int16_pairs: whether some of its kernels add two products in a saturating int16, so that the file must not let any
            sum of two neighboring products leave it (see ``pair_products``).
        meaning: one line for people.
    """

    name: str
    int16_pairs: bool
    meaning: str


CPU_PRESETS: dict[str, CpuPreset] = {
    preset.name: preset
    for preset in (
        CpuPreset("portable", True, "the same outputs on every processor: x86 of any age, ARM, WebAssembly"),
        CpuPreset("x86-vnni", False, "x86 with AVX-512 VNNI or AVX-VNNI (servers from 2019, desktops from 2021)"),
        CpuPreset("x86-avx2", True, "x86 with AVX2 or AVX-512 and no VNNI (from 2013)"),
        CpuPreset("arm64", False, "64-bit ARM"),
    )
}
