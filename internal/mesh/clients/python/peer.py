"""A caller of the broker on grpcio: prints what it saw as a line of JSON.

PYTHONPATH has the directories of the schema and of what it imports.
"""

import json
import os
import time

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

pb, services = grpc.protos_and_services("tokenbroker/v1/token_broker.proto")


def read(name):
    with open(os.environ[name], "rb") as f:
        return f.read()


def failure(profile):
    """What a call that must fail says, details and all."""
    try:
        broker.IssueToken(pb.IssueTokenRequest(profile=profile), timeout=30)
    except grpc.RpcError as e:
        seen = {"code": e.code().name}
        for detail in rpc_status.from_call(e).details:
            for kind in (error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()):
                if not detail.Unpack(kind):
                    continue
                if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                    seen |= {"domain": kind.domain, "reason": kind.reason, "request_id": kind.metadata["request_id"]}
                else:
                    seen["retry_seconds"] = kind.retry_delay.ToTimedelta().total_seconds()
        return seen
    raise SystemExit(f"a token for {profile} was issued")


channel = grpc.secure_channel(
    os.environ["BROKER_ADDRESS"],
    grpc.ssl_channel_credentials(read("BROKER_CA"), read("BROKER_PRIVATE_KEY"), read("BROKER_CERTIFICATE")),
    # Common, and as eager as the broker allows: a ping every 10 s, without calls, too.
    [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0)],
)
with channel:
    broker = services.TokenBrokerStub(channel)
    me = broker.WhoAmI(pb.WhoAmIRequest(), timeout=30)
    issued = broker.IssueToken(pb.IssueTokenRequest(profile="invoices"), timeout=30)
    seen = {
        "caller": me.caller,
        "proof": pb.IdentityProof.Name(me.proof),
        "token_id": issued.token.id,
        "token_type": issued.token.token_type,
        "denied": failure("secret"),
        "throttled": failure("throttled"),
    }
    time.sleep(float(os.environ["IDLE_SECONDS"]))
    seen["token_id_after_idling"] = broker.IssueToken(pb.IssueTokenRequest(profile="invoices"), timeout=30).token.id
print(json.dumps(seen))
