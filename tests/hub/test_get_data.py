"""`get-data` writes DomainBed's folders from a folder, an archive or the Hub, once and with the published counts."""

import io
import json
import os
import signal
import tarfile
import zipfile
from pathlib import Path

import pytest

from builders.hub_server import hub_variables, serve_hub
from builders.processes import start_verb, wait_until
from domainbed_reasoning.images import obtain, sources
from domainbed_reasoning.images.catalog import STOCK

PIXEL = b"P6\n1 1\n255\n%c%c%c"  # a PPM of one pixel


def picture(number):
    return PIXEL % (number % 256, number // 256 % 256, number // 65536)


def whole_vlcs():
    """Yield (path, bytes) of as many images as VLCS has."""
    number = 0
    for domain, counts in obtain._PER_CLASS["VLCS"].items():
        for label, count in zip(STOCK["VLCS"].classes, counts, strict=True):
            for index in range(count):
                number += 1
                yield f"{domain}/{label}/{index}.ppm", picture(number)


def write_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def write_tar(path, entries):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def images_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FEW = [
    (f"kfold/{domain}/{label}/pic_{index}.jpg", f"{domain} {label} {index}".encode())
    for domain in STOCK["PACS"].domains
    for label in STOCK["PACS"].classes
    for index in (1, 2)
]
FEW_PLACED = {name.removeprefix("kfold/"): data for name, data in FEW}


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_an_archive_of_the_published_counts_becomes_the_dataset(verb, tmp_path, write):
    source = write(tmp_path / "archive", [("VLCS/readme.txt", b"x"), *((f"VLCS/{n}", d) for n, d in whole_vlcs())])
    code, out, err = verb("get-data", "VLCS", "--from", source, "--data-dir", tmp_path / "data")
    assert (code, err) == (0, ""), out
    assert images_below(tmp_path / "data" / "VLCS") == dict(whole_vlcs())
    assert "Wrote 10,729 images" in out and sorted(os.listdir(tmp_path / "data")) == ["VLCS"]
    code, _, err = verb("get-data", "VLCS", "--from", source, "--data-dir", tmp_path / "data")
    assert code == 1 and "exists. Check it with" in err


def test_an_archive_of_the_current_folder_is_read(verb, tmp_path):
    """`tar -czf pacs.tgz .` begins every name with ``./``."""
    source = write_tar(tmp_path / "pacs.tgz", [(f"./{name}", data) for name, data in FEW])
    code, out, _ = verb("get-data", "PACS", "--from", source, "--data-dir", tmp_path / "data", "--any-counts")
    assert code == 0 and "Wrote 56 images" in out
    assert images_below(tmp_path / "data" / "PACS") == FEW_PLACED


def test_other_counts_are_named_and_left_aside_until_they_are_accepted(verb, tmp_path):
    source = write_zip(tmp_path / "pacs.zip", FEW)
    words = ("get-data", "PACS", "--from", source, "--data-dir", tmp_path / "data")
    code, out, _ = verb(*words)
    assert code == 1 and "PROBLEM photo: 14 images; 1,670 published." in out
    assert "PROBLEM sketch/person: 2 images; 160 published." in out
    assert not (tmp_path / "data" / "PACS").exists()
    code, out, _ = verb(*words, "--any-counts")
    assert code == 0 and "Wrote 0 images; 56 were there already." in out
    assert images_below(tmp_path / "data" / "PACS") == FEW_PLACED


def test_a_folder_is_read_by_any_names_of_its_domains_and_classes(verb, tmp_path):
    """Office-Home's folders as a copy may spell them; links are not followed."""
    root = tmp_path / "copy"
    for place in ("Real/alarm clock", "Clip Art/TV", "Art/Desk_Lamp"):
        (root / place).mkdir(parents=True)
        (root / place / "1.jpg").write_bytes(place.encode())
    (root / "Art" / "TV").symlink_to(tmp_path)
    (root / "Art" / "Desk_Lamp" / "2.jpg").symlink_to("/etc/hostname")
    verb("get-data", "OfficeHome", "--from", root, "--data-dir", tmp_path / "data", "--any-counts")
    assert sorted(images_below(tmp_path / "data" / "office_home")) == [
        "Art/Desk_Lamp/1.jpg",
        "Clipart/TV/1.jpg",
        "Real World/Alarm_Clock/1.jpg",
    ]


HOSTILE = ["../../photo/dog/1.jpg", "/photo/dog/2.jpg", "photo/dog/../../../3.jpg", "photo/dog/..\\4.jpg",
           "photo/dog/.5.jpg", "__MACOSX/photo/dog/._6.jpg", "C:photo/dog/7.jpg", "photo/dog/8\n.jpg",
           "photo/dog/9.exe", "photo//dog/10.jpg"]  # fmt: skip


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_nothing_leaves_the_folder(verb, tmp_path, write):
    source = write(tmp_path / "evil", [*((name, b"evil") for name in HOSTILE), *FEW])
    verb("get-data", "PACS", "--from", source, "--data-dir", tmp_path / "data" / "deep", "--any-counts")
    assert images_below(tmp_path / "data") == {f"deep/PACS/{name}": data for name, data in FEW_PLACED.items()}
    assert sorted(os.listdir(tmp_path)) == ["data", "evil"]


def test_links_and_devices_in_archives_are_skipped(verb, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "1"), (tarfile.LNKTYPE, "2"), (tarfile.FIFOTYPE, "3"), (b"3", "4")):
            info = tarfile.TarInfo(f"photo/dog/{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    code, _, err = verb("get-data", "PACS", "--from", tmp_path / "a.tar", "--data-dir", tmp_path / "data")
    assert code == 1 and "has no image below a domain and a class of PACS" in err


def test_bombs_are_refused_before_they_are_unpacked(verb, tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("photo/dog/1.jpg", bytes(sources.MAX_FILE_BYTES + 1))
    code, _, err = verb("get-data", "PACS", "--from", bomb, "--data-dir", tmp_path / "data")
    assert code == 1 and "too large for an image" in err
    monkeypatch.setattr(sources, "MAX_ENTRIES", 10)
    for write in (write_zip, write_tar):
        source = write(tmp_path / write.__name__, FEW)
        code, _, err = verb("get-data", "PACS", "--from", source, "--data-dir", tmp_path / f"{write.__name__}_data")
        assert code == 1 and "has more than 10 entries" in err


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"not an archive" * 50])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_damaged_archive_is_named(verb, tmp_path, write, spoil):
    source = write(tmp_path / "a", FEW)
    source.write_bytes(spoil(source.read_bytes()))
    code, _, err = verb("get-data", "PACS", "--from", source, "--data-dir", tmp_path / "data")
    assert code == 1 and len(err.splitlines()) == 1 and "is not a folder, zip or tar file, or is damaged" in err
    assert not (tmp_path / "data" / "PACS").exists()


