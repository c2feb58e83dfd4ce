"""What KubeRay's operator and Kueue ask of a RayJob beyond its schema, and what a run needs of its pods.

The operator says so in an event, after the object was taken; here it is said before anything is sent. The rules are
those of KubeRay 1.7 (ray-operator/controllers/ray/utils/validation.go) and of Kueue's webhook for RayJobs.
"""

import re
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

Tree = dict[str, Any]

DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

_MAX_NAME = 47  # the pods' names are made from it
_MAX_KUEUE_GROUPS = 17
_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_TOKEN_VERSION = (2, 52)
_DEFAULT_SECONDS = 30  # of Kubernetes' grace and of Ray's drain
_PLAIN = re.compile(r"[A-Za-z0-9_./:=,@%+\- ]+")
_SECRET = re.compile(r"(?i)(^|_)(SECRET|TOKEN|PASSWORD|ACCESS_KEY|API_KEY|CREDENTIALS?)(?!.*_(FILE|PATH|URI)$)(_|$)")
_CLUSTER = "spec.rayClusterSpec"


def problems(rayjob: Tree) -> list[str]:
    """Everything that is wrong with a RayJob, a sentence and a remedy each; empty where nothing is."""
    spec = rayjob.get("spec") or {}
    found = [*_object(rayjob), *_lifecycle(spec), *_deletion(spec), *_submission(spec), *_runtime_env(spec)]
    cluster = spec.get("rayClusterSpec")
    if cluster:
        found += [*_cluster(cluster), *_kueue(rayjob, cluster)]
        for where, group in _groups(cluster):
            found += _group(where, group)
        for where, pod in _pods(spec):
            found += _containers(where, pod)
    return found


def _object(rayjob: Tree) -> Iterator[str]:
    kind = f"{rayjob.get('apiVersion')} {rayjob.get('kind')}"
    if kind != "ray.io/v1 RayJob":
        yield f"`kind` must be ray.io/v1 RayJob, but is {kind}."
    name = str((rayjob.get("metadata") or {}).get("name") or "")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield (
            f"`metadata.name` must be small letters, digits and - with a letter first (DNS-1035), but is {name!r}."
            " Choose another."
        )
    if len(name) > _MAX_NAME:
        yield (
            f"`metadata.name` must be at most {_MAX_NAME} characters, but is {name!r}, which has {len(name)}."
            " Shorten it."
        )


def _lifecycle(spec: Tree) -> Iterator[str]:
    shutdown, selector = bool(spec.get("shutdownAfterJobFinishes")), spec.get("clusterSelector") or {}
    if not spec.get("rayClusterSpec") and not selector:
        yield "`spec.rayClusterSpec` must be there, but is missing. Add it, or name a cluster in `clusterSelector`."
    if selector and not selector.get("ray.io/cluster"):
        yield "`spec.clusterSelector` must have `ray.io/cluster`, but has not. Name the RayCluster there."
    if spec.get("suspend") and not shutdown:
        yield "`spec.shutdownAfterJobFinishes` must be true where `spec.suspend` is, but is not. Set it."
    if spec.get("suspend") and selector:
        yield "`spec.suspend` must be false where `spec.clusterSelector` is set, but is true. Remove one."
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield (
            "`spec.shutdownAfterJobFinishes` must be true where `spec.ttlSecondsAfterFinished` is set, but is not."
            " Set it, or remove the other."
        )
    for name, least in (
        ("ttlSecondsAfterFinished", 0),
        ("backoffLimit", 0),
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
    ):
        if name in spec and not (isinstance(spec[name], int) and spec[name] >= least):
            yield f"`spec.{name}` must be a whole number of at least {least}, but is {spec[name]}. Mend or remove it."
    if spec.get("backoffLimit"):
        if selector:
            yield "`spec.backoffLimit` must be 0 where `spec.clusterSelector` is set, but is not. Remove it."
        if spec.get("submissionMode") == "InteractiveMode":
            yield "`spec.backoffLimit` must be 0 in InteractiveMode, but is not. Remove it."


