"""Private training: the engine, the sampler, the ledger and the accounting."""

from ffa_kernels.privacy.accounting import epsilon, noise_multiplier_for
from ffa_kernels.privacy.engine import PrivacyEngine
from ffa_kernels.privacy.ledger import Ledger

__all__ = ["Ledger", "PrivacyEngine", "epsilon", "noise_multiplier_for"]
