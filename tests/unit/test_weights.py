"""Starting weights of any kind of address: fetched once, held to their hash from then on, and explained when not."""

import hashlib
import http.server
import socket
import ssl
import threading
import urllib.request

import pytest
import torchvision.models

from swa_dist.config import Model
from swa_dist.errors import CheckpointError, ConfigError, OutputError, ServiceError
from swa_dist.service import weights
from tests import support

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAMED_BY_HASH = f"resnet18-{SHA256[:8]}.pth"


def model_of(address, **fields):
    return Model(arch="resnet18", weights=str(address), **fields)


def fetch(model):
    return weights.fetch(model, registry_uri="sqlite:///there/is/none.db")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A home and a cache of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "swa_dist" / "weights"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A key and a certificate for 127.0.0.1."""
    made, key = support.certificate(tmp_path_factory.mktemp("certificate"))
    both = made.with_name("both.pem")
    both.write_bytes(key.read_bytes() + made.read_bytes())
    return both


class Server:
    """An HTTPS server on loopback: what it has by path, and what it was asked for."""

    def __init__(self, certificate):
        self.files, self.asked, self.cut = {}, [], 0
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                served.asked.append(self.path)
                content = served.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) - served.cut])

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.address = f"https://127.0.0.1:{self._server.server_port}"

    def stop(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the certificates that it was made with
    running = Server(certificate)
    running.files[f"/{NAMED_BY_HASH}"] = CONTENT
    running.files["/mine.pth"] = CONTENT
    yield running
    running.stop()


@pytest.fixture
def torchvisions(server, monkeypatch):
    """Torchvision's weights of a ResNet-18 are those that the server has."""
    weights = torchvision.models.get_model_weights("resnet18").IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", f"{server.address}/{NAMED_BY_HASH}")
    return server


def left_in(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


# Files


def test_a_path_is_the_file_itself_and_its_hash(tmp_path, cache):
    path = tmp_path / "start.pth"
    path.write_bytes(CONTENT)
    found = fetch(model_of(path))
    assert (found.path, found.sha256) == (path, SHA256)
    assert not cache.exists()


def test_a_path_may_be_relative_or_in_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "start.pth").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    for name in ("~/start.pth", "home/start.pth", "./home/../home/start.pth"):
        assert fetch(model_of(name)).path == tmp_path / "home" / "start.pth"


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"`model\.weights`") as caught:
        fetch(model_of(tmp_path / "absent.pth"))
    assert str(tmp_path / "absent.pth") in str(caught.value)


def test_a_folder_is_no_weights_file(tmp_path):
    with pytest.raises(ConfigError, match=r"`model\.weights`"):
        fetch(model_of(tmp_path))


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/mine.pth", "ftp://127.0.0.1/mine.pth", "s3://bucket/mine.pth"])
def test_an_address_of_another_kind_says_which_there_are(address):
    with pytest.raises(ConfigError, match="https://"):
        fetch(model_of(address))


@pytest.mark.parametrize("right", [True, False])
def test_a_path_is_held_to_the_recipes_hash(tmp_path, right):
    path = tmp_path / "start.pth"
    path.write_bytes(CONTENT)
    if right:
        assert fetch(model_of(path, weights_sha256=SHA256)).sha256 == SHA256
    else:
        with pytest.raises(CheckpointError, match=f"{'0' * 64}, but is {SHA256}") as caught:
            fetch(model_of(path, weights_sha256="0" * 64))
        assert "`model.weights_sha256`" in str(caught.value)
        assert path.read_bytes() == CONTENT


# Torchvision's


def test_an_unknown_torchvision_name_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"`model\.weights` must be one of resnet50's") as caught:
        fetch(Model(arch="resnet50", weights="IMAGENET1K_V3"))
    for name in ("IMAGENET1K_V1", "IMAGENET1K_V2", "DEFAULT"):
        assert name in str(caught.value)


def test_a_torchvision_name_of_an_unknown_architecture_names_the_architecture():
    with pytest.raises(ConfigError, match=r"`model\.arch` must be a torchvision classifier"):
        fetch(Model(arch="resnet51", weights="IMAGENET1K_V1"))


def test_the_first_use_downloads_into_the_cache(torchvisions, cache):
    found = fetch(model_of("IMAGENET1K_V1"))
    assert (found.path, found.sha256) == (cache / NAMED_BY_HASH, SHA256)
    assert found.path.read_bytes() == CONTENT
    assert torchvisions.asked == [f"/{NAMED_BY_HASH}"]
    assert left_in(cache) == [NAMED_BY_HASH, f"{NAMED_BY_HASH}.sha256"]


def test_the_second_use_works_with_the_server_stopped(torchvisions):
    first = fetch(model_of("IMAGENET1K_V1"))
    torchvisions.stop()
    assert fetch(model_of("IMAGENET1K_V1")) == first
    assert torchvisions.asked == [f"/{NAMED_BY_HASH}"]


