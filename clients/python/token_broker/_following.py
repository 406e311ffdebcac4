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
# In seconds: how old a token must be to be reported, and how long a report that failed holds off the next;
_YOUNG = 10.0
# and how long a stream must have stood for its end to be no sign of trouble.
_STEADY = 10.0


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
        self.again_at = 0.0  # when the next attempt is due, by time.monotonic
        self.parked = False  # from then on it waits for somebody who asks
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

    def stands(self, timeout: float | None) -> bool:
        """Whether the last error is the answer to who asks now: the next attempt is further away than his time."""
        left = self.again_at - time.monotonic()
        return bool(self._error) and left > 0 and (self.parked or timeout is not None and left > timeout)

    def refresh_due(self) -> float | None:
        """In how many seconds the successor of the token at hand is due; None if it has been, or there is none."""
        left = self._at_hand[0].refresh_time.timestamp() - time.time() if self._at_hand else 0
        return left if left > 0 else None

    def begin(self) -> None:
        """Begins an attempt."""
        self._since = None
        self.parked = False

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

    def failed(self, error: TokenBrokerError) -> float:
        """Says how long to wait after an attempt."""
        # A stream that was shorter may have been cut by something that cuts the next one, too.
        wait = self._pause(self._since is not None and time.monotonic() - self._since >= _STEADY, error.retry_after or 0)
        self.parked = error.code in _FINAL
        self.again_at = time.monotonic() + wait
        if error.reason == "JOB_ENDED":
            self._at_hand = None  # it was revoked
        if wait or self.parked:
            self._error = error
            self.failures += 1
        log.info("following %s: %s; again in %.1f s%s", self.name, error, wait, ", if somebody asks" if self.parked else "")
        return wait

    def issued(self, message: Any) -> float:
        """Takes the token of a broker that cannot be watched, and says how long to wait."""
        before = self._at_hand[0].id if self._at_hand else ""
        token = self.take(message)
        return self._pause(token.id != before, max(1.0, token.refresh_time.timestamp() - time.time()))

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
        self._quiet_until = time.monotonic() + max(error.retry_after or 0, _YOUNG)
