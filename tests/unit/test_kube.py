"""RayJobs on a real HTTP server that speaks the Kubernetes API: its paths, statuses, watches and cut connections."""

import http.server
import json
import re
import shutil
import ssl
import sys
import threading
import time
from collections import deque
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes.config import incluster_config

from swa_dist import cli, config
from swa_dist.errors import ConfigError, ExitCode, ServiceError
from swa_dist.service import kube, kube_api
from swa_dist.service.kube import Kube
from swa_dist.service.submit import RECIPE_VARIABLE, Attempt
from tests.support import certificate

ROOT = Path(__file__).parents[2]
TEMPLATE = kube.load_template(ROOT / "k8s" / "overlays" / "cron" / "rayjob.yaml")
NAMESPACE = TEMPLATE["metadata"].pop("namespace")  # which would win over the kubeconfig's
KEY = "0123456789ab" + "c" * 52
NAME = "swa-0123456789ab-a1"
CUT, HANG = "cut", "hang"
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "dashboardURL": "head:8265"}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {
    "jobDeploymentStatus": "Failed",
    "jobStatus": "FAILED",
    "reason": "AppFailed",
    "message": "Job entrypoint command failed with exit code 75, last available logs:\nasked to stop",
}


class Api(http.server.ThreadingHTTPServer):
    """RayJobs by name; what it is told to answer instead; what each watch says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs, self.version = {}, 0
        self.answers = deque()  # (status, headers, body), before anything is done
        self.watches = deque()  # a list for each watch: a status of the job, an error, or what happens
        self.seen, self.over = [], threading.Event()

    def put(self, name=NAME, status=None, labels=None):
        self.version += 1
        labels = labels or self.jobs.get(name, {}).get("metadata", {}).get("labels") or {kube.RUN_KEY: KEY[:12]}
        metadata = {"name": name, "labels": labels, "resourceVersion": str(self.version)}
        self.jobs[name] = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "status": status or {}}

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    PATH = re.compile(r"/apis/ray\.io/v1/namespaces/([^/]+)/rayjobs(?:/([^/]+))?")

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if not self._begun():
            return
        query = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
        name = self.PATH.fullmatch(urlsplit(self.path).path)[2]
        if query.get("watch"):
            self._watch(query)
        elif name:
            self._send(200, self.server.jobs[name]) if name in self.server.jobs else self._say(404, "not found")
        else:
            key, _, value = query["labelSelector"].partition("=")
            labels = [(job, job["metadata"]["labels"]) for job in self.server.jobs.values()]
            found = [job for job, has in labels if key in has and value in ("", has[key])]
            self._send(200, {"kind": "RayJobList", "metadata": {"resourceVersion": "1"}, "items": found})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._begun(body):
            return
        if body["metadata"]["name"] in self.server.jobs:
            self._say(409, "already exists")
            return
        self.server.version += 1
        body["metadata"]["resourceVersion"] = str(self.server.version)
        self.server.jobs[body["metadata"]["name"]] = body
        self._send(201, body)

    def _begun(self, body=None):
        """Whether the request is to be handled: it is known, and no other answer was ordered."""
        self.server.seen.append((self.command, self.path, self.headers["Authorization"], body))
        if self.server.answers:
            status, headers, message = self.server.answers.popleft()
            self._say(status, message, headers)
            return False
        if not self.PATH.fullmatch(urlsplit(self.path).path):
            self._say(404, "the server could not find the requested resource")
            return False
        return True

    def _say(self, status, message, headers=None):
        self._send(status, {"kind": "Status", "message": message, "code": status}, headers)

    def _send(self, status, tree, headers=None):
        data = json.dumps(tree).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def _watch(self, query):
        name = query["fieldSelector"].removeprefix("metadata.name=")
        assert query["resourceVersion"]
        assert int(query["timeoutSeconds"])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in self.server.watches.popleft() if self.server.watches else []:
            if step == HANG:
                self.server.over.wait(20)
            if step in (CUT, HANG):
                self.wfile.write(b"400\r\n{half of an event")
                self.close_connection = True
                return
            if callable(step):
                step()
            elif isinstance(step, int):
                self._event("ERROR", {"kind": "Status", "code": step, "reason": "Expired", "message": "too old"})
            elif step is None:
                self._event("DELETED", self.server.jobs.pop(name))
            else:
                self.server.put(name, step)
                self._event("MODIFIED", self.server.jobs[name])
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, kind, tree):
        data = json.dumps({"type": kind, "object": tree}).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


class Record:
    """A display that keeps what is said."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def progress(self, phase, done, total, note=""):
        raise AssertionError("KubeRay tells no progress")

    def close(self):
        pass


