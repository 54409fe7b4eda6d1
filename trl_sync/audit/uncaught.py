"""Names the dead rank after an uncaught exception that its death caused."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from trl_sync.audit.watch import ProgressWatch

_LOOK_AGAIN_S = 0.05


@contextmanager
def _sigterm_later() -> Iterator[None]:
    """While the block runs, a SIGTERM waits: a launcher sends it 0.1 s after a rank's death."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.set())
    try:
        yield
    finally:
        # None: the handler before was not one of Python's.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        if arrived.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


def name_missing_on_uncaught(watch: ProgressWatch, *, patience_s: float = 2.0) -> None:
    """Has `watch` report who is dead after the traceback of an uncaught exception; until it stops.

    A killed rank closes its connections, and gloo raises "Connection closed by peer" in the others'
    collective: true, but without a name. The death may show a little later than the error, so after
    a RuntimeError, which those of torch.distributed are, the question is put for `patience_s`.
    """
    previous = sys.excepthook
    active = threading.Event()
    active.set()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not active.is_set():
            previous(kind, error, trace)
            return
        with watch.hold_exit(), _sigterm_later():
            previous(kind, error, trace)
            until_s = time.monotonic() + (patience_s if isinstance(error, RuntimeError) else 0.0)
            missing = watch.find_missing()
            while missing is None and time.monotonic() < until_s:
                time.sleep(_LOOK_AGAIN_S)
                missing = watch.find_missing()
            if missing is not None:
                watch.report(missing)

    def remove() -> None:
        # A hook chained behind this one keeps a reference to it: it must pass on from now on.
        active.clear()
        if sys.excepthook is hook:
            sys.excepthook = previous

    sys.excepthook = hook
    watch.call_at_stop(remove)
