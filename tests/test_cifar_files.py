"""Sets in CIFAR-10's two forms, in folders and archives: what is read, and one sentence for all else."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distconv import data
from distconv.data import cifar, cifar_files
from distconv.data.dataset import Dataset
from distconv.errors import BadDataError, DistconvError, MissingInputError
from tests import jobs
from tests.cifar import FORMS, ONE, RECORDS, WHOLE, Files, archive, assert_holds, binary, changed, write
from tests.files import peak_memory, small_set, write_set


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_from_a_folder_and_from_an_archive(tmp_path: Path, form: str) -> None:
    folder = str(write(tmp_path / "mine", FORMS[form]))
    (tmp_path / "mine.tar.gz").write_bytes(archive(FORMS[form], "./any/folder/"))
    for name in (folder, str(tmp_path / "mine.tar.gz")):
        assert data.prepare(name) == (name, "")
        loaded = data.load(name)
        assert isinstance(loaded, Dataset) and loaded.name == name
        assert_holds(loaded)


def test_the_file_of_a_python_2_has_the_length_of_the_official_one() -> None:
    assert len(FORMS["Python 2"]["batches.meta"]) == 158


def test_there_are_as_many_classes_as_names_and_mnists_files_win(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {**binary(), "batches.meta.txt": "\n".join(map(str, range(12))).encode()})
    loaded = data.load(str(folder))
    assert loaded.classes == 12 and isinstance(loaded, Dataset) and loaded.class_names == tuple(map(str, range(12)))
    write_set(folder, small_set())
    assert data.load(str(folder)).image_shape == (5, 4, 1)


def pickled(**parts: Any) -> Files:
    """The python form with another data_batch_2, of which some entries are changed or left out."""
    array = RECORDS["data_batch_2"]
    batch = {"labels": array[:, 0].tolist(), "data": array[:, 1:].copy(), **parts}
    kept = {key: value for key, value in batch.items() if value is not None}
    return {**FORMS["protocol 2"], "data_batch_2": pickle.dumps(kept, 2)}


CUT = FORMS["Python 2"]["test_batch"][:-9]
WRONG_LABEL = ONE[: 3073 * 2] + b"\x0a" + ONE[3073 * 2 + 1 :]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        *((changed(**{batch: None}), MissingInputError, f"holds no {batch}.bin: all of ") for batch in RECORDS),
        (changed(meta=None), MissingInputError, "holds no batches.meta.txt"),
        ({"data_batch_1.bin": ONE}, MissingInputError, "holds no data_batch_2.bin: .* unpack the archive again"),
        ({"test_batch": b""}, MissingInputError, "holds no data_batch_1: all of .*, batches.meta are needed"),
        (changed(data_batch_1=ONE[:-1]), BadDataError, "data_batch_1.bin has 9,218 bytes, but records of 3,073"),
        (changed(test_batch=ONE + b"\0"), BadDataError, "test_batch.bin has 9,220 bytes, but records of 3,073"),
        (changed(data_batch_5=b""), BadDataError, "data_batch_5.bin holds no images"),
        (changed(data_batch_1=WRONG_LABEL), BadDataError, "data_batch_1.bin: label number 2 is 10; .* 0 to 9"),
        (changed(meta=b"\xff\xfe"), BadDataError, "batches.meta.txt is no text"),
        (changed(meta=b""), BadDataError, "batches.meta.txt names 0 classes, but a line for each of two or more"),
        (changed(meta=b"cat\n"), BadDataError, "batches.meta.txt names 1 classes"),
        (changed(meta=b"a\nb\n"), BadDataError, "label number . is .*, as .*batches.meta.txt names 2 classes"),
        (changed(meta=b"a\x1b\nb\n" + b"c\n" * 8), BadDataError, "the name of class 0 is 'a.x1b', but printable"),
        (pickled(data=RECORDS["data_batch_2"] / 1), BadDataError, "data_batch_2: data is no array of bytes"),
        (pickled(data=RECORDS["data_batch_2"]), BadDataError, r"data is no array of bytes of shape \(N, 3,072\)"),
        (pickled(data=None), BadDataError, "data is no array"),
        (pickled(labels=None), BadDataError, "labels is no list of 4 numbers"),
        (pickled(labels=[1, 2, 3]), BadDataError, "labels is no list of 4 numbers"),
        (pickled(labels=(1, 2, 3, 4)), BadDataError, "labels is no list of 4 numbers"),
        (pickled(labels=[1, 2, 3, -1]), BadDataError, "labels is no list of 4 numbers"),
        (pickled(labels=[1, 2, 3, 1.5]), BadDataError, "labels is no list of 4 numbers"),
        (pickled(labels=[1, 2, 3, 10]), BadDataError, "label number 3 is 10; .* 0 to 9"),
        (pickled(other={1}), BadDataError, "data_batch_2 is no pickle of a batch: .* nothing of it was run"),
        ({**FORMS["Python 2"], "test_batch": CUT}, BadDataError, "test_batch is no pickle of a batch"),
        ({**FORMS["Python 2"], "test_batch": b"\x80\x02]."}, BadDataError, "test_batch holds a list, but a dict"),
        ({**FORMS["Python 2"], "batches.meta": b"\x80\x02}."}, BadDataError, "batches.meta: label_names is no list"),
    ],
)
def test_files_that_are_wrong_are_named_in_one_sentence(
    tmp_path: Path, content: Files, error: type[DistconvError], words: str
) -> None:
    folder = write(tmp_path / "mine", content)
    packed = tmp_path / "mine.tgz"
    packed.write_bytes(archive(content))
    for path in (folder, packed):
        with pytest.raises(error, match=f"{path}.*{words}") as caught:
            data.load(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_ten_thousand_images_a_file_may_have_names(tmp_path: Path, protocol: int) -> None:
    names = [b"leptodactylus_pentadactylus_s_%06d.png" % n for n in range(10_001)]  # protocol 2 makes each by a call
    batch = {b"labels": [3] * 10_001, b"data": np.zeros((10_001, 3072), np.uint8), b"filenames": names}
    content = {**FORMS["Python 2"], "test_batch": pickle.dumps(batch, protocol)}
    assert data.load(str(write(tmp_path / "mine", content))).size("test") == 10_001


class Call:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def test_a_pickle_that_would_crash_the_interpreter_is_refused(tmp_path: Path) -> None:
    tuples = b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."  # each in the next, and the last is a name to be hashed
    folder = write(tmp_path / "mine", {**FORMS["Python 2"], "data_batch_1": tuples})
    with pytest.raises(BadDataError, match=r"data_batch_1 is no pickle .*10,000 tuples"):
        data.load(str(folder))


@pytest.mark.parametrize("key", ["labels", "data", "other"])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, key: str) -> None:
    folder = write(tmp_path / "mine", pickled(**{key: Call(tmp_path / "canary")}))
    with pytest.raises(BadDataError, match=r"data_batch_2 is no pickle .*mkdir"):
        data.load(str(folder))
    assert not (tmp_path / "canary").exists()


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", changed(data_batch_3=None))
    os.mkfifo(folder / "data_batch_3.bin")
    with pytest.raises(MissingInputError, match=r"data_batch_3.bin is not a regular file"):
        data.load(str(folder))


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (member("x/data_batch_1.bin", tarfile.SYMTYPE, "/etc/passwd"), "'x/data_batch_1.bin' is no plain file"),
        (member("test_batch.bin", tarfile.LNKTYPE, "cifar-10-batches-bin/data_batch_1.bin"), "is no plain file"),
        (member("batches.meta.txt", tarfile.DIRTYPE), "is no plain file"),
        (member("data_batch_2.bin", tarfile.FIFOTYPE), "is no plain file"),
        (member("data_batch_2.bin", tarfile.REGTYPE), "comes twice"),
    ],
)
def test_an_archive_with_a_link_or_a_file_twice_is_refused(tmp_path: Path, odd: tarfile.TarInfo, words: str) -> None:
    path = tmp_path / "odd.tar.gz"
    path.write_bytes(archive(binary(), "cifar-10-batches-bin/", odd))
    with pytest.raises(BadDataError, match=f"{path}: .*{words}"):
        data.load(str(path))


def test_nothing_of_an_archive_is_written_wherever_its_names_lead(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    path = tmp_path / "deep/er/odd.tar.gz"
    outside = [member("../../escaped", tarfile.DIRTYPE), member(str(tmp_path / "absolute"), tarfile.REGTYPE)]
    path.write_bytes(archive(binary(), "../../", *outside, member("device", tarfile.CHRTYPE)))
    loaded = data.load(str(path))
    assert isinstance(loaded, Dataset)
    assert_holds(loaded)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "deep", tmp_path / "deep/er", path]


PLAIN = gzip.decompress(WHOLE)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x1f\x8b", b"PK\3\4", WHOLE[:-9], WHOLE[: len(WHOLE) // 2], WHOLE[9:], PLAIN),
        *(gzip.compress(text) for text in (b"", b"no archive", PLAIN[:9999], PLAIN[:512], PLAIN[600:])),
    ],
)
def test_what_is_no_whole_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(content)
    with pytest.raises((BadDataError, MissingInputError), match=f"{path} (is not a whole .tar.gz|holds no data_batch)"):
        data.load(str(path))


def test_an_archive_that_unpacks_to_too_much_gets_neither_memory_nor_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_files, "LARGEST", 1 << 20)
    zeros = {"data_batch_1.bin": bytes(1 << 24)}
    pax = tarfile.TarInfo("x")
    pax.pax_headers = {"comment": "0" * (1 << 24)}
    for content in (archive(zeros), archive({"other": bytes(1 << 24)}), archive(zeros, "x/", pax)):
        (tmp_path / "bomb.tar.gz").write_bytes(content)

        def refused() -> None:
            with pytest.raises(BadDataError, match=r"bomb.tar.gz unpacks to more than 1,048,576 bytes"):
                data.load(str(tmp_path / "bomb.tar.gz"))

        assert peak_memory(refused) < 4 << 20


def test_training_and_what_comes_after_it_on_colours_with_names(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.tar.gz", tmp_path / "run"
    path.write_bytes(archive(FORMS["Python 2"]))
    flags = ("--model", "simpleconvnet", "--epochs", "1", "--device", "cpu", "--batch-size", "10", "--augment", "cifar")
    trained = jobs.run(2, "-m", "distconv.train", "--data", path, "--out", out, *flags)
    assert trained.returncode == 0, trained.stderr
    judged = jobs.run(2, "-m", "distconv.evaluate", out, "--precision", "float32", "--json", "--confusion")
    row, errors = map(json.loads, judged.stdout.splitlines())
    assert errors["class_names"] == list(cifar.CLASSES)
    table = jobs.run(0, "-m", "distconv.evaluate", out, "--precision", "float32", "--png", tmp_path / "c.png").stdout
    assert [line.split()[1] for line in table.splitlines()[-12:-2]] == list(cifar.CLASSES)
    drawn = jobs.run(0, "-m", "distconv.misclassified", out, "--png", tmp_path / "wrong.png")
    found = drawn.stdout.splitlines()[1:-1]
    assert drawn.returncode == 0 and len(found) == row["total"] - row["correct"]
    for line in found:
        number, (label, inference) = int(line.split()[2].rstrip(":")), line.partition("(")[2].rstrip(")").split(", ")
        assert label == cifar.CLASSES[RECORDS["test_batch"][number, 0]] and inference in {*cifar.CLASSES} - {label}


def test_a_real_copy_is_whole() -> None:
    folder = os.environ.get("DISTCONV_CIFAR10_DIR")
    if not folder:
        pytest.skip("no CIFAR-10 is at hand: set DISTCONV_CIFAR10_DIR to a folder with it, or with a copy in its form")
    loaded = data.load(folder)
    assert isinstance(loaded, Dataset) and loaded.class_names == cifar.CLASSES
    assert np.bincount(loaded.train_labels).tolist() == [5000] * 10
    assert np.bincount(loaded.test_labels).tolist() == [1000] * 10
    np.testing.assert_allclose(
        loaded.channel_means, [0.4914, 0.4822, 0.4465], atol=1e-3
    )  # what everybody normalizes by
    np.testing.assert_allclose(loaded.channel_deviations, [0.2470, 0.2435, 0.2616], atol=3e-3)
