"""`swa-dist` as tests.support runs it, forked from a process that has imported torch, but in the environment that the
test has: the fork server has the one that it was started in."""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from swa_dist.training.world import World
from tests import support


@dataclass(frozen=True)
class Running:
    """A command that may not have ended."""

    arguments: list[str]
    workers: support.Workers
    printed: Path

    def ended(self, timeout_seconds: float = 500) -> subprocess.CompletedProcess[str]:
        (code,) = self.workers.results(timeout_seconds)
        out, err = ((self.printed / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(self.arguments, code, out, err)


def start(*arguments: str, cwd: Path) -> Running:
    printed = Path(tempfile.mkdtemp(prefix="swa-test-"))
    told = (dict(os.environ), list(arguments), str(cwd), str(printed))
    return Running(list(arguments), support.start_workers(_main, 1, *told), printed)


def swa_dist(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return start(*arguments, cwd=cwd).ended()


def _main(world: World, environment: dict[str, str], arguments: list[str], cwd: str, printed: str) -> int:
    os.environ.clear()
    os.environ.update(environment)
    return support._main(world, arguments, cwd, printed)