@pytest.fixture
def api(tmp_path, monkeypatch):
    server = Api()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    contexts = [("ours", "research"), ("plain", None)]
    (tmp_path / "kubeconfig").write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "ours",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
                "users": [{"name": "u", "user": {"token": "opensesame"}}],
                "contexts": [
                    {"name": name, "context": {"cluster": "c", "user": "u"} | ({"namespace": where} if where else {})}
                    for name, where in contexts
                ],
            }
        ),
        encoding="utf-8",
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(kube_api, "_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(kube_api, "_PAUSE_SECONDS", 0.01)
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


@pytest.fixture
def place(api):
    return Kube(template=TEMPLATE)


@pytest.fixture
def recipe():
    return config.load(ROOT / "jobs" / "digits.yaml", ["cluster.address=auto"])


def followed(place):
    display = Record()
    return place.follow(NAME, display), [line.removeprefix(f"{NAME}: ") for line in display.said]


# Submitting


def test_a_run_is_created_where_the_kubeconfig_says_with_its_token(api, place, recipe):
    assert place.start(NAME, KEY, recipe)
    ((method, path, token, body),) = api.seen
    assert (method, path) == ("POST", "/apis/ray.io/v1/namespaces/research/rayjobs")
    assert token == "Bearer opensesame"
    assert body["metadata"]["namespace"] == "research"
    assert body == kube.stamp(TEMPLATE, name=NAME, run_key=KEY, recipe=recipe) | {"metadata": body["metadata"]}


def test_a_run_goes_where_its_template_says(api, recipe):
    template = TEMPLATE | {"metadata": TEMPLATE["metadata"] | {"namespace": NAMESPACE}}
    assert Kube(template=template).start(NAME, KEY, recipe)
    assert NAMESPACE == "swa-dist"
    assert [path.split("/")[5] for _, path, _, _ in api.seen] == [NAMESPACE]


def test_namespace_and_context_can_be_chosen(api, recipe):
    Kube(template=TEMPLATE, namespace="mine").start(NAME, KEY, recipe)
    Kube(template=TEMPLATE, context="plain").start("swa-0123456789ab-a2", KEY, recipe)
    assert [path.split("/")[5] for _, path, _, _ in api.seen] == ["mine", "default"]


def test_a_run_is_come_back_to_by_name_namespace_and_context(api):
    assert Kube(namespace="mine", context="plain").come_back(NAME) == [
        f"kubectl --namespace mine --context plain logs --follow job/{NAME}",
        f"swa-dist status {NAME} --to kube --namespace mine --context plain",
        f"kubectl --namespace mine --context plain delete rayjob {NAME}",
    ]


def test_a_name_is_given_out_once(api, place, recipe):
    assert place.start(NAME, KEY, recipe)
    assert not place.start(NAME, KEY, recipe)


def test_a_template_that_kuberay_would_refuse_is_not_sent(api, recipe):
    with pytest.raises(ConfigError, match=r"`spec\.rayClusterSpec` must be there"):
        Kube().start(NAME, KEY, recipe)
    assert not api.seen


def test_a_busy_server_is_asked_again_when_it_says(api, place, recipe):
    api.answers += [(429, {"Retry-After": "1"}, "slow down"), (500, {}, "internal"), (503, {}, "away")]
    began = time.monotonic()
    assert place.start(NAME, KEY, recipe)
    assert time.monotonic() - began >= 1
    assert len(api.seen) == 4


def test_asking_again_ends(api, place, recipe):
    api.answers += [(500, {}, "etcdserver: no leader")] * 50
    with pytest.raises(ServiceError, match="etcdserver: no leader"):
        place.start(NAME, KEY, recipe)
    assert len(api.seen) == 1 + kube_api._RETRIES


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "Log in anew"),
        (403, "Give the account the Role of k8s/overlays/cron/rbac.yaml"),
        (404, "Install KubeRay's operator"),
        (422, "Mend the template"),
    ],
)
def test_a_refusal_says_what_was_refused_where_and_what_to_do(api, place, recipe, status, words):
    api.answers.append((status, {}, 'rayjobs.ray.io is "not" for you'))
    with pytest.raises(ServiceError) as caught:
        place.start(NAME, KEY, recipe)
    assert caught.value.exit_code == ExitCode.DEPENDENCY_DOWN
    for part in ("`create` of rayjobs.ray.io in namespace research", f"HTTP {status}", '"not" for you', words):
        assert part in str(caught.value)
    assert len(api.seen) == 1, "asking again would not help"


