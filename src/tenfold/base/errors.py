"""Every error that Tenfold raises on purpose, so that a caller can tell ours from a defect."""

START_AGAIN = 75
"""The exit status of a run that the same command would carry on: EX_TEMPFAIL of sysexits.h."""


class TenfoldError(Exception):
    """Base of all deliberate errors. The message says what happened and what to change."""


class ConfigError(TenfoldError):
    """An option or a model configuration has a value that cannot work."""


class UnsupportedModelError(ConfigError):
    """The checkpoint's architecture, or a feature that it asks for by name, is not implemented."""


class CheckpointError(TenfoldError):
    """A checkpoint is incomplete, damaged, or does not match its configuration."""


class DataError(TenfoldError):
    """Data to train on or to measure with cannot be read, or is not what was asked for; says the file and the row."""


class TrainingError(TenfoldError):
    """A run of training cannot go on, such as because its loss is no number."""


class TokenizerError(TenfoldError):
    """A tokenizer or chat template is missing or damaged, or a template refused its messages."""


class MemoryBudgetError(TenfoldError):
    """The model and its cache do not fit in the memory that they were given."""


class RequestError(TenfoldError):
    """A request is invalid and was never given to the engine.

    Attributes:
        param: name of the offending field, as the client spelled it, or None.
        code: short machine-readable reason, e.g. "context_length_exceeded".
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class OverloadedError(TenfoldError):
    """The queue is full. Retry after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(TenfoldError):
    """The engine's process died or stalled with this request in flight; it is being restarted."""


class HostLostError(TenfoldError):
    """Another host of the same run is gone, so that this one cannot go on."""
