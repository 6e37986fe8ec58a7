import os
import signal

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # at once, where a test names what is not there

# Some tests interrupt programs, which would ignore that where a shell has started the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