def _deletion(spec: Tree) -> Iterator[str]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    where, rules = "`spec.deletionStrategy.deletionRules`", strategy.get("deletionRules") or []
    old = [name for name in ("onSuccess", "onFailure") if name in strategy]
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield f"{where} must be absent where `spec.shutdownAfterJobFinishes` is true, but is there. Remove one."
    if rules and spec.get("ttlSecondsAfterFinished"):
        yield f"{where} must be absent where `spec.ttlSecondsAfterFinished` is set, but is there. Remove one."
    if rules and old:
        yield f"{where} must be absent where `{old[0]}` is set, but is there. Remove `{old[0]}`."
    if not rules and len(old) < 2:
        yield f"{where} must have a rule, but has none. Add one, or remove `spec.deletionStrategy`."
    for rule in rules:
        if spec.get("clusterSelector") and rule.get("policy") in ("DeleteCluster", "DeleteWorkers"):
            yield (
                f"{where} must leave the cluster of `spec.clusterSelector` alone, but has {rule['policy']}. Remove it."
            )


def _submission(spec: Tree) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in _MODES:
        yield f"`spec.submissionMode` must be one of {', '.join(_MODES)}, but is {mode}."
    entrypoint = str(spec.get("entrypoint") or "").strip()
    if mode != "InteractiveMode" and not _PLAIN.fullmatch(entrypoint):
        shown = next((letter for letter in entrypoint if not _PLAIN.fullmatch(letter)), None)
        what = f"has {shown!r}" if shown else "is empty"
        yield (
            f"`spec.entrypoint` must be plain words, since it is pasted into a shell script, but {what}. Put what needs"
            " more into the recipe or an environment variable."
        )
    if mode != "SidecarMode":
        return
    for name in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
        if spec.get(name):
            yield f"`spec.{name}` must be absent in SidecarMode, but is there. Remove it, or use K8sJobMode."
    head = _pod((spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {})
    if head.get("restartPolicy", "Never") != "Never":
        yield (
            f"`{_CLUSTER}.headGroupSpec.template.spec.restartPolicy` must be Never in SidecarMode, but is"
            f" {head['restartPolicy']}. Remove it."
        )


def _runtime_env(spec: Tree) -> Iterator[str]:
    """The CR, the job's metadata and the dashboard show it to everyone."""
    where, text = "`spec.runtimeEnvYAML`", spec.get("runtimeEnvYAML")
    if not text:
        return
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        tree = None
    if not isinstance(tree, dict):
        yield f"{where} must be YAML with settings, but is not. Remove it: the image has all that is needed."
        return
    for name in tree.get("env_vars") or {}:
        if _SECRET.search(str(name)):
            yield f"{where} must hold no secrets, but has {name}. Move it to the Secret that the pods' `envFrom` names."


def _cluster(cluster: Tree) -> Iterator[str]:
    auth, version = cluster.get("authOptions") or {}, cluster.get("rayVersion")
    if auth.get("enableK8sTokenAuth"):
        yield f"`{_CLUSTER}.authOptions.enableK8sTokenAuth` must be false for a RayJob, but is true. Remove it."
    if auth.get("mode") == "token":
        numbers = re.match(r"(\d+)\.(\d+)", str(version or ""))
        if not numbers or (int(numbers[1]), int(numbers[2])) < _TOKEN_VERSION:
            yield (
                f"`{_CLUSTER}.rayVersion` must be 2.52.0 or later where `authOptions.mode` is token, but is {version}."
                " Set it to the Ray of the image."
            )
    groups = cluster.get("workerGroupSpecs") or []
    names = [group.get("groupName") for group in groups]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield f"`{_CLUSTER}.workerGroupSpecs` must have names of their own, but two are {name}. Rename one."
    for index, group in enumerate(groups):
        where = f"`{_CLUSTER}.workerGroupSpecs[{index}]"
        counts = [group.get(name) for name in ("minReplicas", "replicas", "maxReplicas")]
        if not all(isinstance(count, int) for count in counts):
            yield f"{where}` must have minReplicas, replicas and maxReplicas, but has {counts}. Set all three."
        elif not 0 <= counts[0] <= counts[1] <= counts[2]:
            yield f"{where}` must have 0 <= minReplicas <= replicas <= maxReplicas, but has {counts}. Mend them."
        if group.get("suspend") and cluster.get("enableInTreeAutoscaling"):
            yield f"{where}.suspend` must be false with the autoscaler, but is true. Remove it."


def _group(where: str, group: Tree) -> Iterator[str]:
    start, pod = group.get("rayStartParams") or {}, _pod(group)
    if "labels" in start:
        yield f"`{where}.rayStartParams` must not have `labels`, but has. Use `{where}.labels`."
    twice = [name for name in ("num-cpus", "num-gpus", "memory", "resources") if start.get(name)]
    if group.get("resources") and twice:
        yield f"`{where}.resources` must be absent where rayStartParams has {twice[0]}, but is there. Remove one."
    containers = pod.get("containers") or []
    if not containers:
        yield f"`{where}.template.spec.containers` must have the Ray container, but is empty. Add it."
        return
    names = [str(container.get("name")) for container in containers]
    ray = [name for name in names if name.startswith("ray-")]
    if ray and names[0] != ray[0]:
        yield f"`{where}.template.spec.containers[0]` must be the Ray container, but is {names[0]}. Put {ray[0]} first."
    labels = ((group.get("template") or {}).get("metadata") or {}).get("labels") or {}
    name = labels.get("app.kubernetes.io/name", "kuberay")
    if where.endswith("headGroupSpec") and name != "kuberay":
        yield (
            f"`{where}.template.metadata.labels` must leave app.kubernetes.io/name to KubeRay, whose services select by"
            f" it, but has {name}. Remove it."
        )
    set_to = {item["name"]: item.get("value") for item in containers[0].get("env") or [] if "name" in item}
    drain, grace = set_to.get(DRAIN_VARIABLE, _DEFAULT_SECONDS), pod.get("terminationGracePeriodSeconds")
    grace = _DEFAULT_SECONDS if grace is None else grace
    if not re.fullmatch(r"\d+(\.\d+)?", str(drain)) or float(drain) >= grace:
        yield (
            f"{DRAIN_VARIABLE} of `{where}` must be less than its terminationGracePeriodSeconds ({grace}), but is"
            f" {drain}: Kubernetes would kill workers that still save their state. Set 110 and 120."
        )


def _containers(where: str, pod: Tree) -> Iterator[str]:
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(kind) or []):
            at = f"{where}.spec.{kind}[{index}]"
            resources = container.get("resources") or {}
            wanted = [(bound, unit) for bound in ("requests", "limits") for unit in ("cpu", "memory")]
            lacking = [f"{bound}.{unit}" for bound, unit in wanted if unit not in (resources.get(bound) or {})]
            if lacking:
                yield f"`{at}.resources` must have {lacking[0]}, but has not: Ray and Kueue count by it. Set it."
            for item in container.get("env") or []:
                if item.get("value") and _SECRET.search(str(item.get("name"))):
                    yield f"`{at}.env` must hold no secrets, but has {item['name']}. Use `valueFrom.secretKeyRef`."


