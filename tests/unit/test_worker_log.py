"""A worker's log says what the worker did, however it ended, and never gets in its way."""

import contextlib
import ctypes
import faulthandler
import logging
import os
import re
import resource
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest

from swa_dist.service import worker_log
from swa_dist.service.worker_log import WorkerLog
from swa_dist.storage.folder import join, open_folder, read
from tests.support import Proxy, WorkerError, free_port, run_workers, start_workers

NAME = "logs/a1/rank-0.log"
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "


def a_log(url):
    return WorkerLog(open_folder(str(url)), 1, 0, 2, "cpu")


def lines_of(url):
    """What was said, without the times."""
    content = read(join(str(url), NAME))
    return [re.sub(f"^{STAMP}", "", line) for line in (content or b"").decode().splitlines()]


def wait_for(text, url, seconds=20):
    deadline = time.monotonic() + seconds
    while not any(text in line for line in lines_of(url)):
        assert time.monotonic() < deadline, lines_of(url)
        time.sleep(0.05)


# What is written


def test_a_log_begins_with_who_the_worker_is_and_each_line_has_its_time(tmp_path):
    with a_log(tmp_path) as log:
        log.say("so far so good")
    written = (tmp_path / NAME).read_text().splitlines()
    assert all(re.match(STAMP, line) for line in written)
    assert f"rank 0 of 2 on cpu, host {os.uname().nodename}, process {os.getpid()}" in written[0]
    assert lines_of(tmp_path)[1:] == ["so far so good", "ended well"]


def test_only_the_first_line_of_what_is_said_begins_at_the_left(tmp_path):
    with a_log(tmp_path) as log:
        log.say("one\nTimeout (0:00:01)!\n  three\n")
        log.say("\udcff")  # of a file's name that is no text
    assert lines_of(tmp_path)[1:-1] == ["one", "  Timeout (0:00:01)!", "    three", "\\udcff"]


def test_a_worker_that_is_started_again_writes_on_where_the_first_ended(tmp_path):
    for word in ("first", "second"):
        with a_log(tmp_path) as log:
            log.say(word)
    assert [line for line in lines_of(tmp_path) if line in ("first", "second")] == ["first", "second"]


def test_an_error_leaves_its_traceback_and_goes_on_its_way(tmp_path):
    with pytest.raises(ZeroDivisionError), a_log(tmp_path):
        divide_by_nothing()
    assert "  ZeroDivisionError: division by zero" in lines_of(tmp_path)
    assert any("divide_by_nothing" in line for line in lines_of(tmp_path))
    assert "ended well" not in lines_of(tmp_path)


def divide_by_nothing():
    return 1 / 0


def test_an_error_that_can_not_say_what_it_is_is_still_the_one_that_is_raised(tmp_path):
    class MuteError(Exception):
        def __str__(self):
            raise ValueError

    with pytest.raises(MuteError), a_log(tmp_path):
        raise MuteError


def test_progress_is_said_first_and_last_and_each_ten_seconds_between(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_log, "_LINE_EVERY_SECONDS", 0.5)
    began = time.monotonic()
    with a_log(tmp_path) as log:
        number = 0
        while time.monotonic() < began + 1.2:
            log.progress("train", number, 100_000, "loss 1.5")
            number += 1
            time.sleep(0.01)
        log.progress("train", 100_000, 100_000)
        log.progress("train", 100_000, 100_000)
        log.progress("evaluate", 1, 9)
        log.progress("evaluate", 3, 9)
        log.progress("register", 1, 2)
    said = [line for line in lines_of(tmp_path)[1:-1] if line.startswith("  ")]
    assert said[0] == "  train: 0 of 100,000, loss 1.5"
    assert 1 <= len(said[1:-4]) <= 2
    assert said[-4:] == [
        "  train: 100,000 of 100,000",
        "  evaluate: 1 of 9",
        "  evaluate: 3 of 9",  # how far it came, though nobody said that it was the end
        "  register: 1 of 2",
    ]


