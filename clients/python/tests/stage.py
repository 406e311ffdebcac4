"""The stage: what it is asked to do, and what it has seen."""

import json
import os
import time
from urllib.request import Request, urlopen

URL = os.environ["STAGE_URL"]
PATIENCE = 30


def _ask(method, path):
    with urlopen(Request(URL + path, method=method), timeout=60) as answer:
        return json.load(answer)


def do(path):
    return _ask("POST", path)


def see(path):
    return _ask("GET", path)


class Calls:
    """Counts the calls of a method from here on."""

    def __init__(self, method):
        self.method = method
        self.before = self.total()

    def total(self):
        return see("/calls").get(self.method, 0)

    def made(self):
        return self.total() - self.before


def until(what, true, patience=PATIENCE):
    """Polls for something that is to come true, and returns it."""
    end = time.monotonic() + patience
    while not (value := true()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {patience} s: {what}")
        time.sleep(0.02)
    return value


def age(token):
    return time.time() - token.issue_time.timestamp()
