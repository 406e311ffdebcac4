"""The source for asyncio, on a real broker."""

import asyncio
import time
import unittest

import httpx

import stage
import token_broker
from stage import Calls, age, do, see, until
from token_broker.aio import TokenSource
from token_broker.httpx import TokenAuth


class TestAsyncio(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        asyncio.get_running_loop().set_debug(False)  # as it is in programs

    def source(self, profile="invoices", **settings):
        source = TokenSource(profile, **settings)
        self.addAsyncCleanup(source.close)
        return source

    async def until(self, what, true):
        end = time.monotonic() + stage.PATIENCE
        while not (value := await true()):
            self.assertLess(time.monotonic(), end, f"not in time: {what}")
            await asyncio.sleep(0.02)
        return value

    async def old(self, *profiles):
        """Sources whose tokens may be reported."""
        sources = [self.source(p) for p in profiles]

        async def may_be_reported():
            return all([age(await s.token()) > 10.2 for s in sources])

        await self.until("tokens of 10 s", may_be_reported)
        return sources

    async def test_a_million_questions_cost_one_call(self):
        watched, issued, source = Calls("WatchToken"), Calls("IssueToken"), self.source()
        tokens = await asyncio.gather(*(source.token() for _ in range(100)))
        began = time.perf_counter()
        for _ in range(1_000_000):
            await source.token()
        print(f"1,000,000 await token() in {time.perf_counter() - began:.2f} s")
        self.assertEqual(len({t.id for t in tokens}), 1)
        self.assertEqual((watched.made(), issued.made()), (1, 0))

    async def test_the_broker_may_go_and_come(self):
        async with TokenSource("invoices") as source:
            first = await source.token()
            do("/broker/stop")
            until("the source has seen it go", lambda: source._state.failures)
            self.assertEqual(await source.token(), first)
            watched = Calls("WatchToken")
            do("/broker/start")
            until("the stream is back", watched.made)
            revoked = do("/revoke")["token_id"]

            async def another():
                return (await source.token()).id not in (first.id, revoked)

            await self.until("a successor", another)
        with self.assertRaisesRegex(token_broker.TokenBrokerError, "closed"):
            await source.token()

    async def test_refusals(self):
        watched, source = Calls("WatchToken"), self.source("secret")
        answers = await asyncio.gather(*(source.token() for _ in range(50)), return_exceptions=True)
        self.assertEqual({a.reason for a in answers}, {"CALLER_DENIED"})
        self.assertLessEqual(watched.made(), 2)

    async def test_who_gives_up_takes_nothing_from_others(self):
        source = self.source()
        impatient = asyncio.create_task(source.token())
        patient = asyncio.create_task(source.token())
        await asyncio.sleep(0)
        impatient.cancel()
        self.assertTrue((await patient).id)
        with self.assertRaises(asyncio.CancelledError):
            await impatient
        self.assertFalse(source._listeners)

    async def test_closing_wakes_who_waits(self):
        source = self.source(address="127.0.0.1:1", ca="", certificate="", private_key="")
        with self.assertRaisesRegex(token_broker.TokenBrokerError, "UNAVAILABLE"):
            await source.token()
        while source._state.failures < 5:  # the next attempt is a second away
            await asyncio.sleep(0.02)
        waiting = asyncio.create_task(source.token())
        await asyncio.sleep(0)
        await source.close()
        with self.assertRaisesRegex(token_broker.TokenBrokerError, "closed"):
            await waiting

    async def test_twenty_requests_with_a_token_that_is_refused(self):
        self.addCleanup(do, "/resource/refuse?tokens=none")
        one, other = await self.old("report5", "report6")
        async with httpx.AsyncClient(auth=TokenAuth(one)) as client:
            (await client.get(stage.URL + "/resource")).raise_for_status()
            do("/resource/refuse?tokens=seen")
            refreshed = Calls("RefreshToken")
            answers = await asyncio.gather(*(client.post(stage.URL + "/resource", content=b"12345") for _ in range(20)))
        self.assertEqual(([a.status_code for a in answers], refreshed.made()), ([200] * 20, 1))

        do("/resource/refuse?tokens=all")
        refused = see("/resource/calls")["refused"]
        async with httpx.AsyncClient(auth=TokenAuth(other)) as client:
            answers = await asyncio.gather(*(client.get(stage.URL + "/resource") for _ in range(20)))
        self.assertEqual([a.status_code for a in answers], [401] * 20)
        self.assertEqual((refreshed.made(), see("/resource/calls")["refused"] - refused), (2, 40))

    async def test_nothing_shows_the_token(self):
        source = self.source()
        token = await source.token()
        self.assertNotIn(token.access_token, repr(token) + repr(source) + repr(vars(source)))


if __name__ == "__main__":
    unittest.main()
