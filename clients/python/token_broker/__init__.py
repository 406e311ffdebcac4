"""OAuth 2.0 access tokens from Token Broker, always fresh.

A TokenSource follows one token over one stream: the broker sends each successor before its predecessor ends, and asking
for the token is a look into memory. It works on while the broker is away and the token is good. TokenSource is for
threads, aio.TokenSource for asyncio, and token_broker.httpx.TokenAuth puts the token of either into HTTP requests.
"""

from token_broker import aio
from token_broker._following import Token
from token_broker._source import TokenSource
from token_broker.errors import TokenBrokerError

__all__ = ["Token", "TokenBrokerError", "TokenSource", "aio"]
