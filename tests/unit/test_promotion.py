"""The gate and the registry: which versions become @champion, which don't, and what is said about it."""

import functools
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import safetensors.torch
from mlflow.exceptions import MlflowException

from swa_dist import config, models
from swa_dist.data.scan import scan
from swa_dist.errors import CheckpointError, ConfigError, DataError
from swa_dist.evidence.verdict import Verdict
from swa_dist.service import champion, logged_model, promotion, registry, standalone, tracking, versions
from swa_dist.service.scored import Scored
from swa_dist.storage.files import sha256_file
from swa_dist.training.evaluate import Outcomes
from tests.support import Said, digits_recipe

NUM_IMAGES = 1000
BETTER = Verdict(better_than_start=True, better_than_last=True, sentence="swa is better than both")
NOT_BETTER = Verdict(better_than_start=True, better_than_last=False, sentence="swa is better than the start alone")


@dataclass
class Place:
    """A registry, and a model's files from which versions are made with other evidence."""

    uri: str
    folder: Path
    base: Path
    recipe: config.Recipe

    @property
    def client(self):
        return versions.client_of(self.uri)

    def model(self, name):
        self.client.create_registered_model(name, tags={champion.LOCK: str(self.folder / f"{name}.lease")})
        return name

    def scored(self, right, **fields):
        """Evidence with the first `right` images right, in ten classes of a hundred images that take turns."""
        top1 = np.arange(NUM_IMAGES) < right
        outcomes = Outcomes(
            ids=np.arange(NUM_IMAGES),
            top1=top1,
            top5=np.ones(NUM_IMAGES, dtype=bool),
            nll=np.zeros(NUM_IMAGES),
            confidence=np.where(top1, 0.9, 0.3),
        )
        made = Scored(
            recipe=self.recipe,
            outcomes=outcomes,
            labels=np.arange(NUM_IMAGES) % 10,
            classes=tuple(str(number) for number in range(10)),
            val_digest="a" * 64,
            verdict=BETTER,
            is_control=False,
        )
        return replace(made, **fields)

    def version(self, name, evidence):
        """A version of this evidence, as a run registers it; its number."""
        client = self.client
        run = client.create_run("1")
        client.set_terminated(run.info.run_id)
        folder = self.folder / f"logged-{run.info.run_id}"
        shutil.copytree(self.base, folder)
        for file, content in evidence.files().items():
            (folder / logged_model.FILES / file).write_bytes(content)
        logged = client.create_logged_model("1", name="model", source_run_id=run.info.run_id)
        client.log_model_artifacts(logged.model_id, str(folder))
        client.finalize_logged_model(logged.model_id, "READY")
        tags = {
            logged_model.MODEL_SHA256: logged_model.digest(folder),
            versions.WEIGHTS_SHA256: sha256_file(folder / logged_model.FILES / logged_model.WEIGHTS),
        }
        made = client.create_model_version(
            name, logged.artifact_location, run.info.run_id, tags=tags, model_id=logged.model_id
        )
        client.set_registered_model_alias(name, "challenger", made.version)
        return str(made.version)

    def keeper(self, name, said=None):
        return promotion.gatekeeper(self.uri, name, said or Said())

    def promote(self, name, version, *overrides, said=None):
        return self.keeper(name, said).promote(version, overrides)

    def promoted(self, name, evidence):
        """A version of this evidence, made @champion by a person."""
        version = self.version(name, evidence)
        with champion.holding(self.client, name, Said().say) as held:
            found = held.settle()
            held.change("promoted", version, found.champion or found.previous, "somebody", "at first")
        return version

    def artifact_place(self, name, version):
        return Path(self.client.get_model_version_download_uri(name, version).removeprefix("file://"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, few_digits):
    folder = tmp_path_factory.mktemp("registry")
    tracking.configure_client()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = versions.client_of(uri)
    client.create_experiment("made", artifact_location=(folder / "artifacts").as_uri())
    recipe = digits_recipe(few_digits, models.RANDOM, **{"model.arch": "shufflenet_v2_x0_5", "data.image_size": 32})
    network = models.build(recipe.model, 0).eval()
    weights = folder / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), weights)
    made = Place(uri, folder, folder / "base", recipe)
    contents = logged_model.Contents(
        network=network,
        classes=tuple(str(number) for number in range(10)),
        resize_size=recipe.data.resize_size,
        image_size=recipe.data.image_size,
        files=made.scored(900).files() | {logged_model.WEIGHTS: weights},
    )
    run = client.create_run("1")
    model_id = logged_model.log(run.info.run_id, uri, contents)
    shutil.copytree(client.get_logged_model(model_id).artifact_location.removeprefix("file://"), made.base)
    return made


