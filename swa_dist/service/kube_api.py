"""The RayJobs of a namespace, by the Kubernetes API. The only importer of kubernetes.

Every error is a ServiceError that says what was asked, where, and what to do.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, watch
from kubernetes import config as kube_config
from kubernetes.client.exceptions import ApiException

from swa_dist.errors import ServiceError
from swa_dist.service.kube_rules import Tree

_RESOURCE = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_TIMEOUTS = (10, 30)  # to connect, and between bytes, seconds
_RETRIES = 5
_BACKOFF_SECONDS = 0.5
_RETRY_AFTER_SECONDS = 60  # at most, whatever the server asks for
_RETRIED = (429, 500, 502, 503, 504)
_WATCH_SECONDS = 60
_PAUSE_SECONDS = 1.0
_PATIENCE_SECONDS = 900.0  # an upgrade of the control plane takes minutes


class RefusedError(ServiceError):
    """An answer of the API server that is an error, or none (`status` 0)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether asking again later may help. 410: what was to be watched from is forgotten."""
        return self.status in (0, 410, *_RETRIED)


class RayJobApi:
    """By default of the pod's own cluster and namespace, or the kubeconfig's."""

    def __init__(self, namespace: str | None, context: str | None) -> None:
        settings, here = _settings(context)
        self.namespace = namespace or here
        self._host = settings.host
        self._client = client.CustomObjectsApi(client.ApiClient(settings))

    def list(self, labels: str) -> list[Tree]:
        """`labels`: a selector."""
        listed = self._call("list", self._client.list_namespaced_custom_object, label_selector=labels)
        items: list[Tree] = listed["items"]
        return items

    def get(self, name: str) -> Tree:
        job: Tree = self._call("get", self._client.get_namespaced_custom_object, name=name)
        return job

    def create(self, job: Tree) -> bool:
        """False where one of the name is there: another's, or our own of a request whose answer got lost."""
        body = job | {"metadata": job["metadata"] | {"namespace": self.namespace}}
        try:
            self._call("create", self._client.create_namespaced_custom_object, body=body)
        except RefusedError as refused:
            if refused.status == 409:
                return False
            raise
        return True

    def states(self, name: str) -> Iterator[Tree]:
        """A RayJob as it is, and again whenever it changed, over cut connections; states between may be left out.

        Raises ServiceError when it is gone, when asking is refused, and when nothing was heard for 15 minutes.
        """
        heard = time.monotonic()
        while True:
            try:
                job = self.get(name)
                heard = time.monotonic()
                yield job
                for event in self._events(name, job["metadata"]["resourceVersion"]):
                    heard = time.monotonic()
                    if event["type"] == "DELETED":
                        raise ServiceError(self._gone(name))
                    yield event["raw_object"]
            except RefusedError as refused:
                if refused.status == 404:
                    raise ServiceError(self._gone(name)) from None
                if not refused.passes or time.monotonic() - heard > _PATIENCE_SECONDS:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _events(self, name: str, version: str) -> Iterator[dict[str, Any]]:
        """One watch; it ends when the server ends it, after a minute, or with RefusedError."""
        events = watch.Watch().stream(
            self._client.list_namespaced_custom_object,
            **_RESOURCE,
            namespace=self.namespace,
            field_selector=f"metadata.name={name}",
            resource_version=version,
            timeout_seconds=_WATCH_SECONDS,
            _request_timeout=(_TIMEOUTS[0], _WATCH_SECONDS + _TIMEOUTS[1]),
        )
        while event := self._answered("watch", lambda: next(events, None)):
            yield event

    def _call(self, verb: str, function: Callable[..., Any], **arguments: Any) -> Any:
        arguments |= _RESOURCE | {"namespace": self.namespace, "_request_timeout": _TIMEOUTS}
        return self._answered(verb, lambda: function(**arguments))

    def _answered(self, verb: str, ask: Callable[[], Any]) -> Any:
        what = f"`{verb}` of rayjobs.ray.io in namespace {self.namespace}"
        try:
            return ask()
        except ApiException as error:
            raise RefusedError(f"{what} must be possible, but is not: {_why(error)}", error.status or 0) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise RefusedError(
                f"Kubernetes at {self._host} must answer, but does not: {error}. Is this the right context?", 0
            ) from None

    def _gone(self, name: str) -> str:
        return (
            f"RayJob {name} must stay in namespace {self.namespace} until it ends, but is not there. Whoever deleted it"
            " stopped the run; submitting again goes on from its last checkpoint."
        )


def _why(error: ApiException) -> str:
    """What the API server said, and what to do about it."""
    try:
        said = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        said = error.reason
    remedies = {
        401: " Log in anew.",
        403: " Give the account the Role of k8s/overlays/cron/rbac.yaml.",
        404: " Install KubeRay's operator, 1.7 or later, and make the namespace.",
        422: " Mend the template.",
    }
    return f"HTTP {error.status}, {said}." + remedies.get(error.status or 0, "")


def _settings(context: str | None) -> tuple[client.Configuration, str]:
    """The client's configuration, and the namespace that goes with it."""
    settings, file = client.Configuration(), os.environ.get("KUBECONFIG")
    try:
        if context is None and "KUBERNETES_SERVICE_HOST" in os.environ and (_SERVICE_ACCOUNT / "token").is_file():
            kube_config.load_incluster_config(client_configuration=settings)
            namespace = (_SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        else:
            kube_config.load_kube_config(config_file=file, context=context, client_configuration=settings)
            contexts, current = kube_config.list_kube_config_contexts(config_file=file)
            chosen = next((one for one in contexts if one["name"] == context), current)
            namespace = chosen["context"].get("namespace") or "default"
    except (kube_config.ConfigException, OSError) as error:
        raise ServiceError(
            f"a Kubernetes cluster must be named by a kubeconfig or by the pod's service account, but is not: {error}."
            " Set KUBECONFIG, or `--context` to one of `kubectl config get-contexts`."
        ) from None
    settings.retries = urllib3.Retry(
        total=_RETRIES,
        status_forcelist=_RETRIED,
        allowed_methods=None,  # names are unique, so that creating twice creates once
        backoff_factor=_BACKOFF_SECONDS,
        retry_after_max=_RETRY_AFTER_SECONDS,
        raise_on_status=False,
    )
    return settings, namespace
