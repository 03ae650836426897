"""A plugin of pytest: what one environment skips runs in another that has more installed.

`--skipped-to FILE` lists the test files of which something was skipped. `--skipped-from FILE` runs
these files, and of the others the slow tests alone.
"""

import pathlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("skipped")
    group.addoption("--skipped-to", metavar="FILE", help="list test files with skips")
    group.addoption("--skipped-from", metavar="FILE", help="run those files and slow tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("skipped_to") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(pathlib.Path(config.getoption("skipped_to"))))


class _Recorder:
    """Runs where reports arrive: in the process that starts the workers of pytest-xdist."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.files: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.files.add(report.nodeid.partition("::")[0])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:  # pytest.importorskip at the top of a file
            self.files.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text("".join(f"{name}\n" for name in sorted(self.files)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("skipped_from")
    if not path:
        return
    files = set(pathlib.Path(path).read_text().split())
    kept, left = [], []
    for item in items:
        again = item.nodeid.partition("::")[0] in files or item.get_closest_marker("slow")
        (kept if again else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
