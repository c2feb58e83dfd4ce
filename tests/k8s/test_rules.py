"""Each of KubeRay's and Kueue's rules finds the manifest that breaks it, and says what to do."""

import copy

import pytest

from swa_dist.service import kube, kube_rules
from tests.k8s.conftest import K8S

CRON = K8S / "overlays" / "cron" / "rayjob.yaml"
QUEUE = {kube_rules.QUEUE_LABEL: "queue"}


@pytest.fixture(scope="module")
def right():
    return kube.load_template(CRON)


def in_spec(**fields):
    return lambda job: job["spec"].update(fields)


def in_cluster(**fields):
    return lambda job: job["spec"]["rayClusterSpec"].update(fields)


def in_head(**fields):
    return lambda job: head(job).update(fields)


def in_workers(**fields):
    return lambda job: workers(job).update(fields)


def in_head_pod(**fields):
    return lambda job: head(job)["template"]["spec"].update(fields)


def in_head_container(**fields):
    return lambda job: head(job)["template"]["spec"]["containers"][0].update(fields)


def head(job):
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]


def workers(job):
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def named(name):
    return lambda job: job["metadata"].update(name=name)


def queued(job):
    job["metadata"]["labels"] |= QUEUE


def sidecar(job):
    for name in ("submitterPodTemplate", "submitterConfig"):
        del job["spec"][name]
    job["spec"]["submissionMode"] = "SidecarMode"


def both(*mutations):
    return lambda job: [mutate(job) for mutate in mutations]


def selector(job):
    job["spec"]["clusterSelector"] = {"ray.io/cluster": "one"}


def many(job):
    group = workers(job)
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"] = [group | {"groupName": f"w{i}"} for i in range(18)]


def twice(job):
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"] *= 2


def strategy(**fields):
    return in_spec(deletionStrategy=fields)


RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}}
DRAIN = {"name": kube_rules.DRAIN_VARIABLE, "value": "120"}

