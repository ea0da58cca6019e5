import numpy as np
import pytest
from PIL import Image

from sandbox.pictures import to_rgb


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bit_grey_keeps_its_shades(dtype):
    image = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=dtype))
    assert np.asarray(to_rgb(image))[0].tolist() == [[0] * 3, [0x80] * 3, [0xFF] * 3]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "RGB"])
def test_every_other_kind_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (2, 3))).mode == "RGB"
