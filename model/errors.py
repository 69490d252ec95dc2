"""What can go wrong with a model, for the caller to tell apart.

ModelError
├── CheckpointError      a weight file is missing, truncated or of the wrong shape
│   └── InvalidExpertFile   a file of experts to add does not fit the blocks, or is none
├── UnsupportedConfig    a configuration names a choice that does not exist or cannot be had
├── ChatTemplateError    the template refuses these messages
├── InvalidGrammar       a schema cannot be compiled
└── GrammarExhausted     a text outgrew what its grammar may take to follow
"""


class ModelError(Exception):
    """Root of the errors that this package raises for its callers."""


class CheckpointError(ModelError):
    """A weight file cannot be used; the message names the file and the tensor."""


class InvalidExpertFile(CheckpointError):
    """A file of experts cannot be added to the blocks; the message names the file and the tensor."""


class UnsupportedConfig(ModelError):
    """A configuration asks for what does not exist or cannot be had; the message says what is allowed."""


class ChatTemplateError(ModelError):
    """The chat template refuses the messages."""


class InvalidGrammar(ModelError):
    """A JSON schema is wrong, too large, or asks for what cannot be kept; the message names the keyword."""


class GrammarExhausted(ModelError):
    """Following the schema came to take more states or more work than is allowed."""
