"""Asking a running loop to stop at the next step, on all hosts at the same one."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopRequest:
    """Set by a signal, read by the loop.

    Attributes:
        signal: the signal that came, None so far.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While inside, the first SIGTERM or Ctrl-C asks to stop; a second Ctrl-C interrupts.

    Python delivers signals to the main thread only: elsewhere this does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, _: FrameType | None) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class SharedStop:
    """A request to stop that all processes of a job get to know at the same step.

    A signal reaches hosts at different times, or one alone, and a checkpoint needs them all. So
    each step is followed by a maximum over the processes, read when the next step is dispatched,
    as its metrics are: nobody waits for it.
    """

    def __init__(self, request: StopRequest, mesh: Mesh):
        """Asks nothing yet.

        Args:
            request: of this process.
            mesh: devices of all processes.
        """
        self._request, self._alone = request, jax.process_count() == 1
        self._known: signal.Signals | None = None
        self._asked: jax.Array | None = None
        self._size = mesh.size
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def signal(self) -> signal.Signals | None:
        """The signal to stop for, the same on all processes."""
        return self._request.signal if self._alone else self._known

    def share(self) -> None:
        """Called by every process after it has dispatched a step."""
        if self._alone:
            return
        number = np.full(1, self._request.signal or 0, np.int32)
        mine = jax.make_array_from_callback((self._size,), self._each, lambda _: number)
        before, self._asked = self._asked, self._most(mine)
        if before is not None and (found := int(before)):
            self._known = signal.Signals(found)
