"""A flat folder of validation images and the files that say their classes: as class folders would have them."""

import csv
import time

import numpy as np
import pytest
from scipy.io import savemat

from swa_dist.data.labels import labels_of
from swa_dist.data.scan import scan
from swa_dist.errors import DataError
from tests.unit.test_index import add

NUM_IMAGES = 7
NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, NUM_IMAGES + 1)]
WNIDS = ["n03", "n01", "n02", "n01", "n03", "n10", "n02"]
"""Of each image. The devkit's numbers are not in the order of these names."""
DEVKIT = {"n10": 1, "n02": 2, "n03": 3, "n01": 4}


@pytest.fixture
def val(tmp_path):
    for number, name in enumerate(NAMES):
        add(tmp_path / "val" / name, seed=number)
    return tmp_path / "val"


def write_meta(path, numbers=DEVKIT):
    """A meta.mat with the fields of ILSVRC2012's, in their order; synsets that have children are no classes."""
    kinds = [
        *(("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")),
        *(("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")),
    ]
    rows = [(number, wnid, f"words, of {wnid}", "a gloss", 0, [], 0, 1300) for wnid, number in numbers.items()]
    rows.append((len(numbers) + 1, "n99", "animal", "a gloss", 2, [1, 2], 3, 0))
    synsets = np.zeros((len(rows), 1), dtype=kinds)
    for place, row in enumerate(rows):
        for (field, _), value in zip(kinds, row, strict=True):
            synsets[place, 0][field] = value if isinstance(value, str) else np.array([value], dtype=np.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"synsets": synsets})


def kaggle(folder):
    """Not in the order of the images, without extensions, with boxes, several to an image."""
    lines = [
        f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for name, wnid in zip(NAMES, WNIDS, strict=True)
    ]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n")


def tiny(folder):
    lines = [f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in zip(NAMES, WNIDS, strict=True)]
    (folder / "val_annotations.txt").write_text("".join(reversed(lines)))


def tensorflow(folder):
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(WNIDS))


def devkit(folder):
    numbers = "".join(f"{DEVKIT[wnid]}\n" for wnid in WNIDS)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)
    write_meta(folder / "meta.mat")


def devkit_unpacked(folder):
    """The numbers copied out of the devkit, whose folder `data` lies beside."""
    devkit(folder)
    (folder / "data").mkdir()
    (folder / "meta.mat").rename(folder / "data" / "meta.mat")


def own_csv(folder):
    with (folder / "mine").open("w", newline="") as file:
        csv.writer(file).writerows(zip(NAMES, WNIDS, strict=True))


def own_windows(folder):
    lines = [f"{name} {wnid}\r\n" for name, wnid in zip(NAMES, WNIDS, strict=True)]
    (folder / "mine").write_bytes("".join(["\ufeff", *lines, "\r\n"]).encode())


def classes_by_image(found):
    return {
        path.rpartition("/")[2]: found.classes[label] for path, label in zip(found.paths, found.labels, strict=True)
    }


def as_class_folders(val, root):
    for name, wnid in zip(NAMES, WNIDS, strict=True):
        (root / wnid).mkdir(parents=True, exist_ok=True)
        (root / wnid / name).write_bytes((val / name).read_bytes())
    return scan(str(root), "data.val")


@pytest.mark.parametrize("write", [kaggle, tiny, tensorflow, devkit])
@pytest.mark.parametrize("beside", [True, False], ids=["beside", "within"])
def test_a_known_file_in_the_folder_or_beside_it_gives_what_class_folders_would(val, tmp_path, write, beside):
    write(tmp_path if beside else val)
    found = scan(str(val), "data.val", labels="auto")
    folders = as_class_folders(val, tmp_path / "folders")
    assert found.classes == folders.classes == ("n01", "n02", "n03", "n10")
    assert classes_by_image(found) == classes_by_image(folders) == dict(zip(NAMES, WNIDS, strict=True))
    assert [path.rpartition("/")[2] for path in folders.paths] == list(found.paths)  # by class and name
    assert found.labels.tolist() == folders.labels.tolist()


@pytest.mark.parametrize("write", [kaggle, tiny, tensorflow, devkit, devkit_unpacked, own_csv, own_windows])
def test_a_file_that_is_named_may_be_anywhere(val, tmp_path, write):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere")
    (path,) = [path for path in (tmp_path / "elsewhere").iterdir() if path.is_file() and path.suffix != ".mat"]
    found = scan(str(val), "data.val", labels=str(path))
    assert classes_by_image(found) == dict(zip(NAMES, WNIDS, strict=True))


def test_names_with_blanks_are_separated_by_commas_or_tabs(tmp_path):
    add(tmp_path / "val" / "a b.jpg")
    add(tmp_path / "val" / "c, d.jpg", seed=1)
    (tmp_path / "tabs").write_text("a b.jpg\tcat\nc, d.jpg\tdog\n")
    (tmp_path / "commas").write_text('a b.jpg,cat\n"c, d.jpg",dog\n')
    for name in ("tabs", "commas"):
        found = scan(str(tmp_path / "val"), "data.val", labels=str(tmp_path / name))
        assert classes_by_image(found) == {"a b.jpg": "cat", "c, d.jpg": "dog"}, name


