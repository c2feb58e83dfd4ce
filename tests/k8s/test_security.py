"""Pod Security "restricted" and more, for every pod; who may do and reach what."""

import copy

import pytest

from tests.k8s.conftest import containers, of_kind

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(pod):
    """What Kubernetes' "restricted" level forbids of a pod's spec."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [f"volume {v['name']}" for v in pod.get("volumes", []) if not (v.keys() - {"name"}) <= VOLUMES]
    of_all = pod.get("securityContext", {})
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        own = container.get("securityContext", {})
        both = of_all | own
        capabilities = own.get("capabilities", {})
        kept = {
            "runAsNonRoot": both.get("runAsNonRoot") is True,
            "runAsUser": both.get("runAsUser") != 0,
            "seccompProfile": both.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities": "ALL" in capabilities.get("drop", [])
            and set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "procMount": own.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }
        found += [f"{container['name']}: {name}" for name, right in kept.items() if not right]
    return found


def test_every_pod_is_restricted(pods):
    assert [violation for pod in pods.values() for violation in violations(pod["spec"])] == []


def _of_container(**fields):
    return lambda pod: pod["containers"][0]["securityContext"].update(fields)


@pytest.mark.parametrize(
    ("mutate", "name"),
    [
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork"),
        (lambda pod: pod["volumes"].append({"name": "node", "hostPath": {"path": "/"}}), "volume node"),
        (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "ray-head: runAsNonRoot"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "ray-head: seccompProfile"),
        (_of_container(runAsUser=0), "ray-head: runAsUser"),
        (_of_container(privileged=True), "ray-head: privileged"),
        (_of_container(allowPrivilegeEscalation=True), "ray-head: allowPrivilegeEscalation"),
        (_of_container(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}), "ray-head: capabilities"),
        (lambda pod: pod["containers"][0].pop("securityContext"), "ray-head: allowPrivilegeEscalation"),
    ],
)
def test_a_pod_that_is_not_restricted_is_found(rayjobs, mutate, name):
    pod = copy.deepcopy(rayjobs["gpu"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"])
    mutate(pod)
    assert name in violations(pod)


def test_the_namespace_enforces_it(documents):
    (namespace,) = of_kind(documents, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_root_folders_are_read_only_and_tmp_and_home_are_not(pods):
    for pod in pods.values():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            home = {item["name"]: item["value"] for item in container["env"]}["HOME"]
            assert container["workingDir"] == home
            for path in ("/tmp", home):
                assert "emptyDir" in volumes[mounted[path]["name"]]
                assert not mounted[path].get("readOnly")
            assert mounted.get("/data", {}).get("readOnly", True), "nothing writes among the images"


def test_only_the_cron_has_a_token_of_kubernetes(documents, pods):
    assert {role for role, pod in pods.items() if pod["spec"]["automountServiceAccountToken"]} == pods.keys() & {"cron"}
    for account in of_kind(documents, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False


def test_the_cron_may_submit_and_look_and_nothing_else(rendered):
    documents = rendered["cron"]
    (role,) = of_kind(documents, "Role").values()
    (rule,) = role["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list", "watch"]}
    (binding,) = of_kind(documents, "RoleBinding").values()
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    pod = of_kind(documents, "CronJob")["swa-dist"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert [subject["name"] for subject in binding["subjects"]] == [pod["serviceAccountName"]]


def test_only_the_cron_overlay_gives_rights(rendered):
    for name in rendered.keys() - {"cron"}:
        assert not of_kind(rendered[name], "Role")
        assert not of_kind(rendered[name], "RoleBinding")


def test_secrets_come_by_reference_and_may_be_absent(pods):
    for role in pods.keys() - {"submitter"}:
        for container in containers(pods[role]):
            references = [item["secretRef"] for item in container["envFrom"] if "secretRef" in item]
            assert references == [{"name": "swa-dist-secrets", "optional": True}]


def test_nothing_that_is_rendered_looks_like_a_secret(documents):
    for word in ("AWS_SECRET_ACCESS_KEY", "AKIA", "PASSWORD", "TRACKING_TOKEN", "stringData", "runtimeEnvYAML"):
        assert word not in str(documents)


def test_the_disruption_budget_keeps_the_head_and_no_other(documents, pods):
    (budget,) = of_kind(documents, "PodDisruptionBudget").values()
    assert budget["spec"]["maxUnavailable"] == 0
    assert {role for role, pod in pods.items() if selects(budget["spec"]["selector"], pod["metadata"]["labels"])} == {
        "head"
    }


# Network: the policies, evaluated


def selects(selector, labels):
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    assert {one["operator"] for one in selector.get("matchExpressions", [])} <= {"In"}
    return wanted and all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))


def allowed(documents, direction, labels, other, port):
    """Whether a pod may be reached by (or reach) `other`, (namespace, labels), at a TCP port."""
    rules = []
    for policy in of_kind(documents, "NetworkPolicy").values():
        if selects(policy["spec"]["podSelector"], labels) and direction in policy["spec"]["policyTypes"]:
            rules += policy["spec"].get(direction.lower(), [])
    namespace, other_labels = other
    for rule in rules:
        peers = rule.get("from" if direction == "Ingress" else "to")
        at = "ports" not in rule or {"protocol": "TCP", "port": port} in rule["ports"]
        if at and (peers is None or any(_is_peer(peer, namespace, other_labels) for peer in peers)):
            return True
    return False


def _is_peer(peer, namespace, labels):
    assert peer.keys() <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" in peer:
        where = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    else:
        where = namespace == "swa-dist"
    return where and selects(peer.get("podSelector", {}), labels)


OPERATOR = ("kuberay-operator", {"app.kubernetes.io/name": "kuberay-operator"})
STRANGERS = [
    ("swa-dist", {"app": "other"}),
    ("elsewhere", {"app.kubernetes.io/part-of": "swa-dist"}),
    ("elsewhere", {"app.kubernetes.io/name": "kuberay-operator"}),
    ("kuberay-operator", {"app": "other"}),
]


def test_only_our_pods_and_the_operator_reach_ray(documents, pods):
    head = pods["head"]["metadata"]["labels"]
    for port in (6379, 8265, 10001, 52365, 12345):
        assert not [stranger for stranger in STRANGERS if allowed(documents, "Ingress", head, stranger, port)]
        for pod in pods.values():
            ours = ("swa-dist", pod["metadata"]["labels"])
            assert allowed(documents, "Ingress", head, ours, port)
            assert allowed(documents, "Egress", ours[1], ("swa-dist", head), port)
        assert allowed(documents, "Ingress", head, OPERATOR, port) == (port == 8265)
    for role in pods.keys() - {"head"}:
        assert not allowed(documents, "Ingress", pods[role]["metadata"]["labels"], OPERATOR, 8265)


def test_pods_reach_names_storage_and_mlflow_and_only_the_cron_the_api(documents, pods):
    internet, mlflow = ("", {}), ("mlflow", {"app.kubernetes.io/name": "mlflow"})
    for role, pod in pods.items():
        labels = pod["metadata"]["labels"]
        assert allowed(documents, "Egress", labels, internet, 53)
        assert allowed(documents, "Egress", labels, internet, 443)
        assert allowed(documents, "Egress", labels, mlflow, 5000)
        assert not allowed(documents, "Egress", labels, internet, 5000)
        assert not allowed(documents, "Egress", labels, internet, 80)
        assert allowed(documents, "Egress", labels, internet, 6443) == (role == "cron")