def test_a_killed_run_is_resumed_and_another_source_is_not_mixed_in(verb, tmp_path):
    source = write_zip(tmp_path / "vlcs.zip", whole_vlcs())
    words = ("get-data", "VLCS", "--from", source, "--data-dir", tmp_path / "data")
    partial = tmp_path / "data" / ".VLCS.partial"
    process = start_verb(*words)
    wait_until(lambda: (partial / "Caltech101" / "car" / "0.ppm").exists())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "data" / "VLCS").exists()
    other = write_zip(tmp_path / "other.zip", whole_vlcs())
    code, _, err = verb("get-data", "VLCS", "--from", other, "--data-dir", tmp_path / "data")
    assert code == 1 and "was written from" in err and "Pass the same --from to continue" in err
    code, out, _ = verb(*words)
    kept = int(out.partition(" were there already")[0].rpartition(" ")[2].replace(",", ""))
    assert code == 0 and kept >= 238  # all birds and the first car
    assert images_below(tmp_path / "data" / "VLCS") == dict(whole_vlcs())


# Of LILA's archive: file name → location and its annotations' categories. Location 33 and cars are not DomainBed's.
TRAPS = {
    "59a1.jpg": (38, ["coyote"]),
    "59a2.jpg": (38, ["coyote", "coyote"]),
    "59a3.jpg": ("100", ["empty"]),
    "59a4.jpg": (46, ["bird", "squirrel"]),
    "59a5.jpg": (43, ["car"]),
    "59a6.jpg": (33, ["dog"]),
    "59a7.jpg": (43, ["rabbit", "car"]),
}
CATEGORIES = ["empty", "bird", "coyote", "squirrel", "car", "dog", "rabbit"]
TRAPS_PLACED = [
    "location_100/empty/59a3.jpg",
    "location_38/coyote/59a1.jpg",
    "location_38/coyote/59a2.jpg",
    "location_43/rabbit/59a7.jpg",
    "location_46/bird/59a4.jpg",
    "location_46/squirrel/59a4.jpg",
]


