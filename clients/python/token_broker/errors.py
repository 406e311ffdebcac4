"""What the broker says when there is no token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DOMAIN = "tokenbroker.v1"


class TokenBrokerError(Exception):
    """The broker's refusal, or the way to the broker that failed.

    code is the canonical code, and reason the broker's own, by which programs decide: docs/errors.md lists them. It is empty
    if the error is not the broker's. metadata has request_id, profile and the like. retry_after is in how many seconds
    trying again helps, None if nothing says that it does. The text is for people, and shows no token.
    """

    def __init__(self, code: grpc.StatusCode, message: str, reason: str = "",
                 metadata: Mapping[str, str] | None = None, retry_after: float | None = None) -> None:  # fmt: skip
        super().__init__(code, message, reason, metadata, retry_after)  # all of them, so that it can be copied and pickled
        self.code = code
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} ({self.reason or self.code.name})"


def of(error: Any) -> TokenBrokerError:
    """Turns into ours what a call has raised: grpc.RpcError, of either kind, or what kept this side from calling."""
    if isinstance(error, TokenBrokerError):
        return error
    if not isinstance(error, grpc.RpcError):
        return TokenBrokerError(grpc.StatusCode.UNAVAILABLE, f"calling the broker: {error}")
    call: Any = error
    reason, metadata, retry_after = "", {}, None
    for key, value in call.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        try:
            for detail in status_pb2.Status.FromString(value).details:
                info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
                if detail.Unpack(info) and info.domain == _DOMAIN:
                    reason, metadata = info.reason, dict(info.metadata)
                elif detail.Unpack(retry):
                    retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        except DecodeError:
            pass  # something on the way has made them up; the code is all there is
    return TokenBrokerError(call.code(), call.details() or "", reason, metadata, retry_after)
