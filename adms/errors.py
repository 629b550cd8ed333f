"""The errors ADMS raises: each says what was wrong, what was expected and what to do."""


class ADMSError(Exception):
    """Base class of every error raised on purpose by ADMS."""


class ADMSValueError(ADMSError, ValueError):
    """An argument has the right type and a value that cannot work."""


class ADMSTypeError(ADMSError, TypeError):
    """An argument has a type that cannot work."""


class UnsupportedModelError(ADMSError, TypeError):
    """The model's architecture has no ADMS patch."""


class CacheStateError(ADMSError, RuntimeError):
    """The call does not fit the state the cache is in."""


class ForwardError(ADMSError, RuntimeError):
    """A forward pass failed part of the way; the message says how many tokens were consumed."""


class SessionFileError(ADMSError, ValueError):
    """A session file is damaged, foreign, too new, or belongs to another model."""