def annotations_of(names):
    """An annotation file of these images, in the format of COCO Camera Traps."""
    categories = [{"id": 10 + number, "name": name} for number, name in enumerate(CATEGORIES)]
    images = [{"id": name[:-4], "file_name": name, "location": TRAPS[name][0], "width": 1} for name in names]
    labels = [(name[:-4], 10 + CATEGORIES.index(label)) for name in names for label in TRAPS[name][1]]
    annotations = [{"id": str(n), "image_id": image, "category_id": c} for n, (image, c) in enumerate(labels)]
    return json.dumps({"categories": categories, "images": images, "annotations": annotations, "info": {}}).encode()


@pytest.mark.parametrize("unpacked", [False, True])
def test_lilas_camera_traps_become_terra_incognita(verb, tmp_path, unpacked):
    """Two archives: images in one folder, and annotation files of a split each. An image of two classes is in both."""
    images = [(f"eccv_18_all_images_sm/{name}", name.encode()) for name in TRAPS]
    names = sorted(TRAPS)
    files = [(f"eccv_18_annotation_files/{split}_annotations.json", annotations_of(part))
             for split, part in (("cis_test", names[:3]), ("train", names[2:]))]  # fmt: skip
    source = write_tar(tmp_path / "eccv_18_all_images_sm.tar.gz", images)
    annotations = write_tar(tmp_path / "eccv_18_annotations.tar.gz", files)
    if unpacked:
        for archive in (source, annotations):
            tarfile.open(archive).extractall(tmp_path / "terra", filter="data")
        source = annotations = tmp_path / "terra"
    words = ("get-data", "TerraIncognita", "--from", source, "--annotations", annotations)
    code, out, _ = verb(*words, "--data-dir", tmp_path / "data")
    assert code == 1 and "PROBLEM location_38: 2 images; 9,736 published." in out
    assert "2 images are of other locations or classes, and were ignored." in out
    code, out, _ = verb(*words, "--data-dir", tmp_path / "data", "--any-counts")
    assert code == 0 and "Wrote 0 images; 6 were there already." in out
    found = images_below(tmp_path / "data" / "terra_incognita")
    assert sorted(found) == TRAPS_PLACED
    assert all(data == Path(name).name.encode() for name, data in found.items())


@pytest.mark.parametrize(
    ("dataset", "entries", "message"),
    [
        ("PACS", [], "--annotations is for TerraIncognita"),
        ("TerraIncognita", [("readme.txt", b"x")], "has no JSON file. Pass LILA's eccv_18_annotations.tar.gz"),
        ("TerraIncognita", [("a.json", b"{")], "a.json is not JSON"),
        ("TerraIncognita", [("a.json", b"\xff")], "a.json is not JSON"),
        (
            "TerraIncognita",
            [("a.json", b"[1]")],
            "a.json needs a list 'images' of objects with id, file_name, location",
        ),
        ("TerraIncognita", [("a.json", b'{"images": [{"id": []}]}')], "needs a list 'images'"),
        ("TerraIncognita", [("a.json", annotations_of(["59a6.jpg"]))], "has none of TerraIncognita's images in"),
        (
            "TerraIncognita",
            [("a.json", annotations_of([])), ("b.json", annotations_of([]).replace(b"coyote", b"wolf"))],
            "b.json: the category 12 has another name than in the other files",
        ),
    ],
)
def test_annotations_that_cannot_be_used_are_named(verb, tmp_path, dataset, entries, message):
    source = write_tar(tmp_path / "images.tar.gz", [(f"sm/{name}", name.encode()) for name in TRAPS])
    annotations = write_zip(tmp_path / "annotations.zip", entries)
    words = ("get-data", dataset, "--from", source, "--annotations", annotations, "--data-dir", tmp_path / "data")
    code, _, err = verb(*words)
    assert code == 1 and message in err and len(err.splitlines()) == 1


def parquet_bytes(folder, rows, names):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    features = {"label": {"names": names, "_type": "ClassLabel"}}
    schema = arrow.Table.from_pylist(rows).schema
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    file = folder / "rows.parquet"
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows, schema.with_metadata(told)), file)
    return file.read_bytes()


@pytest.fixture
def hub():
    with serve_hub() as hub:
        yield hub


def get_from_hub(hub, tmp_path, *more):
    process = start_verb(
        "get-data", "PACS", "--from", "hub:someone/pacs", "--data-dir", tmp_path / "data", *more,
        **hub_variables(hub, tmp_path / "hf", token=""),
    )  # fmt: skip
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def hub_rows(names):
    return [
        {"image": {"bytes": b"\xff\xd8\xff" + data, "path": f"/x/{Path(name).name}" if number % 2 else None},
         "domain": name.split("/")[1], "label": names.index(name.split("/")[2])}
        for number, (name, data) in enumerate(FEW)
    ]  # fmt: skip


def test_a_copy_on_the_hub_becomes_the_dataset_and_is_resumed(hub, tmp_path):
    """Numbers of classes are read by the names in the file, whatever their order; two files, the second unreachable."""
    names = [*reversed(STOCK["PACS"].classes)]
    rows = hub_rows(names)
    files = {
        "data/train-00000-of-00002.parquet": parquet_bytes(tmp_path, rows[:20], names),
        "data/train-00001-of-00002.parquet": parquet_bytes(tmp_path, rows[20:], names),
    }
    hub.add("dataset", "someone/pacs", files, private=False)
    hub.refuses = "resolve/.*00001-of-00002"
    code, _, err = get_from_hub(hub, tmp_path)
    assert code == 1 and err.startswith("The Hub: ")
    hub.refuses = None
    code, out, err = get_from_hub(hub, tmp_path, "--any-counts")
    assert code == 0, err
    assert "Wrote 36 images; 20 were there already." in out
    found = images_below(tmp_path / "data" / "PACS")
    assert sorted(found.values()) == sorted(b"\xff\xd8\xff" + data for _, data in FEW)
    for name, data in found.items():
        domain, label = name.split("/")[:2]
        assert data.startswith(b"\xff\xd8\xff" + f"{domain} {label} ".encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "nowhere"}, "row 1: PACS has no domain 'nowhere' with a class 'dog'"),
        ({"label": 99}, "the column 'label' has 99, and the file has no names for its numbers"),
        ({"image": {"bytes": b"MZ", "path": None}}, "its bytes are no JPEG, PNG, WebP, BMP or TIFF"),
        ({"image": {"bytes": b"\xff\xd8\xff", "path": "../../x.jpg"}}, None),
    ],
)
def test_rows_of_other_layouts_are_named(hub, tmp_path, change, message):
    names = list(STOCK["PACS"].classes)
    hub.add("dataset", "someone/pacs", {"a.parquet": parquet_bytes(tmp_path, [hub_rows(names)[0] | change], names)})
    code, out, err = get_from_hub(hub, tmp_path)
    assert code == 1 and (message in err if message else "PROBLEM" in out), err
    assert not list(tmp_path.rglob("../x.jpg")) and not (tmp_path / "data" / "PACS").exists()
