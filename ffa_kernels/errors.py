"""The library's exceptions; each is also the built-in type a caller would expect to catch."""

from collections.abc import Callable
from typing import TypeGuard

_SHORT = 100


class FFAError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(FFAError, ValueError):
    """An argument or a configuration value that is not accepted."""


class UnsupportedError(FFAError, NotImplementedError):
    """What a caller of PyTorch may ask for, and this library does not do."""


class NativeError(FFAError, RuntimeError):
    """A compiled library that is missing, does not fit, or refused a launch."""


class PrivacyError(FFAError, RuntimeError):
    """A privacy rule would be broken by going on."""


class CoupledError(PrivacyError):
    """One record's gradient depends on another record."""


class LedgerError(PrivacyError):
    """A privacy ledger that cannot be read, or does not allow what was asked."""


class WireError(FFAError, ValueError):
    """A federated message that is malformed, stale or does not fit."""


class FederationError(FFAError, RuntimeError):
    """A round that cannot be finished."""


def is_number(value: object) -> TypeGuard[float]:
    """Whether an argument is a number: True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shown(value: object, spell: Callable[[object], str] = repr) -> str:
    """A value that was given, for an error message: as `spell` has it, cut to 100 letters."""
    try:
        text = spell(value)
    except (RecursionError, ValueError):
        # Nested too deeply to be printed, or an integer of too many digits.
        return f"{type(value).__name__} that is too large to show"
    return text if len(text) <= _SHORT else text[:_SHORT] + "..."