def test_a_version_that_is_better_on_the_same_images_takes_the_champions_place(place):
    name = place.model("better")
    old = place.promoted(name, place.scored(900))
    new = place.version(name, place.scored(950))
    found = place.promote(name, new)
    assert (found.status, found.over, found.is_champion) == ("promoted", old, True)
    assert found.why.startswith("better than @champion: +5.00 points")
    now = champion.look(place.client, name)
    assert (now.champion, now.previous, now.challenger) == (new, old, None)
    tags = place.client.get_model_version(name, new).tags
    assert (tags["gate"], tags["gate_champion"]) == ("promoted", old)
    assert tags["swa.champion_instead_of"] == old
    assert "+5.00 points" in tags["gate_why"]


def test_what_was_found_is_kept_with_the_run(place, tmp_path):
    name = place.model("kept")
    place.promoted(name, place.scored(900))
    new = place.version(name, place.scored(890))
    found = place.promote(name, new)
    assert found.status == "rejected"
    run_id = place.client.get_model_version(name, new).run_id
    assert place.client.get_run(run_id).data.tags["swa.promotion"] == f"rejected: {found.why}"
    kept = Path(place.client.download_artifacts(run_id, "promotion", str(tmp_path)))
    assert json.loads((kept / f"version-{new}.json").read_text()) == json.loads(json.dumps(found.facts()))
    page = (kept / f"version-{new}.md").read_text()
    assert "| gain | **no** | -1.00 points" in page
    assert "| 0 | 100 | -1.0 |" in page, "the classes that lost most"


@pytest.mark.parametrize(
    ("right", "fields", "overrides", "said"),
    [
        (900, {}, (), "+0.00 points"),
        (950, {"verdict": NOT_BETTER}, (), "must be shown better than the start and plain fine-tuning in its own run"),
        (950, {}, ("registry.gate.min_gain=6",), "and +6 is the least"),
    ],
)
def test_a_version_that_breaks_a_rule_is_rejected_and_noted(right, fields, overrides, said, place):
    name = place.model(f"rejected-{right}-{len(fields)}-{len(overrides)}")
    old = place.promoted(name, place.scored(900))
    new = place.version(name, place.scored(right, **fields))
    found = place.promote(name, new, *overrides)
    assert found.status == "rejected"
    assert said in found.why
    now = champion.look(place.client, name)
    assert (now.champion, now.challenger) == (old, new)
    last = now.journal[-1]
    assert (last.kind, last.version, last.why) == ("rejected", new, found.why)


def test_the_rules_are_those_of_the_versions_recipe(place):
    name = place.model("rules")
    place.promoted(name, place.scored(900))
    recipe = config.replace(place.recipe, **{"registry.gate.evidence": "start"})
    new = place.version(name, place.scored(950, verdict=NOT_BETTER, recipe=recipe))
    assert place.promote(name, new).status == "promoted"


def test_only_the_gate_and_the_place_of_the_images_can_be_set(place):
    name = place.model("settable")
    new = place.version(name, place.scored(900))
    with pytest.raises(ConfigError, match=r"`--set` must be of the gate .*, but is optim.epochs=3"):
        place.promote(name, new, "optim.epochs=3")


@pytest.mark.parametrize(("rule", "status"), [("hold", "held"), ("promote", "promoted")])
def test_the_first_version_waits_for_a_person_or_not_as_its_recipe_has_it(rule, status, place):
    name = place.model(f"first-{rule}")
    recipe = config.replace(place.recipe, **{"registry.first": rule})
    new = place.version(name, place.scored(900, recipe=recipe, verdict=NOT_BETTER))
    found = place.promote(name, new)
    assert (found.status, found.over) == (status, None)
    assert champion.look(place.client, name).champion == (new if status == "promoted" else None)
    assert place.promote(name, new, "registry.first=promote").is_champion


def test_the_champion_itself_stays_it(place):
    name = place.model("itself")
    only = place.promoted(name, place.scored(900))
    assert place.promote(name, only).status == "champion already"
    assert len(champion.look(place.client, name).journal) == 1


