"""Which experts worked on each token, as numpy's own file format in base64."""

import base64
import io

import numpy as np

from server.engine.sequence import RoutedRows


def as_npy_base64(expert_ids: RoutedRows) -> str:
    """(tokens, layers, K) as the base64 of a .npy file, which `numpy.load` reads without pickle."""
    file = io.BytesIO()
    np.save(file, expert_ids, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
