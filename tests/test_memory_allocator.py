"""Freed tensors: with glibc their memory stays in the process, until that is told otherwise."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
TENSORS = 64

PROGRAM = f"""
import json, os
from pathlib import Path
import torch
from ffa_kernels.memory.allocator import give_freed_memory_back

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def kept():
    "Bytes that stay of every other tensor of 1 MiB, freed while the others live."
    tensors = [torch.ones({MIB} // 4) for _ in range({TENSORS})]
    before = resident()
    del tensors[::2]
    return {TENSORS // 2 * MIB} - (before - resident())

# A process each, since what lies in a heap stays there; and one thread, which forks survive.
torch.set_num_threads(1)
for tell in (False, True):
    if os.fork() == 0:
        told = tell and give_freed_memory_back()
        torch.ones(24 * {MIB} // 4)
        print(json.dumps([told, kept()]), flush=True)
        os._exit(0)
    os.wait()
"""


GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").exists(),
    reason="needs glibc and Linux's /proc",
)


@GLIBC
def test_freed_tensors_leave_the_process_once_it_is_told():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (_, stock), (told, kept) = map(json.loads, done.stdout.splitlines())
    # One freed tensor of 24 MiB, and no smaller one is given back any more.
    assert stock > TENSORS // 2 * MIB * 3 // 4
    assert told is True
    assert kept < MIB


FAULTS = f"""
import json, os, resource
import torch
from ffa_kernels.memory import keep_freed_memory

def faults():
    "Of a step whose tensors are larger than what glibc would ever keep."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * {MIB} // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
stock = [faults() for _ in range(3)]
told = keep_freed_memory()
print(json.dumps([told, stock[-1], [faults() for _ in range(8)]]))
"""


@GLIBC
def test_a_step_finds_the_pages_of_those_before_where_they_are_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, stock, kept = json.loads(done.stdout)
    assert told is True
    # A fault a page, of 4 KiB or, with luck, of 2 MiB; and none.
    assert stock >= 32
    # What else the process asks for may lie where a freed tensor lay: the next one then gets pages
    # of its own, once, and they are kept too.
    assert max(kept[4:]) <= 4, kept
    assert sum(count > 4 for count in kept) <= 2, kept
