"""The tasks of a run: train a tokenizer, a classifier, a generator; sample; evaluate."""

import sandbox

from .evaluate import Evaluate
from .sample import Sample
from .train_classifier import TrainClassifier
from .train_generator import TrainGenerator
from .train_tokenizer import TrainTokenizer


@sandbox.hookimpl
def sandbox_register(register: sandbox.Register) -> None:
    register(sandbox.Task, "train-tokenizer", TrainTokenizer)
    register(sandbox.Task, "train-classifier", TrainClassifier)
    register(sandbox.Task, "train-generator", TrainGenerator)
    register(sandbox.Task, "sample", Sample)
    register(sandbox.Task, "evaluate", Evaluate)
