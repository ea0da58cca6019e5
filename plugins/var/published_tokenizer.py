"""The published tokenizer's state dict: our names for its tensors, and back.

Published files differ in the names of the phi convolutions: `quant_resi.qresi.` where all scales
share one, `quant_resi.qresi_ls.N.` for a few, `quant_resi.N.` for one a scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tokenizer import VarTokenizer

AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
CODES = "codebook.embedding.weight"
COSINE = "codebook.cosine"
PUBLISHED_CODES = "quantize.embedding.weight"
PUBLISHED_HITS = "quantize.ema_vocab_hit_SV"
PUBLISHED_PHI = re.compile(r"quantize\.quant_resi\.(?:qresi|(?:qresi_ls\.)?(\d+))\.(weight|bias)")


def from_published(
    tokenizer: VarTokenizer, state: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """See `VarTokenizer.from_published`."""
    if PUBLISHED_CODES not in state:
        return _of_another_schedule(tokenizer, state)
    ours = {_our_name(name): tensor for name, tensor in state.items()}
    buffers = {name for name, _ in tokenizer.named_buffers()}
    counters = {name: t for name, t in tokenizer.state_dict().items() if name in buffers}
    if COSINE in counters:
        counters[COSINE] = torch.tensor(False)  # the published code looks up by distance
    if "hits" in ours and ours["hits"].shape != counters["hits"].shape:
        del ours["hits"]
    return {**counters, **ours}


def _of_another_schedule(
    tokenizer: VarTokenizer, state: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Our own weights without the usage counts of another number of scales; else None.

    One convolution a scale cannot serve other scales: such weights stay as they are, and so unfit.
    """
    hits = state.get("hits")
    fits = hits is None or len(hits) == len(tokenizer.hits)
    if fits or tokenizer.params.phi == "per-scale":
        return None
    return {**state, "hits": torch.zeros_like(tokenizer.hits)}


def to_published(tokenizer: VarTokenizer) -> dict[str, Tensor]:
    """See `VarTokenizer.to_published`. The codes are the codebook's `published_codes()`."""
    state, p = tokenizer.state_dict(), tokenizer.params
    codes = getattr(tokenizer.codebook, "published_codes", None)
    if codes is None or "autoencoder.quant_conv.weight" not in state:
        raise ValueError(
            "only the autoencoder `cnn` with a codebook that is a table (`vq`, `simvq`) has a "
            f"published layout, not `{p.autoencoder.name}` with `{p.codebook.name}`"
        )
    names = {name: _published_name(name, p.phi) for name in state}
    published = {names[name]: tensor for name, tensor in state.items() if names[name]}
    return {**published, PUBLISHED_CODES: codes()}


def describe(state: Mapping[str, Tensor]) -> dict[str, str]:
    """See `VarTokenizer.describe`."""
    facts = {}
    if (conv_in := state.get("autoencoder.encoder.conv_in.weight")) is not None:
        facts["channel count"] = str(conv_in.shape[0])
    levels = {name.split(".")[3] for name in state if name.startswith("autoencoder.encoder.down.")}
    if levels:
        facts["resolution count"] = str(len(levels))
    if (codes := state.get(CODES)) is not None:
        facts["code count"], facts["code width"] = map(str, codes.shape)
    if (cosine := state.get(COSINE)) is not None:
        facts["codebook lookup"] = "cosine" if cosine else "euclidean"
    if (hits := state.get("hits")) is not None:
        facts["scale count"] = str(len(hits))
    if facts:
        facts["phi convolution count"] = str(len({n for n in state if re.match(r"phi\.\d+\.w", n)}))
    return facts


def _our_name(name: str) -> str:
    if name.startswith(AUTOENCODER):
        return f"autoencoder.{name}"
    if phi := PUBLISHED_PHI.fullmatch(name):
        return f"phi.{phi[1] or 0}.{phi[2]}"
    return {PUBLISHED_CODES: CODES, PUBLISHED_HITS: "hits"}.get(name, name)


def _published_name(name: str, phi: str) -> str | None:
    """None for what only our training keeps."""
    if name.startswith("autoencoder."):
        return name.removeprefix("autoencoder.")
    if name.startswith("phi."):
        _, index, kind = name.split(".")
        place = {"shared": "qresi", "partial": f"qresi_ls.{index}", "per-scale": index}[phi]
        return f"quantize.quant_resi.{place}.{kind}"
    return {"hits": PUBLISHED_HITS}.get(name)
