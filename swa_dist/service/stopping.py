"""Who asks a run to stop: a signal to this process, or a request in the run's folder."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from swa_dist.errors import Stopped, SwaDistError
from swa_dist.service.layout import STOP_REQUEST
from swa_dist.storage.folder import Folder

_LOOK_EVERY_SECONDS = 2.0


@contextlib.contextmanager
def requested(folder: Folder) -> Iterator[Callable[[], bool]]:
    """Within the block, whether a stop request lies in a run's folder. A thread looks, since on S3 that is a request,
    which can take its time."""
    found, ended = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_EVERY_SECONDS):
            with contextlib.suppress(SwaDistError, OSError):  # storage that is away for a moment is no reason to stop
                if folder.has(STOP_REQUEST):
                    found.set()
                    return

    threading.Thread(target=look, name="stop-request", daemon=True).start()
    try:
        yield found.is_set
    finally:
        ended.set()


def never() -> bool:
    """Who asks nobody."""
    return False


class Termination:
    """SIGTERM to this process, from `installed` on. It raises Stopped in the main thread, except within `awaited`,
    where it is waited for that someone asks. Elsewhere than in a main thread nothing is changed."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._awaited = False

    @property
    def told(self) -> bool:
        return self._told.is_set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block. Once more within another library's, such as Ray's, which has a handler of its own."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[Callable[[], bool]]:
        """Within the block, whether this process was told to end; it is to end in its own time. A second SIGTERM ends
        it at once, but not under torchrun, which sends them to all that are left when one has ended."""
        self._awaited = True
        try:
            yield self._told.is_set
        finally:
            self._awaited = False

    def _note(self, number: int, frame: object) -> None:
        first = not self._told.is_set()
        self._told.set()
        if not self._awaited:
            if first:
                raise Stopped("the run was told to end; what was committed is kept. The same command resumes it.")
        elif not first and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