def test_a_server_that_is_away_is_named(api, place, recipe):
    api.shutdown()
    api.server_close()
    with pytest.raises(ServiceError, match=r"Kubernetes at http://127\.0\.0\.1:\d+ must answer, but does not"):
        place.start(NAME, KEY, recipe)


# Where we are


def test_no_kubeconfig_is_an_error_with_a_remedy(tmp_path, api, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    with pytest.raises(ServiceError, match="Set KUBECONFIG"):
        Kube(template=TEMPLATE)


def test_an_unknown_context_is_an_error_that_names_it(api):
    with pytest.raises(ServiceError, match="elsewhere"):
        Kube(template=TEMPLATE, context="elsewhere")


def test_in_a_pod_its_service_account_is_used_and_the_certificate_checked(api, tmp_path, monkeypatch, recipe):
    served, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served, key)
    api.socket = context.wrap_socket(api.socket, server_side=True)
    for name, text in (("token", "of-the-pod"), ("namespace", "jobs\n"), ("ca.crt", served.read_text())):
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.server_address[1]))
    monkeypatch.setattr(kube_api, "_SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    assert Kube(template=TEMPLATE).start(NAME, KEY, recipe)
    assert [(path.split("/")[5], token) for _, path, token, _ in api.seen] == [("jobs", "bearer of-the-pod")]

    other, _ = certificate(tmp_path)
    (tmp_path / "ca.crt").write_text(other.read_text())
    with pytest.raises(ServiceError, match="certificate"):
        Kube(template=TEMPLATE).start(NAME, KEY, recipe)


# What there is


def test_attempts_are_those_of_the_key_by_number(api, place):
    api.put("swa-0123456789ab-a10", RUNNING)
    api.put("swa-0123456789ab-a9", FAILED)
    api.put("swa-0123456789ab-a2", DONE)
    api.put("by-hand", DONE)
    api.put("swa-ffffffffffff-a1", DONE, {kube.RUN_KEY: "f" * 12})
    reason = "Failed, job FAILED (AppFailed): Job entrypoint command failed with exit code 75, last available logs:"
    assert place.attempts(KEY) == [
        Attempt("swa-0123456789ab-a2", 2, "succeeded"),
        Attempt("swa-0123456789ab-a9", 9, "failed", reason),
        Attempt("swa-0123456789ab-a10", 10, "running"),
    ]
    assert place.attempts("e" * 64) == []


@pytest.mark.parametrize(
    ("deployment", "job", "state"),
    [
        (None, None, "running"),
        ("Initializing", "", "running"),
        ("Waiting", None, "running"),
        ("Suspended", None, "running"),
        ("Retrying", "FAILED", "running"),
        ("Running", "SUCCEEDED", "running"),
        ("Complete", "SUCCEEDED", "succeeded"),
        ("Failed", "SUCCEEDED", "succeeded"),
        ("Complete", "STOPPED", "failed"),
        ("Failed", "FAILED", "failed"),
        ("ValidationFailed", None, "failed"),
    ],
)
def test_states(api, place, deployment, job, state):
    api.put(NAME, {"jobDeploymentStatus": deployment, "jobStatus": job})
    assert [attempt.state for attempt in place.attempts(KEY)] == [state]


def test_a_run_is_described_and_all_of_them(api, place, recipe):
    place.start(NAME, KEY, recipe)
    assert place.describe(NAME) == [
        {
            "name": NAME,
            "recipe": "digits",
            "status": "pending",
            "exit_code": None,
            "started": None,
            "seconds": None,
            "run_dir": "runs/swa-0123456789ab",
            "run_key": KEY,
        }
    ]
    times = {"startTime": "2026-11-24T08:00:00Z", "endTime": "2026-11-24T09:30:00Z"}
    api.put("swa-0123456789ab-a2", DONE | times)
    api.put("swa-0123456789ab-a3", FAILED | times)
    api.put("swa-0123456789ab-a4", RUNNING | {"startTime": "2026-11-24T08:00:00Z"})
    api.put("by-hand", DONE, {"a": "b"})
    told = {one["name"][-2:]: (one["status"], one["exit_code"], one["seconds"]) for one in place.describe(None)}
    assert told["a2"] == ("succeeded", 0, 5400)
    assert told["a3"] == ("stopped", 75, 5400)
    assert told.pop("a4")[:2] == ("running", None)
    assert told.keys() == {"a1", "a2", "a3"}


def test_a_run_that_is_not_there_is_the_persons_mistake(place):
    with pytest.raises(ConfigError, match="is none in namespace research"):
        place.describe(NAME)


# Following


def test_each_change_is_said_once(api, place):
    api.put(NAME)
    api.watches.append([{"jobDeploymentStatus": "Initializing"}, RUNNING, RUNNING, RUNNING, DONE])
    code, said = followed(place)
    assert code == 0
    assert said == [
        f"logs: kubectl --namespace research logs --follow job/{NAME}",
        "Initializing",
        "Running, job RUNNING",
        f"dashboard: http://head:8265, or kubectl --namespace research port-forward service/{NAME}-head-svc 8265",
        "Complete, job SUCCEEDED",
    ]


def test_a_run_that_ended_before_is_told_at_once(api, place):
    api.put(NAME, FAILED)
    code, said = followed(place)
    assert code == 75
    assert said[1] == f"Failed, job FAILED (AppFailed): {FAILED['message']}"
    assert len(api.seen) == 1


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Job entrypoint command failed with exit code 78. No logs available.", 78),
        ("Job entrypoint command failed with exit code -9, last available logs: exit code 3", 3),
        ("Job entrypoint command failed with exit code 256", 1),
        ("The RayJob has passed the activeDeadlineSeconds.", 1),
        ("", 1),
    ],
)
def test_the_exit_code_is_the_commands_own_or_1(api, place, message, code):
    api.put(NAME, FAILED | {"message": message})
    assert followed(place)[0] == code


@pytest.mark.parametrize("broken", [[CUT], [], [RUNNING, CUT], [410], [RUNNING, 410], [500]])
def test_a_watch_that_breaks_is_taken_up_again(api, place, broken):
    api.put(NAME, {"jobDeploymentStatus": "Initializing"})
    api.watches += [broken, [RUNNING, CUT], [FAILED]]
    code, said = followed(place)
    assert code == 75
    assert [line.partition(":")[0] for line in said] == [
        "logs",
        "Initializing",
        "Running, job RUNNING",
        "dashboard",
        "Failed, job FAILED (AppFailed)",
    ]


def test_what_happens_while_nobody_watches_is_seen(api, place):
    """The run ends between two watches: the second would have nothing to tell."""
    api.put(NAME, RUNNING)
    api.watches.append([lambda: api.put(NAME, DONE), CUT])
    assert followed(place)[0] == 0


def test_a_silent_connection_is_given_up(api, place, monkeypatch):
    monkeypatch.setattr(kube_api, "_WATCH_SECONDS", 1)
    monkeypatch.setattr(kube_api, "_TIMEOUTS", (1, 0.2))
    api.put(NAME, RUNNING)
    api.watches += [[HANG], [DONE]]
    assert followed(place)[0] == 0


def test_a_server_that_is_away_for_a_while_is_waited_for(api, place):
    api.put(NAME, RUNNING)
    away = [(503, {}, "starting")] * (2 * kube_api._RETRIES)
    api.watches += [[lambda: api.answers.extend(away), CUT], [DONE]]
    assert followed(place)[0] == 0
    assert not api.answers


