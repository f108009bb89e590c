"""How many programs of a kernel a multiprocessor holds at once, from what a program asks for.

Each resource gives a bound, and the least of them holds:

    registers       a warp takes 32 times those of a thread, in units of 256, from one of four partitions that have a
                    quarter of the registers each
    shared memory   what a program asks for in units of 128 bytes, and 1 KiB of the system's own
    tensor memory   512 columns (Blackwell)
    warps, programs the hardware's limits

Limits: NVIDIA's programming guide, technical specifications of compute capabilities 8.0, 9.0 and 10.0.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTITIONS = 4
REGISTER_UNIT = 256
SHARED_UNIT = 128
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Multiprocessor:
    shared: int  # bytes
    registers: int = 65_536
    warps: int = 64
    programs: int = 32
    tensor_columns: int = 0

    @property
    def shared_a_program(self) -> int:
        """The most that one program may ask for."""
        return self.shared - RESERVED_SHARED

    def resident(self, *, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
        """Programs of `warps` warps at once; `registers` are those of a thread. 0 where not even one fits."""
        warps_by_registers = self.registers // PARTITIONS // _in_units(32 * registers, REGISTER_UNIT) * PARTITIONS
        bounds = [
            self.programs,
            self.warps // warps,
            warps_by_registers // _in_units(warps, PARTITIONS),
            self.shared // (_in_units(shared, SHARED_UNIT) + RESERVED_SHARED),
        ]
        if tensor_columns:
            bounds.append(self.tensor_columns // tensor_columns)
        return min(bounds)


MULTIPROCESSORS = {
    80: Multiprocessor(shared=164 * 1024),
    90: Multiprocessor(shared=228 * 1024),
    100: Multiprocessor(shared=228 * 1024, tensor_columns=512),
}


def _in_units(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit
