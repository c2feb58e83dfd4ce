"""RayJobs against KubeRay's own definition of them, made strict: what it doesn't know it would drop without a word."""

import copy

import jsonschema
import pytest
import yaml

from tests.k8s.conftest import K8S

CRD = K8S.parents[1] / "shared" / "crds" / "ray.io_rayjobs.yaml"


def strict(schema):
    """An OpenAPI schema of Kubernetes as a JSON schema that takes no unknown field."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["type"] = ["integer", "string"]
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = strict(schema[key])
    if "properties" in schema:
        made["properties"] = {name: strict(one) for name, one in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    return made


@pytest.fixture(scope="session")
def validator():
    if not CRD.is_file():
        pytest.skip(f"KubeRay's definition of a RayJob is not at {CRD}")
    crd = yaml.load(CRD.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def errors(validator, job):
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(job)]


def test_a_rayjob_is_as_kuberay_defines_it(validator, rayjob):
    assert errors(validator, rayjob) == []


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (lambda spec: spec.update(activDeadlineSeconds=1), "activDeadlineSeconds"),
        (lambda spec: spec.update(backoffLimit="2"), "$.spec.backoffLimit"),
        (lambda spec: spec["rayClusterSpec"]["headGroupSpec"].pop("template"), "'template' is a required property"),
        (lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
        (lambda spec: _pod(spec).update(securityContxt={}), "securityContxt"),
        (lambda spec: _pod(spec)["containers"][0].update(volumeMount=[]), "volumeMount"),
        (lambda spec: _pod(spec)["containers"][0]["resources"]["limits"].update(cpu=[]), "limits.cpu"),
    ],
)
def test_a_mistyped_field_is_found(validator, rayjobs, mutate, words):
    job = copy.deepcopy(rayjobs["gpu"])
    mutate(job["spec"])
    assert any(words in error for error in errors(validator, job))


def _pod(spec):
    return spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