def _kueue(rayjob: Tree, cluster: Tree) -> Iterator[str]:
    if QUEUE_LABEL not in ((rayjob.get("metadata") or {}).get("labels") or {}):
        return
    spec, groups = rayjob["spec"], cluster.get("workerGroupSpecs") or []
    if not spec.get("shutdownAfterJobFinishes"):
        yield "`spec.shutdownAfterJobFinishes` must be true under Kueue, or its quota stays taken, but is not. Set it."
    if spec.get("clusterSelector"):
        yield "`spec.clusterSelector` must be absent under Kueue, but is there. Remove it."
    if cluster.get("enableInTreeAutoscaling"):
        yield f"`{_CLUSTER}.enableInTreeAutoscaling` must be false under Kueue, but is true. Remove it."
    if len(groups) > _MAX_KUEUE_GROUPS:
        yield (
            f"`{_CLUSTER}.workerGroupSpecs` must have at most {_MAX_KUEUE_GROUPS} groups under Kueue, but has"
            f" {len(groups)}. Merge some."
        )
    if any(group.get("groupName") == "head" for group in groups):
        yield f"`{_CLUSTER}.workerGroupSpecs` must have no group `head` under Kueue, but has. Rename it."


def _groups(cluster: Tree) -> Iterator[tuple[str, Tree]]:
    """The head's and the workers' groups, with where they are."""
    yield f"{_CLUSTER}.headGroupSpec", cluster.get("headGroupSpec") or {}
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        yield f"{_CLUSTER}.workerGroupSpecs[{index}]", group


def _pods(spec: Tree) -> Iterator[tuple[str, Tree]]:
    for where, group in _groups(spec["rayClusterSpec"]):
        yield f"{where}.template", _pod(group)
    if submitter := spec.get("submitterPodTemplate"):
        yield "spec.submitterPodTemplate", submitter.get("spec") or {}


def _pod(group: Tree) -> Tree:
    pod: Tree = (group.get("template") or {}).get("spec") or {}
    return pod
