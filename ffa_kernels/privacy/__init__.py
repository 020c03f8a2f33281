"""Private training: the engine, the sampler, the ledger, the accounting and the audit."""

from ffa_kernels.privacy.accounting import epsilon, noise_multiplier_for
from ffa_kernels.privacy.adaptive import AdaptiveClipping
from ffa_kernels.privacy.auditing import (
    AuditReport,
    audit,
    epsilon_of_mu,
    gaussian_mu,
    mu_of_epsilon,
    one_run_epsilon,
)
from ffa_kernels.privacy.engine import PrivacyEngine
from ffa_kernels.privacy.ledger import Ledger

__all__ = [
    "AdaptiveClipping",
    "AuditReport",
    "Ledger",
    "PrivacyEngine",
    "audit",
    "epsilon",
    "epsilon_of_mu",
    "gaussian_mu",
    "mu_of_epsilon",
    "noise_multiplier_for",
    "one_run_epsilon",
]
