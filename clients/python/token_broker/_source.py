"""The token source: what all sources share, and the one for threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from token_broker._broker import Broker, message, method
from token_broker._following import Following, Token
from token_broker.errors import TokenBrokerError, of


class Source:
    """Follows a token in a thread. It begins when it is first asked, and ends when it is closed.

    profile, scopes, min_lifetime (in seconds), job and dedicated say which token; the rest where the broker is and who calls,
    and is read from the environment (BROKER_ADDRESS and so on) where it is None. Raises ValueError if they contradict each
    other. After a fork the child needs a source of its own, unless the parent has not used its source before.
    """

    def __init__(self, profile: str, *, scopes: Sequence[str] = (), min_lifetime: float = 0, job: str = "", dedicated: bool = False,
                 address: str | None = None, ca: str | None = None, certificate: str | None = None, private_key: str | None = None,
                 token_file: str | None = None) -> None:  # fmt: skip
        self._broker = Broker(address=address, ca=ca, certificate=certificate, private_key=private_key, token_file=token_file)
        self._wanted: dict[str, Any] = {"profile": profile, "scopes": scopes}
        if min_lifetime:
            self._wanted["min_lifetime"] = {"seconds": int(min_lifetime), "nanos": int(min_lifetime % 1 * 1e9)}
        if job or dedicated:
            self._wanted["job"] = {"id": job, "dedicated": dedicated}
        self._state = Following(profile)
        self._changed = threading.Condition()  # guards what is below, and changes of the state
        self._thread: threading.Thread | None = None  # begins when it is first asked
        self._channels: set[Any] = set()  # with calls under way
        self._pid = 0  # of the process that uses it
        self._closed = False
        self._report = threading.Lock()  # held by whoever reports a token
        self._listeners: set[Callable[[], None]] = set()

    def _check(self) -> None:
        if self._closed:
            raise TokenBrokerError(grpc.StatusCode.CANCELLED, "the token source is closed")
        if self._pid and self._pid != os.getpid():
            raise RuntimeError("this token source was used before the process was forked: make one in each process")

    def _at_hand(self) -> Token | None:
        """The token, if it is good and somebody follows it."""
        self._check()
        return self._state.good() if self._thread and not self._state.parked else None

    def _begin(self, timeout: float | None) -> Callable[[], bool]:
        """Makes sure that somebody follows the token, if that is allowed by now. Returns what says that there is news."""
        with self._changed:
            state = self._state
            if not self._thread and not self._closed:
                self._pid = os.getpid()
                self._thread = threading.Thread(target=self._follow, name=f"token of {state.name}", daemon=True)
                self._thread.start()
            if state.parked and time.monotonic() >= state.again_at:
                state.parked = False
                self._changed.notify_all()
            seen = -1 if state.stands(timeout) else state.failures
            return lambda: bool(state.good()) or state.failures != seen or self._closed

    def _answer(self, timeout: float | None) -> Token:
        self._check()
        if token := self._state.good():
            return token
        raise self._state.error(timeout)

    def _successor(self, token: Token) -> Token | None:
        self._check()
        with self._report:
            current = self._state.good()
            if current and current.id != token.id:
                return current
            if not self._state.reportable(token):
                return None
            try:
                with self._connect() as channel:
                    response = self._call(channel, "RefreshToken", rejected_token_id=token.id)
            except Exception as e:
                error = of(e)
                self._state.unreported(error)
                if error.reason == "REFRESH_TOO_SOON":
                    return None
                raise error from None
            with self._changed:
                successor = self._state.replaced(token, response.token)
                self._tell()
            return successor

    def _end(self) -> None:
        with self._changed:
            self._closed = True
            self._tell()
            thread = self._thread
        for channel in list(self._channels):
            channel.close()
        if thread:
            thread.join()

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    @contextmanager
    def _connect(self) -> Iterator[Any]:
        """Opens a channel, which _end closes: each looks at what the other has done before."""
        with self._broker.connect() as channel:
            self._channels.add(channel)
            try:
                self._check()
                yield channel
            finally:
                self._channels.discard(channel)

    def _call(self, channel: Any, name: str, **more: str) -> Any:
        return method(channel, name)(message(f"{name}Request")(**self._wanted, **more), metadata=self._broker.metadata())

    def _follow(self) -> None:
        wait = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, wait)
                if self._state.parked:
                    self._changed.wait_for(lambda: self._closed or not self._state.parked, self._state.refresh_due())
                if self._closed:
                    return
                self._state.begin()
            try:
                wait = self._attempt()
            except Exception as e:
                with self._changed:
                    if self._closed:
                        return
                    wait = self._state.failed(of(e))
                    self._tell()

    def _attempt(self) -> float:
        """Takes tokens for as long as the stream brings them. Returns when to go on, if the broker knows no streams."""
        with self._connect() as channel:
            try:
                for response in self._call(channel, "WatchToken"):
                    with self._changed:
                        self._state.watched(response.token)
                        self._tell()
                raise TokenBrokerError(grpc.StatusCode.UNAVAILABLE, "the broker has ended the stream")
            except grpc.RpcError as e:
                if of(e).code is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
            response = self._call(channel, "IssueToken")
            with self._changed:
                wait = self._state.issued(response.token)
                self._tell()
            return wait


class TokenSource(Source):
    __doc__ = Source.__doc__

    def token(self, timeout: float | None = 40) -> Token:
        """Returns a token that is good now, from memory if there is one.

        Else it waits for the broker, timeout seconds at most. Raises TokenBrokerError if the broker refuses, cannot get one,
        or cannot be reached.
        """
        if token := self._at_hand():
            return token
        news = self._begin(timeout)
        with self._changed:
            self._changed.wait_for(news, timeout)
        return self._answer(timeout)

    def rejected(self, token: Token) -> Token | None:
        """Reports that a resource server has answered 401 to a token, and returns its successor.

        None if there is none: the token is too young to be reported, or one has been reported a moment ago. Then the 401
        stands. Raises TokenBrokerError if the broker has no other.
        """
        return self._successor(token)

    def close(self) -> None:
        """Ends the stream and its thread. Whoever waits gets an error."""
        self._end()

    def __enter__(self) -> TokenSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
