"""Coroutines from code that is not asynchronous, also where an event loop runs already."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine, Sequence
from typing import Any


class _Background:
    """An event loop in a thread of its own.

    The loop stays the same for the whole process: clients that reward functions keep between calls
    are bound to the loop they were first used in.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="reward functions", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)

    @property
    def runs(self) -> bool:
        # A forked process has the object, but not the thread.
        return self._thread.is_alive()

    def close(self) -> None:
        if self.runs:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


_background: _Background | None = None


def run_together(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """What the coroutines return, in their order; they run concurrently in one event loop.

    The first error ends them all and is raised.
    """
    global _background
    if _background is None or not _background.runs:
        _background = _Background()
    future = asyncio.run_coroutine_threadsafe(_gather(coroutines), _background.loop)
    try:
        return future.result()
    except BaseException:
        # Also when the user interrupts the wait.
        future.cancel()
        raise


async def _gather(coroutines: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
