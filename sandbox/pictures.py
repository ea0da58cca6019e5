"""Pictures as files hold them, to the 8-bit RGB that everything here is made of."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB. 16-bit grey is scaled down; PIL alone would clip it to white."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64).clip(0, 65_535)
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    return image.convert("RGB")
