"""The source for threads, on a real broker."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import httpx

import stage
import token_broker
from stage import Calls, age, do, see, until
from token_broker.httpx import TokenAuth


class OnStage(unittest.TestCase):
    def source(self, profile="invoices", **settings):
        source = token_broker.TokenSource(profile, **settings)
        self.addCleanup(source.close)
        return source

    def refused(self, source, **settings):
        with self.assertRaises(token_broker.TokenBrokerError) as caught:
            source.token(**settings)
        return caught.exception


class TestTokens(OnStage):
    def test_a_million_questions_cost_one_call(self):
        watched, issued, source = Calls("WatchToken"), Calls("IssueToken"), self.source()
        first = source.token()
        self.assertEqual((first.token_type, first.authorization), ("Bearer", f"Bearer {first.access_token}"))
        self.assertAlmostEqual((first.expire_time - first.issue_time).total_seconds(), 3600, delta=1)
        began = time.perf_counter()
        for _ in range(1_000_000):
            source.token()
        took = time.perf_counter() - began
        print(f"1,000,000 token() in {took:.2f} s")
        self.assertEqual(source.token(), first)
        self.assertEqual((watched.made(), issued.made()), (1, 0))

    def test_many_who_ask_first_cost_one_call(self):
        watched, source = Calls("WatchToken"), self.source()
        with ThreadPoolExecutor(50) as pool:
            tokens = set(pool.map(lambda _: source.token().id, range(50)))
        self.assertEqual((len(tokens), watched.made()), (1, 1))

    def test_the_successor_of_a_revoked_token_comes_by_itself(self):
        source = self.source()
        first = source.token()
        revoked = do("/revoke")["token_id"]
        self.assertEqual(first.id, revoked)
        until("a successor", lambda: source.token().id != revoked)

    def test_nothing_shows_the_token(self):
        source = self.source()
        token = source.token()
        for shown in (repr(token), str(token), f"{token}", f"{[token]}", repr(source), repr(vars(source))):
            self.assertNotIn(token.access_token, shown)
        self.assertIn(token.id, repr(token))

    def test_closing_leaves_nothing(self):
        before = set(threading.enumerate()), len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        for _ in range(20):
            with self.source() as source:
                source.token()
            with self.assertRaisesRegex(token_broker.TokenBrokerError, "closed"):
                source.token()
        until("no thread of a source", lambda: not [t for t in threading.enumerate() if t.name.startswith("token of")])
        if before[1]:  # grpc's own come once
            until("no more files than before", lambda: len(os.listdir("/proc/self/fd")) < before[1] + 15)

    def test_a_program_that_does_not_close_ends(self):
        program = "import token_broker; s = token_broker.TokenSource('invoices'); print(s.token().id)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
        self.assertEqual((done.returncode, done.stderr, len(done.stdout.strip())), (0, "", 16))

    def test_after_a_fork_a_source_that_was_used_says_so(self):
        program = """if True:
            import os, token_broker
            used, fresh = (token_broker.TokenSource("invoices") for _ in range(2))
            used.token()
            if os.fork() == 0:
                try:
                    used.token()
                except RuntimeError as e:
                    print(e, flush=True)
                os._exit(0)
            os.wait()
            print(fresh.token().id)"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"used before the process was forked: make one in each process\n[0-9a-f]{16}\n")

    def test_the_service_config_is_the_published_one(self):
        published = Path(__file__).parents[2] / "service_config.json"
        self.assertEqual(json.loads(Path(token_broker.__file__).with_name("service_config.json").read_text()), json.loads(published.read_text()))


