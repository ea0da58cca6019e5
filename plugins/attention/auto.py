"""The backend that takes whichever of the others is fastest, by measurement.

The one idea to hold: a pick is made once for each kind of call on a GPU and then kept, in memory
and in a file for the runs to come, so that the same settings on the same machine go the same way.
What is traced or captured only looks up what was picked before.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sandbox
from sandbox import AttentionRequest, Mask

from .cached import CachedAttention
from .kernels import CudnnAttention, FlexAttention, XformersAttention
from .measuring import fastest
from .picks import settled
from .plain import Attention, SdpaAttention, request_of
from .prefix import LARGE, PrefixAttention
from .steps import StepsAttention

UNMEASURED = "sdpa"
"""What is taken where nothing was measured; it honours every call."""
MEASURED_ON = "cuda"
"""The type of device on which it is worth while."""
CANDIDATES: dict[str, type[Attention]] = {
    UNMEASURED: SdpaAttention,
    "cudnn": CudnnAttention,
    "prefix": PrefixAttention,
    "xformers": XformersAttention,
    "flex": FlexAttention,
    "cached": CachedAttention,
    "steps": StepsAttention,
}
HANDED_ON = {"full": ("flex", "prefix"), "causal": ("flex", "prefix"), "dense": ("prefix",)}
"""Kinds of mask that backends leave to another one, or for which others have kernels of their own.
"""


class Kind(NamedTuple):
    """What tells one call's speed from another's."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the queries: `b heads n e`."""
    num_keys: int
    """Without a mask rounded up to a power of two: stepwise drawing meets every number there is."""
    mask: str
    step_lens: tuple[int, ...] | None
    needs_grad: bool

    def __str__(self) -> str:
        b, heads, n, e = self.shape
        mask = self.mask
        if mask == "steps" and self.step_lens is not None:
            mask = f"steps of {' '.join(map(str, self.step_lens))}"
        keys = f"{'up to ' * (mask == 'full')}{self.num_keys} keys"
        return (
            f"{b} x {heads} heads of {e}, {n} queries, {keys}, mask: {mask}, "
            f"{str(self.dtype).removeprefix('torch.')}, "
            + ("forward and backward" if self.needs_grad else "forward")
        )


_picks: dict[tuple[object, ...], str] = {}
"""What this process has picked, by kind."""


class AutoAttention(Attention):
    """On a GPU the fastest of the others, as measured (`math` aside); elsewhere `sdpa`.

    The first call of each kind (shape, dtype, mask, with gradients or not) measures those that do
    not refuse it, on its own tensors. The pick is kept beside torch's caches, by GPU and versions,
    and told to the run. Within torch.compile, or while a CUDA graph is captured, nothing is
    measured: a kind not met or rehearsed before goes to `sdpa` there.
    """

    def __init__(self, params: sandbox.Params) -> None:
        super().__init__(params)
        self.backends = {name: cls(cls.Params()) for name, cls in CANDIDATES.items()}
        self._told: set[Kind] = set()

    def limit(self, request: AttentionRequest) -> str | None:
        return self.backends[UNMEASURED].limit(request)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        return self.backends[self._pick(q, k, v, mask, scale)].compute(q, k, v, mask, scale)

    def rehearse(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> None:
        """Pick for calls like this one."""
        self._pick(q, k, v, mask, scale)

    def attend_appending(
        self, qkv: Tensor, past: Tensor, start: int, scale: float, cosine: Any
    ) -> Tensor | None:
        """See `CachedAttention`: where that was picked for such a call before, else None."""
        (b, n, _), (_, _, heads, _, e) = qkv.shape, past.shape
        kind = Kind(
            qkv.device, qkv.dtype, (b, heads, n, e), _rounded(start + n), "full", None, False
        )
        if kind not in self._told or _picks.get(kind) != "cached":
            return None
        appending: Any = self.backends["cached"]
        return appending.attend_appending(qkv, past, start, scale, cosine)

    def _pick(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> str:
        if q.device.type != MEASURED_ON:
            return UNMEASURED
        request = request_of(q, k, v, mask)
        num_keys = request.num_keys
        if mask.kind == "full":
            num_keys = _rounded(num_keys)
        whose = q.device, q.dtype, tuple(q.shape), num_keys
        kind = Kind(*whose, mask.kind, mask.step_lens, request.needs_grad)
        if torch.compiler.is_compiling():
            return _remembered(*kind)
        if kind not in self._told and _is_at_work(q):
            handed_on = HANDED_ON.get(mask.kind, ())  # to sdpa, which is there already
            if mask.step_lens is not None and max(mask.step_lens) < LARGE:
                handed_on = (*handed_on, "prefix")
            able = {name: b for name, b in self.backends.items() if name not in handed_on}
            pick = settled(
                q.device, able, str(kind), lambda: fastest(able, request, (q, k, v), scale)
            )
            _picks[kind] = pick.name
            self._told.add(kind)
            sandbox.chose("attention", str(kind), pick.name, pick.why)
        pick = _picks.get(kind, UNMEASURED)
        return pick if self.backends[pick].limit(request) is None else UNMEASURED


@torch.compiler.assume_constant_result
def _remembered(*kind: object) -> str:
    """A constant where it is traced, so that what is picked later compiles nothing anew."""
    return _picks.get(kind, UNMEASURED)


def _rounded(num_keys: int) -> int:
    return 1 << (num_keys - 1).bit_length()


def _is_at_work(q: Tensor) -> bool:
    """Whether calls are carried out now: neither captured nor traced (by a subclass of tensors)."""
    return type(q) in (Tensor, nn.Parameter) and not torch.cuda.is_current_stream_capturing()
