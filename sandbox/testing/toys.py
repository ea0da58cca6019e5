"""A tokenizer without weights: for parts that need some tokenizer and must not care which."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sandbox.layout import Layout

CELL_PX = 4


class GreyTokenizer:
    """Each step corrects what the steps before left over, in one of `vocab_size` shades of grey."""

    code_dim = 1

    def __init__(self, layout: Layout, vocab_size: int = 8) -> None:
        self.layout, self.vocab_size = layout, vocab_size
        self.image_size = (CELL_PX * layout.size[0], CELL_PX * layout.size[1])
        self.shades = torch.linspace(-1, 1, vocab_size)

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b l"]:
        target = F.interpolate(images.mean(1, keepdim=True), self.layout.size, mode="area")
        canvas, ids = self.canvas(len(images)), []
        for step in range(len(self.layout.steps)):
            rest = self.context(target - canvas, step)
            ids.append((rest - self.shades).abs().argmin(-1))
            canvas = self.paint(canvas, self.embed(ids[-1]), step)
        return torch.cat(ids, dim=1)

    def decode(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b 3 h w"]:
        return self.render(self._canvases(ids)[-1])

    def contexts(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l c"]:
        before = enumerate(self._canvases(ids)[:-1])
        return torch.cat([self.context(canvas, step) for step, canvas in before], dim=1)

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]:
        return self.shades[ids, None]

    def canvas(self, batch_size: int) -> Float[Tensor, "b c h w"]:
        return torch.zeros(batch_size, 1, *self.layout.size)

    def paint(
        self, canvas: Float[Tensor, "b c h w"], codes: Float[Tensor, "b n c"], step: int
    ) -> Float[Tensor, "b c h w"]:
        place = self.layout.steps[step]
        cells = codes.new_zeros(len(codes), 1, place.height * place.width)
        cells[:, :, list(place.cells)] = rearrange(codes, "b n c -> b c n")
        maps = rearrange(cells, "b c (h w) -> b c h w", h=place.height)
        return canvas + F.interpolate(maps, self.layout.size, mode="nearest")

    def context(self, canvas: Float[Tensor, "b c h w"], step: int) -> Float[Tensor, "b n c"]:
        place = self.layout.steps[step]
        maps = F.interpolate(canvas, (place.height, place.width), mode="area")
        return rearrange(maps, "b c h w -> b (h w) c")[:, list(place.cells)]

    def render(self, canvas: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        return F.interpolate(canvas.expand(-1, 3, -1, -1), self.image_size).clamp(-1, 1)

    def _canvases(self, ids: Int[Tensor, "b l"]) -> list[Float[Tensor, "b c h w"]]:
        canvases = [self.canvas(len(ids))]
        for step, span in enumerate(self.layout.spans):
            canvases.append(self.paint(canvases[-1], self.embed(ids[:, span]), step))
        return canvases
