"""Write the RayJob that the cron submits anew, after a change of the gpu overlay: `python -m tests.k8s.regenerate`."""

from pathlib import Path

from ruamel.yaml import YAML

from swa_dist.service import kube

RAYJOB = Path(__file__).parents[2] / "k8s" / "overlays" / "cron" / "rayjob.yaml"
HEADER = "# The RayJob of the gpu overlay, for `swa-dist submit`. Made by `python -m tests.k8s.regenerate`.\n"


def main() -> None:
    writer = YAML()
    writer.width = 1000
    with RAYJOB.open("w", encoding="utf-8") as file:
        file.write(HEADER)
        writer.dump(kube.template_of(kube.render("gpu")), file)
    print(f"{RAYJOB}: read `git diff` before you commit it.")


if __name__ == "__main__":
    main()
