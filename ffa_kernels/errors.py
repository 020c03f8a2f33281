"""The library's exceptions; each is also the built-in type a caller would expect to catch."""


class FFAError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(FFAError, ValueError):
    """An argument or a configuration value that is not accepted."""


class PrivacyError(FFAError, RuntimeError):
    """A privacy rule would be broken by going on."""


class LedgerError(PrivacyError):
    """A privacy ledger that cannot be read, or does not allow what was asked."""


class WireError(FFAError, ValueError):
    """A federated message that is malformed, stale or does not fit."""
