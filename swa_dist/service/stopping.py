"""Who asks a run to stop: a signal to this process, or a request in the run's folder."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from swa_dist.errors import SwaDistError
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


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Within the block, whether this process was sent SIGTERM, which then doesn't end it; a second one does.

    Only in a process's main thread: elsewhere nothing is changed, and the answer is no.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
