"""What the overlays render to is what Kubernetes and KubeRay take, and fits the recipes."""

import os
import re
import shlex
import subprocess
import zoneinfo
from pathlib import Path

import kubernetes_validate
import pytest
from kubernetes.utils import parse_quantity
from ruamel.yaml import YAML

from swa_dist import config
from swa_dist.service import data, identity, kube, kube_rules
from swa_dist.service.progress import display
from tests.k8s.conftest import K8S, containers, of_kind

KUBERNETES = "1.34"
JOBS = K8S.parent / "jobs"
RECIPES = "/etc/swa-dist/recipes/"


def validate(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


# As Kubernetes has it


def test_core_objects_are_valid(documents):
    for document in documents:
        if document["kind"] != "RayJob":
            validate(document)


def test_pod_templates_are_valid(pods):
    for pod in pods.values():
        validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod})


def test_the_example_of_claims_is_valid_and_names_what_the_pods_mount(rayjobs):
    claims = list(YAML(typ="safe").load_all((K8S / "claims.yaml").read_text(encoding="utf-8")))
    for claim in claims:
        validate(claim)
    mounted = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in rayjobs["gpu"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert mounted == {claim["metadata"]["name"] for claim in claims}


def test_a_mistyped_field_of_a_pod_is_found(rayjobs):
    pod = rayjobs["gpu"]["spec"]["submitterPodTemplate"]
    broken = pod | {"spec": {**pod["spec"], "securityContxt": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="securityContxt"):
        validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": broken})


def test_all_objects_are_in_one_namespace_and_none_is_there_twice(documents):
    named = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(named) == len(set(named))
    assert {document["metadata"].get("namespace") for document in documents if document["kind"] != "Namespace"} == {
        "swa-dist"
    }
    assert {document["metadata"]["labels"]["app.kubernetes.io/part-of"] for document in documents} == {"swa-dist"}


def test_nothing_is_published(documents):
    assert not {"Service", "Ingress", "Secret", "ClusterRole"} & {document["kind"] for document in documents}


def test_every_mount_has_its_volume_and_every_volume_a_mount(pods):
    for pod in pods.values():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        assert mounted == volumes


def test_every_config_map_that_pods_name_is_there(documents, pods):
    named = set()
    for pod in pods.values():
        named |= {volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume}
        for container in containers(pod):
            named |= {item["configMapRef"]["name"] for item in container.get("envFrom", []) if "configMapRef" in item}
    assert named == of_kind(documents, "ConfigMap").keys()


def test_the_service_accounts_that_pods_run_as_are_there(documents, pods):
    assert {pod["spec"]["serviceAccountName"] for pod in pods.values()} == of_kind(documents, "ServiceAccount").keys()


@pytest.mark.parametrize("name", ["gpu", "cron"])
def test_an_overlay_of_ones_own_sets_image_and_namespace_everywhere(rendered, tmp_path, name):
    base = os.path.relpath(K8S / "overlays" / name, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{base}]\nnamespace: mine\nimages: [{{name: swa-dist, newName: registry/swa, newTag: '7'}}]\n",
        encoding="utf-8",
    )
    documents = kube.render(str(tmp_path))
    assert len(documents) == len(rendered[name])
    text = re.findall(r"'image': '([^']*)'", str([one for one in documents if one["kind"] in ("RayJob", "CronJob")]))
    assert set(text) == {"registry/swa:7"}
    assert {document["metadata"].get("namespace", "mine") for document in documents} == {"mine"}
    for binding in of_kind(documents, "RoleBinding").values():
        assert {subject["namespace"] for subject in binding["subjects"]} == {"mine"}


# The recipes


def test_the_config_map_holds_each_recipe_as_it_is(documents):
    held = of_kind(documents, "ConfigMap")["swa-dist-recipes"]["data"]
    shipped = {path.name: path.read_bytes() for path in JOBS.glob("*.yaml")}
    assert {name: text.encode() for name, text in held.items()} == shipped


def settings(words):
    """The recipe file and the overrides in a command line."""
    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    overrides += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    named = [word.removeprefix("--recipe=") for word in words if RECIPES in word]
    return (named or [RECIPES + "digits.yaml"])[0], overrides


def resolved(words):
    path, overrides = settings(words)
    assert path.startswith(RECIPES)
    return config.load(JOBS / path.removeprefix(RECIPES), overrides)


def mounts(container):
    return {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}


def test_the_entrypoint_is_a_recipe_on_this_ray_with_paths_that_are_mounted(rayjob, pods):
    words = shlex.split(rayjob["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "swa_dist"]
    recipe = resolved(words)
    assert (recipe.cluster.launcher, recipe.cluster.address) == ("ray", "auto")
    for role in pods.keys() - {"submitter", "cron"}:
        mounted = mounts(pods[role]["spec"]["containers"][0])
        assert mounted[str(Path(recipe.output.dir))] is False
        for path in (recipe.data.train, recipe.data.val):
            assert any(path.startswith(mount + "/") for mount in mounted), path


def test_the_workers_of_the_recipe_fit_the_cluster(rayjob):
    recipe, cluster = resolved(shlex.split(rayjob["spec"]["entrypoint"])), rayjob["spec"]["rayClusterSpec"]
    have = {"cpu": float(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"]), "gpu": 0}
    for group in cluster.get("workerGroupSpecs", []):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) % recipe.cluster.cpus_per_worker == 0
        have["cpu"] += group["replicas"] * int(limits["cpu"])
        have["gpu"] += group["replicas"] * int(limits["nvidia.com/gpu"])
    assert have["cpu"] == recipe.cluster.num_workers * recipe.cluster.cpus_per_worker
    assert have["gpu"] == (recipe.cluster.num_workers if recipe.data.kind == "imagenet" else 0)


def test_requests_are_within_limits_and_gpus_are_asked_for_by_both(pods):
    for pod in pods.values():
        for container in containers(pod):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests.keys() == limits.keys() >= {"cpu", "memory"}
            assert all(parse_quantity(requests[unit]) <= parse_quantity(limits[unit]) for unit in requests)
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")


# RayJobs


def test_a_rayjob_has_no_problems(rayjob):
    assert kube_rules.problems(rayjob) == []


def test_the_ray_version_is_the_images(rayjob):
    pinned = re.search(r"(?m)^ray==(.+)$", (K8S.parent / "constraints.txt").read_text(encoding="utf-8"))[1]
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    assert rayjob["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_a_run_is_bounded_and_its_cluster_goes_with_it(rayjob):
    spec = rayjob["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert 0 < spec["ttlSecondsAfterFinished"] <= 3600
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


def test_workers_save_their_state_before_they_are_killed(pods):
    for role in pods.keys() - {"submitter", "cron"}:
        pod = pods[role]["spec"]
        drain = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}[kube_rules.DRAIN_VARIABLE]
        assert 60 <= int(drain) < pod["terminationGracePeriodSeconds"]


def test_one_smoke_test_runs_on_the_head_alone(rayjobs):
    cluster = rayjobs["cpu-smoke"]["spec"]["rayClusterSpec"]
    assert "workerGroupSpecs" not in cluster
    pod = cluster["headGroupSpec"]["template"]["spec"]
    assert not [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    recipe = resolved(shlex.split(rayjobs["cpu-smoke"]["spec"]["entrypoint"]))
    assert recipe.tracking.uri.startswith("sqlite:////runs/")
    assert recipe.model.weights.startswith("/runs/")


@pytest.mark.parametrize("name", ["gpu", "gpu-spot", "kueue", "cron"])
def test_a_head_runs_no_workers(rayjobs, name):
    assert rayjobs[name]["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_gpu_is_one_node_and_spot_one_gpu_a_node(rayjobs):
    (whole,) = rayjobs["gpu"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [whole[name] for name in ("minReplicas", "replicas", "maxReplicas")] == [1, 1, 1]
    (spot,) = rayjobs["gpu-spot"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    recipe = resolved(shlex.split(rayjobs["gpu-spot"]["spec"]["entrypoint"]))
    assert spot["minReplicas"] == recipe.cluster.min_workers == 2
    assert spot["replicas"] == spot["maxReplicas"] == recipe.cluster.num_workers
    tolerated = {item["key"] for item in spot["template"]["spec"]["tolerations"]}
    assert tolerated > {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert "nvidia.com/gpu" in {item["key"] for item in whole["template"]["spec"]["tolerations"]}


def test_a_head_keeps_off_nodes_that_are_taken_away(rayjob):
    pod = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {rule["operator"] for rule in term["matchExpressions"]} == {"NotIn"}
    assert "karpenter.sh/capacity-type" in {rule["key"] for rule in term["matchExpressions"]}
    assert "tolerations" not in pod


def test_kueue_is_gpu_with_a_queue(rayjobs):
    labels = {**rayjobs["kueue"]["metadata"]["labels"]}
    assert labels.pop(kube_rules.QUEUE_LABEL)
    assert {**rayjobs["kueue"]["metadata"], "labels": labels} == rayjobs["gpu"]["metadata"]
    assert rayjobs["kueue"]["spec"] == rayjobs["gpu"]["spec"]


# Submissions


def test_a_recipe_is_rendered_as_its_submission(rendered, few_digits, tmp_path):
    recipe = config.load(
        JOBS / "digits.yaml",
        [
            f"data.train={few_digits}/train",
            f"data.val={few_digits}/val",
            f"data.index={tmp_path}/index",
            "output.dir=/runs",
            f"model.weights_sha256={'a' * 64}",
        ],
    )
    data.write_indices(recipe, display())
    documents = list(YAML(typ="safe").load_all(kube.rendered(recipe, "kueue")))
    job = kube.template_of(documents)
    assert kube_rules.problems(job) == []
    key = identity.identify(recipe).run_key
    assert job["metadata"]["name"] == config.attempt_name(key, 1)
    assert job["metadata"]["annotations"][kube.RUN_DIR] == f"/runs/swa-{key[:12]}"
    assert kube_rules.QUEUE_LABEL in job["metadata"]["labels"]
    assert "address: auto" in str(job["spec"]["rayClusterSpec"]["headGroupSpec"])
    rest = [document for document in rendered["kueue"] if document["kind"] != "RayJob"]
    assert [document for document in documents if document is not job] == rest


# The cron


def test_the_cron_submits_gpus_rayjob(rendered, rayjobs):
    assert rayjobs["cron"] == rayjobs["gpu"], "Run `python -m tests.k8s.regenerate`, and read the difference."
    held = of_kind(rendered["cron"], "ConfigMap")["swa-dist-rayjob"]["data"]["rayjob.yaml"]
    assert held == (K8S / "overlays" / "cron" / "rayjob.yaml").read_text(encoding="utf-8")
    assert not of_kind(rendered["cron"], "RayJob"), "the cron makes RayJobs, and starts with none"


def test_the_cron_runs_one_at_a_time_and_tries_once(rendered):
    spec = of_kind(rendered["cron"], "CronJob")["swa-dist"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["timeZone"] in zoneinfo.available_timezones()
    assert re.fullmatch(r"(\S+ ){4}\S+", spec["schedule"])
    assert spec["startingDeadlineSeconds"] >= 100, "less is never met: the controller looks each 10 seconds"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert spec["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_a_cron_of_ones_own_submits_another_rayjob(rayjobs, tmp_path):
    """As k8s/README.md says: all that a folder renders to will do as the template."""
    spot = subprocess.run(
        ["kubectl", "kustomize", str(K8S / "overlays" / "gpu-spot")], check=True, capture_output=True, text=True
    )
    (tmp_path / "rayjob.yaml").write_text(spot.stdout, encoding="utf-8")
    base = os.path.relpath(K8S / "overlays" / "cron", tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{base}]\n"
        "configMapGenerator: [{name: swa-dist-rayjob, behavior: replace, files: [rayjob.yaml]}]\n",
        encoding="utf-8",
    )
    held = of_kind(kube.render(str(tmp_path)), "ConfigMap")["swa-dist-rayjob"]["data"]["rayjob.yaml"]
    (tmp_path / "mounted.yaml").write_text(held, encoding="utf-8")
    assert kube.load_template(tmp_path / "mounted.yaml") == rayjobs["gpu-spot"]


def test_the_cron_indexes_the_images_that_it_then_submits(rendered):
    pod = of_kind(rendered["cron"], "CronJob")["swa-dist"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (index,), (submit,) = pod["initContainers"], pod["containers"]
    assert index["command"] == ["swa-dist", "data", "index"]
    assert submit["command"][:2] == ["swa-dist", "submit"]
    indexed, submitted = (resolved(one["command"] + one["args"]) for one in (index, submit))
    assert indexed.data == submitted.data
    assert mounts(index)["/runs"] is False
    template = next(word for word in submit["args"] if word.startswith("--template=")).removeprefix("--template=")
    assert template == "/etc/swa-dist/rayjob/rayjob.yaml"
    assert mounts(submit)[str(Path(template).parent)]