def test_a_file_may_name_more_images_than_there_are(val, tmp_path):
    kaggle(tmp_path)
    (val / NAMES[0]).unlink()
    assert len(scan(str(val), "data.val", labels="auto")) == NUM_IMAGES - 1


def test_the_digest_is_of_the_classes_too(val, tmp_path):
    tensorflow(tmp_path)
    before = scan(str(val), "data.val", labels="auto").digest
    path = tmp_path / "imagenet_2012_validation_synset_labels.txt"
    path.write_text("\n".join(["n02", *WNIDS[1:]]))
    assert scan(str(val), "data.val", labels="auto").digest != before


def test_class_folders_beside_images_win_unless_a_file_is_named(val, tmp_path):
    add(val / "cat" / "a.jpg")
    tensorflow(tmp_path)
    assert scan(str(val), "data.val", labels="auto").paths == ("cat/a.jpg",)
    named = str(tmp_path / "imagenet_2012_validation_synset_labels.txt")
    assert set(scan(str(val), "data.val", labels=named).paths) == set(NAMES)


def test_fifty_thousand_images_are_named_in_a_moment():
    """ImageNet's, as Kaggle has them: without the extensions, so that no name is found as it stands."""
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    lines = [f"{name.removesuffix('.JPEG')},n{number % 1000:08d} 1 2 3 4" for number, name in enumerate(names)]
    began = time.monotonic()
    found = labels_of_lines(lines, names)
    assert time.monotonic() - began < 5
    assert len(found) == 50_000


def labels_of_lines(lines, names):
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write("\n".join(lines))
        file.flush()
        return labels_of("/absent", names, file.name, "data.val")


# What is refused


def refusal(val, labels="auto", named="data.val"):
    with pytest.raises(DataError) as caught:
        scan(str(val), named, labels=labels)
    assert caught.value.exit_code == 65
    return str(caught.value)


def test_without_a_file_the_setting_is_named(val):
    message = refusal(val)
    assert str(val) in message
    assert "`data.val_labels`" in message
    assert "`--labels`" in refusal(val, named="SRC")


def test_a_flat_folder_of_training_images_needs_folders(val, tmp_path):
    tensorflow(tmp_path)
    assert "must hold one folder per class" in refusal(val, labels=None, named="data.train")


def test_a_file_that_is_not_there_is_named(val, tmp_path):
    message = refusal(val, str(tmp_path / "absent.txt"))
    assert f"{tmp_path}/absent.txt is not there" in message
    assert "`data.val_labels`" in message


def test_a_folder_in_place_of_the_file_is_named(val, tmp_path):
    (tmp_path / "folder").mkdir()
    assert f"{tmp_path}/folder" in refusal(val, str(tmp_path / "folder"))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_named(val, tmp_path, content):
    (tmp_path / "mine").write_text(content)
    assert f"{tmp_path}/mine is empty" in refusal(val, str(tmp_path / "mine"))


@pytest.mark.parametrize("wnids", [WNIDS[:-1], [*WNIDS, "n01"], ["n01"]])
def test_another_number_of_classes_than_images_is_refused_with_both(val, tmp_path, wnids):
    (tmp_path / "mine").write_text("\n".join(wnids))
    message = refusal(val, str(tmp_path / "mine"))
    assert f"{tmp_path}/mine has {len(wnids)} for the 7 images of {val}" in message


@pytest.mark.parametrize("write", [kaggle, tiny])
def test_images_that_a_file_does_not_name_are_refused_by_name(val, tmp_path, write):
    write(tmp_path)
    for number in range(3):
        add(val / f"extra{number}.jpg", seed=number)
    message = refusal(val)
    assert "'extra0.jpg' and 2 more" in message


def test_an_image_whose_class_is_left_empty_is_refused_by_name(val, tmp_path):
    kaggle(tmp_path)
    path = tmp_path / "LOC_val_solution.csv"
    content = path.read_text()
    path.write_text(content.replace("n03 1 2 3 4 n03 5 6 7 8\n", "\n"))
    assert path.read_text() != content
    assert NAMES[0] in refusal(val)


def test_a_file_that_is_no_text_is_refused_by_name(val, tmp_path):
    add(tmp_path / "mine.png")
    assert f"{tmp_path}/mine.png" in refusal(val, str(tmp_path / "mine.png"))


def test_the_devkits_numbers_need_its_meta_mat(val, tmp_path):
    devkit(tmp_path)
    (tmp_path / "meta.mat").unlink()
    message = refusal(val)
    assert f"{tmp_path}/ILSVRC2012_validation_ground_truth.txt" in message
    assert "meta.mat beside it" in message


def test_a_number_that_meta_mat_has_not_is_refused_with_both_named(val, tmp_path):
    devkit(tmp_path)
    for number in ("0", "5", "1001"):  # 5 is a synset with children: an animal
        path = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
        path.write_text("\n".join(["1"] * (NUM_IMAGES - 1) + [number]))
        message = refusal(val)
        assert str(path) in message
        assert "meta.mat" in message
        assert number in message


@pytest.mark.parametrize("content", [b"", b"no mat file" * 100, None])
def test_a_meta_mat_that_is_none_is_refused_by_name(val, tmp_path, content):
    devkit(tmp_path)
    if content is None:
        savemat(tmp_path / "meta.mat", {"other": np.zeros(3)})
    else:
        (tmp_path / "meta.mat").write_bytes(content)
    assert f"{tmp_path}/meta.mat" in refusal(val)
