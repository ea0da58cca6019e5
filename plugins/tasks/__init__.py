"""The tasks of a run: train tokenizer, classifier, generator; inspect, sample, evaluate, bench."""

import sandbox

from .bench import Bench
from .evaluate import Evaluate
from .inspect_tokenizer import InspectTokenizer
from .near_copies import NearCopies
from .sample import Sample
from .train_classifier import TrainClassifier
from .train_generator import TrainGenerator
from .train_tokenizer import TrainTokenizer
from .tune_sampler import TuneSampler


@sandbox.hookimpl
def sandbox_register(register: sandbox.Register) -> None:
    register(sandbox.Task, "train-tokenizer", TrainTokenizer)
    register(sandbox.Task, "train-classifier", TrainClassifier)
    register(sandbox.Task, "train-generator", TrainGenerator)
    register(sandbox.Task, "inspect-tokenizer", InspectTokenizer)
    register(sandbox.Task, "sample", Sample)
    register(sandbox.Task, "tune-sampler", TuneSampler)
    register(sandbox.Task, "evaluate", Evaluate)
    register(sandbox.Task, "near-copies", NearCopies)
    register(sandbox.Task, "bench", Bench)
