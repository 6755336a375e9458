"""Tables of images: what is read, in three formats, and what is refused with file, row and fix."""

import json
import pickle

import pytest

from domainbed_reasoning.images.catalog import scan
from domainbed_reasoning.images.paths import Paths
from domainbed_reasoning.images.table import TableError, read_table
from domainbed_reasoning.images.user_datasets import DatasetFileError, read_dataset

ROWS = [
    {"path": "a/1.png", "label": "mug", "domain": "day", "split": "train", "note": "x"},
    {"path": 'b é, "2".png', "label": "bike", "domain": "night", "split": "val", "note": "y"},
    {"path": "3.png", "label": "bike", "domain": "day", "split": "train", "note": ""},
    {"path": "a/4.png", "label": "mug", "domain": "night", "split": "train", "note": "z"},
]


def write(path, rows=ROWS, columns=("note", "path", "label", "domain", "split")):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(list(rows)), path)
    else:
        import csv

        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_images_are_by_domain_in_the_tables_order_and_classes_are_sorted(tmp_path, ending):
    table = read_table(write(tmp_path / f"images.{ending}"), ["night", "day"])
    assert table.classes == ("bike", "mug")
    assert [list(paths) for paths in table.paths] == [['b é, "2".png', "a/4.png"], ["a/1.png", "3.png"]]
    assert [list(labels) for labels in table.labels] == [[0, 1], [1, 0]]


def test_rows_of_other_splits_are_left_out_and_columns_may_be_called_otherwise(tmp_path):
    rows = [
        {"file": row["path"], "y": index, "domain": row["domain"], "part": row["split"]}
        for index, row in enumerate(ROWS)
    ]
    names = {"path": "file", "label": "y", "split": "part"}
    table = read_table(write(tmp_path / "t.jsonl", rows), ["day", "night"], names, ["train"])
    assert [list(paths) for paths in table.paths] == [["a/1.png", "3.png"], ["a/4.png"]]
    assert table.classes == ("0", "2", "3")  # whole numbers are names of classes too


def test_rows_of_other_splits_may_have_no_label(tmp_path):
    rows = [*ROWS, {"path": "t.png", "label": "", "domain": "night", "split": "test"}]
    assert sum(map(len, read_table(write(tmp_path / "t.csv", rows), ["day", "night"], None, ["train"]).paths)) == 3
    with pytest.raises(TableError, match="'split' must be non-empty text"):
        read_table(write(tmp_path / "u.csv", [*ROWS, rows[-1] | {"split": ""}]), ["day", "night"], None, ["train"])


def test_paths_may_have_what_names_of_files_have(tmp_path):
    """macOS names a screenshot with a narrow no-break space, which Python does not count as printable."""
    path = "Screenshot 9.00.00\u202fAM.png"
    table = read_table(write(tmp_path / "t.jsonl", [ROWS[0] | {"path": path}, ROWS[1]]), ["day", "night"])
    assert list(table.paths[0]) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "dusk"}, r"line 3: the domain 'dusk' is not among the environments \(day, night\)"),
        ({"path": "../3.png"}, r"line 3: .*must not contain '\.\.'"),
        ({"path": "/3.png"}, "line 3: .*must be below the dataset's folder"),
        ({"path": "a/1.png"}, "line 3: the image 'a/1.png' is listed twice"),
        ({"label": ""}, "line 3: 'label' must be non-empty text of one line, got ''"),
        ({"label": None}, "line 3: 'label' must be non-empty text"),
        ({"path": 1.5}, "line 3: 'path' must be non-empty text"),
        ({"label": True}, "line 3: 'label' must be non-empty text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, change, message):
    rows = [*ROWS[:2], {**ROWS[2], **change}, ROWS[3]]
    with pytest.raises(TableError, match=message):
        read_table(write(tmp_path / "t.jsonl", rows), ["day", "night"])


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    def refused(name, content, *arguments):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TableError) as caught:
            read_table(path, ["day", "night"], *arguments)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "the column 'domain' is missing. It has the columns path, label" in refused("a.csv", b"path,label\n1,2\n")
    assert "the column 'path' is there more than once" in refused("b.csv", b"path,label,domain,path\n")
    assert "line 2: has 2 cells" in refused("c.csv", b"path,label,domain\n1,2\n")
    assert "not CSV" in refused("d.csv", b'path,label,domain\n"1,2,3\n')
    assert "line 1: not JSON" in refused("e.jsonl", b"{\n")
    assert "line 1: not a JSON object" in refused("f.jsonl", b"[]\n")
    assert "line 1: the key 'label' is missing" in refused("g.jsonl", b'{"path": "x"}\n')
    assert "not UTF-8" in refused("h.csv", b"path,label,domain\n\xff,2,3\n")
    assert "No such file" in refused("i.csv", None)
    assert "must end in .csv, .tsv, .jsonl, .parquet" in refused("j.txt", b"")
    assert "no row has the domain 'day'" in refused("k.csv", b"path,label,domain\n1,2,night\n")
    assert "no row of the split 'test'" in refused("l.csv", b"path,label,domain,split\n1,2,day,x\n", {}, ["test"])
    pytest.importorskip("pyarrow")
    assert "not Parquet" in refused("m.parquet", b"PAR1 and no more")


def test_paths_are_a_sequence_in_one_block():
    names = ["a/1.png", "é/ü.png", "\udcff.png", ""]
    paths = Paths(names)
    assert list(paths) == names == paths[:] and paths == names and len(paths) == 4
    assert paths[1] == names[1] and paths[-2] == names[2] and paths[1:3] == names[1:3] and "a/1.png" in paths
    assert pickle.loads(pickle.dumps(paths)) == paths and paths != Paths(names[:3])
    with pytest.raises(IndexError):
        paths[4]


def test_the_verbs_see_a_tables_images(tmp_path):
    (tmp_path / "data" / "camera").mkdir(parents=True)
    write(tmp_path / "data" / "camera" / "images.csv")
    described = tmp_path / "camera.toml"
    described.write_text('name = "Camera"\nfolder = "camera"\nenvironments = ["night", "day"]\ntable = "images.csv"\n')
    found = scan(read_dataset(described), tmp_path / "data")
    assert found.domains == ("night", "day") and found.classes == ("bike", "mug") and not found.missing
    assert found.labels() == {'b é, "2".png': 0, "a/4.png": 1, "a/1.png": 1, "3.png": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('table = "../images.csv"', "'table' must be the path of a .csv"),
        ('table = "images.xlsx"', "'table' must be the path of a .csv"),
        ('splits = ["train"]', "'splits' needs 'table'"),
        ('table = "t.csv"\nsplits = []', "'splits' must name at least one split"),
        ('table = "t.csv"\n[columns]\nfile = "x"', "Unknown column 'file'"),
        ('table = "t.csv"\n[columns]\npath = ""', "'columns' must map 'path' to a single-line name"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused(tmp_path, line, message):
    path = tmp_path / "x.toml"
    path.write_text(f'name = "Camera"\nfolder = "camera"\nenvironments = ["day", "night"]\n{line}\n')
    with pytest.raises(DatasetFileError, match=message):
        read_dataset(path)
