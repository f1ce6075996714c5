"""One computation for all who ask for the same thing at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Flight(Generic[Result]):
    """A computation under way and how many wait for it. ``spent``: seconds by stage, for whoever computes to fill."""

    def __init__(self, claim: Callable[[Flight[Result]], bool]) -> None:
        self.future: Future[Result] = Future()
        self.waiters = 0
        self.spent: dict[str, float] = {}
        self._claim = claim

    def claim(self) -> bool:
        """Whether anybody still waits. If not, the flight is over: who computes stops here."""
        return self._claim(self)


class Flights(Generic[Key, Result]):
    """Computations by key. Waiters may sit on any event loop, computations run on any thread."""

    def __init__(self) -> None:
        self._flying: dict[Key, Flight[Result]] = {}
        self._lock = threading.Lock()

    def under_way(self, key: Key) -> bool:
        """Whether somebody waits for that key."""
        with self._lock:
            return key in self._flying

    async def join(self, key: Key, start: Callable[[Flight[Result]], object]) -> tuple[Flight[Result], Result, bool]:
        """Await the result for ``key``; the first to ask has it started by ``start``.

        ``start`` hands the flight to a thread, which sets the result or exception of its future; it must have put the
        result where later askers look before it does. A waiter that is cancelled leaves the others waiting.
        Returns the flight, the result and whether this call joined a flight of another.
        """
        with self._lock:
            flight = self._flying.get(key)
            joined = flight is not None
            if flight is None:
                flight = self._flying[key] = Flight(lambda own: self._claim(key, own))
                flight.future.add_done_callback(lambda _, own=flight: self._land(key, own))  # type: ignore[misc]
            flight.waiters += 1
        try:
            if not joined:
                try:
                    start(flight)
                except BaseException as error:
                    flight.future.set_exception(error)
            return flight, await asyncio.shield(asyncio.wrap_future(flight.future)), joined
        finally:
            with self._lock:
                flight.waiters -= 1

    def _claim(self, key: Key, flight: Flight[Result]) -> bool:
        with self._lock:
            if flight.waiters:
                return True
            if self._flying.get(key) is flight:
                del self._flying[key]
        flight.future.cancel()
        return False

    def _land(self, key: Key, flight: Flight[Result]) -> None:
        with self._lock:
            if self._flying.get(key) is flight:
                del self._flying[key]
