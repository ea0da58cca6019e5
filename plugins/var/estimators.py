"""How gradients pass the quantizer, whose output does not follow its input.

Both estimators give the decoder the quantized map and the encoder a gradient; they differ in which.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor


def straight_through(
    features: Float[Tensor, "b c h w"], quantized: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Gradients reach the features unchanged (Bengio et al., arXiv 1308.3432)."""
    return features + (quantized - features).detach()


def rotation(
    features: Float[Tensor, "b c h w"], quantized: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Gradients are turned and stretched as the features are (arXiv 2410.06424, eq. 4).

    Each cell's vector e becomes |q|/|e| R e, where R reflects twice, held constant. On the sum of
    many scales it shrinks the features: it is here to be compared with.
    """
    e, q = features.detach(), quantized.detach()
    e_length, q_length = (x.norm(dim=1, keepdim=True).clamp_min(1e-6) for x in (e, q))
    e_unit, q_unit = e / e_length, q / q_length
    middle = e_unit + q_unit
    middle = middle / middle.norm(dim=1, keepdim=True).clamp_min(1e-6)
    turned = (
        features
        - 2 * (features * middle).sum(1, keepdim=True) * middle
        + 2 * (features * e_unit).sum(1, keepdim=True) * q_unit
    )
    turned = turned * (q_length / e_length)
    return turned + (q - turned).detach()  # rounding aside they are equal


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight-through": straight_through,
    "rotation": rotation,
}
"""By the name that a recipe gives."""