class TestAbsence(OnStage):
    def test_the_broker_may_go_and_come(self):
        source = self.source()
        first = source.token()
        for end in ("/broker/stop", "/broker/kill"):
            do(end)
            until("the source has seen it go", lambda: source._state.failures)
            for _ in range(1000):
                source.token(timeout=0)
            watched = Calls("WatchToken")
            do("/broker/start")
            until("the stream is back", watched.made)
            revoked = do("/revoke")["token_id"]
            until("a successor", lambda: source.token().id not in (first.id, revoked))

    def test_who_has_no_token_hears_that_the_broker_is_away_and_gets_one_when_it_is_back(self):
        source = self.source()
        do("/broker/stop")
        try:
            error = self.refused(source)
            self.assertEqual((error.code, error.reason), (grpc.StatusCode.UNAVAILABLE, ""))
        finally:
            do("/broker/start")
        until("a token", lambda: _or_none(source.token))

    def test_new_certificates_are_used_when_the_stream_comes_back(self):
        source = self.source()
        source.token()
        try:
            do("/broker/stop")
            do("/certificate?as=worker2")
            watched, before = Calls("WatchToken"), len(see("/callers"))
            do("/broker/start")
            until("the stream is back", watched.made)
            revoked = do("/revoke")["token_id"]
            until("a successor", lambda: source.token().id != revoked)
            source.close()  # a stream is in the audit log when it has ended
            until("the new identity", lambda: "spiffe://clients.test/worker2" in see("/callers")[before:])
            self.assertNotIn("spiffe://clients.test/worker", see("/callers")[before:])
        finally:
            do("/certificate?as=worker")

    def test_files_that_were_good_are_used_while_they_are_not(self):
        certificate, ca = Path(os.environ["BROKER_CERTIFICATE"]), Path(os.environ["BROKER_CERTIFICATE"] + ".ca")
        ca.write_bytes(Path(os.environ["BROKER_CA"]).read_bytes())
        self.source(ca=str(ca)).token()
        was = {path: path.read_bytes() for path in (certificate, ca)}

        def other_pair():
            do("/certificate?as=worker2")
            certificate.write_bytes(was[certificate])

        spoils = {
            "missing": certificate.unlink,
            "half written": lambda: certificate.write_bytes(was[certificate][:-40]),
            "no authority": lambda: ca.write_bytes(b""),
            "of another pair": other_pair,
        }
        try:
            for name, spoil in spoils.items():
                with self.subTest(name):
                    do("/broker/stop")
                    spoil()
                    watched = Calls("WatchToken")
                    do("/broker/start")
                    until("the stream is back", watched.made)
                    certificate.write_bytes(was[certificate])
                    ca.write_bytes(was[ca])
        finally:
            do("/certificate?as=worker")


def _or_none(token):
    try:
        return token()
    except token_broker.TokenBrokerError:
        return None


class TestRefusals(OnStage):
    def test_a_denial_comes_at_once_and_is_not_hammered(self):
        watched, source = Calls("WatchToken"), self.source("secret")
        began = time.monotonic()
        error = self.refused(source)
        self.assertLess(time.monotonic() - began, 2)
        self.assertEqual((error.code, error.reason, error.retry_after), (grpc.StatusCode.PERMISSION_DENIED, "CALLER_DENIED", None))
        self.assertEqual((error.metadata["caller"], error.metadata["profile"]), ("spiffe://clients.test/worker", "secret"))
        while time.monotonic() - began < 3:
            self.assertEqual(self.refused(source).reason, "CALLER_DENIED")
        self.assertIn(watched.made(), range(2, 8))  # 0.1 + 0.2 + 0.4 + 0.8 + 1.6 s, and half of that at the least

    def test_a_throttled_profile_says_when_to_ask_again(self):
        watched, source = Calls("WatchToken"), self.source("throttled")
        error = self.refused(source)
        self.assertEqual((error.code, error.reason), (grpc.StatusCode.RESOURCE_EXHAUSTED, "ENDPOINT_THROTTLED"))
        self.assertTrue(20 < error.retry_after <= 31, error.retry_after)
        self.assertEqual(self.refused(source, timeout=0.5).reason, "ENDPOINT_THROTTLED")
        self.assertEqual(watched.made(), 1)

    def test_errors_can_be_copied_and_pickled(self):
        error = self.refused(self.source("secret"))
        for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            self.assertEqual((str(other), other.metadata, other.retry_after), (str(error), error.metadata, error.retry_after))

    def test_a_token_is_served_while_it_is_good_though_the_right_is_gone(self):
        source = self.source()
        first = source.token()
        try:
            do("/policy?allow=false")
            until("the stream has ended", lambda: source._state.failures)
            self.assertEqual(source.token(timeout=0).id, first.id)
            self.assertEqual(self.refused(self.source()).reason, "CALLER_DENIED")
        finally:
            do("/policy?allow=true")
        watched = Calls("WatchToken")
        until("the stream is back once somebody asks", lambda: source.token(timeout=0) and watched.made())

    def test_settings_that_cannot_be(self):
        with self.assertRaises(ValueError):
            token_broker.TokenSource("invoices", certificate="")

    def test_files_that_are_missing(self):
        error = self.refused(self.source(ca="/nowhere/ca.crt"))
        self.assertEqual(error.code, grpc.StatusCode.UNAVAILABLE)
        self.assertIn("/nowhere/ca.crt", str(error))


