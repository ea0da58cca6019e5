"""A computation on a GPU, recorded once as a CUDA graph and then replayed without Python between.

The one thing to hold in mind: a graph reads and writes the places in memory that it was recorded
with. So what goes in is copied to such a place and what comes out is copied from one; weights may
change in place, but whoever records must name in the `key` all else that a call depends on:
`Followed` tells where weights lie.
"""

import copy
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Computation = Callable[[Tensor, torch.Generator], Tensor]
"""Of one tensor to another, drawing from the generator."""


Held = Sequence[Mapping[str, Tensor | None]]
"""Parameters and buffers of modules."""


_apart: ContextVar[dict[Hashable, Computation] | None] = ContextVar("apart", default=None)


@contextmanager
def recorded_apart() -> Iterator[None]:
    """Within, `Recordings` record a kind of call anew when it comes first, and forget it at the
    end: so what stands in a part's place for a while, to mark its time say, is replayed too."""
    token = _apart.set({})
    try:
        yield
    finally:
        _apart.reset(token)


class NotRecorded(UserWarning):
    """A computation that is to be replayed waits for the device, say, and so runs as it is."""


class Recording:
    """A computation as one CUDA graph, for inputs of one shape.

    It draws what the plain computation would draw from the same generator, and moves that on.
    Computed twice before, so that what is set up at first use is no part of it, and so that what
    waits for the device is found out before it breaks a recording: on `stream`, that of those that
    share its memory `pool`, or one for all that name none. Raises RuntimeError.
    """

    def __init__(
        self,
        compute: Computation,
        inputs: Tensor,
        rng: torch.Generator,
        pool: Any = None,
        stream: Any = None,
    ) -> None:
        self.compute = compute  # kept, so that the ids of what it refers to stay taken
        self.device = device = inputs.device
        with torch.inference_mode(False):
            self._inputs = inputs.clone()
        self._rng = torch.Generator(device)
        self._rng.set_state(rng.get_state())
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self._rng)
        cuda: Any = torch.cuda  # torch leaves streams untyped
        with cuda.device(device):
            self.stream = stream = stream or _recording_stream(device)
            stream.wait_stream(cuda.current_stream())
            try:
                with cuda.stream(stream):
                    compute(self._inputs, self._rng)
                    with _refusing_to_wait():
                        compute(self._inputs, self._rng)
            finally:
                cuda.current_stream().wait_stream(stream)
            self._output = self._record(stream, pool)

    def _record(self, stream: Any, pool: Any) -> Tensor:
        # What autocast remembers must be neither read by the graph nor left behind by it.
        torch.clear_autocast_cache()
        recorder = torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        cuda: Any = torch.cuda
        try:
            # A recording that breaks leaves its own stream the current one.
            with cuda.stream(cuda.current_stream()), recorder:
                return self.compute(self._inputs, self._rng)
        except BaseException:
            with suppress(RuntimeError):
                _close_what_failed(self._inputs.device)
            raise
        finally:
            torch.clear_autocast_cache()

    def __call__(self, inputs: Tensor, rng: torch.Generator) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            self._inputs.copy_(inputs)
            self._rng.set_state(rng.get_state())
            self.graph.replay()
            rng.set_state(self._rng.get_state())
            return self._output.clone()


