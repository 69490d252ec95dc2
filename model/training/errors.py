"""Errors of training, for the person at the command line.

TrainingError
└── TrainingDataMissing   the text that a domain needs is not installed
"""

from model.errors import ModelError


class TrainingError(ModelError):
    """Root of the errors of training and evaluation."""


class TrainingDataMissing(TrainingError):
    """The text that a domain needs is not installed; the message names the package."""
