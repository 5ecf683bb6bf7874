"""Compiles every shipped kernel for GPUs that need not be here, and reads registers, spills and instructions.

    python kernels/benchmarks/compile_table.py            # print the table
    python kernels/benchmarks/compile_table.py --write    # and write results/compile_triton_<release>.csv and .md

Needs no GPU: Triton brings its own assembler and disassembler. `make kernels-compile TRITON=3.6.0` runs it under
another Triton. A module `<op>_cases.py` beside this one lists the kernels of an op.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parent / "results"
OPS = tuple(sorted(one.name.removesuffix("_cases.py") for one in Path(__file__).parent.glob("*_cases.py")))

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory a thread block may have, by compute capability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel as it is shipped for one compute capability.

    Attributes:
        op: The op it belongs to.
        kernel: The `triton.jit` function.
        variant: What sets this case apart: size bucket, dtype, masks.
        capability: 80, 90 or 100.
        signature: Type of every argument that is no constant, in the order of the function, in Triton's words: `*bf16`,
            `i32`, `fp32`, `tensordesc<bf16[128, 64]>`.
        constants: Value of every `tl.constexpr` argument and of arguments that are None or 1.
        unaligned: Integer arguments that are not multiples of 16; all others, and all pointers, are.
        num_warps: As launched.
        num_stages: As launched.
        tensor_cores: Whether its products must run on the tensor cores: on 90 as HGMMA (wgmma), never as HMMA.
        tma: Whether it loads by TMA on 90.
        table_only: Left to `make kernels-compile`, since another case of the same kernel needs more; the tests skip it.
    """

    op: str
    kernel: Any
    variant: str
    capability: int
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    unaligned: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    tma: bool = False
    table_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One row of the table.

    Attributes:
        op: The op.
        kernel: Name of the kernel.
        variant: Size bucket, dtype, masks.
        capability: Compute capability it was compiled for.
        num_warps: Warps of a block.
        num_stages: Pipeline stages.
        registers: Of a thread.
        spills: Instructions that move registers to local memory or back.
        shared: Bytes of shared memory of a block.
        hgmma: wgmma instructions.
        hmma: Older tensor core instructions.
        tcgen: Tensor core instructions of capability 100.
        tma: TMA loads.
        triton: Release of Triton.
    """

    op: str
    kernel: str
    variant: str
    capability: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    shared: int
    hgmma: int
    hmma: int
    tcgen: int
    tma: int
    triton: str


def compile_case(case: Case) -> Compiled:
    """Compiles for the case's capability and reads the machine code.

    Raises:
        triton.CompilationError: Triton cannot compile it.
        subprocess.CalledProcessError: The machine code cannot be read.
    """
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    forgotten = [name for name, kind in signature.items() if kind == "constexpr" and name not in case.constants]
    if forgotten:
        raise ValueError(f"{case.kernel.__name__}: no type and no value for {forgotten}")
    aligned = [
        place
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] in ("i32", "i64") and name not in case.unaligned)
    ]
    source = ASTSource(
        case.kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", case.capability, 32),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )
    usage, code = _read(compiled.asm["cubin"])
    registers, stack, local = (int(one) for one in _found(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage))
    count = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("STL", "LDL", "HGMMA", "HMMA", "UTMALDG")}
    moves = count["STL"] + count["LDL"]
    return Compiled(
        op=case.op,
        kernel=case.kernel.__name__,
        variant=case.variant,
        capability=case.capability,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        registers=registers,
        spills=moves or int(stack + local > 0),
        shared=compiled.metadata.shared,
        hgmma=count["HGMMA"],
        hmma=count["HMMA"],
        tcgen=len(re.findall(r"\bUTC[A-Z]*MMA\b", code)),
        tma=count["UTMALDG"],
        triton=triton.__version__,
    )


def compile_tested(processes: int) -> list[tuple[Case, Compiled]]:
    """Compiles what the tests compile, several at a time: most of it is single-threaded work of `ptxas`."""
    chosen = [one for one in cases() if not one.table_only]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(zip(chosen, pool.map(_compile_tested, range(len(chosen))), strict=True))


def _compile_tested(place: int) -> Compiled:
    # Kernels cannot be sent to another process, places in the list can.
    return compile_case([one for one in cases() if not one.table_only][place])


def _read(cubin: bytes) -> tuple[str, str]:
    """Resource usage and disassembly, by the `cuobjdump` that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        outputs = [
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    return outputs[0], outputs[1]


def _found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cuobjdump says nothing like {pattern}:\n{text}")
    return match.groups()


def problems(case: Case, row: Compiled) -> list[str]:
    """What of a compiled case breaks the rules every shipped kernel keeps."""
    rules = {
        f"{row.spills} spills": row.spills == 0,
        f"{row.shared} bytes of shared memory, limit {SHARED_LIMIT[row.capability]}": row.shared
        <= SHARED_LIMIT[row.capability],
    }
    if case.tensor_cores and row.capability == 90:
        rules |= {"no wgmma": row.hgmma > 0, f"{row.hmma} HMMA beside wgmma": row.hmma == 0}
    if case.tensor_cores and row.capability == 80:
        rules |= {"no HMMA": row.hmma > 0}
    if case.tensor_cores and row.capability == 100:
        rules |= {"no tensor core instruction": row.tcgen + row.hmma > 0}
    if case.tma and row.capability >= 90:
        rules |= {"no TMA load": row.tma > 0}
    return [f"{row.kernel} {row.variant} sm_{row.capability}: {name}" for name, kept in rules.items() if not kept]


def cases(ops: Iterable[str] = OPS) -> list[Case]:
    """All cases of some ops."""
    return [case for op in ops for case in importlib.import_module(f"{op}_cases").cases()]


def as_text(rows: Sequence[Compiled], *, head: bool = True) -> str:
    """The table in Markdown."""
    names = [one.name for one in fields(Compiled) if one.name != "triton"]
    lines = [
        *([names, ["---"] * len(names)] if head else []),
        *[[str(getattr(row, name)) for name in names] for row in rows],
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a row breaks a rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, action="append", help="only these ops")
    parser.add_argument("--capability", type=int, choices=sorted(SHARED_LIMIT), help="only this one")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    options = parser.parse_args(arguments)
    chosen = [one for one in cases(options.op or OPS) if options.capability in (None, one.capability)]
    print(f"Triton {triton.__version__}, {len(chosen)} kernels", flush=True)
    rows = []
    for one in chosen:
        rows.append(compile_case(one))
        print(as_text(rows[-1:], head=len(rows) == 1), flush=True)
    if options.write:
        _write(rows)
    found = [line for case, row in zip(chosen, rows, strict=True) for line in problems(case, row)]
    print("\n".join(found) if found else "No spills, shared memory within limits, tensor cores as wanted.")
    return int(bool(found))


def _write(rows: Sequence[Compiled]) -> None:
    """Writes the table of this Triton; rows of other ops and capabilities that stand there stay."""
    name, measured = f"compile_triton_{triton.__version__}", {(row.op, row.capability) for row in rows}
    file = RESULTS / f"{name}.csv"
    types = {one.name: int if one.type == "int" else str for one in fields(Compiled)}
    kept = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            lines = [one for one in csv.DictReader(stream) if (one["op"], int(one["capability"])) not in measured]
        kept = [Compiled(**{key: types[key](value) for key, value in one.items()}) for one in lines]
    order = {(one.op, one.kernel.__name__, one.variant, one.capability): place for place, one in enumerate(cases())}
    place = {id(row): order.get((row.op, row.kernel, row.variant, row.capability), -1) for row in (*kept, *rows)}
    table = sorted([*kept, *rows], key=lambda row: (row.op, place[id(row)]))
    RESULTS.mkdir(exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [one.name for one in fields(Compiled)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in table)
    (RESULTS / f"{name}.md").write_text(
        f"Compiled with Triton {triton.__version__}, without a GPU.\n\n{as_text(table)}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
