"""The test kit for authors of plugins: the laws of every interface, and a project to run in.

    from sandbox.testing import check, load_plugins

    registry = load_plugins([Path("my_plugins")])
    check(sandbox.Sampler, registry.find(sandbox.Sampler, "my-sampler"), registry)

A law is a function that raises AssertionError in plain words; `check` runs all of an interface on
one small case each. To try a law on drawn layouts, call it with `sandbox.testing.strategies`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from sandbox import interfaces
from sandbox.layout import Layout, Mask, Step
from sandbox.parts import Params
from sandbox.plugins import load_plugins
from sandbox.recipe import Recipe
from sandbox.registry import Registry
from sandbox.run import LiveRun
from sandbox.task import Run
from sandbox.testing.images import (
    dataset_law,
    feature_extractor_law,
    metric_law,
    metric_order_law,
    observer_law,
    task_law,
)
from sandbox.testing.judges import adversary_law, image_loss_law
from sandbox.testing.networks import (
    attention_law,
    backbone_law,
    generator_law,
    objective_law,
    sampler_law,
)
from sandbox.testing.project import Outcome, Project, sandbox_project
from sandbox.testing.tokens import (
    autoencoder_law,
    codebook_law,
    layout_law,
    requantizing_tokenizer_law,
    tokenizer_law,
    trainable_tokenizer_law,
)
from sandbox.testing.toys import GreyTokenizer
from sandbox.values import Subject, Tokens

__all__ = [
    "GreyTokenizer",
    "Outcome",
    "Project",
    "adversary_law",
    "attention_law",
    "autoencoder_law",
    "backbone_law",
    "check",
    "codebook_law",
    "dataset_law",
    "feature_extractor_law",
    "generator_law",
    "image_loss_law",
    "layout_law",
    "load_plugins",
    "metric_law",
    "metric_order_law",
    "objective_law",
    "observer_law",
    "requantizing_tokenizer_law",
    "sampler_law",
    "sandbox_project",
    "settle",
    "task_law",
    "tokenizer_law",
    "trainable_tokenizer_law",
]

LAYOUTS = (
    Layout.pyramid(1, (2, 3), (4, 3)),
    Layout.raster(2, 2, [3, 0, 2, 1]),
    Layout((Step(2, 3, (4,)), Step(2, 3, (0, 5)), Step(2, 3, (1, 2, 3)))),
)
"""Growing maps, one token a step, one map in three groups."""
IMAGE_SIZE, NUM_CLASSES, CODE_DIM, VOCAB_SIZE = (32, 32), 3, 5, 11


def check(
    interface: type,
    cls: type,
    registry: Registry | None = None,
    params: Mapping[str, Any] | None = None,
    *,
    run: Run | None = None,
    seed: int = 0,
) -> None:
    """Hold a class to all laws of an interface; raises AssertionError where one is broken.

    `params` are settings as in a recipe, small ones for a large part; left out, its defaults.
    `registry` is where parts that it names are looked up (by default the installed plugins), `run`
    what a task may plan for (by default a run of an empty recipe). Raises ValueError for an
    interface without laws.
    """
    if interface.__name__ not in _LAWS:
        raise ValueError(f"{interface.__name__} has no laws; known: {', '.join(_LAWS)}")
    checked = settle(cls, registry or load_plugins(), params)
    case = _Case(lambda *handed: cls(checked, *handed), checked, run, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _LAWS[interface.__name__](case)


def settle(cls: Any, registry: Registry, params: Mapping[str, Any] | None = None) -> Params:
    """The checked `Params` of a class, from settings as in a recipe."""
    try:
        checked: Params = cls.Params.model_validate(params or {}, context={"registry": registry})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise AssertionError(f"{cls.__name__} needs other `params` to be tested: {wrong}") from None
    return checked


@dataclass(frozen=True)
class _Case:
    make: Callable[..., Any]
    params: Params
    run: Run | None
    seed: int


def _tokenizer(case: _Case) -> None:
    tokenizer_law(case.make(), case.seed)
    if isinstance(tokenizer := case.make(), interfaces.TrainableTokenizer):
        trainable_tokenizer_law(tokenizer, case.seed)
    if isinstance(tokenizer := case.make(), interfaces.RequantizingTokenizer):
        requantizing_tokenizer_law(tokenizer, case.seed)


def _attention(case: _Case) -> None:
    staircase = torch.ones(5, 7).tril(2).bool()
    calls = [(Mask(), 3, 9), (Mask(), 1, 1), (Mask(dense=staircase), 5, 7)]
    layouts = (*LAYOUTS, Layout.pyramid(1, 2, 4, (8, 7), (9, 8)))  # over several blocks of 64
    calls += [(Mask(layout.lens), layout.seq_len, layout.seq_len) for layout in layouts]
    for mask, num_queries, num_keys in calls:
        for needs_grad in (False, True):
            attention_law(
                case.make(), mask, num_queries, num_keys, seed=case.seed, needs_grad=needs_grad
            )


def _backbone(case: _Case) -> None:
    for layout in LAYOUTS:
        tokens = Tokens(layout, VOCAB_SIZE, CODE_DIM, NUM_CLASSES)
        backbone_law(case.make(tokens), tokens, case.seed)


def _objective(case: _Case) -> None:
    for layout in LAYOUTS:
        objective_law(case.make(), layout, case.seed)


def _generator(case: _Case) -> None:
    tokenizer = GreyTokenizer(Layout.pyramid(1, 2, 4))
    subject = Subject(tokenizer.image_size, NUM_CLASSES, tokenizer)
    generator_law(case.make(subject), subject.image_size, NUM_CLASSES, case.seed)


def _task(case: _Case) -> None:
    empty = Recipe.model_validate({"device": "cpu"})
    task_law(case.make(), case.run or LiveRun(empty, Path("runs", "none")))


def _feature_extractor(case: _Case) -> None:
    feature_extractor_law(case.make(IMAGE_SIZE, NUM_CLASSES), IMAGE_SIZE, case.seed)


_LAWS: dict[str, Callable[[_Case], None]] = {
    "ScaleSchedule": lambda case: layout_law(case.make().layout()),
    "Tokenizer": _tokenizer,
    "Autoencoder": lambda case: autoencoder_law(case.make(), case.seed),
    "Codebook": lambda case: codebook_law(case.make(CODE_DIM), case.seed),
    "AttentionBackend": _attention,
    "Backbone": _backbone,
    "Sampler": lambda case: sampler_law(case.make(), case.params, case.seed),
    "Objective": _objective,
    "ImageLoss": lambda case: image_loss_law(case.make(), IMAGE_SIZE, case.seed),
    "Adversary": lambda case: adversary_law(case.make(IMAGE_SIZE), IMAGE_SIZE, case.seed),
    "Generator": _generator,
    "Dataset": lambda case: dataset_law(case.make(), case.seed),
    "FeatureExtractor": _feature_extractor,
    "Metric": lambda case: metric_law(case.make, case.seed),
    "Observer": lambda case: observer_law(case.make()),
    "Task": _task,
}
