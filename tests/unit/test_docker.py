"""The image is made in an order that spares torch, of nothing but what git tracks, and belongs to root.

What it can do is for `make image-test`, which builds and runs it.
"""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths  # the rules of .dockerignore, as Docker's own client has them

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def stages() -> list[list[str]]:
    """The instructions of each stage, a line each; what stands before the first FROM is of the first."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = [re.sub(r"\s+", " ", line) for line in re.sub(r"\\\n", " ", text).splitlines() if line]
    found: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("FROM ") and any(one.startswith("FROM ") for one in found[-1]):
            found.append([])
        found[-1].append(line)
    return found


def image() -> list[str]:
    """The instructions that make the image, those of the stages that it is FROM too."""
    *others, last = stages()
    named = {line.split()[-1]: stage for stage in others for line in stage if re.match(r"FROM .* AS ", line)}
    line = last[0].split()[1]
    made = last
    while line in named:
        made = named[line] + made
        line = next(one for one in named[line] if one.startswith("FROM ")).split()[1]
    return made


def position(pattern: str) -> int:
    """Where the one instruction is that matches."""
    (found,) = [number for number, line in enumerate(image()) if re.search(pattern, line)]
    return found


def runs() -> list[str]:
    return [line for line in image() if line.startswith("RUN ")]


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def sent(folder: Path) -> set[str]:
    """The files of a folder that the builder is sent."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    # The client sends .dockerignore along, for the builder to read.
    return {name for name in exclude_paths(str(folder), patterns) if (folder / name).is_file()} - {".dockerignore"}


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    found = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


# The order


def test_the_base_is_the_builders_choice() -> None:
    assert [line for line in image() if line.startswith(("ARG BASE_IMAGE=", "FROM ${"))] == [
        "ARG BASE_IMAGE=debian:bookworm-slim",
        "FROM ${BASE_IMAGE} AS base",
    ]


def test_no_code_is_in_reach_when_the_dependencies_are_installed() -> None:
    before = image()[: position(r"--requirement /opt/requirements\.txt")]
    copied = [line for line in before if line.startswith(("COPY ", "ADD "))]
    assert copied == ["COPY --from=requirements /requirements.txt /opt/", "COPY constraints.txt /opt/"]
    (requirements,) = [stage for stage in stages() if stage[0].endswith(" AS requirements")]
    assert [line for line in requirements if line.startswith(("COPY ", "ADD "))] == ["COPY pyproject.toml /"]


def test_pip_installs_what_the_constraints_say_or_nothing_from_outside() -> None:
    installs = [line for line in runs() if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        assert "--constraint /opt/constraints.txt" in line or ("--no-index" in line and "--no-deps" in line)


def test_what_changes_with_each_build_comes_after_all_that_takes_time() -> None:
    assert position("^ARG REVISION") > max(number for number, line in enumerate(image()) if line.startswith("RUN "))


def test_the_last_step_imports_all_that_the_service_is_made_of_as_the_user() -> None:
    smoke = runs()[-1]
    imported = set(re.findall(r"[\w.]+", re.search(r"'import ([^']*)'", smoke)[1]))
    assert imported >= {
        *("torch", "torchvision", "ray", "ray.train", "nvidia.dali", "mlflow", "boto3", "kubernetes", "swa_dist.cli")
    }
    assert "swa-dist --help" in smoke
    assert image().index(smoke) > position("^USER ")


# The user


def test_the_user_is_a_number_that_kubernetes_can_tell_is_not_root() -> None:
    assert [line for line in image() if line.startswith("USER ")] == ["USER 1000:1000"]


def test_nothing_is_given_to_the_user_but_a_home() -> None:
    assert not [line for line in image() if re.search(r"\bchown\b|\bchmod\b", line)]


# What is not in it


def test_what_pip_goes_by_is_there_while_it_runs_and_nowhere_else() -> None:
    for stage in stages():
        for line in stage:
            if line.startswith("RUN ") and re.search(r"\bpip (install|wheel)\b", line) and "--no-index" not in line:
                assert "--mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem" in line
                assert "--no-cache-dir" in line
            if line.startswith(("ARG ", "ENV ", "COPY ")):
                assert not re.search(r"(?i)PIP_|pip\.conf|://|token|password|secret|proxy", line)


def test_the_builder_is_sent_what_git_tracks_of_the_package_and_nothing_else() -> None:
    wanted = {name for name in tracked() if re.match(r"(swa_dist|jobs|k8s)/", name)}
    assert len(wanted) > 40
    assert sent(ROOT) & tracked() == wanted | {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}


@pytest.mark.parametrize("place", ["", "swa_dist", "jobs", "swa_dist/service"])
def test_the_builder_is_sent_nothing_that_git_ignores(place: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    names = [line.strip("/").replace("*", "x") for line in (ROOT / ".gitignore").read_text().splitlines()]
    for name in names:
        (tmp_path / place / name).mkdir(parents=True)
        (tmp_path / place / name / "file").touch()
    ignored = subprocess.run(
        ["git", "ls-files", "--others", "--ignored", "--exclude-standard"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(ignored) > 5
    assert not sent(tmp_path) & set(ignored)


@pytest.mark.parametrize("name", [".env", ".git/config", "swa_dist/.netrc", "k8s/base/secrets.env", "k8s/tls.key"])
def test_the_builder_is_sent_no_secrets(name: str, tmp_path: Path) -> None:
    for each in (name, "swa_dist/cli.py"):
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).touch()
    assert sent(tmp_path) == {"swa_dist/cli.py"}


# Kubernetes


def test_the_manifests_ask_for_the_user_that_the_image_has() -> None:
    asked = "".join(path.read_text() for path in (ROOT / "k8s").rglob("*.yaml"))
    assert set(re.findall(r"runAs(?:User|Group): *(\d+)", asked)) == {"1000"}
