"""What a plugin or a notebook may import; everything else is private to the core.

Names are resolved on first use (PEP 562), so that `sandbox --help` answers without importing torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "errors": ["RunError", "SandboxError"],
    "hooks": ["hookimpl"],
    "interfaces": [
        "AttentionBackend",
        "AttentionRequest",
        "Autoencoder",
        "Backbone",
        "Batch",
        "Codebook",
        "Dataset",
        "Evidence",
        "FeatureExtractor",
        "Generator",
        "ImageLoss",
        "Losses",
        "Metric",
        "Objective",
        "Observer",
        "Reconstruction",
        "Role",
        "Run",
        "Sampler",
        "ScaleSchedule",
        "Split",
        "Subject",
        "Task",
        "Tokenizer",
        "Tokens",
        "TrainableTokenizer",
        "Watch",
    ],
    "layout": ["Layout", "Mask", "Step"],
    "parts": ["Params", "Part"],
    "sampling": ["Keep", "Sampled", "sample"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)  # noqa: PLE0605  (a list of names, computed)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sandbox' has no attribute {name!r}")
    return getattr(import_module(f"sandbox.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
