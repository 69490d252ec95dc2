"""What can go wrong with a model, for the caller to tell apart.

ModelError
├── CheckpointError      a weight file is missing, truncated or of the wrong shape
└── ChatTemplateError    the template refuses these messages
"""


class ModelError(Exception):
    """Root of the errors that this package raises for its callers."""


class CheckpointError(ModelError):
    """A weight file cannot be used; the message names the file and the tensor."""


class ChatTemplateError(ModelError):
    """The chat template refuses the messages."""
