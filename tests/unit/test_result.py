"""What a finished run that has something left to send ends with, while MLflow is away."""

import json
import pickle
import socket

import pytest
import torch

from swa_dist.errors import BusyError, CheckpointError, ExitCode, ServiceError
from swa_dist.service import registry, result, tracking
from swa_dist.service.layout import RECIPE, SUMMARY, lease_url
from swa_dist.service.registry import REGISTERED
from swa_dist.service.run import Finished
from swa_dist.service.spool import Spool, Target
from swa_dist.storage import lease
from swa_dist.storage.folder import open_folder
from swa_dist.training.state import save_entry
from tests.support import Said

MODEL = {"kind": "model", "recipe": {}, "uri": "", "entry": "candidates/swa", "tags": {}}
STATUS = {"kind": "status", "status": "FINISHED", "time_ms": 1}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes a run that has finished, all of whose events wait for a server that is not there."""
    monkeypatch.setattr(tracking, "_PAUSES_SECONDS", ())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def make(*events, registered):
        folder = open_folder(str(tmp_path / "run"))
        folder.write(RECIPE, "name: digits\n")
        save_entry(folder.store, MODEL["entry"], {"model": {"weight": torch.zeros(1)}}, {})
        if registered:
            folder.write(REGISTERED, json.dumps({"name": "digits", "version": "1"}))
        spool = Spool(folder.local)
        spool.open(Target(uri=uri, experiment="digits", run_name="small", run_key="k" * 64, first_attempt=1))
        if events:
            spool.append(*events)
        summary = {"run_dir": folder.url, "attempt": 1, "waiting": 0, "registered": None, "mlflow": {"uri": uri}}
        folder.write(SUMMARY, json.dumps(summary))
        return Finished(summary, already=True)

    return make


def test_a_model_that_waits_is_no_success_and_says_what_to_do(finished, tmp_path):
    said = Said()
    found = result.catch_up(finished(MODEL, STATUS, registered=False), said)
    error = pickle.loads(pickle.dumps(found)).unregistered  # as the other workers get it
    assert isinstance(error, ServiceError)
    assert error.exit_code == ExitCode.DEPENDENCY_DOWN
    assert "2 events wait to be sent, its model among them" in str(error)
    assert f"`swa-dist replay {tmp_path / 'run'}`" in str(error)
    (written,) = error.__notes__
    assert "its model among them" in (tmp_path / "run" / written.rpartition("/")[2]).read_text()
    assert said.lines == []
    assert found.summary["waiting"] == json.loads((tmp_path / "run" / SUMMARY).read_text())["waiting"] == 2


@pytest.mark.parametrize("left", [STATUS, {"kind": "artifact", "name": SUMMARY}])
def test_what_else_waits_is_a_warning(finished, tmp_path, left):
    said = Said()
    found = result.catch_up(finished(left, registered=True), said)
    assert found.unregistered is None
    (warning,) = said.lines
    assert warning.startswith("warning: MLflow at ")
    assert "swa-dist replay" in warning
    assert not list((tmp_path / "run").glob("post-mortem*"))


def test_where_nothing_waits_nobody_is_asked(finished, monkeypatch):
    monkeypatch.setattr(registry, "send", None)
    before = finished(registered=True)
    assert result.catch_up(before, Said()) is before


def test_what_is_not_mlflows_fault_is_its_own_error_and_the_table_is_there(finished, monkeypatch):
    def fails(folder, display):
        raise CheckpointError("logits of the logged model must be the network's, but differ by 3.")

    monkeypatch.setattr(registry, "send", fails)
    found = result.catch_up(finished(MODEL, STATUS, registered=False), Said())
    assert type(found.unregistered) is CheckpointError
    assert "differ by 3" in str(found.unregistered)
    assert "swa-dist replay" in str(found.unregistered)


def test_a_run_that_is_at_work_is_not_replayed(finished):
    run = finished(STATUS, registered=True).summary["run_dir"]
    with (
        lease.hold(lease.register(lease_url(run)), "the run", lambda line: None),
        pytest.raises(BusyError, match="must not be running already, but is"),
    ):
        result.replay(run, Said())
