"""The same images in shards on disk and on S3 are the same run."""

from pathlib import Path

import safetensors.torch
import torch

from swa_dist.storage.s3 import Prefix
from tests.service.forked import swa_dist
from tests.service.test_launch import settings, summary_in


def swa_weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("runs/swa-*/candidates/swa/model.safetensors")
    return safetensors.torch.load_file(path)


def test_shards_on_disk_and_on_s3_are_the_same_run(
    few_digits: Path, start_weights: Path, tmp_path: Path, s3: str
) -> None:
    on_disk, on_s3 = tmp_path / "disk", tmp_path / "s3"
    for split in ("train", "val"):
        made = swa_dist(
            "data", "shard", str(few_digits / split), f"shards/{split}", "--images-per-shard", "40", cwd=tmp_path
        )
        assert made.returncode == 0, made.stderr
        for file in sorted((tmp_path / "shards" / split).iterdir()):
            Prefix(f"{s3}/{split}").upload(file, file.name)
    found = {}
    for folder, root in ((on_disk, str(tmp_path / "shards")), (on_s3, s3)):
        folder.mkdir()
        places = {"data.train": f"{root}/train", "data.val": f"{root}/val", "data.index": f"{root}/index"}
        arguments = settings(few_digits, start_weights, **places, **{"data.shard_window": 3})
        indexed = swa_dist("data", "index", "--recipe", *arguments[1:], cwd=folder)
        assert indexed.returncode == 0, indexed.stderr
        run = swa_dist(*arguments, "--set", f"data.cache_dir={tmp_path / 'cache'}", cwd=folder)
        assert run.returncode == 0, run.stderr
        found[root] = summary_in(folder), swa_weights(folder), run.stdout
    (disk, disk_weights, _), (remote, remote_weights, said) = found.values()
    assert disk["run_key"] == remote["run_key"]
    assert disk["candidates"]["swa"]["nll"] == remote["candidates"]["swa"]["nll"]
    assert all(torch.equal(disk_weights[name], remote_weights[name]) for name in disk_weights)
    assert "of images from S3 kept in" in said
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) > 497  # the images, once each
