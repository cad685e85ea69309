"""Live comparisons with the reference library, which is no dependency of the package.

Without it the whole folder is one skipped line.
"""

from importlib.util import find_spec

import pytest

REASON = (
    "parity with the reference library needs torch and transformers: "
    "pip install -e '.[test,parity]' && pytest -m parity"
)
TOLD = pytest.StashKey[bool]()


class Unavailable(pytest.Module):
    """A test module that is not imported: the first says why, the others say nothing."""

    def collect(self):
        if self.session.stash.get(TOLD, False):
            return []
        self.session.stash[TOLD] = True
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if find_spec("torch") is None or find_spec("transformers") is None:
        return Unavailable.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="session")
def live_case(tmp_path_factory):
    """live_case(name) -> folder of a freshly made case of make_fixtures.CASES."""
    from make_fixtures import make_case

    root, made = tmp_path_factory.mktemp("live"), set()

    def folder(name: str):
        if name not in made:
            make_case(name, root)
            made.add(name)
        return root / name

    return folder
