"""The fault suite: `make test` runs its short form, `make faults` the thorough one, which writes docs/RELIABILITY.md.

Each test injects a fault and hands in a row: what it injected and how often, what was lost, what the user reads.
"""

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import page
from harness import flags
from runs import cut_fmnist

ROWS = pytest.StashKey[list[page.Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--reliability") is not None:
        for item in items:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def thorough(request) -> bool:
    return request.config.getoption("--reliability") is not None


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """120 training and 20 test images: 15 steps an epoch."""
    return cut_fmnist(tmp_path_factory.mktemp("data"), train=120, test=20)


@pytest.fixture(scope="session")
def undisturbed(server, data, tmp_path_factory) -> Callable[..., Path]:
    """A function that gives the folder of a run to the end on so many ranks; the same one for the same flags.

    Saves in between and loader processes change nothing of the end, so that runs with them are compared with one
    without.
    """
    folders: dict[tuple, Path] = {}

    def run(size: int, *arguments: object) -> Path:
        if (size, *arguments) not in folders:
            folder = tmp_path_factory.mktemp("undisturbed")
            server.finish(size, *flags(data, folder, *arguments))
            folders[size, *arguments] = folder
        return folders[size, *arguments]

    return run


@pytest.fixture
def report(request, tmp_path) -> Callable[..., None]:
    """A function that hands in a row of the table."""

    def hand_in(fault: str, *, injected: int | str, lost: str, reads: str) -> None:
        # What differs between machines and runs is named instead of shown.
        reads = reads.replace(f"{tmp_path}/", "").replace(str(tmp_path), "FOLDER")
        reads = re.sub(r"/\S*?pytest-of-\w+/pytest-\d+/\S+?/", "", reads)
        reads = reads.replace(socket.gethostname(), "HOST")
        reads = re.sub(r"(?<=process )\d+|(?<=pid )\d+|(?<=pid\(s\) )\d+", "PID", reads)
        request.config.stash[ROWS].append(page.Row(fault, str(injected), lost, reads))

    return hand_in


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = session.config.getoption("--reliability")
    if target is not None and exitstatus == 0:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        skipped = [(entry.nodeid, entry.longrepr[2]) for entry in reporter.stats.get("skipped", [])]
        Path(target).write_text(page.render(session.config.stash[ROWS], skipped))
