"""The token in HTTP requests, for users of httpx: Client(auth=TokenAuth(source)), AsyncClient with a source of aio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

import httpx

from token_broker import aio
from token_broker._following import Token
from token_broker._source import TokenSource
from token_broker.errors import TokenBrokerError


class TokenAuth(httpx.Auth):
    """Adds the header Authorization. A request that gets 401 is sent once more, with the token's successor, if there is one
    and the body can be sent again; then the answer is the user's, whatever it is. A source of aio is for AsyncClient."""

    def __init__(self, source: TokenSource | aio.TokenSource) -> None:
        self._source = source

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if not isinstance(self._source, TokenSource):
            raise TypeError("httpx.Client needs a token_broker.TokenSource, not one of token_broker.aio")
        token = self._source.token()
        if _refused(request, (yield _signed(request, token))):
            try:
                successor = self._source.rejected(token)
            except TokenBrokerError:
                return
            if successor and _repeatable(request):
                yield _signed(request, successor)

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        if not isinstance(self._source, aio.TokenSource):
            raise TypeError("httpx.AsyncClient needs a token_broker.aio.TokenSource")
        token = await self._source.token()
        if _refused(request, (yield _signed(request, token))):
            try:
                successor = await self._source.rejected(token)
            except TokenBrokerError:
                return
            if successor and _repeatable(request):
                yield _signed(request, successor)


def _signed(request: httpx.Request, token: Token) -> httpx.Request:
    request.headers["Authorization"] = token.authorization
    return request


def _refused(request: httpx.Request, response: httpx.Response) -> bool:
    """Whether it is the token that was refused: httpx does not show it to other servers that it is redirected to."""
    return response.status_code == 401 and response.request.headers.get("Authorization") == request.headers["Authorization"]


def _repeatable(request: httpx.Request) -> bool:
    try:
        request.content  # noqa: B018
    except httpx.RequestNotRead:
        return False  # it was streamed
    return True
