"""A plugin of pytest: what one environment could not run is run by another with more installed.

`--passed-to FILE` lists the tests that passed. `--not-in FILE` leaves those out.
"""

import pathlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("passed")
    group.addoption("--passed-to", metavar="FILE", help="list the tests that passed")
    group.addoption("--not-in", metavar="FILE", help="run what such a list does not contain")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("passed_to") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(pathlib.Path(config.getoption("passed_to"))))


class _Recorder:
    """Runs where reports arrive: in the process that starts the workers of pytest-xdist."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when == "call":
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text("".join(f"{name}\n" for name in sorted(self.passed)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("not_in")
    if not path:
        return
    passed = set(pathlib.Path(path).read_text().splitlines())
    kept, left = [], []
    for item in items:
        (left if item.nodeid in passed else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
