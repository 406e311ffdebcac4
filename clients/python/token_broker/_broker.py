"""How the broker is reached: its schema, its address, and the files that say who calls."""

from __future__ import annotations

import ipaddress
import os
import ssl
from importlib.resources import files
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# In a pool of its own: a program may have stubs of the same schema, even of another version.
_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(files(__package__).joinpath("schema.binpb").read_bytes()).file:
    _pool.Add(_file)

_OPTIONS = [
    ("grpc.service_config", files(__package__).joinpath("service_config.json").read_text()),
    ("grpc.service_config_disable_resolution", 1),  # what DNS might say
    # A dead connection is noticed within a minute, also while nothing is sent.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it some versions of grpcio wait 60 s, whatever the line above says
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    # Nothing is left over from earlier attempts, such as their back-off: the source has its own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.primary_user_agent", "token-broker-python"),
]


def message(name: str) -> Any:
    """The class of a message of the schema."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"tokenbroker.v1.{name}"))


def method(channel: Any, name: str) -> Any:
    """A method of the broker, to be called with its request."""
    kind = channel.unary_stream if name == "WatchToken" else channel.unary_unary
    encode, decode = message(f"{name}Request").SerializeToString, message(f"{name}Response").FromString
    return kind(f"/tokenbroker.v1.TokenBroker/{name}", request_serializer=encode, response_deserializer=decode)


class Broker:
    """Where the broker is, and who calls. What is not given is read from the environment."""

    def __init__(self, **given: str | None) -> None:
        def setting(name: str, standard: str = "") -> str:
            value = given[name]
            return os.environ.get(f"BROKER_{name.upper()}", standard) if value is None else value

        self.address = setting("address", "127.0.0.1:7443")
        self.ca, self.token_file = setting("ca"), setting("token_file")
        self.certificate, self.private_key = setting("certificate"), setting("private_key")
        self.plain = not (self.ca or self.certificate or self.private_key) and _is_local(self.address)
        if bool(self.certificate) != bool(self.private_key):
            raise ValueError("certificate and private_key go together: set both, or neither")
        self._good: list[bytes | None] = []  # what the files of TLS held when they last were good

    def connect(self) -> Any:
        """Opens a channel, with the files as they are now, or as they last were good. Raises OSError and ValueError."""
        target = self.address if self.address.startswith("unix:") else f"dns:///{self.address}"
        if self.plain:
            return grpc.insecure_channel(target, _OPTIONS)
        try:
            self._good = self._pems()
        except (OSError, ValueError):
            if not self._good:
                raise
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(*self._good), _OPTIONS)

    def _pems(self) -> list[bytes | None]:
        """Reads the files of TLS, and has OpenSSL check them."""
        paths = self.ca, self.private_key, self.certificate
        pems, context = [_read(p) for p in paths], ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            checking = f"CA file {self.ca}"
            if self.ca:
                context.load_verify_locations(self.ca)
            checking = f"certificate {self.certificate} and key {self.private_key}"
            if self.certificate:
                context.load_cert_chain(self.certificate, self.private_key, password="")
        except ssl.SSLError as e:
            raise ValueError(f"{checking}: {e}") from None
        for path, pem in zip(paths, pems):
            if pem != _read(path) or pem and pem.count(b"-----BEGIN ") != pem.count(b"-----END "):
                raise ValueError(f"{path} is being written")
        return pems

    def metadata(self) -> list[tuple[str, str]]:
        """What goes with a call: the bearer token, as its file has it now. Raises OSError and ValueError."""
        if not self.token_file:
            return []
        token = (_read(self.token_file) or b"").decode("latin-1").removesuffix("\n").removesuffix("\r")
        if not token or any(not "!" <= c <= "~" for c in token):
            raise ValueError(f"{self.token_file} does not hold one token and nothing else")
        return [("authorization", f"Bearer {token}")]


def _read(path: str) -> bytes | None:
    if not path:
        return None
    with open(path, "rb") as f:
        return f.read()


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        ip = ipaddress.ip_address(host)
        return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
    except ValueError:
        return host.lower() == "localhost"
