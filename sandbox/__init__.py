"""What a plugin or a notebook may import; everything else is private to the core.

Names are resolved on first use (PEP 562), so that `sandbox --help` answers without importing torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "compiler": ["compiled_method", "compiling", "fastest_convolutions", "tried"],
    "distributed": ["agree", "all_reduce_mean_", "barrier", "broadcast_", "rank", "world_size"],
    "errors": ["RunError", "SandboxError"],
    "hooks": ["Register", "hookimpl"],
    "interfaces": [
        "AttentionBackend",
        "Autoencoder",
        "Backbone",
        "Codebook",
        "Dataset",
        "FeatureExtractor",
        "Generator",
        "Metric",
        "Observer",
        "RequantizingTokenizer",
        "Sampler",
        "ScaleSchedule",
        "Tokenizer",
        "TrainableTokenizer",
    ],
    "judges": ["Adversary", "ImageLoss", "Objective"],
    "launching": ["one_by_one", "overlapping"],
    "layout": ["Layout", "Mask", "Step"],
    "checkpoint": [
        "Checkpoints",
        "atomic",
        "random_states",
        "read_tensors",
        "set_random_states",
        "write_json",
        "write_tensors",
    ],
    "loading": ["ahead", "stream", "sweep", "to_device"],
    "notebook": ["export", "load"],
    "parts": ["INCIDENTAL", "Params", "Part", "Switch"],
    "pictures": ["to_rgb"],
    "precision": ["exact_float32", "float32_products", "products_of_float32"],
    "products": ["onednn_linear", "suits_onednn"],
    "provenance": ["chose", "device_name", "memory_bytes"],
    "rendering": ["quickened", "refresh", "render"],
    "replay": ["Followed", "NotRecorded", "Recording", "Recordings", "recorded_apart"],
    "sampling": ["Keep", "Sampled", "guided", "sample"],
    "seeds": ["derive_seed"],
    "task": ["Run", "Task"],
    "values": [
        "AttentionRequest",
        "Batch",
        "Evidence",
        "Losses",
        "Reconstruction",
        "Role",
        "Split",
        "Subject",
        "Tokens",
        "Watch",
    ],
    "weights": ["load_weights"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sandbox' has no attribute {name!r}")
    return getattr(import_module(f"sandbox.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
