"""Counts that the tests report (kills survived, bad calls answered, …), summed over pytest's workers and
printed at the end, and what else they found."""
from collections import Counter

import pytest


@pytest.fixture
def count(record_property):
    "count(what, good): one more `what` was tried, and it was `good` or not."

    def one(what, good=True):
        record_property("count", (what, bool(good)))

    return one


@pytest.fixture
def tell(record_property):
    "tell(line): print a line at the end."
    return lambda line: record_property("tell", line)


def pytest_terminal_summary(terminalreporter):
    ended = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    reports = [r for r in ended if getattr(r, "when", "") == "call"]
    counted = Counter(tuple(value) for r in reports for name, value in r.user_properties if name == "count")
    for what in dict.fromkeys(what for what, _ in counted):
        good, bad = counted[what, True], counted[what, False]
        terminalreporter.write_line(f"{what}: {good} of {good + bad}")
    for line in (value for r in reports for name, value in r.user_properties if name == "tell"):
        terminalreporter.write_line(line)