class TestRejections(OnStage):
    @classmethod
    def setUpClass(cls):
        """Opens sources, and waits until their tokens may be reported."""
        cls.sources = {}
        for profile in ("report1", "report2", "report3", "report4"):
            source = cls.sources[profile] = token_broker.TokenSource(profile)
            cls.addClassCleanup(source.close)
        until("tokens of 10 s", lambda: all([age(s.token()) > 10.2 for s in cls.sources.values()]))

    def setUp(self):
        self.addCleanup(do, "/resource/refuse?tokens=none")

    def test_reports(self):
        source, refreshed = self.source(), Calls("RefreshToken")
        revoked = do("/revoke")["token_id"]
        young = until("a successor", lambda: (t := source.token()).id != revoked and t)
        self.assertLess(age(young), 9)
        self.assertIsNone(source.rejected(young))
        self.assertEqual(source.rejected(replace(young, id="0" * 16)), young)
        self.assertEqual(refreshed.made(), 0)
        source = self.sources["report1"]
        token = source.token()
        with ThreadPoolExecutor(20) as pool:
            successors = set(pool.map(lambda _: source.rejected(token).id, range(20)))
        self.assertEqual((len(successors), refreshed.made()), (1, 1))
        self.assertNotIn(token.id, successors)
        self.assertEqual({source.token().id}, successors)

    def test_twenty_requests_meet_a_resource_that_refuses_everything(self):
        source = self.sources["report2"]
        do("/resource/refuse?tokens=all")
        refreshed, refused = Calls("RefreshToken"), see("/resource/calls")["refused"]
        barrier = threading.Barrier(20)  # so that all of them are under way with the same token
        hooks = {"request": [lambda request: barrier.wait(30)]}
        with httpx.Client(auth=TokenAuth(source), event_hooks=hooks) as client, ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda _: client.get(stage.URL + "/resource").status_code, range(20)))
        self.assertEqual((answers, refreshed.made()), ([401] * 20, 1))
        self.assertEqual(see("/resource/calls")["refused"] - refused, 40)

    def test_twenty_requests_with_a_token_that_is_refused(self):
        source = self.sources["report3"]
        with httpx.Client(auth=TokenAuth(source)) as client, ThreadPoolExecutor(20) as pool:
            client.get(stage.URL + "/resource").raise_for_status()
            do("/resource/refuse?tokens=seen")
            refreshed = Calls("RefreshToken")
            answers = list(pool.map(lambda _: client.post(stage.URL + "/resource", content=b"12345"), range(20)))
            self.assertEqual([a.status_code for a in answers], [200] * 20)
            self.assertEqual({a.json()["body_length"] for a in answers}, {5})
            self.assertEqual(refreshed.made(), 1)

    def test_a_body_that_cannot_be_sent_again(self):
        source = self.sources["report4"]
        token = source.token()
        do("/resource/refuse?tokens=all")
        refused = see("/resource/calls")["refused"]
        with httpx.Client(auth=TokenAuth(source)) as client:
            self.assertEqual(client.post(stage.URL + "/resource", content=iter([b"123"])).status_code, 401)
        self.assertEqual(see("/resource/calls")["refused"] - refused, 1)
        self.assertNotEqual(source.token().id, token.id)


if __name__ == "__main__":
    unittest.main()
