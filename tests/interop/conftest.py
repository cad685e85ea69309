"""The whole matrix of methods and families takes minutes: it runs with `-m matrix` only."""

import pytest

LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    if "matrix" in config.option.markexpr:
        return
    out = [item for item in items if item.get_closest_marker("matrix")]
    if out:
        config.stash[LEFT_OUT] = len(out)
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{count} combinations of methods and families left out: pytest -m matrix runs them"
        )
