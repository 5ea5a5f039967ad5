"""Whether llama-cpp-python is installed, here or where CPTQUANT_LLAMACPP_PYTHON says."""

import pytest

from cptquant.core.errors import MissingEngineError
from cptquant.engines.llamacpp_python import find_llamacpp


def _is_missing() -> bool:
    try:
        find_llamacpp()
    except MissingEngineError:
        return True
    return False


needs_llamacpp = pytest.mark.skipif(_is_missing(), reason="llama-cpp-python is not installed")