def test_images_that_one_of_the_two_could_not_decode_are_left_out_of_the_comparison(place):
    name = place.model("left-out")
    place.promoted(name, place.scored(900))
    evidence = place.scored(950)
    kept = np.arange(NUM_IMAGES) != 925
    outcomes = promotion._picked(evidence.outcomes, kept)
    new = place.version(name, replace(evidence, outcomes=outcomes, labels=evidence.labels[kept]))
    found = place.promote(name, new)
    assert found.status == "promoted"
    assert found.decision.paired.wins == 49


def test_a_champion_that_was_scored_on_other_images_is_scored_on_these(place, digits, few_digits):
    """The real thing: random weights on real digits, scored again through the loaders."""
    name = place.model("rescored")
    place.promoted(name, place.scored(900))
    val = scan(str(few_digits / "val"), "data.val")
    weights = place.base / logged_model.FILES / logged_model.WEIGHTS
    truth = standalone.outcomes_of(standalone.loaded(weights, place.recipe), val, place.recipe, Said())
    right = np.ones(len(val), dtype=bool)
    mine = place.scored(
        900,
        outcomes=replace(truth, top1=right, confidence=np.where(truth.top1, truth.confidence, 0.9)),
        labels=val.labels,
        classes=val.classes,
        val_digest=val.digest,
        recipe=config.replace(place.recipe, **{"registry.gate.max_ece_rise": 100.0}),
    )
    new = place.version(name, mine)
    said = Said()
    found = place.promote(name, new, said=said)
    assert "was scored on other images; scoring it on these" in said.lines[0]
    assert found.decision.paired.wins == int((~truth.top1).sum()) > 50
    assert found.decision.paired.losses == 0
    assert found.status == "promoted"

    other = place.version(name, replace(mine, val_digest="b" * 64))
    with pytest.raises(DataError, match=r"`data.val` must hold the images that the challenger was scored on"):
        place.promote(name, other)
    with pytest.raises(DataError, match="/nowhere"):
        place.promote(name, other, "data.val=/nowhere")


def test_a_champion_for_other_classes_is_no_rival(place):
    name = place.model("classes")
    place.promoted(name, place.scored(900))
    classes = (*(str(number) for number in range(9)), "ten")
    new = place.version(name, place.scored(950, classes=classes))
    with pytest.raises(DataError, match=r"must know the same classes, .* Known to one alone: 9, ten"):
        place.promote(name, new)


@pytest.mark.parametrize("file", [logged_model.PROGRAM, logged_model.WEIGHTS, "outcomes.safetensors"])
@pytest.mark.parametrize("whose", ["challenger", "champion"])
def test_files_that_are_not_those_that_were_registered_promote_nobody(whose, file, place):
    name = place.model(f"changed-{whose}-{file}")
    old = place.promoted(name, place.scored(900))
    new = place.version(name, place.scored(950))
    path = place.artifact_place(name, new if whose == "challenger" else old) / logged_model.FILES / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="must have the SHA-256 in its tag"):
        place.promote(name, new)
    with pytest.raises(CheckpointError, match="must have the SHA-256 in its tag"):
        place.keeper(name).rollback(new if whose == "challenger" else old, "try")
    assert champion.look(place.client, name).champion == old


def test_a_version_of_another_program_is_refused(place):
    name = place.model("foreign")
    made = place.client.create_model_version(name, "s3://somewhere/model")
    with pytest.raises(CheckpointError, match="must have the tag model_sha256"):
        place.promote(name, made.version)


def test_a_version_whose_run_was_deleted_is_refused(place):
    name = place.model("run-deleted")
    place.promoted(name, place.scored(900))
    new = place.version(name, place.scored(950))
    place.client.delete_run(place.client.get_model_version(name, new).run_id)
    with pytest.raises(ConfigError, match=r"was deleted. `mlflow runs restore --run-id \w+` brings it back"):
        place.promote(name, new)


def test_where_the_champion_was_deleted_a_person_puts_one_in_its_place(place):
    name = place.model("champion-deleted")
    first = place.promoted(name, place.scored(900))
    second = place.promoted(name, place.scored(910))
    new = place.version(name, place.scored(950))
    place.client.delete_model_version(name, second)
    with pytest.raises(ConfigError, match=f"must have a @champion .* has none since version {second} was taken away"):
        place.promote(name, new)
    place.keeper(name).rollback(first, "the second was deleted")
    assert place.promote(name, new).status == "promoted"


