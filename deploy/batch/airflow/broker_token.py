"""Access tokens of Token Broker for Airflow tasks, by the command ``broker``.

    with broker_token("invoices", job_id(context)) as path:
        ...  # read the file each time the token is needed

The file is kept fresh as long as the block runs, and is gone after it. How to reach the broker is in the worker's
environment: BROKER_ADDRESS, BROKER_CA and the others of ``broker watch --help``. Nothing here is Airflow's but job_id and
last_try, so it serves any Python program. It needs Python 3.9 and the standard library.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

MAX_JOB_ID = 128


class NoToken(Exception):
    """There is no token: the message says why, as the broker told it."""


def job_id(context: Mapping[str, Any]) -> str:
    """The id under which a task asks for tokens: the same one for each try of the same task of the same run.

    It is dag_id/run_id/task_id, and /map_index for a mapped task. What is too long for an id, or not plain ASCII, is
    cut, with a digest of the whole.
    """
    ti = context["ti"]
    parts = [ti.dag_id, ti.run_id, ti.task_id]
    if getattr(ti, "map_index", -1) >= 0:
        parts.append(str(ti.map_index))
    whole = "/".join(parts)
    if len(whole) <= MAX_JOB_ID and all("!" <= c <= "~" for c in whole):
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:32]
    plain = "".join(c if "!" <= c <= "~" else "_" for c in whole)
    return plain[: MAX_JOB_ID - len(digest) - 1] + "~" + digest


def last_try(context: Mapping[str, Any]) -> bool:
    """Whether Airflow will not try the task again by itself if it fails now."""
    ti = context["ti"]
    return ti.try_number > ti.max_tries


@contextlib.contextmanager
def broker_token(
    profile: str,
    job: str | None = None,
    *,
    dedicated: bool = False,
    scopes: Sequence[str] = (),
    min_lifetime: str = "",
    revoke_after_success: bool = False,
    revoke_after_failure: bool = False,
    wait: float = 60.0,
    command: str = "broker",
) -> Iterator[str]:
    """Keeps a token of the profile in a file while the block runs, and yields the file's path.

    job names the unit of work, dedicated asks for a token of its own. A dedicated job can be revoked when the block
    ends: after success, when no try will follow, and after failure, which is right only on the last try (last_try). A
    revoked job gets no token until the revoked one would have ended by itself. A revocation that fails is logged.

    Raises NoToken if there is none within wait seconds, and ValueError for arguments that do not fit together.
    """
    if job is not None and not job:
        raise ValueError("the job's id is empty")
    if (dedicated or revoke_after_success or revoke_after_failure) and not job:
        raise ValueError("a token of a job's own needs the job's id")
    if (revoke_after_success or revoke_after_failure) and not dedicated:
        raise ValueError("only a token of the job's own can be revoked: dedicated=True")
    options = [f"--scope={scope}" for scope in scopes]
    if job:
        options.append(f"--job={job}")
    if dedicated:
        options.append("--dedicated")

    done = False
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="token.", dir=memory if os.access(memory, os.W_OK) else None) as directory:
        path = os.path.join(directory, "access_token")
        arguments = [command, "watch", profile, "--file", path, *options]
        if min_lifetime:
            arguments.append(f"--min-lifetime={min_lifetime}")
        with open(os.path.join(directory, "log"), "w+b") as errors:
            watch = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
            try:
                _first_token(watch, path, errors, profile, wait)
                yield path
                done = True
            finally:
                _stop(watch)
                if os.path.exists(path):
                    os.unlink(path)
                    if revoke_after_success if done else revoke_after_failure:
                        _revoke([command, "revoke", profile, *options], job)


def _first_token(watch: subprocess.Popen, path: str, errors, profile: str, wait: float) -> None:
    """Returns when there is a token in the file."""
    deadline = time.monotonic() + wait
    while not os.path.exists(path):
        ended = watch.poll() is not None
        if ended or time.monotonic() > deadline:
            errors.seek(0)
            said = errors.read(8192).decode(errors="replace").strip()
            when = "broker watch has ended" if ended else f"none came within {wait:g} s"
            raise NoToken(f"no token of profile {profile}: {when}: {said}")
        time.sleep(0.05)


def _stop(watch: subprocess.Popen) -> None:
    watch.terminate()
    try:
        watch.wait(timeout=10)
    except subprocess.TimeoutExpired:
        watch.kill()
        watch.wait()


def _revoke(arguments: Sequence[str], job: str | None) -> None:
    try:
        ended = subprocess.run(
            [*arguments, "--timeout=10s"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        log.warning("the token of job %s is not revoked, it ends by itself: %s", job, e)
        return
    if ended.returncode != 0:
        log.warning("the token of job %s is not revoked, it ends by itself: %s", job, ended.stderr.strip())
    else:
        log.info("%s", ended.stdout.strip())
