"""The library's exceptions; each is also the built-in type a caller would expect to catch."""

from collections.abc import Callable

_SHORT = 100


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


class FederationError(FFAError, RuntimeError):
    """A round that cannot be finished."""


def shown(value: object, spell: Callable[[object], str] = repr) -> str:
    """A value that was given, for an error message: as `spell` has it, cut to 100 letters."""
    try:
        text = spell(value)
    except (RecursionError, ValueError):
        # Nested too deeply to be printed, or an integer of too many digits.
        return f"{type(value).__name__} that is too large to show"
    return text if len(text) <= _SHORT else text[:_SHORT] + "..."
