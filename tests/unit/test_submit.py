"""One key, one run: what a submission does, by what the place and the run's folder know of the key."""

import json
import re

import pytest

from swa_dist import config
from swa_dist.data import index
from swa_dist.errors import ConfigError, DataError
from swa_dist.service import data, identity
from swa_dist.service.layout import run_dir
from swa_dist.service.submit import Attempt, submit
from swa_dist.storage import folder
from tests.support import JOBS


class Shelf:
    """A place that keeps submissions on a shelf, where others may have put some before."""

    def __init__(self, *attempts):
        self.known = list(attempts)
        self.sent = []
        self.followed = []
        self.interrupted = False

    def attempts(self, run_key):
        return self.known

    def start(self, name, run_key, recipe):
        if name in (name for name, _ in self.sent):
            return False
        self.sent.append((name, recipe))
        return True

    def follow(self, name, display):
        self.followed.append(name)
        if self.interrupted:
            raise KeyboardInterrupt
        return 7

    def come_back(self, name):
        return [f"come back to {name}"]


class Said:
    def __init__(self):
        self.text = ""

    def say(self, line):
        self.text += line + "\n"

    def progress(self, phase, done, total, note=""):
        pass

    def close(self):
        pass


@pytest.fixture(params=["disk", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "shared") if request.param == "disk" else request.getfixturevalue("s3")


@pytest.fixture
def recipe(root, few_digits):
    digits = config.load(JOBS / "digits.yaml")
    located = {
        "data.train": str(few_digits / "train"),
        "data.val": str(few_digits / "val"),
        "data.index": f"{root}/index",
        "model.weights_sha256": "1" * 64,
        "output.dir": f"{root}/runs",
    }
    made = config.replace(digits, **located)
    data.write_indices(made, Said())
    return made


def name_of(recipe, number):
    return config.attempt_name(identity.identify(recipe).run_key, number)


def attempt(recipe, number, state, reason=""):
    return Attempt(name_of(recipe, number), number, state, reason)


def test_what_is_new_is_submitted_whole_for_that_cluster(recipe):
    place, said = Shelf(), Said()
    assert submit(recipe, place, said, wait=True) == 7
    ((name, sent),) = place.sent
    assert name == name_of(recipe, 1)
    assert len(name) <= 47
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert (sent.cluster.address, sent.cluster.launcher) == ("auto", "ray")
    assert identity.identify(sent) == identity.identify(recipe)
    assert place.followed == [name]
    assert f"submitted digits as {name}" in said.text


def test_what_runs_is_attached_to(recipe):
    place, said = Shelf(attempt(recipe, 1, "failed"), attempt(recipe, 2, "running")), Said()
    assert submit(recipe, place, said, wait=True) == 7
    assert place.sent == []
    assert place.followed == [name_of(recipe, 2)]
    assert "runs already; attached" in said.text


def test_what_failed_is_the_next_attempt(recipe):
    place, said = Shelf(attempt(recipe, 1, "failed"), attempt(recipe, 9, "failed", "exit code 70")), Said()
    submit(recipe, place, said, wait=True)
    assert [name for name, _ in place.sent] == [name_of(recipe, 10)]
    assert "exit code 70" in said.text


def test_attempts_that_the_place_forgot_are_not_given_out_again(recipe):
    key = identity.identify(recipe).run_key
    folder.open_folder(run_dir(recipe.output.dir, key)).write("attempt.json", '{"attempt": 4, "first_attempt": 1}')
    place = Shelf()
    submit(recipe, place, Said(), wait=False)
    assert [name for name, _ in place.sent] == [name_of(recipe, 5)]


def test_one_that_another_submitted_in_the_same_moment_is_attached_to(recipe):
    place, said = Shelf(), Said()
    place.sent.append((name_of(recipe, 1), recipe))
    assert submit(recipe, place, said, wait=True) == 7
    assert len(place.sent) == 1
    assert "by another a moment ago; attached" in said.text


def test_what_is_finished_is_said_and_not_submitted(recipe):
    key = identity.identify(recipe).run_key
    where = run_dir(recipe.output.dir, key)
    summary = {"verdict": {"sentence": "swa is better."}, "run_dir": where, "registered": {"version": "1"}}
    folder.open_folder(where).write("summary.json", json.dumps(summary))
    place, said = Shelf(attempt(recipe, 1, "failed")), Said()
    assert submit(recipe, place, said, wait=True) == 0
    assert (place.sent, place.followed) == ([], [])
    assert "finished already" in said.text
    assert "swa is better." in said.text


def test_what_is_finished_but_not_registered_is_submitted_once_more(recipe):
    """Which trains nothing: what waits in the run's spool is sent from where MLflow can be reached."""
    key = identity.identify(recipe).run_key
    there = folder.open_folder(run_dir(recipe.output.dir, key))
    there.write("attempt.json", '{"attempt": 1, "first_attempt": 1}')
    there.write("summary.json", '{"registered": null}')
    place, said = Shelf(attempt(recipe, 1, "failed", "exit code 69")), Said()
    assert submit(recipe, place, said, wait=True) == 7
    assert [name for name, _ in place.sent] == [name_of(recipe, 2)]
    assert f"{name_of(recipe, 1)} finished, but its model waits to be registered (exit code 69)" in said.text


def test_where_the_folder_cannot_be_seen_the_places_word_counts(recipe):
    place, said = Shelf(attempt(recipe, 1, "succeeded")), Said()
    assert submit(recipe, place, said, wait=True) == 0
    assert place.sent == []
    assert "finished already" in said.text


def test_a_success_whose_folder_was_emptied_since_is_run_again(recipe):
    key = identity.identify(recipe).run_key
    folder.open_folder(run_dir(recipe.output.dir, key)).write("attempt.json", '{"attempt": 1, "first_attempt": 1}')
    place = Shelf(attempt(recipe, 1, "succeeded"))
    submit(recipe, place, Said(), wait=False)
    assert [name for name, _ in place.sent] == [name_of(recipe, 2)]


def test_interrupted_it_detaches_and_says_how_to_come_back(recipe):
    place, said = Shelf(), Said()
    place.interrupted = True
    assert submit(recipe, place, said, wait=True) == 0
    assert "detached" in said.text
    assert f"come back to {name_of(recipe, 1)}" in said.text


def test_the_key_is_that_of_the_images_themselves(recipe, few_digits):
    """Told by the index from afar, or by a look at the images where they are."""
    scanned = config.replace(recipe, **{"data.index": "scan"})
    train, val = identity.indices(scanned, Said())
    key = config.run_key(scanned, "1" * 64, index.data_digest(train, val))
    assert identity.identify(recipe).run_key == key


def test_without_an_index_nothing_is_submitted_and_the_command_is_named(recipe, root):
    for url, error in (("scan", ConfigError), (f"{root}/absent", DataError)):
        place = Shelf()
        with pytest.raises(error, match="swa-dist data index"):
            submit(config.replace(recipe, **{"data.index": url}), place, Said(), wait=True)
        assert place.sent == []


@pytest.mark.parametrize("field", ["tracking.uri", "model.weights", "output.dir"])
def test_a_recipe_with_a_password_is_none(recipe, field):
    with pytest.raises(ConfigError, match=f"`{field}` must be an address without a password"):
        config.replace(recipe, **{field: "https://user:pass@host/x"})
