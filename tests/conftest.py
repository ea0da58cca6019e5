import hypothesis
import pytest
import torch

from sandbox.plugins import load_plugins

# Wall-clock deadlines time torch's first call, not the code; a red run must be repeatable.
hypothesis.settings.register_profile(
    "sandbox",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=25,
    phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
)
hypothesis.settings.load_profile("sandbox")


@pytest.fixture(scope="session")
def registry():
    return load_plugins(strict=True)


@pytest.fixture(scope="module")
def one_thread():
    """Whole runs of tiny networks: fastest so, and as in a process that is given one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
