import torch
from torch import nn

from sandbox_plugins.autoregressive.scoring import scores
from sandbox_plugins.tasks.plan import _trial


def test_memory_counts_what_is_kept_for_the_backward_pass_and_not_what_was_let_go():
    network, x, ids = nn.Linear(4, 1000), torch.randn(64, 1, 4), torch.zeros(64, 1)

    def score(ids, x):
        losses = -network(x).log_softmax(-1)[..., 0]
        return losses, losses < 1

    def kept(size):
        return _trial(network, lambda: scores(score, size, ids, [x]).total, torch.device("cpu"))[2]

    logits, gradients = 4 * 64 * 1000, 4 * 5 * 1000
    assert kept(64) >= logits
    assert gradients <= kept(8) < 2 * gradients
