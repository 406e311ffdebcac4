"""The source on a broker that does what a real one seldom does."""

import socket
import tempfile
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import grpc
import httpx
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

import token_broker
from stage import until
from token_broker import _broker, _following
from token_broker._broker import message
from token_broker.httpx import TokenAuth

PREFIX = "/tokenbroker.v1.TokenBroker/"


def made(name, life=3600.0, age=60.0, refresh=None):
    """A token that lives for some seconds more."""
    now = time.time()
    token = message("Token")(access_token=f"secret of {name}", token_type="Bearer", id=name)
    for field, at in (("issue_time", now - age), ("expire_time", now + life), ("refresh_time", now + (life if refresh is None else refresh))):
        getattr(token, field).FromNanoseconds(int(at * 1e9))
    return token


def refuse(context, code, reason="", retry=None):
    status = status_pb2.Status(code=code.value[0], message="refused")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="tokenbroker.v1"))
    if retry is not None:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=int(retry), nanos=int(retry % 1 * 1e9))))
    context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
    context.abort(code, "refused")


class FakeBroker(grpc.GenericRpcHandler):
    """Answers by functions named after the methods, and notes the calls."""

    def __init__(self, **methods):
        self.methods, self.calls, self.left = methods, [], threading.Event()

    def service(self, details):
        name = details.method.removeprefix(PREFIX)

        def answer(request, context):
            self.calls.append((name, time.monotonic(), request, dict(context.invocation_metadata())))
            return self.methods[name](len(self.named(name)), context)

        kind = grpc.unary_stream_rpc_method_handler if name == "WatchToken" else grpc.unary_unary_rpc_method_handler
        decode, encode = message(f"{name}Request").FromString, message(f"{name}Response").SerializeToString
        return kind(answer, decode, encode) if name in self.methods else None

    def named(self, name):
        return [c for c in self.calls if c[0] == name]

    def stay(self, context):
        """Keeps a stream open until its caller leaves, or the test ends."""
        context.add_callback(self.left.set)
        self.left.wait(60)


class Relay:
    """Passes bytes to a server, until it is frozen: then it is like a machine that has lost its power."""

    def __init__(self, address):
        self.address, self.frozen, self.sockets = address, threading.Event(), []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while not self.frozen.is_set():
            caller, _ = self.listener.accept()
            server = socket.create_connection(self.address)
            self.sockets += [caller, server]
            for ends in ((caller, server), (server, caller)):
                threading.Thread(target=self.copy, args=ends, daemon=True).start()

    def copy(self, source, sink):
        try:
            while data := source.recv(1 << 16):
                if not self.frozen.is_set():
                    sink.sendall(data)
        except OSError:
            pass  # closed

    def close(self):
        for s in (self.listener, *self.sockets):
            s.close()


def _reason(source):
    """Why there is no token, if there is none."""
    try:
        source.token()
    except token_broker.TokenBrokerError as e:
        return e.reason
    return None


