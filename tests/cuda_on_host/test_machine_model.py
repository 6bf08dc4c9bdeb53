"""The model of the machine: what it reads in machine code, its occupancy, and that it finds a kernel that starves."""

import machine_model
import pytest
import sass
from machine_model import MACHINES, Case, Launch, blocks_per_sm, estimate
from sass import Kernel

# The form of cuobjdump's listing, with instructions of our own.
LISTING = """
arch = sm_90
 Function sample:
  REG:40 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
	code for sm_90
		Function : sample
        /*0000*/                   LDG.E R9, desc[UR4][R2.64] ;                     /* 0x0 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                 /* 0x0 */
        /*0020*/              @!P0 LDG.E.128 R12, desc[UR4][R2.64+0x1000] ;         /* 0x0 */
                                                                                    /* 0x0 */
        /*0030*/                   LDG.E.128.CONSTANT R20, desc[UR4][R16.64] ;      /* 0x0 */
        /*0040*/                   FADD R24, R7, R20 ;                              /* 0x0 */
        /*0050*/                   LDG.E.64 R26, desc[UR4][R2.64+0x2000] ;          /* 0x0 */
        /*0060*/                   FADD R25, R15, R26 ;                             /* 0x0 */
        /*0070*/                   STG.E.128 desc[UR4][R18.64], R24 ;               /* 0x0 */
        /*0080*/               @P1 BRA 0x10 ;                                       /* 0x0 */
        /*0090*/                   EXIT ;                                           /* 0x0 */
        /*00a0*/                   BRA 0xa0;                                        /* 0x0 */
"""


def bursts(*lines: str) -> set[tuple[int, ...]]:
    code = "".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */\n" for i, line in enumerate(lines))
    (kernel,) = sass.parse("arch = sm_90\n Function k:\n" + code)
    return kernel.bursts


def test_reads_a_listing():
    (kernel,) = sass.parse(LISTING)
    assert (kernel.registers, kernel.shared, kernel.stack) == (40, 2048, 0)
    assert kernel.instructions["LDG.E.128"] == 2
    assert (kernel.stores(16), kernel.stores(8), kernel.wide_loads, kernel.wide_stores) == (1, 0, 3, 1)


def test_loads_in_flight():
    """Neither the load before the loop counts nor the cached one; a use waits for its load and those before it."""
    (kernel,) = sass.parse(LISTING)
    assert kernel.bursts == {(16, 16), (8, 16)}


LOOP = ("BRA 0x0",)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("LDG.E R1, [R2.64]", "LDG.E R3, [R2.64]", "FADD R5, R1, R3", *LOOP), {(4, 4)}),
        (("LDG.E R1, [R2.64]", "FADD R5, R1, R1", "LDG.E R3, [R2.64]", "FADD R5, R3, R3", *LOOP), {(4,)}),
        (("LDG.E.U16 R1, [R2.64]", *LOOP), {(2,)}),
        (("LDG.E.128 R4, [R2.64]", "MOV R7, RZ", *LOOP), {(16,)}),  # overwritten: waits as well
        (("LDG.E.ENL2.256 R8, R4, desc[UR6][R2.64]", "FADD R1, R9, R9", *LOOP), {(32,)}),
        (("@P0 BRA 0x30", "LDG.E R1, [R2.64]", "BRA 0x40", "LDG.E R3, [R2.64]", *LOOP), {(4,)}),  # either, not both
        (("LDG.E R1, [R2.64]", "FADD R5, R1, R3", "EXIT"), set()),  # no loop
        (("LDS.128 R4, [R2]", "LDC.64 R8, c[0x0][0x28]", "FADD R5, R4, R8", *LOOP), set()),  # not from memory
    ],
)
def test_waiting_loads(lines, expected):
    assert bursts(*lines) == expected


def kernel(registers: int, shared: int = 0) -> Kernel:
    return Kernel("sm_90", "k", "k", registers=registers, shared=shared, bursts={(4, 16, 16), (4, 4)})


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "arch", "expected"),
    [  # as NVIDIA's occupancy calculator has it
        (32, 0, 256, "90", 8),
        (33, 0, 256, "90", 6),
        (64, 0, 1024, "90", 1),
        (128, 0, 256, "90", 2),
        (32, 0, 64, "90", 32),
        (32, 0, 256, "75", 4),
        (32, 0, 64, "75", 16),
        (32, 0, 256, "89", 6),
        (32, 100 * 1024, 256, "90", 2),
        (32, 23 * 1024, 256, "86", 4),  # and 1 KB that the system reserves
    ],
)
def test_occupancy(registers, shared, threads, arch, expected):
    assert blocks_per_sm(kernel(registers, shared), MACHINES[arch], threads, 0) == expected


def test_estimate():
    """A full grid; one of few blocks; rows shorter than their team; a part smaller than a block's first loads; a path
    for misaligned arrays."""

    def kilobytes(grid: int = 10_000, integers: tuple[int, ...] = (), **more) -> float:
        case = Case("case", "norm float32 1 1 0", "k", **{"total": 2**40, **more})
        return estimate(case, Launch("k", grid, 256, 0, list(integers)), kernel(32), "90").kilobytes

    assert kilobytes() == 8 * 256 * 32 / 1024
    assert kilobytes(grid=66) == 0.5 * 256 * 32 / 1024
    assert kilobytes(integers=(6,), row=1000) == 8 * 4 * 1000 / 1024 // 0.1 / 10
    assert kilobytes(total=10_000 * 512) == 8 * 512 / 1024
    assert kilobytes(share=0.5) == 4 * 256 * 32 / 1024
    assert kilobytes(narrow=4) == 8 * 256 * 36 / 1024


def test_a_starving_kernel_is_found(tmp_path, capsys, monkeypatch):
    case = Case("case", "norm float32 1 1 0", "k", total=2**40, floor=65)
    monkeypatch.setattr(machine_model, "objects_in", lambda paths: paths)
    monkeypatch.setattr(machine_model, "inspect", lambda paths: [kernel(32)])
    monkeypatch.setattr(
        machine_model, "launches_of", lambda program, cases: [[Launch("k", 10_000, 256, 0, [])] for _ in cases]
    )
    monkeypatch.setattr(machine_model, "norm_cases", lambda: [case])
    monkeypatch.setattr(machine_model, "batch_cases", list)
    monkeypatch.setattr(machine_model, "list_cases", list)
    arguments = ["object.o", "--shapes", "program", "--json", str(tmp_path / "model.json")]
    assert machine_model.main(arguments) == 1
    assert "BROKEN: below 65" in capsys.readouterr().out
    case.floor = 64
    assert machine_model.main(arguments) == 0
