"""Loop guard: finds out that an answer repeats itself over and over."""

from __future__ import annotations

import ctypes as C
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_stream.native import bindings

if TYPE_CHECKING:
    from edge_stream.stream import Stream


@dataclass(frozen=True)
class Loop:
    """How an answer ended: its newest `period` tokens were written `repetitions` times (the last may be cut short).

    n_taken: its newest tokens that the stream no longer holds, which is all but the first period if it can be rewound.
    """

    period: int
    repetitions: int
    n_taken: int


class LoopGuard:
    """Watches the tokens of one answer for a cycle: see es_loop_guard in edge_stream.h."""

    def __init__(self) -> None:
        self._native, self._handle = bindings.library(), C.c_void_p()
        bindings.check(self._native.es_loop_guard_init(C.byref(self._handle)))

    def __del__(self) -> None:
        if self._handle:
            self._native.es_loop_guard_free(self._handle)

    def find(self, token: int) -> tuple[int, int] | None:
        """Add a token. (period, tokens in the cycle) once the answer is in one."""
        loop = self._native.es_loop_guard_add(self._handle, token)
        return (loop.period, loop.n_tokens) if loop.period else None

    def watch(self, token: int, stream: Stream) -> Loop | None:
        """Add a token that was fed to a stream. In a cycle, all but its first period are taken back."""
        found = self.find(token)
        if found is None:
            return None
        n_taken = C.c_size_t()
        stream.call(self._native.es_stream_unloop, stream.handle, bindings.Loop(*found), C.byref(n_taken))
        period, n_tokens = found
        return Loop(period, n_tokens // period, n_taken.value)
