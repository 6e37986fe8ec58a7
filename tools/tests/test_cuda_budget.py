"""Machine code, read and judged: the cost of a full tile, and that a kernel made worse is noticed."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
cuda_sass, cuda_budget = (importlib.import_module(name) for name in ("cuda_sass", "cuda_budget"))

NAME = "_ZN4gspn4cuda13strip_forwardINS0_6ConfigIfLi2ELi2ELi1ELi1EEELb0EEEvNS_6ParamsE"
# A loop over tiles that loads 16 bytes, or 4 at an edge, scans two lines and stores; a checkpoint is rarely due.
BEFORE = ["LDC R1, c[0x0][0x28]"]
LOOP = """
.tile:
  ISETP.GE.AND P0, PT, R2, R3, PT
  @P0 BRA `(.edge)
  LDG.E.128 R4, desc[UR4][R8.64]
  BRA `(.loaded)
.edge:
  LDG.E R4, desc[UR4][R8.64]
  FMUL R4, R4, R4
.loaded:
  MUFU.EX2 R5, R4
.line:
  SHFL.UP PT, R6, R5, 0x1, RZ
  FFMA R5, R6, R5, R4
  @P1 BRA `(.next)
  STG.E desc[UR4][R10.64], R5
  LDL R7, [R1]
  LDL R7, [R1+0x4]
  LDL R7, [R1+0x8]
.next:
  @P2 BRA `(.line)
  STG.E.128 desc[UR4][R10.64], R4
  @P3 BRA `(.tile)
  EXIT
"""


def listing(code=LOOP, name=NAME):
    """What nvdisasm would print."""
    lines, address = [f'\t.section\t.text.{name},"ax",@progbits', f".text.{name}:"], 0
    for line in [*BEFORE, *code.strip().splitlines()]:
        if line.endswith(":"):
            lines.append(f".L_x{line[:-1].replace('.', '_')}:")
        else:
            text = line.strip().replace("`(.", "`(.L_x_")
            lines.append(f"        /*{address:04x}*/              {text} ;")
            address += 16
    return "\n".join(lines) + "\n"


def measured(code=LOOP):
    (kernel,) = cuda_sass.parse(listing(code)).values()
    case = cuda_budget.Case("test", ("strip_forward", "float", (2, 2, 1, 1), (False,)), 20, 0, 400)
    return case, cuda_budget.measure(case, kernel, cuda_budget.check_spills.Usage(NAME, 40, 0, 0, 0), {})


def test_a_full_tile_is_counted():
    """Compare, branch, load, branch, exponential; twice shuffle, multiply, two branches; store, branch."""
    case, row = measured()
    assert row.instructions_per_32 == round((5 + 2 * 4 + 2) / 4, 1)
    assert row.alu_per_32 == round(1 / 4, 1)
    assert (row.local_accesses, row.load_bytes, row.loop_bytes) == (0, 16, 17 * 16)
    assert cuda_budget.judge(case, row) == []


@pytest.mark.parametrize(
    "before,after,fault",
    [
        (
            "  MUFU.EX2 R5, R4\n",
            "  MUFU.EX2 R5, R4\n  STL [R1], R5\n",
            "1 accesses to local memory in a tile, allowed are 0",
        ),
        ("  FFMA", 40 * "  IMAD R7, R7, R7, R7\n" + "  FFMA", "23.8 instructions per 32 elements, allowed are 20"),
        ("  FMUL R4, R4, R4\n", 10 * "  FMUL R4, R4, R4\n", "416 bytes of code in a loop, allowed are 400"),
    ],
)
def test_a_kernel_made_worse_is_noticed(before, after, fault):
    case, row = measured(LOOP.replace(before, after))
    assert cuda_budget.judge(case, row)[0] == f"test: {fault}"


def test_a_kernel_without_a_loop_over_tiles():
    with pytest.raises(ValueError, match="has no loop that reads global memory and exchanges states"):
        measured(LOOP.replace("SHFL.UP PT", "MOV"))


def test_cubins_are_found_in_an_object(tmp_path):
    def elf(machine, size):
        head = bytearray(64)
        head[:4], head[18:20] = b"\x7fELF", machine.to_bytes(2, "little")
        head[40:48], head[58:60], head[60:62] = size.to_bytes(8, "little"), (64).to_bytes(2, "little"), b"\x02\x00"
        return bytes(head)

    first, second = elf(190, 64) + bytes(128), elf(190, 64) + bytes(64) + b"\x01" * 64
    (tmp_path / "a.o").write_bytes(elf(62, 64) + b"host" + first + b"..." + second + b"rest")
    assert list(cuda_sass.find_cubins(tmp_path / "a.o")) == [first, second]


FUSED = """
.tile:
  LDG.E.128 R4, desc[UR4][R8.64]
  MUFU.EX2 R5, R4
  MUFU.EX2 R6, R4
  MUFU.EX2 R7, R4
  SHFL.UP PT, R6, R5, 0x1, RZ
  STS [R2], R6
  VOTE.ANY P0, P1
  @!P0 BRA `(.done)
  MUFU.EX2 R5, R4
  MUFU.EX2 R6, R4
  MUFU.EX2 R7, R4
  SHFL.UP PT, R6, R5, 0x1, RZ
.done:
  @P3 BRA `(.tile)
  EXIT
"""


def test_states_are_finite_in_a_fused_kernel():
    """Load, three exponentials, shuffle, store, vote, two branches: of one element."""
    name = NAME.replace("13strip", "13fused").replace("Lb0E", "")
    (kernel,) = cuda_sass.parse(listing(FUSED, name)).values()
    case = cuda_budget.Case("test", ("fused_forward", "float", (2, 2, 1, 1), ()), 20, 0, 400, lanes=0.5)
    row = cuda_budget.measure(case, kernel, cuda_budget.check_spills.Usage(name, 40, 0, 0, 0), {})
    assert row.instructions_per_32 == 9 / 0.5


def test_missing_kernels_and_the_json(tmp_path, capsys, monkeypatch):
    (kernel,) = cuda_sass.parse(listing()).values()
    case, row = measured()
    monkeypatch.setattr(
        cuda_budget, "CASES", (case, replace(case, case="other", kernel=("none", "float", (2, 2, 1, 1), ())))
    )
    monkeypatch.setattr(cuda_budget, "disassemble", lambda *_: {NAME: kernel})
    monkeypatch.setattr(cuda_budget.check_spills, "read", lambda _: [cuda_budget.check_spills.Usage(NAME, 40, 0, 0, 0)])
    (tmp_path / "build.log").write_text("")
    (tmp_path / "kernels_float32.cu.o").write_bytes(b"")
    assert cuda_budget.main([str(tmp_path)]) == 1
    assert "other: no kernel" in capsys.readouterr().err
    (written,) = json.loads((tmp_path / "budget.json").read_text())
    assert written["case"] == "test" and written["instructions_per_32"] == row.instructions_per_32


def test_other_kernels_are_measured_too(tmp_path, monkeypatch):
    (kernel,) = cuda_sass.parse(listing()).values()
    other, no_scan = NAME.replace("Lb0E", "Lb1E"), NAME.replace("strip_forward", "prepare_them")
    usages = [cuda_budget.check_spills.Usage(name, 40, 0, 0, 0) for name in (NAME, other, no_scan)]
    case, _ = measured()
    monkeypatch.setattr(cuda_budget, "CASES", (case,))
    monkeypatch.setattr(cuda_budget, "disassemble", lambda *_: {usage.kernel: kernel for usage in usages})
    monkeypatch.setattr(cuda_budget.check_spills, "read", lambda _: usages)
    (tmp_path / "build.log").write_text("")
    (tmp_path / "kernels_float32.cu.o").write_bytes(b"")
    assert cuda_budget.main([str(tmp_path)]) == 0
    first, second = json.loads((tmp_path / "budget.json").read_text())
    assert first["case"] == "test" and second["case"].startswith("other: strip_forward")
    assert {key: second[key] for key in ("instructions_per_32", "registers", "lanes")} == {
        key: first[key] for key in ("instructions_per_32", "registers", "lanes")
    }