def test_a_champion_that_was_moved_by_hand_is_the_one_to_beat(place):
    name = place.model("by-hand")
    first = place.promoted(name, place.scored(900))
    strong = place.version(name, place.scored(990))
    place.client.set_registered_model_alias(name, "champion", strong)
    new = place.version(name, place.scored(950))
    found = place.promote(name, new)
    assert (found.status, found.over) == ("rejected", strong)
    kinds = [entry.kind for entry in champion.look(place.client, name).journal]
    assert kinds == ["promoted", "moved by hand", "rejected"]
    assert champion.look(place.client, name).previous == first


def test_a_rollback_takes_a_number_however_it_is_written(place):
    name = place.model("written")
    first = place.promoted(name, place.scored(900))
    place.promoted(name, place.scored(910))
    assert place.keeper(name).rollback(f"0{first}", "why not").version == first
    assert champion.look(place.client, name).champion == first


def test_a_rollback_is_of_the_champion_that_was_seen(place, monkeypatch):
    """Promoted, while it looks at the files, is another: what the person says of the old one is not about that."""
    name = place.model("seen")
    for right in (900, 910):
        place.promoted(name, place.scored(right))
    verified = versions.verified

    def slow(*which):
        place.promoted(name, place.scored(920))
        return verified(*which)

    monkeypatch.setattr(versions, "verified", slow)
    with pytest.raises(ConfigError, match=r"`--to` must be given, since @champion .* from version 2 to 3 meanwhile"):
        place.keeper(name).rollback(None, "2 sees ghosts")
    assert champion.look(place.client, name).champion == "3"


def test_who_may_promote_but_not_write_to_the_run_is_warned(place, monkeypatch):
    name = place.model("no-run")
    place.promoted(name, place.scored(900))
    version = place.version(name, place.scored(950))

    def refused(self, *arguments):
        raise MlflowException("Permission denied")

    monkeypatch.setattr(mlflow.MlflowClient, "log_text", refused)
    said = Said()
    assert place.promote(name, version, said=said).status == "promoted"
    assert any("not among the files of the version's run" in line for line in said.lines)


def test_rolling_back_twice_goes_further_back(place):
    name = place.model("back")
    numbers = [place.promoted(name, place.scored(900 + 10 * step)) for step in range(3)]
    place.keeper(name).rollback(None, "it sees ghosts")
    now = champion.look(place.client, name)
    assert (now.champion, now.previous) == (numbers[1], numbers[0])
    place.keeper(name).rollback(None, "so does this")
    now = champion.look(place.client, name)
    assert (now.champion, now.previous) == (numbers[0], None)
    with pytest.raises(ConfigError, match="`--to` must name a version"):
        place.keeper(name).rollback(None, "and this")
    with pytest.raises(ConfigError, match="must be another version than @champion"):
        place.keeper(name).rollback(numbers[0], "again")
    with pytest.raises(ConfigError, match="must be in the registry"):
        place.keeper(name).rollback("99", "there is none")
    place.keeper(name).rollback(numbers[2], "no ghosts after all")
    assert champion.look(place.client, name).champion == numbers[2]


@pytest.mark.parametrize("model", ["models:/any@latest", "models:/any@v2", "models:/any@Latest"])
def test_reserved_aliases_are_explained(model, place):
    with pytest.raises(ConfigError, match="must not name an alias that MLflow reserves"):
        versions.pinned(place.uri, model)


# The command line


@pytest.fixture
def swa_dist(place, swa_dist_here):
    return functools.partial(swa_dist_here, uri=place.uri)


def test_the_command_line_promotes_rejects_rolls_back_and_tells(place, swa_dist):
    name = place.model("commands")
    first = place.version(name, place.scored(900))
    held = swa_dist("promote", name, "--set", "registry.first=hold")
    assert held.returncode == 10, held.stderr
    assert f"{name} version {first} waits for a person" in held.stdout
    assert swa_dist("promote", name, "--set", "registry.first=promote").returncode == 0
    second = place.version(name, place.scored(880))
    rejected = swa_dist("promote", name)
    assert rejected.returncode == 10
    assert f"{name} version {second} does not become @champion: -2.00 points" in rejected.stdout
    assert "  NO  gain: -2.00 points" in rejected.stdout
    third = place.version(name, place.scored(960))
    passed = swa_dist("promote", name, "--version", third, "--json")
    assert passed.returncode == 0, passed.stderr
    assert json.loads(passed.stdout)["status"] == "promoted"
    no_reason = swa_dist("rollback", name)
    assert no_reason.returncode == 2
    back = swa_dist("rollback", name, "--reason", "it sees ghosts")
    assert f"models:/{name}@champion is version {first} again, instead of {third}" in back.stdout, back.stderr
    table = swa_dist("history", name).stdout
    for text in ("held", "promoted", "rejected", "rolled back", "it sees ghosts", "@champion before"):
        assert text in table
    told = json.loads(swa_dist("history", name, "--json").stdout)
    assert [one["kind"] for one in told] == ["held", "promoted", "rejected", "promoted", "rolled back"]
    assert {one["who"].partition("@")[2] != "" for one in told} == {True}


