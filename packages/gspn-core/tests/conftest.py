"""Settings of all tests."""

import signal

# Some tests interrupt programs, which would ignore that where a shell has started the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