def test_many_threads_say_whole_lines(tmp_path):
    def chatter(log, number):
        for count in range(200):
            log.say(f"thread {number} line {count} {'x' * 200}")
            log.progress(f"phase {number}", count, 200)

    with a_log(tmp_path) as log:
        threads = [threading.Thread(target=chatter, args=(log, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    said = [line for line in lines_of(tmp_path) if line.startswith("thread")]
    assert sorted(said) == sorted(f"thread {n} line {c} {'x' * 200}" for n in range(4) for c in range(200))


def test_warnings_of_python_and_of_libraries_are_written_and_information_is_not(tmp_path):
    logger = logging.getLogger("some.library")
    logger.setLevel(logging.DEBUG)
    with a_log(tmp_path):
        warnings.warn("that is old", DeprecationWarning, stacklevel=1)
        logger.warning("disk %d is slow", 7)
        logger.info("nothing much")
    logger.warning("said after the end")
    written = "\n".join(lines_of(tmp_path))
    assert "DeprecationWarning: that is old" in written
    assert "WARNING some.library: disk 7 is slow" in written
    assert "nothing much" not in written
    assert "after the end" not in written


def test_what_only_standard_error_would_show_is_shown_there_once_and_still(tmp_path):
    (ended,) = run_workers(warn_of_two_kinds, 1, str(tmp_path))
    assert ended == 0
    shown = (tmp_path / "err").read_text()
    assert [shown.count(text) for text in ("UserWarning: that is old", "disk is slow", "has its own handler")] == [
        1,
        1,
        1,
    ]
    written = "\n".join(lines_of(tmp_path))
    assert [written.count(text) for text in ("UserWarning: that is old", "disk is slow", "has its own handler")] == [
        1,
        1,
        1,
    ]


def warn_of_two_kinds(world, url):
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    with Path(url, "err").open("w") as shown, contextlib.redirect_stderr(shown):
        own = logging.getLogger("own")
        own.addHandler(logging.StreamHandler())
        with a_log(url):
            warnings.warn("that is old", stacklevel=1)
            logging.getLogger("bare").warning("disk is slow")
            own.warning("has its own handler")
    return len(root.handlers)


def test_a_process_is_as_it_was_when_the_log_is_closed(tmp_path):
    before = (warnings.showwarning, list(logging.getLogger().handlers), faulthandler.is_enabled())
    with a_log(tmp_path) as log:
        log.alive(0.2)
    log.close()
    log.say("not any more")
    log.progress("train", 1, 2)
    assert (warnings.showwarning, list(logging.getLogger().handlers), faulthandler.is_enabled()) == before
    with (tmp_path / "next").open("w"):  # which may have the number that the log's file had
        time.sleep(1.5)
    assert (tmp_path / "next").read_text() == ""
    assert lines_of(tmp_path)[-1] == "ended well"


def test_what_captured_the_warnings_before_goes_on_doing_so(tmp_path):
    with warnings.catch_warnings():
        logging.captureWarnings(True)
        captured = warnings.showwarning
        with a_log(tmp_path):
            pass
        assert warnings.showwarning is captured
        logging.captureWarnings(False)


# Workers that end in no good way


def test_a_killed_worker_keeps_the_lines_that_it_said(tmp_path):
    workers = start_workers(say_and_wait, 1, str(tmp_path))
    try:
        wait_for("line 99", tmp_path)
        os.kill(workers.processes[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="died"):
            workers.results()
    finally:
        workers.kill()
    assert lines_of(tmp_path)[1:] == [f"line {n}" for n in range(100)]


def say_and_wait(world, url):
    with a_log(url) as log:
        for n in range(100):
            log.say(f"line {n}")
        time.sleep(60)


def test_the_stacks_of_all_threads_of_a_worker_that_hangs_are_written_in_time(tmp_path):
    workers = start_workers(hang, 1, str(tmp_path))
    try:
        wait_for("wait_for_a_message_that_never_comes", tmp_path)
        wait_for("decode_images_forever", tmp_path)
    finally:
        workers.kill()
    written = lines_of(tmp_path)
    dumped = next(n for n, line in enumerate(written) if line.startswith("Timeout (0:00:01.5"))
    assert "  train: 5 of 9" in written[:dumped]


def hang(world, url):
    with a_log(url) as log:
        threading.Thread(target=decode_images_forever, daemon=True).start()
        log.alive(0.5)
        log.progress("train", 5, 9)
        wait_for_a_message_that_never_comes()


def wait_for_a_message_that_never_comes():
    time.sleep(60)


def decode_images_forever():
    time.sleep(60)


@pytest.mark.parametrize("report", ["alive", "progress"])
def test_a_worker_that_makes_progress_however_often_is_not_taken_for_hanging(tmp_path, report):
    (num_calls,) = run_workers(make_progress, 1, str(tmp_path), report)
    assert num_calls > 100
    assert not any("Timeout" in line for line in lines_of(tmp_path))


def make_progress(world, url, report):
    num_calls, began = 0, time.monotonic()
    with a_log(url) as log:
        log.alive(0.2)
        while time.monotonic() < began + 2.5:
            log.alive(0.2) if report == "alive" else log.progress("train", num_calls, 10**9)
            num_calls += 1
            time.sleep(0.01)
    return num_calls


def test_a_crash_leaves_its_stack(tmp_path):
    workers = start_workers(crash_in_a_library, 1, str(tmp_path))
    with pytest.raises(WorkerError, match="died"):
        workers.results()
    written = lines_of(tmp_path)
    assert "Fatal Python error: Segmentation fault" in written
    assert any("crash_in_a_library" in line for line in written)


def crash_in_a_library(world, url):
    with a_log(url) as log:
        log.say("about to")
        ctypes.string_at(0)


# Disks and servers that fail


def do_everything(log):
    with log:
        log.say("x" * 5000)
        logging.getLogger("some.library").warning("slow")
        log.progress("train", 1, 2)
        log.alive(0.1)
        log.flush_remote()
        raise KeyboardInterrupt


def test_a_full_disk_never_gets_in_the_way(tmp_path):
    path = tmp_path / NAME
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    with pytest.raises(KeyboardInterrupt):
        do_everything(a_log(tmp_path))


def test_a_limit_of_size_never_gets_in_the_way_and_keeps_what_fits(tmp_path):
    assert run_workers(write_too_much, 1, str(tmp_path)) == ["KeyboardInterrupt"]
    assert (tmp_path / NAME).stat().st_size == 4096
    assert "rank 0 of 2 on cpu" in lines_of(tmp_path)[0]


def write_too_much(world, url):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        do_everything(a_log(url))
    except BaseException as error:
        return type(error).__name__


def test_a_folder_that_can_not_be_made_never_gets_in_the_way(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(KeyboardInterrupt):
        do_everything(a_log(tmp_path))


# On S3


def test_a_log_of_a_run_on_s3_is_there_after_the_end_and_goes_on_in_a_second_worker(s3):
    url = f"{s3}/runs/swa-1"
    for word in ("first", "second"):
        with a_log(url) as log:
            log.say(word)
            log.flush_remote()
            assert word in lines_of(url)
    assert [line for line in lines_of(url) if not line.startswith("rank")] == [
        "first",
        "ended well",
        "second",
        "ended well",
    ]


def test_the_stacks_of_a_hang_reach_s3_while_it_lasts(s3):
    url = f"{s3}/runs/swa-1"
    workers = start_workers(hang_on_s3, 1, url, dict(os.environ))
    try:
        wait_for("wait_for_a_message_that_never_comes", url)
    finally:
        workers.kill()


def hang_on_s3(world, url, environment):
    os.environ.update(environment)
    worker_log._PUSH_EVERY_SECONDS = 0.5
    hang(world, url)


def test_s3_that_is_away_or_refuses_never_gets_in_the_way(s3, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with Proxy(s3_server, lambda number, method, path: "403 Forbidden\r\nContent-Length: 0\r\n\r\n") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(KeyboardInterrupt):
            do_everything(a_log(f"{s3}/runs/swa-1"))
        assert any(line.startswith("PUT") for line in proxy.seen)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(KeyboardInterrupt):
        do_everything(a_log(f"{s3}/runs/swa-1"))
