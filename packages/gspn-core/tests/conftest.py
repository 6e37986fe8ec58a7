"""Settings of all tests."""

import os
import signal

import pytest
from operator_cases import EXTENSION, ISAS

# Some tests interrupt programs, which would ignore that where a shell has started the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Run every n-th test where GSPN_EVERY asks for it, as the tests under AddressSanitizer do."""
    items[:] = items[:: int(os.environ.get("GSPN_EVERY", "1"))]


@pytest.fixture(params=ISAS)
def isa(request):
    """Use the kernels of an instruction set: every one, or those that the test's parameters name."""
    EXTENSION.select_isa(request.param)
    yield request.param
    EXTENSION.select_isa("auto")
