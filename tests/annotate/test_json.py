"""``--json`` of the verbs about chains: `check`, `stats` and `import`."""

import json


def test_check_stats_and_import_print_one_document_with_the_numbers_of_their_texts(toy, verb, tmp_path, chain_text):
    images = sorted(path.relative_to(toy / "toy").as_posix() for path in (toy / "toy").rglob("*.png"))
    mine = tmp_path / "mine.jsonl"
    label = images[0].split("/")[1].replace("_", " ").lower()
    rows = [{"image": images[0], "chain": chain_text("fur and ears", label)}, {"image": images[1], "chain": "none"}]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ("--dataset", "Toy", "--data-dir", toy)

    code, out, err = verb("import", mine, *where, "--unverified", "--min-words", 1, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["rows"], found["written"]) == (2, 2) and sum(found["outcomes"].values()) == 2

    code, out, _ = verb("check", *where, "--json")
    found = json.loads(out)
    assert out.count("\n") == 1 and code == int(bool(found["problems"]))
    assert found["images"] == 18 and set(found["classes"].values()) >= {label} and label in found["question"]
    assert all(domain == {"images": 9, "published": None} for domain in found["domains"].values())

    code, out, _ = verb("stats", *where, "--json")
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert sum(group["images"] for group in found["groups"]) == 18
    assert sum(group["candidates"] for group in found["groups"]) == 2
    assert found["rules"]["true"] + found["rules"]["wrong"] == 2
    assert all(group["dollars"] is None for group in found["groups"])
    assert verb("stats", *where, "--json", "--csv", tmp_path / "counts.csv")[0] == 2

    listed = json.loads(verb("check", "--list", "--json")[1])
    assert {"name": "Toy", "folder": "toy", "environments": ["A", "P"], "subject": "thing"} in listed
