"""What a source knows, and what it does next."""

from __future__ import annotations

import copy
import logging
import random
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import grpc

from token_broker.errors import TokenBrokerError

log = logging.getLogger("token_broker")

# After these somebody has to act before trying again helps.
_FINAL = {getattr(grpc.StatusCode, c) for c in ("INVALID_ARGUMENT", "PERMISSION_DENIED", "UNAUTHENTICATED", "FAILED_PRECONDITION")}
# How long a token must be there before it is reported, in seconds.
_YOUNG = 10.0


@dataclass(frozen=True)
class Token:
    """An access token. Printed, it does not show itself; its id may be logged."""

    access_token: str = field(repr=False)
    token_type: str
    id: str
    scopes: tuple[str, ...]
    issue_time: datetime
    refresh_time: datetime
    expire_time: datetime

    @property
    def authorization(self) -> str:
        """The value of the header Authorization."""
        return f"{self.token_type} {self.access_token}"


class Following:
    """The state of a source. Its user makes sure that it changes from one place at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = 0  # attempts that whoever waits is told of
        self.again_at = 0.0  # when trying again is allowed, by time.monotonic
        self._at_hand: tuple[Token, float] | None = None  # and until when it is good
        self._error: TokenBrokerError | None = None  # since the token came
        self._streak = 0  # attempts that brought nothing, one after the other
        self._since: float | None = None  # the stream has brought tokens
        self._replaced = ""  # id of the token that was reported
        self._quiet_until = 0.0  # as to reports

    def good(self) -> Token | None:
        """The token, if it is good."""
        at_hand = self._at_hand
        return at_hand[0] if at_hand and time.time() < at_hand[1] else None

    def error(self, timeout: float | None) -> TokenBrokerError:
        """Why there is none, after that time. A new one for each who asks: raising changes it."""
        if self._error:
            return copy.copy(self._error)
        return TokenBrokerError(grpc.StatusCode.DEADLINE_EXCEEDED, f"the broker has sent no token within {timeout} s")

    def begin(self) -> None:
        """Begins an attempt."""
        self._since = None

    def watched(self, message: Any) -> None:
        """Takes what a stream has brought."""
        self._since = self._since or time.monotonic()
        self.take(message)

    def take(self, message: Any) -> Token:
        """Makes a token that the broker has sent the one to use, unless it is one that was reported."""
        times = (t.ToDatetime(timezone.utc) for t in (message.issue_time, message.refresh_time, message.expire_time))
        token = Token(message.access_token, message.token_type, message.id, tuple(message.scopes), *times)
        if token.id != self._replaced:
            end = token.expire_time.timestamp()
            self._at_hand = token, end - min(10.0, (end - token.issue_time.timestamp()) / 10)
            self._error = None
        return token

    def failed(self, error: TokenBrokerError) -> float | None:
        """Says how long to wait after an attempt; None: until somebody asks."""
        # A stream that was shorter may have been cut by something that cuts the next one, too.
        wait = self._pause(self._since is not None and time.monotonic() - self._since >= 1, error.retry_after or 0)
        final = error.code in _FINAL
        self.again_at = time.monotonic() + wait
        if wait or final:
            self._error = error
            self.failures += 1
        log.info("following %s: %s; %s", self.name, error, "not again unasked" if final else f"again in {wait:.1f} s")
        return None if final else wait

    def issued(self, message: Any) -> float:
        """Takes the token of a broker that cannot be watched, and says how long to wait."""
        before = self._at_hand[0].id if self._at_hand else ""
        token = self.take(message)
        return self._pause(token.id != before, token.refresh_time.timestamp() - time.time())

    def _pause(self, well: bool, least: float) -> float:
        self._streak = 0 if well else min(self._streak + 1, 10)
        return max(least, 0 if well else min(30, 0.05 * 2**self._streak) * random.uniform(0.5, 1))

    def reportable(self, token: Token) -> bool:
        return time.time() - token.issue_time.timestamp() >= _YOUNG and time.monotonic() >= self._quiet_until

    def replaced(self, token: Token, message: Any) -> Token:
        """Takes the successor of a token that was reported."""
        self._replaced = token.id
        return self.take(message)

    def unreported(self, error: TokenBrokerError) -> None:
        """Keeps quiet after a report that failed."""
        self._quiet_until = time.monotonic() + (error.retry_after or _YOUNG)