def test_a_server_that_stays_away_is_an_error(api, place, monkeypatch):
    monkeypatch.setattr(kube_api, "_PATIENCE_SECONDS", 0.3)
    api.put(NAME, RUNNING)
    api.watches.append([HANG])
    threading.Timer(0.2, lambda: (api.shutdown(), api.server_close(), api.over.set())).start()
    with pytest.raises(ServiceError, match="must answer, but does not"):
        followed(place)


@pytest.mark.parametrize("watched", [[None], []])
def test_a_run_that_is_deleted_is_an_error(api, place, watched):
    if watched:
        api.put(NAME, RUNNING)
        api.watches.append(watched)
    with pytest.raises(ServiceError, match=f"RayJob {NAME} must stay in namespace research"):
        followed(place)


def test_no_right_to_look_is_an_error_at_once(api, place):
    api.put(NAME, RUNNING)
    api.answers.append((403, {}, "no"))
    with pytest.raises(ServiceError, match=r"`get` of rayjobs\.ray\.io in namespace research"):
        followed(place)


# Manifests


def test_a_stamped_job_holds_the_recipe_and_its_key(recipe):
    job = kube.stamp(TEMPLATE, name=NAME, run_key=KEY, recipe=recipe)
    assert job["metadata"]["name"] == job["spec"]["jobId"] == NAME
    assert job["metadata"]["labels"][kube.RUN_KEY] == KEY[:12]
    assert job["metadata"]["labels"]["swa-dist/recipe"] == "digits"
    assert job["metadata"]["labels"]["app.kubernetes.io/part-of"] == "swa-dist"
    assert job["metadata"]["annotations"] == {kube.RUN_KEY: KEY, kube.RUN_DIR: "runs/swa-0123456789ab"}
    assert job["spec"]["entrypoint"] == "python -m swa_dist finetune env:SWA_DIST_RECIPE"
    assert _recipe_in(job) == recipe
    assert RECIPE_VARIABLE not in str(TEMPLATE), "the template is left alone"


def test_stamping_twice_is_stamping_once(recipe):
    once = kube.stamp(TEMPLATE, name=NAME, run_key=KEY, recipe=recipe)
    again = kube.stamp(once | {"status": DONE}, name=NAME, run_key=KEY, recipe=recipe)
    assert again == once


def test_kubernetes_puts_no_variables_into_a_recipe(recipe):
    odd = config.replace(recipe, **{"data.name": "$(HOME) $$(HOME) $ $$", "name": "digits-"})
    job = kube.stamp(TEMPLATE, name=NAME, run_key=KEY, recipe=odd)
    assert _recipe_in(job) == odd
    assert job["metadata"]["labels"]["swa-dist/recipe"] == "digits"


def _recipe_in(job):
    """The recipe as a process in the head's container finds it."""
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    variables = {}
    for item in head["env"]:
        # Kubernetes' rule: $$ is a dollar, $(NAME) the variable before it of that name, and any other dollar itself.
        variables[item["name"]] = re.sub(
            r"\$(\$|\((\w+)\))",
            lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]),
            item["value"],
        )
    return config.parse(variables[RECIPE_VARIABLE], RECIPE_VARIABLE)


