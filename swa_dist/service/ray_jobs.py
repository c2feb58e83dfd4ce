"""Runs as jobs of a Ray cluster, by way of its jobs server. Tokens (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH)
and headers (RAY_JOB_HEADERS) are Ray's own settings."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import shlex
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.errors import ConfigError, ExitCode, ServiceError
from swa_dist.service.layout import run_dir
from swa_dist.service.progress import Display
from swa_dist.service.submit import ENTRYPOINT, RECIPE_VARIABLE, Attempt

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TIMEOUTS = (10, 60)  # to connect, and between bytes, seconds
_PATIENCE_SECONDS = 180.0  # a head behind a proxy that is restarted
_POLL_SECONDS = 1.0
_RECONNECTS = 20
_STATES = {JobStatus.SUCCEEDED: "succeeded", JobStatus.FAILED: "failed", JobStatus.STOPPED: "failed"}


class RayJobs:
    """The jobs server at `address`, http://HEAD:8265. `verify`: as of requests, a file of certificates to trust."""

    def __init__(self, address: str | None, verify: bool | str = True) -> None:
        self._address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ""
        if not self._address.startswith(("http://", "https://")):
            raise ConfigError(
                "`--address` must be that of a Ray cluster's jobs server, like http://HEAD:8265, but is"
                f" {self._address or 'not given, and RAY_API_SERVER_ADDRESS is not set either'}."
            )
        if isinstance(verify, str) and not Path(verify).exists():
            raise ConfigError(f"`--ca-file` must be a file of certificates, but {verify} does not exist.")
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        try:
            headers = json.loads(os.environ.get("RAY_JOB_HEADERS", "{}"))
        except ValueError:
            raise ConfigError("`RAY_JOB_HEADERS` must be JSON, but is not. Unset or mend it.") from None
        with self._answering(), _without(_ADDRESS_VARIABLES):  # which would win over the address that was given
            self._client = JobSubmissionClient(self._address, headers=headers, verify=verify)
        # The client itself would wait for good for a head that is cut off.
        self._client._do_request = functools.partial(self._client._do_request, timeout=_TIMEOUTS)
        self._trust = f" --ca-file {verify}" if isinstance(verify, str) else ""

    def attempts(self, run_key: str) -> list[Attempt]:
        return [attempt for attempt in self._all_attempts() if attempt.name.startswith(f"swa-{run_key[:12]}-a")]

    def _all_attempts(self) -> list[Attempt]:
        with self._answering():
            jobs = self._client.list_jobs()
        found = [_attempt(job) for job in jobs if config.parse_attempt_name(job.submission_id or "")]
        return sorted(found, key=lambda attempt: (attempt.name.rpartition("-a")[0], attempt.number))

    def start(self, name: str, run_key: str, recipe: Recipe) -> bool:
        text = config.to_yaml(recipe)
        if "$" in text:  # Ray would put variables in, secrets among them
            raise ConfigError("a recipe that is submitted must have no $ in it, but has. Rename what it names.")
        with self._answering():
            try:
                self._client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=name,
                    runtime_env={"env_vars": {RECIPE_VARIABLE: text}},
                    metadata={
                        "recipe": recipe.name,
                        "run_key": run_key,
                        "run_dir": run_dir(recipe.output.dir, run_key),
                    },
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    def follow(self, name: str, display: Display) -> int:
        """Show the job's log as it grows, until the job ends; a connection that breaks is made again."""
        self.details(name)
        asyncio.run(self._tail(name, display))
        while True:
            details = self._patient_details(name)
            if details.status in _STATES:
                return self._exit_code(details, display)
            time.sleep(_POLL_SECONDS)

    def logs(self, name: str) -> str:
        """What the job has printed so far."""
        self.details(name)
        with self._answering():
            return str(self._client.get_job_logs(name))

    def details(self, name: str) -> JobDetails:
        """Raises ConfigError where the cluster knows no such job."""
        with self._answering():
            try:
                return self._client.get_job_info(name)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    raise ConfigError(
                        f"`RUN` must be a job of the cluster at {self._address}, but {name} is none. See"
                        f" `swa-dist status --address {self._address}`."
                    ) from None
                raise

    def _patient_details(self, name: str) -> JobDetails:
        """As `details`, from a head that may be away for a moment."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self.details(name)
            except ServiceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_SECONDS)

    def describe(self, name: str | None) -> list[dict[str, Any]]:
        """A run, or all that the cluster knows of, as a person or a program asks for them."""
        names = [attempt.name for attempt in self._all_attempts()] if name is None else [name]
        return [_description(self.details(one)) for one in names]

    def stop(self, name: str, display: Display, timeout_seconds: float) -> None:
        """Have the run commit its state and end; kill the job if that takes longer than `timeout_seconds`.

        The request is left in the run's folder by a small job, which sees that folder as the run does. Ray's own way
        is a SIGTERM and, 3 seconds later, the end.
        """
        details = self.details(name)
        if details.status in _STATES:
            display.say(f"{name} has ended already ({details.status.value.lower()})")
            return
        folder = (details.metadata or {}).get("run_dir")
        if folder is None:
            raise ConfigError(f"`RUN` must be a run that `swa-dist submit` submitted, but {name} is another job.")
        self._leave_request(name, folder)
        display.say(f"asked {name} to stop; waiting up to {timeout_seconds:g} s for its checkpoint")
        if not self._await_end(name, timeout_seconds):
            display.say(f"warning: {name} did not stop in {timeout_seconds:g} s; it is ended now, as it is")
            with self._answering():
                self._client.stop_job(name)
            self._await_end(name, timeout_seconds=60)
            raise ServiceError(f"{name} must stop by itself, but had to be ended. Its last checkpoint is kept.")
        lines = [line for line in self.logs(name).splitlines() if line.startswith("swa-dist: ")]
        display.say(f"{name} has ended{': ' + lines[-1].removeprefix('swa-dist: ') if lines else ''}")

    def come_back(self, name: str) -> list[str]:
        return [
            f"swa-dist {verb} {name} --address {self._address}{self._trust}"
            for verb in ("logs --follow", "status", "stop")
        ]

    def _leave_request(self, name: str, folder: str) -> None:
        helper = f"{name}-stop-{uuid.uuid4().hex[:8]}"
        with self._answering():
            self._client.submit_job(entrypoint=f"python -m swa_dist stop {shlex.quote(folder)}", submission_id=helper)
        if not self._await_end(helper, timeout_seconds=120) or self.details(helper).status != JobStatus.SUCCEEDED:
            raise ServiceError(f"{name} must take a stop request, but could not be left one: {self.logs(helper)}")

    def _await_end(self, name: str, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        while self._patient_details(name).status not in _STATES:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    async def _tail(self, name: str, display: Display) -> None:
        shown, line = 0, ""  # characters shown: each connection begins at the log's beginning
        for attempt in range(_RECONNECTS):
            skipped = 0
            try:
                async for text in self._client.tail_job_logs(name):
                    fresh = text[max(0, shown - skipped) :]
                    skipped += len(text)
                    shown = max(shown, skipped)
                    *whole, line = (line + fresh).split("\n")
                    for one in whole:
                        display.say(one)
                if line:
                    display.say(line)
                return
            except (RuntimeError, aiohttp.ClientError, OSError) as error:
                if self._patient_details(name).status in _STATES or attempt == _RECONNECTS - 1:
                    display.say(f"warning: the log of {name} broke off: {error}")
                    return
                await asyncio.sleep(_POLL_SECONDS)

    def _exit_code(self, details: JobDetails, display: Display) -> int:
        if details.status == JobStatus.SUCCEEDED:
            return ExitCode.OK
        if details.driver_exit_code is None or details.driver_exit_code < 0:
            display.say(f"{details.submission_id} {details.status.value.lower()}: {details.message}")
            return ExitCode.STOPPED if details.status == JobStatus.STOPPED else ExitCode.UNFORESEEN
        return int(details.driver_exit_code)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn what the client raises into an error of ours."""
        try:
            yield
        except AuthenticationError as error:
            reason = str(error).splitlines()[0]
            raise ServiceError(
                f"Ray at {self._address} must take the token, but does not: {reason} Set RAY_AUTH_MODE=token and"
                " RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's."
            ) from None
        except (ConnectionError, RuntimeError, requests.RequestException) as error:
            raise ServiceError(f"Ray at {self._address} must answer, but does not: {error}") from None


def _description(details: JobDetails) -> dict[str, Any]:
    metadata = details.metadata or {}
    began, ended = details.start_time, details.end_time or time.time() * 1000
    return {
        "name": details.submission_id,
        "recipe": metadata.get("recipe", ""),
        "status": "stopped" if details.driver_exit_code == ExitCode.STOPPED else details.status.value.lower(),
        "exit_code": details.driver_exit_code,
        "started": datetime.fromtimestamp(began / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if began else None,
        "seconds": round((ended - began) / 1000) if began else None,
        "run_dir": metadata.get("run_dir", ""),
        "run_key": metadata.get("run_key", ""),
    }


def _attempt(job: JobDetails) -> Attempt:
    parsed = config.parse_attempt_name(job.submission_id)
    assert parsed is not None
    code = job.driver_exit_code
    reason = {ExitCode.STOPPED: "stopped"}.get(code, f"exit code {code}") if code else str(job.message or "")
    state = _STATES.get(job.status, "running")
    return Attempt(job.submission_id, parsed[1], state, reason if state == "failed" else "")  # type: ignore[arg-type]


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Within the block these variables are not in the environment."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