BROKEN = {
    "kind": (lambda job: job.update(kind="RayCluster"), "`kind` must be ray.io/v1 RayJob"),
    "long name": (named("a" * 48), "at most 47 characters"),
    "name begins with a digit": (named("1a"), "DNS-1035"),
    "name with capitals": (named("Swa"), "DNS-1035"),
    "name ends with -": (named("swa-"), "DNS-1035"),
    "no cluster": (lambda job: job["spec"].pop("rayClusterSpec"), "`spec.rayClusterSpec` must be there"),
    "selector without a cluster": (in_spec(clusterSelector={"a": "b"}), "must have `ray.io/cluster`"),
    "suspend without shutdown": (in_spec(suspend=True, shutdownAfterJobFinishes=False), "where `spec.suspend` is"),
    "suspend with selector": (both(selector, in_spec(suspend=True)), "`spec.suspend` must be false"),
    "ttl without shutdown": (in_spec(shutdownAfterJobFinishes=False), "where `spec.ttlSecondsAfterFinished` is set"),
    "negative ttl": (in_spec(ttlSecondsAfterFinished=-1), "`spec.ttlSecondsAfterFinished` must be a whole number"),
    "no deadline at all": (in_spec(activeDeadlineSeconds=0), "`spec.activeDeadlineSeconds` must be a whole number"),
    "deadline as text": (in_spec(activeDeadlineSeconds="60"), "`spec.activeDeadlineSeconds` must be a whole number"),
    "no time to start": (in_spec(preRunningDeadlineSeconds=0), "`spec.preRunningDeadlineSeconds` must be"),
    "negative retries": (in_spec(backoffLimit=-1), "`spec.backoffLimit` must be a whole number"),
    "retries with selector": (selector, "`spec.backoffLimit` must be 0 where `spec.clusterSelector`"),
    "retries when interactive": (in_spec(submissionMode="InteractiveMode"), "must be 0 in InteractiveMode"),
    "deletion rules and shutdown": (strategy(deletionRules=[RULE]), "where `spec.shutdownAfterJobFinishes` is true"),
    "deletion rules and ttl": (strategy(deletionRules=[RULE]), "where `spec.ttlSecondsAfterFinished` is set"),
    "old and new deletion": (strategy(deletionRules=[RULE], onSuccess={}), "where `onSuccess` is set"),
    "half a deletion strategy": (strategy(onSuccess={}), "must have a rule"),
    "deletion of another's cluster": (both(selector, strategy(deletionRules=[RULE])), "leave the cluster"),
    "mistyped mode": (in_spec(submissionMode="K8sJob"), "must be one of K8sJobMode, HTTPMode"),
    "no entrypoint": (in_spec(entrypoint=""), "is empty"),
    "a variable in the entrypoint": (in_spec(entrypoint="python -m swa_dist finetune $RECIPE"), "but has '$'"),
    "a pipe in the entrypoint": (in_spec(entrypoint="python -m swa_dist | tee log"), "but has '|'"),
    "a line break in the entrypoint": (in_spec(entrypoint="python\nrm"), "plain words"),
    "sidecar with a submitter's pod": (in_spec(submissionMode="SidecarMode"), "`spec.submitterPodTemplate` must be"),
    "sidecar with a submitter's settings": (in_spec(submissionMode="SidecarMode"), "`spec.submitterConfig` must be"),
    "sidecar with a selector": (both(sidecar, selector), "`spec.clusterSelector` must be absent in SidecarMode"),
    "sidecar in a head that restarts": (both(sidecar, in_head_pod(restartPolicy="Always")), "must be Never"),
    "a secret in the runtime environment": (
        in_spec(runtimeEnvYAML="env_vars: {AWS_SECRET_ACCESS_KEY: abc}"),
        "must hold no secrets, but has AWS_SECRET_ACCESS_KEY",
    ),
    "a runtime environment that is not YAML": (in_spec(runtimeEnvYAML="{"), "`spec.runtimeEnvYAML` must be YAML"),
    "a token of Kubernetes": (in_cluster(authOptions={"enableK8sTokenAuth": True}), "enableK8sTokenAuth"),
    "no version": (lambda job: job["spec"]["rayClusterSpec"].pop("rayVersion"), "rayVersion` must be 2.52.0 or later"),
    "an old version": (in_cluster(rayVersion="2.9.3"), "but is 2.9.3"),
    "two groups of a name": (twice, "must have names of their own, but two are workers"),
    "no replicas": (lambda job: workers(job).pop("minReplicas"), "must have minReplicas, replicas and maxReplicas"),
    "more replicas than at most": (in_workers(replicas=2), "0 <= minReplicas <= replicas <= maxReplicas"),
    "suspended and scaled": (
        both(in_workers(suspend=True), in_cluster(enableInTreeAutoscaling=True)),
        "suspend` must be false with the autoscaler",
    ),
    "labels as parameters": (in_head(rayStartParams={"labels": "a=b"}), "must not have `labels`"),
    "resources twice": (in_head(resources={"cpu": "1"}), "must be absent where rayStartParams has num-cpus"),
    "no container": (in_head_pod(containers=[]), "must have the Ray container"),
    "Ray's container second": (
        lambda job: head(job)["template"]["spec"]["containers"].insert(0, {"name": "agent"}),
        "but is agent. Put ray-head first",
    ),
    "a label that hides the head": (
        lambda job: head(job)["template"]["metadata"]["labels"].update({"app.kubernetes.io/name": "swa-dist"}),
        "must leave app.kubernetes.io/name to KubeRay",
    ),
    "a drain as long as the grace": (
        in_head_container(env=[DRAIN]),
        "less than its terminationGracePeriodSeconds (120)",
    ),
    "Kubernetes' own grace": (
        lambda job: workers(job)["template"]["spec"].pop("terminationGracePeriodSeconds"),
        "less than its terminationGracePeriodSeconds (30)",
    ),
    "both defaults": (
        both(in_head_container(env=[]), in_head_pod(terminationGracePeriodSeconds=None)),
        "(30), but is 30",
    ),
    "no limits": (in_head_container(resources={"requests": {"cpu": 1, "memory": "1Gi"}}), "must have limits.cpu"),
    "no requests of a submitter": (
        lambda job: job["spec"]["submitterPodTemplate"]["spec"]["containers"][0].pop("resources"),
        "`spec.submitterPodTemplate.spec.containers[0].resources` must have requests.cpu",
    ),
    "no limits before the start": (
        in_head_pod(initContainers=[{"name": "wait"}]),
        "headGroupSpec.template.spec.initContainers[0].resources` must have requests.cpu",
    ),
    "a secret as a value": (
        in_head_container(env=[{"name": "MLFLOW_TRACKING_PASSWORD", "value": "abc"}]),
        "must hold no secrets, but has MLFLOW_TRACKING_PASSWORD",
    ),
    "Kueue without shutdown": (both(queued, in_spec(shutdownAfterJobFinishes=False)), "must be true under Kueue"),
    "Kueue with a selector": (both(queued, selector), "`spec.clusterSelector` must be absent under Kueue"),
    "Kueue with the autoscaler": (both(queued, in_cluster(enableInTreeAutoscaling=True)), "must be false under Kueue"),
    "Kueue with 18 groups": (both(queued, many), "at most 17 groups under Kueue, but has 18"),
    "Kueue with a group named head": (both(queued, in_workers(groupName="head")), "no group `head` under Kueue"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest_is_found(right, name):
    mutate, words = BROKEN[name]
    job = copy.deepcopy(right)
    mutate(job)
    found = kube_rules.problems(job)
    assert [problem for problem in found if words in problem], found
    assert kube_rules.problems(right) == []


@pytest.mark.parametrize(
    "mutate",
    [
        sidecar,
        queued,
        in_spec(suspend=True),
        in_cluster(rayVersion="3.0.0"),
        in_head_container(env=[DRAIN | {"value": "0"}]),
        in_head_container(env=[DRAIN | {"value": "110"}, {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": "/token"}]),
        in_head_container(env=[DRAIN | {"value": "110"}, {"name": "TOKENIZERS_PARALLELISM", "value": "false"}]),
        in_spec(runtimeEnvYAML="env_vars: {NCCL_DEBUG: INFO}"),
        in_spec(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0, deletionStrategy={"deletionRules": [RULE]}),
    ],
)
def test_what_the_rules_allow_is_no_problem(right, mutate):
    job = copy.deepcopy(right)
    mutate(job)
    assert kube_rules.problems(job) == []


def test_each_message_says_what_must_be_and_what_is(right):
    for mutate, _ in BROKEN.values():
        job = copy.deepcopy(right)
        mutate(job)
        for problem in kube_rules.problems(job):
            assert " must " in problem, problem
            assert ", but " in problem, problem
            assert problem.endswith("."), problem


def test_all_problems_are_told_at_once(right):
    job = copy.deepcopy(right)
    both(named("Swa"), in_spec(submissionMode="x"), in_cluster(rayVersion="1"), in_workers(replicas=9))(job)
    assert len(kube_rules.problems(job)) == 4


def test_what_is_no_rayjob_at_all_is_a_problem():
    assert kube_rules.problems({})
