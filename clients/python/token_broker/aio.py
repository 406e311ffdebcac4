"""The token source for asyncio. A thread follows the token, so nothing that an event loop does can hold it up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property

from token_broker._following import Token
from token_broker._source import Source

__all__ = ["TokenSource"]


class TokenSource(Source):
    __doc__ = Source.__doc__

    @cached_property
    def _one(self) -> asyncio.Lock:
        return asyncio.Lock()

    async def token(self, timeout: float | None = 40) -> Token:
        """Returns a token that is good now, from memory if there is one.

        Else it waits for the broker, timeout seconds at most. Raises TokenBrokerError if the broker refuses, cannot get one,
        or cannot be reached.
        """
        if token := self._at_hand():
            return token
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def hear() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        async def wait(news: Callable[[], bool]) -> None:
            while not news():
                await changed.wait()
                changed.clear()

        with self._changed:
            self._listeners.add(hear)
        try:
            await asyncio.wait_for(wait(self._begin(timeout)), timeout)
        except asyncio.TimeoutError:
            pass
        finally:
            with self._changed:
                self._listeners.discard(hear)
        return self._answer(timeout)

    async def rejected(self, token: Token) -> Token | None:
        """Reports that a resource server has answered 401 to a token, and returns its successor.

        None if there is none: the token is too young to be reported, or one has been reported a moment ago. Then the 401
        stands. Raises TokenBrokerError if the broker has no other.
        """
        async with self._one:  # thread is enough for all who report
            return await asyncio.to_thread(self._successor, token)

    async def close(self) -> None:
        """Ends the stream and its thread. Whoever waits gets an error."""
        await asyncio.to_thread(self._end)

    async def __aenter__(self) -> TokenSource:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