def test_a_changed_byte_in_the_cache_is_refused_by_name(torchvisions):
    path = fetch(model_of("IMAGENET1K_V1")).path
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        fetch(model_of("IMAGENET1K_V1"))
    assert SHA256 in str(caught.value)
    assert "Remove the file" in str(caught.value)


def test_the_remedy_for_a_changed_byte_works(torchvisions):
    path = fetch(model_of("IMAGENET1K_V1")).path
    path.write_bytes(b"x")
    path.unlink()
    assert fetch(model_of("IMAGENET1K_V1")).sha256 == SHA256


def test_a_cached_file_without_its_record_is_held_to_the_hash_in_its_name(torchvisions, cache):
    """A kill between the download and the record leaves the file alone, as does a person who puts it there."""
    cache.mkdir(parents=True)
    (cache / NAMED_BY_HASH).write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(CheckpointError, match=NAMED_BY_HASH):
        fetch(model_of("IMAGENET1K_V1"))


def test_a_download_with_another_hash_than_its_name_is_refused_and_nothing_is_left(torchvisions, cache):
    torchvisions.files[f"/{NAMED_BY_HASH}"] = b"something else"
    with pytest.raises(CheckpointError, match=NAMED_BY_HASH) as caught:
        fetch(model_of("IMAGENET1K_V1"))
    assert SHA256[:8] in str(caught.value)
    assert left_in(cache) == []
    torchvisions.files[f"/{NAMED_BY_HASH}"] = CONTENT
    assert fetch(model_of("IMAGENET1K_V1")).sha256 == SHA256


def test_a_download_is_held_to_the_recipes_hash(torchvisions):
    assert fetch(model_of("IMAGENET1K_V1", weights_sha256=SHA256)).sha256 == SHA256
    with pytest.raises(CheckpointError, match=r"`model\.weights_sha256`"):
        fetch(model_of("IMAGENET1K_V1", weights_sha256="f" * 64))


# Other addresses


def test_an_https_address_is_downloaded_once(server, cache):
    model = model_of(f"{server.address}/mine.pth")
    first, second = fetch(model), fetch(model)
    assert first == second
    assert first.sha256 == SHA256
    assert first.path.read_bytes() == CONTENT
    assert first.path.is_relative_to(cache)
    assert server.asked == ["/mine.pth"]


def test_two_addresses_that_end_alike_are_two_files(server):
    server.files["/other/mine.pth"] = b"other weights"
    one, other = (fetch(model_of(f"{server.address}{path}")) for path in ("/mine.pth", "/other/mine.pth"))
    assert one.sha256 == SHA256
    assert other.sha256 == hashlib.sha256(b"other weights").hexdigest()


def test_a_download_that_ends_early_is_refused_and_nothing_is_left(server, cache):
    """Its name holds no hash: only the announced length tells."""
    server.cut = 1000
    with pytest.raises((ServiceError, CheckpointError), match=r"mine\.pth"):
        fetch(model_of(f"{server.address}/mine.pth"))
    assert left_in(cache) == []


def test_an_address_that_is_not_there_is_a_service_error(server, cache):
    with pytest.raises(ServiceError, match="404") as caught:
        fetch(model_of(f"{server.address}/absent.pth"))
    assert f"{server.address}/absent.pth" in str(caught.value)
    assert left_in(cache) == []


def test_an_address_without_a_file_name_is_a_mistake_that_is_named(server):
    server.files["/"] = CONTENT
    with pytest.raises((ConfigError, ServiceError), match=server.address):
        fetch(model_of(f"{server.address}/"))


def test_an_untrusted_server_is_a_service_error(server, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ServiceError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(model_of(f"{server.address}/mine.pth"))
    assert server.asked == []


def test_a_server_that_is_down_says_where_to_put_the_file_and_it_is_found_there(torchvisions, cache):
    torchvisions.stop()
    with pytest.raises(ServiceError) as caught:
        fetch(model_of("IMAGENET1K_V1"))
    assert str(cache / NAMED_BY_HASH) in str(caught.value)
    assert left_in(cache) == []
    (cache / NAMED_BY_HASH).write_bytes(CONTENT)
    assert fetch(model_of("IMAGENET1K_V1")).sha256 == SHA256


def test_a_host_that_closes_at_once_is_a_service_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(ServiceError, match="must be reachable"):
            fetch(model_of(f"https://127.0.0.1:{listener.getsockname()[1]}/mine.pth"))


def test_a_cache_that_cannot_be_written_is_an_output_error_that_names_it(torchvisions, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=str(tmp_path / "file")):
        fetch(model_of("IMAGENET1K_V1"))