def test_mistakes_on_the_command_line_end_with_a_sentence(place, swa_dist, tmp_path):
    name = place.model("mistakes")
    for arguments, code, said in [
        (("promote", "no-such-model"), 78, "`NAME` must be a registered model"),
        (("promote", "a/b"), 78, "`NAME` must be a registered model"),
        (("promote", ""), 78, "`NAME` must be a registered model"),
        (("promote", name, "--version", "7"), 78, f"models:/{name}/7 is not"),
        (("rollback", name, "--reason", "x"), 78, "`--to` must name a version"),
        (("history", "no-such-model"), 78, "`NAME` must be a registered model"),
    ]:
        ended = swa_dist(*arguments)
        assert (ended.returncode, said in ended.stderr) == (code, True), (arguments, ended.stderr)
        assert "Traceback" not in ended.stderr
    nothing = swa_dist("promote", name)
    assert (nothing.returncode, "there is nothing to promote" in nothing.stdout) == (0, True), nothing
    assert json.loads(swa_dist("promote", name, "--json").stdout)["status"] == "no challenger"
    gone = swa_dist("history", name, uri=f"sqlite:///{tmp_path / 'none.db'}")
    assert gone.returncode == 69
    assert "MLflow's database must be at" in gone.stderr
    assert not (tmp_path / "none.db").exists()


# At the end of a run


def ruled(place, version, said=None, **fields):
    recipe = config.replace(place.recipe, **{"registry.model": "at-the-end"} | fields)
    return registry._rule(place.uri, recipe, version, "the run at the end", said or Said())


def test_a_run_rules_about_its_version_once_and_a_rollback_stays(place):
    name = place.model("at-the-end")
    first = place.promoted(name, place.scored(900))
    second = place.version(name, place.scored(950))
    assert ruled(place, second).status == "promoted"
    place.keeper(name).rollback(None, "it sees ghosts")
    again = ruled(place, second)  # as after a crash before registered.json
    assert (again.status, again.over) == ("promoted", first)
    assert champion.look(place.client, name).champion == first


def test_a_comparison_that_fails_leaves_the_version_to_a_person_and_is_in_the_history(place, monkeypatch):
    name = "at-the-end"
    version = place.version(name, place.scored(990))

    def fails(*arguments, **named):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(promotion.gate, "decide", fails)
    found = ruled(place, version)
    assert (found.status, found.why) == ("held", "it can't be compared: CUDA error: out of memory")
    now = champion.look(place.client, name)
    assert (now.challenger, now.journal[-1].kind, now.journal[-1].version) == (version, "held", version)
    assert place.client.get_model_version(name, version).tags["gate"] == "held"


def test_a_version_that_is_held_is_in_the_history_and_can_be_promoted(place):
    name = "at-the-end"
    version = place.version(name, place.scored(995))
    found = ruled(place, version, **{"registry.promote": "hold"})
    assert found.status == "held"
    assert f"swa-dist promote {name} --version {version}" in found.why
    assert place.promote(name, version).status == "promoted"


# Using it


def test_a_version_whose_files_were_changed_is_not_loaded_from_the_registry(place, monkeypatch):
    name = place.model("changed")
    version = place.promoted(name, place.scored(900))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    mlflow.pyfunc.load_model(f"models:/{name}@champion")  # on a disk: from the artifact store itself
    assert place.promote(name, place.version(name, place.scored(950))).status == "promoted"
    place.keeper(name).rollback(None, "the files of this one are as they were, too")
    facts = place.artifact_place(name, version) / logged_model.FILES / logged_model.FACTS
    facts.write_text(facts.read_text().replace('"1"', '"cat"'))
    with pytest.raises(MlflowException, match="must have the SHA-256 in its tag"):
        mlflow.pyfunc.load_model(f"models:/{name}@champion")
