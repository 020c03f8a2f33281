"""What a private training step needs of memory, predicted, and the settings that make it fit."""

from ffa_kernels.memory.allocator import give_freed_memory_back, keep_freed_memory
from ffa_kernels.memory.planning import Fitted, MemoryPlan, fit_to_memory, plan

__all__ = [
    "Fitted",
    "MemoryPlan",
    "fit_to_memory",
    "give_freed_memory_back",
    "keep_freed_memory",
    "plan",
]
