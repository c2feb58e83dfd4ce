"""Every overlay, rendered once, and the pods in it."""

import shutil
from pathlib import Path

import pytest

from swa_dist.service import kube

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())


@pytest.fixture(scope="session")
def rendered():
    """The documents of each overlay, by its name."""
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl here, which renders the overlays")
    return {overlay: kube.render(overlay) for overlay in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def overlay(request):
    return request.param


@pytest.fixture
def documents(rendered, overlay):
    return rendered[overlay]


@pytest.fixture(scope="session")
def rayjobs(rendered):
    """The RayJob of each overlay; of cron, the one that it submits."""
    found = {name: kube.template_of(documents) for name, documents in rendered.items() if name != "cron"}
    return found | {"cron": kube.load_template(K8S / "overlays" / "cron" / "rayjob.yaml")}


@pytest.fixture
def rayjob(rayjobs, overlay):
    return rayjobs[overlay]


@pytest.fixture
def pods(documents, rayjob):
    """The pod templates of an overlay, by what they are for."""
    spec = rayjob["spec"]
    cluster = spec["rayClusterSpec"]
    found = {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster.get("workerGroupSpecs", [])}
    for cron in of_kind(documents, "CronJob").values():
        found["cron"] = cron["spec"]["jobTemplate"]["spec"]["template"]
    return found


def containers(pod):
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def of_kind(documents, kind):
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}