class Recordings:
    """The recordings of a computation, one for each kind of call, the latest `kept` of them.

    Recording takes the time of about three calls, so a kind of call comes `patience` times before
    it is recorded. Recordings share their memory: all together need what the largest needs, and
    only one is replayed at a time. Those of another object may be replayed beside them: they have a
    stream of their own, which kernels that keep something from launch to launch keep it by.
    """

    def __init__(self, kept: int = 8, patience: int = 3) -> None:
        self.kept, self.patience = kept, patience
        self._calls: OrderedDict[Hashable, Computation | int] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recordings":
        """With none yet: those there are read what is not copied with them."""
        return Recordings(self.kept, self.patience)

    def run(
        self,
        compute: Computation,
        inputs: Tensor,
        rng: torch.Generator,
        *,
        key: Hashable,
        at_once: bool,
    ) -> Tensor:
        """`compute(inputs, rng)`, replayed where calls with this key came before.

        The first call of a kind is recorded only where `at_once` says so. What cannot be recorded
        runs as it is, now and when it comes again, which a warning (`NotRecorded`) tells.
        """
        if (apart := _apart.get()) is not None:
            kind = id(self), key
            if kind not in apart:
                apart[kind] = self._recorded(compute, inputs, rng)
            return apart[kind](inputs, rng)
        call = self._calls.pop(key, 0)
        if isinstance(call, int):
            ripe = at_once or call >= self.patience
            call = self._recorded(compute, inputs, rng) if ripe else call + 1
        self._calls[key] = call
        while len(self._calls) > self.kept:
            self._calls.popitem(last=False)
        return (compute if isinstance(call, int) else call)(inputs, rng)

    def _recorded(self, compute: Computation, inputs: Tensor, rng: torch.Generator) -> Computation:
        others = (call for call in self._calls.values() if isinstance(call, Recording))
        shared = next((each for each in others if each.device == inputs.device), None)
        try:
            if shared:
                return Recording(compute, inputs, rng, shared.graph.pool(), shared.stream)
            return Recording(compute, inputs, rng, stream=_own_stream(inputs.device))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):  # leave the plain way what there is
                self._forget()
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"not recorded as a CUDA graph, so slower: {type(error).__name__}: {reason}",
                NotRecorded,
                stacklevel=4,
            )
            return compute

    def _forget(self) -> None:
        """Give back the memory of all recordings."""
        recorded = [key for key, call in self._calls.items() if isinstance(call, Recording)]
        for key in recorded:
            del self._calls[key]
        torch.cuda.empty_cache()


@functools.cache
def _recording_stream(device: torch.device) -> Any:
    """One for all that name none: each stream that was ever used keeps some memory."""
    return _own_stream(device)


def _own_stream(device: torch.device) -> Any:
    cuda: Any = torch.cuda
    return cuda.Stream(device) if device.type == "cuda" else None


class Followed:
    """Modules whose weights recordings read, asked where those lie and whether they moved on."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._held = held(self.modules)
        self._lying: tuple[object, ...] = ()
        self._written: tuple[object, ...] = ()
        self._place: object = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Followed":
        """Of the copied modules, of which nothing was seen."""
        return Followed(copy.deepcopy(self.modules, memo))

    @classmethod
    def within(cls, *parts: object) -> "Followed | None":
        """All modules of all parts; None where one of these is no module."""
        modules = [part for part in parts if isinstance(part, nn.Module)]
        whole = len(modules) == len(parts)
        return cls(inner for part in modules for inner in part.modules()) if whole else None

    def look(self) -> tuple[Hashable, bool]:
        """Where all parameters and buffers lie, and whether any lies elsewhere or was written to
        since this was asked before (at first: yes).

        The former is for the key of a recording: the same while nothing lies elsewhere. It is read
        before every replay, while the device waits, so it is but a name for what `places` says.
        """
        tensors = _tensors(self._held)
        lying, written = _places(tensors), _versions(tensors)
        moved = lying != self._lying
        if moved:
            self._lying, self._place = lying, object()
        moved_on = moved or written != self._written
        self._written = written
        return self._place, moved_on


def held(modules: Iterable[nn.Module]) -> Held:
    """The modules' own parameters and buffers by name, now and later; those within them are to be
    named too."""
    return [own for module in modules for own in (module._parameters, module._buffers)]


def places(of: Held) -> tuple[object, ...]:
    """Where parameters and buffers lie."""
    return _places(_tensors(of))


def versions(of: Held) -> tuple[object, ...]:
    """How often parameters and buffers were written to.

    While this and `places` stay equal, they are as they were. Fused optimizers do not count as
    writing, so every step of any optimizer does. Of what was made in inference mode nobody knows:
    it never is equal. What is written through `.data` is missed.
    """
    return _versions(_tensors(of))


def _places(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    return *map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors)


def _versions(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    try:
        found: list[object] = [tensor._version for tensor in tensors]
    except RuntimeError:  # of an inference tensor
        found = [object() if tensor.is_inference() else tensor._version for tensor in tensors]
    return _steps[0], *found


def _tensors(of: Held) -> list[Tensor]:
    return [tensor for own in of if own for tensor in own.values() if tensor is not None]


_steps = [0]
"""Of all optimizers of this process, since this module is there."""


def _count_step(*_: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Within, waiting for the device is an error, as it is in a recording."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _close_what_failed(device: torch.device) -> None:
    """Record something that works: until then the default generator takes itself for recorded."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)