class TestProtocol(unittest.TestCase):
    def broker(self, **methods):
        broker = FakeBroker(**methods)
        server = grpc.server(ThreadPoolExecutor(32), handlers=[broker])
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        self.addCleanup(server.stop, None)
        self.addCleanup(broker.left.set)
        return broker

    def source(self, **settings):
        settings = {"address": self.address, "ca": "", "certificate": "", "private_key": "", **settings}
        source = token_broker.TokenSource("invoices", **settings)
        self.addCleanup(source.close)
        return source

    def streams(self, *tokens):
        """Each stream brings the next token, and stays."""

        def watch(n, context):
            yield message("WatchTokenResponse")(token=tokens[min(n, len(tokens)) - 1])
            broker.stay(context)

        broker = self.broker(WatchToken=watch)
        return broker

    def test_a_report_that_fails_is_an_error_once(self):
        broker = self.streams(made("a"))
        broker.methods["RefreshToken"] = lambda n, context: refuse(context, grpc.StatusCode.PERMISSION_DENIED, "CALLER_DENIED")
        source = self.source()
        with self.assertRaisesRegex(token_broker.TokenBrokerError, "CALLER_DENIED"):
            source.rejected(source.token())
        self.assertIsNone(source.rejected(source.token()))
        self.assertEqual(len(broker.named("RefreshToken")), 1)

    def test_the_request_says_what_is_wanted(self):
        broker = self.streams(made("a"))
        self.source(scopes=["x", "y"], min_lifetime=90.5, job="nightly", dedicated=True).token()
        request = broker.calls[0][2]
        self.assertEqual((request.profile, list(request.scopes), request.min_lifetime.ToMilliseconds()), ("invoices", ["x", "y"], 90_500))
        self.assertEqual((request.job.id, request.job.dedicated), ("nightly", True))

    def test_a_bearer_token_is_read_for_each_call(self):
        broker = self.streams(made("a"))
        broker.methods["RefreshToken"] = lambda n, context: message("RefreshTokenResponse")(token=made("b"))
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("first\n")
            file.flush()
            source = self.source(token_file=file.name)
            token = source.token()
            file.seek(0)
            file.write("other\n")
            file.flush()
            source.rejected(token)
        self.assertEqual([c[3]["authorization"] for c in broker.calls], ["Bearer first", "Bearer other"])

    def test_a_broker_that_cannot_be_watched_is_asked_at_refresh_time(self):
        names = iter("abcdefgh")
        broker = self.broker(IssueToken=lambda n, context: message("IssueTokenResponse")(token=made(next(names), refresh=0.5)))
        source = self.source()
        self.assertEqual(source.token().id, "a")
        until("a successor", lambda: source.token().id == "b")
        first, second = (c[1] for c in broker.named("IssueToken")[:2])
        self.assertGreater(second - first, 0.45)

    def test_the_margin_is_a_tenth_of_a_short_life_and_ten_seconds_of_a_long_one(self):
        for life, margin in ((20.0, 2.0), (3600.0, 10.0)):
            with self.subTest(life):
                self.streams(made("a", life=life, age=0))
                source, now = self.source(), time.time()
                source.token()
                with mock.patch("time.time", lambda: now + life - margin - 0.5):
                    self.assertEqual(source.token(timeout=0).id, "a")
                with mock.patch("time.time", lambda: now + life - margin + 0.5), self.assertRaises(token_broker.TokenBrokerError) as caught:
                    source.token(timeout=0)
                self.assertIs(caught.exception.code, grpc.StatusCode.DEADLINE_EXCEEDED)

    def test_an_attempt_waits_as_long_as_retry_info_says(self):
        def watch(n, context):
            if n == 1:
                refuse(context, grpc.StatusCode.UNAVAILABLE, "ENDPOINT_UNAVAILABLE", 0.7)
            yield message("WatchTokenResponse")(token=made("a"))
            broker.stay(context)

        broker = self.broker(WatchToken=watch)
        source = self.source()
        with self.assertRaises(token_broker.TokenBrokerError) as caught:
            source.token()
        self.assertAlmostEqual(caught.exception.retry_after, 0.7, places=3)
        self.assertEqual(source.token().id, "a")
        self.assertGreater(broker.calls[1][1] - broker.calls[0][1], 0.69)

    def test_a_report_that_came_too_soon_is_not_repeated(self):
        broker = self.streams(made("a"))
        broker.methods["RefreshToken"] = lambda n, context: refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "REFRESH_TOO_SOON", 20)
        source = self.source()
        self.assertEqual([source.rejected(source.token()) for _ in range(5)], [None] * 5)
        self.assertEqual(len(broker.named("RefreshToken")), 1)

    def test_closing_ends_what_is_under_way(self):
        entered, leave = threading.Event(), threading.Event()
        self.addCleanup(leave.set)
        broker = self.streams(made("a"))
        broker.methods["RefreshToken"] = lambda n, context: entered.set() or leave.wait(60) and None
        source = self.source()
        token = source.token()
        with ThreadPoolExecutor(1) as pool:
            report = pool.submit(source.rejected, token)
            entered.wait(30)
            source.close()
            with self.assertRaises(token_broker.TokenBrokerError) as caught:
                report.result(10)
        self.assertIs(caught.exception.code, grpc.StatusCode.CANCELLED)

    def test_unary_calls_are_tried_again_by_grpc_as_the_service_config_says(self):
        broker = self.streams(made("a"))

        def refresh(n, context):
            if n < 3:
                refuse(context, grpc.StatusCode.UNAVAILABLE)
            return message("RefreshTokenResponse")(token=made("b"))

        broker.methods["RefreshToken"] = refresh
        source = self.source()
        self.assertEqual(source.rejected(source.token()).id, "b")
        self.assertEqual(len(broker.named("RefreshToken")), 3)

    def test_a_stream_does_not_bring_back_a_token_that_was_reported(self):
        again = threading.Event()

        def watch(n, context):
            if n > 1:
                broker.stay(context)
            yield message("WatchTokenResponse")(token=made("a"))
            again.wait(30)
            yield message("WatchTokenResponse")(token=made("a"))
            refuse(context, grpc.StatusCode.PERMISSION_DENIED)

        broker = self.broker(WatchToken=watch, RefreshToken=lambda n, context: message("RefreshTokenResponse")(token=made("b")))
        source = self.source()
        source.rejected(source.token())
        again.set()
        until("the next stream, after all that the first one brought", lambda: source.token() and len(broker.named("WatchToken")) == 2)
        self.assertEqual(source.token().id, "b")

    def test_streams_that_end_at_once_are_not_opened_in_a_loop(self):
        broker = self.broker(WatchToken=lambda n, context: iter([message("WatchTokenResponse")(token=made("a"))]))
        source, end = self.source(), time.monotonic() + 1
        while time.monotonic() < end:
            source.token()
            time.sleep(0.01)
        self.assertIn(len(broker.calls), range(2, 7))  # after 0.1 + 0.2 + 0.4 s, and half of that at the least

    def standing(self, seconds):
        """Streams that bring a token, and end after some seconds. Notes when."""
        ends = []

        def watch(n, context):
            yield message("WatchTokenResponse")(token=made("a"))
            time.sleep(seconds)
            ends.append(time.monotonic())

        return self.broker(WatchToken=watch), ends

    def test_a_stream_that_stood_for_a_second_is_not_opened_again_at_once(self):
        broker, ends = self.standing(1.1)
        self.source().token()
        until("a third stream", lambda: len(broker.calls) == 3)
        for end, call, wait in zip(ends, broker.calls[1:], (0.05, 0.1)):
            self.assertGreater(call[1] - end, wait - 0.01)

    def test_a_stream_that_stood_for_long_is_opened_again_at_once(self):
        broker, _ = self.standing(1)
        with mock.patch.object(_following, "_STEADY", 0.05):
            source = self.source()
            source.token()
            until("a third stream", lambda: len(broker.calls) == 3)
            self.assertEqual(source._state.failures, 0)  # an attempt that waits is one

    def test_after_a_final_end_it_tries_again_at_refresh_time(self):
        def watch(n, context):
            yield message("WatchTokenResponse")(token=made("ab"[n - 1], refresh=1.0 if n == 1 else None))
            if n == 1:
                refuse(context, grpc.StatusCode.PERMISSION_DENIED, "CALLER_DENIED")
            broker.stay(context)

        broker = self.broker(WatchToken=watch)
        source = self.source()
        source.token()
        until("a second stream, though nobody asks", lambda: len(broker.calls) == 2)
        self.assertGreater(broker.calls[1][1] - broker.calls[0][1], 0.9)
        until("its token", lambda: source.token().id == "b")

    def test_after_a_final_end_who_asks_once_the_wait_is_over_waits_for_the_attempt(self):
        def watch(n, context):
            if n == 1:
                refuse(context, grpc.StatusCode.PERMISSION_DENIED, "CALLER_DENIED", 0.5)
            time.sleep(0.3)
            yield message("WatchTokenResponse")(token=made("a"))
            broker.stay(context)

        broker = self.broker(WatchToken=watch)
        source = self.source()
        for _ in range(3):
            with self.assertRaisesRegex(token_broker.TokenBrokerError, "CALLER_DENIED"):
                source.token()
        time.sleep(0.6)  # in which nothing may happen
        self.assertEqual(len(broker.calls), 1)
        self.assertEqual(source.token().id, "a")

    def test_the_token_of_a_job_that_has_ended_is_of_no_use(self):
        def watch(n, context):
            if n == 1:
                yield message("WatchTokenResponse")(token=made("a"))
            ended.wait(30)
            refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED")

        ended = threading.Event()
        self.broker(WatchToken=watch)
        source = self.source(job="nightly", dedicated=True)
        source.token()
        ended.set()
        until("an error", lambda: _reason(source) == "JOB_ENDED")

    def test_who_has_less_time_than_the_next_attempt_is_away_gets_the_last_error_at_once(self):
        broker = self.broker(WatchToken=lambda n, context: refuse(context, grpc.StatusCode.UNAVAILABLE, "ENDPOINT_UNAVAILABLE", 60))
        source, began = self.source(), time.monotonic()
        self.assertEqual([_reason(source) for _ in range(3)], ["ENDPOINT_UNAVAILABLE"] * 3)
        self.assertLess(time.monotonic() - began, 20)
        self.assertEqual(len(broker.calls), 1)

    def test_a_dead_connection_is_noticed_within_a_minute(self):
        settings = dict(_broker._OPTIONS)
        pings = {k: v for k, v in settings.items() if k in ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")}
        self.assertLessEqual(settings["grpc.keepalive_time_ms"] + settings["grpc.keepalive_timeout_ms"], 60_000)
        self.assertGreater(settings["grpc.keepalive_time_ms"], 10_000)  # what brokers tolerate
        self.streams(made("a"))
        relay = Relay(("127.0.0.1", int(self.address.rpartition(":")[2])))
        self.addCleanup(relay.close)
        hurried = [*(settings | {k: v // 20 for k, v in pings.items()}).items()]
        with mock.patch.object(_broker, "_OPTIONS", hurried):  # a minute in three seconds
            source = self.source(address=f"127.0.0.1:{relay.port}")
            source.token()
            with self.assertLogs("token_broker", "INFO") as logs:
                relay.frozen.set()
                until("a stream that has ended", lambda: logs.output, patience=3)

    def test_a_401_of_a_server_that_was_not_shown_the_token_is_not_reported(self):
        broker, shown = self.streams(made("a")), []
        broker.methods["RefreshToken"] = lambda n, context: message("RefreshTokenResponse")(token=made("b"))

        def answer(request):
            shown.append((request.url.host, request.headers.get("Authorization")))
            if request.url.path == "/elsewhere":
                return httpx.Response(302, headers={"Location": "https://other.example/"})
            return httpx.Response(401)

        with httpx.Client(auth=TokenAuth(self.source()), transport=httpx.MockTransport(answer), follow_redirects=True) as client:
            self.assertEqual(client.get("https://api.example/elsewhere").status_code, 401)
            self.assertEqual((shown, len(broker.named("RefreshToken"))), ([("api.example", "Bearer secret of a"), ("other.example", None)], 0))
            self.assertEqual(client.get("https://api.example/").status_code, 401)
        self.assertEqual([s[1] for s in shown[2:]], ["Bearer secret of a", "Bearer secret of b"])
        self.assertEqual(len(broker.named("RefreshToken")), 1)

    def test_details_that_nobody_understands(self):
        def watch(n, context):
            context.set_trailing_metadata([("grpc-status-details-bin", b"\xff\xff")])
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
            yield

        self.broker(WatchToken=watch)
        with self.assertRaises(token_broker.TokenBrokerError) as caught:
            self.source().token()
        self.assertEqual((caught.exception.reason, str(caught.exception)), ("", "no (PERMISSION_DENIED)"))


if __name__ == "__main__":
    unittest.main()
