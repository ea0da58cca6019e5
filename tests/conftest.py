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


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
