"""A plugin of pytest for tests on a GPU: results as they come, and no worker with a CUDA error that would stay.

`-p gpu_pytest`, with GSPN_TEST_RESULTS the file that gets a line of JSON for every test. After a failure that leaves
the device unusable, a process of pytest-xdist ends; xdist starts another, which goes on with the next test.
"""

import json
import os
import sys
from pathlib import Path

import pytest


def broken():
    """Tell whether every later CUDA call of this process would fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def write(test, outcome, reason, seconds=0.0):
    """Add a line to the results."""
    with Path(os.environ["GSPN_TEST_RESULTS"]).open("a") as file:  # a line is short enough to be written at once
        file.write(
            json.dumps({"test": test, "outcome": outcome, "reason": reason, "seconds": round(seconds, 2)}) + "\n"
        )


def reason_of(report):
    """Return why a test was skipped or failed."""
    if isinstance(report.longrepr, tuple):  # a skipped test: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()[:500]


def is_worker(config):
    """Tell whether this is a process of pytest-xdist (its environment variables are inherited, and tell nothing)."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """End a process of pytest-xdist that has become useless."""
    report = yield
    if report.failed and is_worker(item.config) and broken():
        write(item.nodeid, "failed", f"{reason_of(report)} (and its process was ended)", report.duration)
        os._exit(3)
    return report


class Reporter:
    """Writes the results of all tests."""

    def pytest_runtest_logreport(self, report):
        """Write the result of a test."""
        if report.when == "call" or report.outcome != "passed":
            reason = None if report.outcome == "passed" else reason_of(report)
            write(report.nodeid, report.outcome, reason, report.duration)


def pytest_configure(config):
    """Let the process report that has started the workers, if there are any."""
    if not is_worker(config):
        config.pluginmanager.register(Reporter())
