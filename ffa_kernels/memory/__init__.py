"""What a private training step needs of memory, predicted, and the settings that make it fit."""

from ffa_kernels.memory.planning import Fitted, MemoryPlan, fit_to_memory, plan

__all__ = ["Fitted", "MemoryPlan", "fit_to_memory", "plan"]
