"""Errors a person can act on.

    CptquantError                 a fault of ours unless a subclass says otherwise (exit code 1)
    └── UserError                 something the person can change (exit code 2)
        ├── ModelError            folder, weights, architecture, tokenizer
        ├── DataError             calibration or evaluation text
        ├── FormatError           an unreadable or illegal quantization format
        ├── BudgetError           an unreadable or unreachable budget
        ├── ArtifactError         layout.json, sensitivity.json, plan.json, ... unreadable or of another version
        ├── EngineError           an inference engine is too old, refuses its file, or differs from our own model
        │   └── MissingEngineError  it is not installed: what does not need it goes on, and says so
        └── OutputError           the output folder: not empty, not writable, disk full

A message says what was wrong, the value received, what is allowed and what to do, with the flag's spelling.
"""


class CptquantError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class UserError(CptquantError):
    """Something the person at the keyboard can change."""

    exit_code = 2


class ModelError(UserError):
    """The model folder, its weights, its architecture or its tokenizer cannot be used."""


class DataError(UserError):
    """Calibration or evaluation text cannot be used."""


class FormatError(UserError):
    """A quantization format is unreadable, or illegal where it was asked for."""


class BudgetError(UserError):
    """A memory budget is unreadable or outside the reachable range."""


class ArtifactError(UserError):
    """A stage file is missing, damaged, or of another schema version."""


class EngineError(UserError):
    """An inference engine is missing, too old, refuses its file, or differs from our own model."""


class MissingEngineError(EngineError):
    """An inference engine is not installed, and nobody said where it is."""


class OutputError(UserError):
    """The output folder cannot be written."""
