"""Two workers on two cores: one intra-op thread each. No test leaves the console quiet for the next."""

import pytest
import torch

from vismt import console

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def loud():
    console.set_quiet(False)
    yield
    console.set_quiet(False)
