"""What each CUDA kernel takes on each card, from what ptxas said when it was compiled.

    python csrc/resources.py [FOLDER]

prints registers of a thread, static shared bytes of a block, spilled bytes and occupancy (the
part of a multiprocessor's warps that can be resident), and exits 1 if a kernel spills. Kernels
that are empty on an arch (it is served by another) are left out. Standard library only.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "ffa_kernels" / "_lib"
FILE = "libffa_cuda.ptxas.txt"
THREADS = 256  # of every block: kThreads of cuda/block.h

# A multiprocessor's resident threads, blocks, and bytes of shared memory (CUDA programming guide,
# technical specifications by compute capability); each has 65536 registers.
LIMITS = {
    75: (1024, 16, 64 << 10),
    80: (2048, 32, 164 << 10),
    86: (1536, 16, 100 << 10),
    87: (1536, 16, 164 << 10),
    89: (1536, 24, 100 << 10),
    90: (2048, 32, 228 << 10),
    100: (2048, 32, 228 << 10),
    110: (1536, 24, 228 << 10),
    120: (1536, 24, 100 << 10),
    121: (1536, 24, 100 << 10),
}
_REGISTERS = 65536
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
# An empty kernel returns at once, and uses the fewest registers that there are.
_EMPTY = 8


@dataclass(frozen=True)
class Kernel:
    """One kernel on one arch."""

    name: str
    arch: int
    registers: int
    shared: int
    spilled: int

    @property
    def blocks(self) -> int:
        """Blocks that fit a multiprocessor together."""
        threads, blocks, shared = LIMITS[self.arch]
        # Registers are given out to warps 256 at a time; a block takes 1 KiB for the system from
        # compute capability 8.0.
        of_warp = -(-self.registers * 32 // 256) * 256
        of_block = self.shared + (1024 if self.arch >= 80 else 0)
        fits = [threads // THREADS, blocks, _REGISTERS // of_warp // (THREADS // 32)]
        return min([*fits, *([shared // of_block] if of_block else [])])

    @property
    def occupancy(self) -> float:
        """The part of a multiprocessor's threads that can be resident."""
        return self.blocks * THREADS / LIMITS[self.arch][0]


def _plain(mangled: list[str]) -> dict[str, str]:
    """Names as written in the source, as far as a demangler is at hand."""
    tool = next(filter(None, map(shutil.which, ("c++filt", "cu++filt"))), None)
    if tool is None:
        return {name: name for name in mangled}
    said = subprocess.run(
        [tool], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    inside = re.compile(r"run<(.*)>\(")
    names = [found[1] if (found := inside.search(line)) else line for line in said]
    return dict(zip(mangled, [n.replace("ffa::cuda::", "") for n in names], strict=True))


def kernels(said: str) -> list[Kernel]:
    """Every kernel that is not empty, of ptxas' words with -v."""
    found: list[tuple[str, int, int, int, int]] = []
    for part in said.split("Compiling entry function")[1:]:
        entry = _ENTRY.search("Compiling entry function" + part)
        used, spills = _USED.search(part), _SPILLS.search(part)
        if entry is None or used is None or spills is None:
            raise ValueError(f"ptxas' words are not understood: {part[:200]!r}")
        spilled = int(spills[1]) + int(spills[2])
        found.append((entry[1], int(entry[2]), int(used[1]), int(used[2] or 0), spilled))
    plain = _plain(sorted({f[0] for f in found}))
    made = [Kernel(plain[name], *rest) for name, *rest in found if rest[1] > _EMPTY]
    return sorted(made, key=lambda k: (k.name, k.arch))


def read(folder: Path = FOLDER) -> list[Kernel]:
    """The kernels of the library in `folder`.

    Raises:
        FileNotFoundError: no CUDA library was built there.
    """
    return kernels((folder / FILE).read_text())


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    if not (folder / FILE).exists():
        print(f"no CUDA library in {folder}: see build.json there for the reason")
        return 0
    found = read(folder)
    print(f"{'kernel':<52} {'arch':>5} {'regs':>5} {'shared':>7} {'spilled':>7} {'occupancy':>9}")
    for k in found:
        print(
            f"{k.name:<52} {k.arch:>5} {k.registers:>5} {k.shared:>7} {k.spilled:>7} "
            f"{k.occupancy:>8.0%}"
        )
    return int(any(k.spilled for k in found))


if __name__ == "__main__":
    sys.exit(main())