def test_a_template_with_problems_is_told_with_all_of_them(recipe):
    broken = TEMPLATE | {"spec": TEMPLATE["spec"] | {"submissionMode": "x", "backoffLimit": -1}}
    with pytest.raises(ConfigError) as caught:
        kube.stamp(broken, name=NAME, run_key=KEY, recipe=recipe)
    assert "2 problems" in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG


@pytest.mark.parametrize("text", ["{", "kind: Service", "kind: RayJob\n---\nkind: RayJob", "- a", ""])
def test_a_template_must_be_one_rayjob(tmp_path, text):
    path = tmp_path / "template.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="RayJob"):
        kube.load_template(path)
    with pytest.raises(ConfigError, match="must be a YAML file"):
        kube.load_template(tmp_path / "nothing.yaml")


def test_an_unknown_overlay_is_told_the_known_ones():
    with pytest.raises(ConfigError, match="cpu-smoke, cron, gpu, gpu-spot, kueue"):
        kube.render("gpus")


def test_no_kubectl_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceError, match="kubectl must be installed"):
        kube.render("gpu")


# The cron


@pytest.fixture
def tick(api, few_digits, tmp_path, monkeypatch, capsys):
    """What the cron's pod does at each tick, by its own manifest; its mounts, images and weights are the test's."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the overlay, is not installed")
    (cron,) = (d for d in kube.render("cron") if d["kind"] == "CronJob")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    mounts = {
        "/etc/swa-dist/recipes/resnet50-swa5.yaml": str(ROOT / "jobs" / "digits.yaml"),
        "/etc/swa-dist/rayjob": str(ROOT / "k8s" / "overlays" / "cron"),
        "/runs": str(tmp_path / "runs"),
    }
    images = tmp_path / "images"
    shutil.copytree(few_digits, images)
    settings = {"data.train": images / "train", "data.val": images / "val", "model.weights_sha256": "a" * 64}

    def run():
        for container in (*pod["initContainers"], *pod["containers"]):
            command = container["command"] + container["args"]
            for mount, here in mounts.items():
                command = [word.replace(mount, here) for word in command]
            command += [f"--set={name}={value}" for name, value in settings.items()]
            monkeypatch.setattr(sys, "argv", command)
            try:
                cli.main()
            except SystemExit as end:
                if end.code:
                    return int(end.code), capsys.readouterr().out
        return 0, capsys.readouterr().out

    run.images = images
    return run


def test_a_cron_runs_what_is_new_skips_what_is_finished_and_fails_with_what_fails(api, tick):
    api.watches.append([RUNNING, DONE])
    code, said = tick()
    assert (code, len(api.jobs)) == (0, 1)
    assert "submitted digits as swa-" in said
    code, said = tick()
    assert (code, len(api.jobs)) == (0, 1)
    assert "finished already: swa-" in said
    image = next((tick.images / "train" / "3").iterdir())
    shutil.copy(image, image.with_name("another.jpg"))  # other images, another key
    api.watches.append([RUNNING, FAILED])
    code, said = tick()
    assert (code, len(api.jobs)) == (75, 2)
    api.watches.append([RUNNING, DONE])
    code, said = tick()
    assert (code, len(api.jobs)) == (0, 3)
    assert "did not finish" in said
    assert [name[-3:] for name in api.jobs] == ["-a1", "-a1", "-a2"]
    assert {verb for verb, *_ in api.seen} == {"GET", "POST"}  # which is all that its role allows


def test_of_two_crons_at_once_one_submits_and_both_wait(api, tick, monkeypatch):
    start = kube.Kube.start

    def late(self, name, run_key, recipe):
        assert start(self, name, run_key, recipe)  # by the other, between the look and the submission
        return start(self, name, run_key, recipe)

    monkeypatch.setattr(kube.Kube, "start", late)
    api.watches.append([RUNNING, DONE])
    code, said = tick()
    assert (code, len(api.jobs)) == (0, 1)
    assert "by another a moment ago; attached to it" in said
