"""Shared by the tests of checkpoints."""

import pytest
from states import make_state

from efficient_vlm.checkpoints.run import Checkpoints


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory):
    """A directory with committed steps 10 and 20; copy it before harming it."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(10, make_state(10), metadata={"note": "ten"}, wait=True)
        checkpoints.save(20, make_state(20), metadata={"note": "twenty"}, wait=True)
    return directory
