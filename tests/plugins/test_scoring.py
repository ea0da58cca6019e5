import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sandbox_plugins.autoregressive.scoring import scores

IDS = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """A network in two halves that both read `table`; `asleep` is frozen, `spare` not read."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.asleep = nn.Parameter(torch.randn(4), requires_grad=False)
        self.spare = nn.Parameter(torch.randn(4))

    def features(self, ids):
        seen = F.embedding(ids.roll(1, 1), self.table)
        return (seen @ self.mix).tanh(), ids[:, 0], seen.square()  # the last one is read by nobody

    def logits(self, x, first, _):
        return (x + self.asleep) @ self.table.T + F.embedding(first, self.table)[:, None].mean()


def step(network, size, factor=1.0, logits=None, half=False, passes=1):
    """The scores, and the gradient of each parameter after so many backward passes."""

    def score(ids, *features):
        made = (logits or network.logits)(*features).float()
        losses = F.cross_entropy(made.mT, ids, reduction="none")
        return losses, made.detach().argmax(-1) == ids

    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = scores(score, size, IDS, network.features(IDS))
    for _ in range(passes):
        (found.total * factor).backward(retain_graph=passes > 1)
    return found, {name: p.grad for name, p in network.named_parameters()}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tied()


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_what_both_halves_read_learns_from_both(network, size, factor):
    whole, exact = step(network, 7, factor)
    pieces, ours = step(network, size, factor)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(pieces.right, whole.right)
    torch.testing.assert_close(pieces[:2], whole[:2])
    assert ours["spare"] is ours["asleep"] is None


def test_a_piece_may_read_what_the_others_do_not(network):
    def logits(x, first, _):
        made = x @ network.table.T
        return made * network.spare.sum() if (first == IDS[4, 0]).any() else made

    assert (IDS[:, 0] == IDS[4, 0]).sum() < 7
    pieces, ours = step(network, 1, logits=logits)
    assert ours["spare"].any() and pieces.total.isfinite()


def test_only_features_or_only_the_second_half_may_learn(network):
    for frozen in ("mix", "table"):
        network.requires_grad_(True)
        getattr(network, frozen).requires_grad_(False)
        torch.testing.assert_close(step(network, 2)[1], step(network, 7)[1], rtol=1e-5, atol=1e-6)
    network.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        step(network, 2)
    network.requires_grad_(True)
    network.features = torch.no_grad()(network.features)
    whole, pieces = step(network, 7)[1], step(network, 2)[1]
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)
    assert pieces["mix"] is None and pieces["table"].any()


def test_a_loss_scale_keeps_small_gradients_of_float16():
    ids, weights = torch.zeros(8, 64), 1e-4 * (torch.rand(8, 64, 64) + 0.5)
    x = torch.zeros_like(weights, dtype=torch.float16).requires_grad_()

    def score(rows, x, weights):
        return (x.float() * weights).sum(-1), rows > 0

    (scores(score, 3, ids, (x, weights)).total * 65536).backward()
    torch.testing.assert_close(x.grad.float(), weights * 65536 / ids.numel(), rtol=2**-8, atol=0)


def test_a_second_backward_pass_adds_as_much_again(network):
    _, exact = step(network, 7, 2.0)
    _, ours = step(network, 2, passes=2)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_logits_that_are_made_in_autocast_learn_the_same_in_pieces(network):
    _, whole = step(network, 7, half=True)
    _, ours = step(network, 2, half=True)
    torch.testing.assert_close(ours, whole, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_factor_is_not_rounded_to_the_type_of_the_features(device):
    ids, weights = torch.zeros(8, 64, device=device), torch.rand(8, 64, 64, device=device) + 0.5
    x = torch.zeros_like(weights, dtype=torch.bfloat16).requires_grad_()

    def score(rows, x, weights):
        return (x.float() * weights).sum(-1), rows > 0

    factor = 1 + 171 / 256  # halfway between two numbers of bfloat16
    (scores(score, 3, ids, (x, weights)).total * 512 * factor).backward()
    assert x.grad.dtype == torch.bfloat16
    ratio = x.grad.float() / (weights * factor)
    assert abs(ratio.mean() - 1) < 5e-4 and (ratio - 1).abs().max() < 2**-7
