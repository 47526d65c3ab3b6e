"""A file of prompts becomes requests, or all that is wrong with it."""

from __future__ import annotations

import base64
import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client.rows import InvalidRows, read_batch
from src.settings import ROOT


def batch_of(folder: Path, name: str, content: str | bytes, **options: Any) -> Any:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_batch(file, **options)


def fields(folder: Path, name: str, content: str | bytes, **options: Any) -> list[tuple[int, Any]]:
    return [(row.number, dict(row.fields)) for row in batch_of(folder, name, content, **options).rows]


def faults(folder: Path, name: str, content: str | bytes, **options: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidRows) as caught:
        batch_of(folder, name, content, **options)
    return caught.value.faults


@pytest.mark.parametrize(
    "content",
    [
        "prompt,seed,preview\na fox,7,true\n",
        "prompt,seed,preview\r\na fox,7,TRUE\r\n",
        b"\xef\xbb\xbfprompt,seed,preview\na fox,7,true",
        "prompt;seed;preview\na fox;7;true\n",
        "prompt\tseed\tpreview\na fox\t7\ttrue\n",
        " Prompt , SEED,Preview\n a fox , 7 ,True,,\n,,\n\n",
        codecs.BOM_UTF16_LE + "prompt\tseed\tpreview\na fox\t7\ttrue\n".encode("utf-16-le"),
    ],
)
def test_a_table_is_read_as_spreadsheets_write_it(tmp_path: Path, content: str | bytes) -> None:
    assert fields(tmp_path, "a.csv", content) == [(2, {"prompt": "a fox", "seed": 7, "preview": True})]


def test_cells_may_hold_quotes_commas_and_lines_and_empty_ones_say_nothing(tmp_path: Path) -> None:
    content = (
        'prompt,Negative Prompt,steps,num_images\n"a ""red"" fox, big",,4,\n\n"a fox\nat night",blurry,,2\n42,,,\n'
    )
    assert fields(tmp_path, "a.csv", content) == [
        (2, {"prompt": 'a "red" fox, big', "steps": 4}),
        (4, {"prompt": "a fox\nat night", "negative_prompt": "blurry", "num_images": 2}),
        (5, {"prompt": "42"}),
    ]


def test_other_files_have_a_row_a_line(tmp_path: Path) -> None:
    assert fields(tmp_path, "a.txt", "a fox\n\n# an owl, truly\r\n") == [
        (1, {"prompt": "a fox"}), (3, {"prompt": "# an owl, truly"}),
    ]  # fmt: skip
    lines = '{"prompt": "a fox", "steps": 4}\n\n{"input": {"prompt": "an\\u2028owl"}}\n'
    assert fields(tmp_path, "a.jsonl", lines) == [
        (1, {"prompt": "a fox", "steps": 4}), (3, {"prompt": "an\u2028owl"}),
    ]  # fmt: skip
    assert fields(tmp_path, "a.json", '[{"prompt": "a fox"}, {"input": {"prompt": "an owl"}}]') == [
        (1, {"prompt": "a fox"}), (2, {"prompt": "an owl"}),
    ]  # fmt: skip
    assert fields(tmp_path, "a.json", (ROOT / "test_input.json").read_bytes())


def test_all_faults_of_all_rows_are_found_at_once(tmp_path: Path) -> None:
    content = "prompt,width,init_image,num_image\na fox,63,,\n,64,,\nan owl,many,gone.png,3\na hen,63,,\na,64,,,more\n"
    found = faults(tmp_path, "a.csv", content)
    assert [line.partition(": ")[0] for line in found] == ["rows 2, 5", "row 3", "row 4", "row 4", "row 4", "row 6"]
    assert found[2] == "row 4: init_image: there is no file 'gone.png'"
    assert found[5].startswith("row 6: 'more' is in none of 4 columns; ")
    text = "\n".join(found)
    assert found[0].startswith("rows 2, 5: width: must be")
    assert found[1].startswith("row 3: prompt: is required")
    assert "num_image: is not a field of a request; did you mean num_images?" in text
    assert "got 'many'" in text


def test_a_fault_of_every_row_is_one_line_and_a_thousand_faults_are_a_hundred(tmp_path: Path) -> None:
    rows = "".join(f"a fox,{64 + i}\n" for i in range(1, 1_000))
    (line,) = faults(tmp_path, "a.csv", "prompt,note\n" + "a fox,x\n" * 300)
    assert line.startswith("rows 2, 3, 4, 5, 6 and 295 more: note: is not a field of a request")
    found = faults(tmp_path, "a.csv", "prompt,width\n" + rows)
    assert len(found) == 101
    assert found[-1].endswith(" more")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "holds no row"),
        ("a.csv", "prompt,seed\n,,\n\n", "holds no row"),
        ("a.txt", " \n\n", "holds no row"),
        ("a.csv", "a red fox\nan owl\n", "row 1: must name the columns, each a field of a request, and one of them pr"),
        ("a.csv", "a red fox\nan owl\n", "let the file's name end in .txt"),
        ("a.csv", "prompt,seed,Seed\na,1,2\n", "row 1: names seed more than once"),
        ("a.csv", 'prompt,seed\n"a fox,1\n', "row 2: cannot be read as CSV"),
        ("a.csv", "prompt,seed\n" + 'a fox,1\na "fox" or "two,3\n"so,4\n', "cannot be read as CSV"),
        ("a.csv", "prompt,\na fox,1\n", "row 2: has '1' in a column without a name"),
        ("a.csv", "prompt\nein schöner Fuchs\n".encode("latin-1"), "line 2 holds the byte 0xf6; save it as CSV UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": }\n[1]\n', "row 2: is no JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": }\n[1]\n', "row 3: must be an object of request fields, got [1]"),
        ("a.json", "{", "the file is no JSON"),
        ("a.csv", "prompt,describe\na,true\n", "describe: makes no picture, leave it out"),
        ("a.csv", f"prompt,seed\na,{2**63 - 1}\n", "row 2: seed: 9223372036854775807 leaves no room for 2 pictures"),
        ("a.jsonl", '{"workflow": {"1": {}}}', "row 1: workflow: is a workflow of ComfyUI"),
    ],
)
def test_what_is_no_file_of_rows_gets_a_sentence(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    assert words in "\n".join(faults(tmp_path, name, content, seeds=2))


def test_pictures_are_named_by_their_files_and_read_when_they_are_sent(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    sent = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    assert len(sent) < 1_000
    lines: list[dict[str, Any]] = [
        {"prompt": "x", "image": "a.png", "controls": [{"image": "a.png", "type": "canny"}]},
        {"prompt": "x", "init_images": ["a.png", "https://example.com/a.png", sent]},
        {"prompt": "x", "init_image": f"data:image/png;base64,{sent}"},
    ]
    found = batch_of(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    one, two, three = (drawing.input() for drawing in found.drawings(found.picked()))
    assert (one["image"], one["controls"]) == (sent, [{"image": sent, "type": "canny"}])
    assert two["init_images"] == [sent, "https://example.com/a.png", sent]
    assert three["init_image"] == lines[2]["init_image"]
    before = found.digest
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
    assert read_batch(tmp_path / "a.jsonl").digest != before
    (tmp_path / "a.png").write_bytes(bytes(8_000_000))
    assert faults(tmp_path, "b.csv", "prompt,init_image\na,a.png\n") == (
        "row 2: its pictures take 10.7 MB, and RunPod carries 10 MB to a worker",
    )


def test_seeds_are_picked_once_and_each_picture_has_its_own(tmp_path: Path) -> None:
    content = "prompt,seed,num_images\na fox,7,\nan owl,,2\na hen,-1,\n"
    found = batch_of(tmp_path, "a.csv", content, seeds=2)
    assert found.pictures == 8
    drawings = found.drawings({3: 100, 4: 50})
    assert [(drawing.row.number, list(drawing.seeds)) for drawing in drawings] == [
        (2, [7]), (2, [8]), (3, [100, 101]), (3, [102, 103]), (4, [50]), (4, [51]),
    ]  # fmt: skip
    assert found.picked().keys() == {3, 4}
    assert drawings[3].input() == {"prompt": "an owl", "num_images": 2, "seed": 102}
    assert drawings[3].request(103) == {"prompt": "an owl", "seed": 103}
    (prompts,) = batch_of(tmp_path, "a.jsonl", '{"prompt": ["a fox", "an owl"], "seed": 1}').drawings({})
    assert [prompts.request(seed)["prompt"] for seed in prompts.seeds] == ["a fox", "an owl"]
    hugging = batch_of(tmp_path, "a.jsonl", '{"inputs": "a fox", "parameters": {"seed": 3}}').drawings({})
    assert hugging[0].input() == {"inputs": "a fox", "parameters": {}, "seed": 3}


def test_what_is_set_for_all_wins_and_is_part_of_the_digest(tmp_path: Path) -> None:
    content = "prompt,width\na fox,64\nan owl,\n"
    plain, set_ = (batch_of(tmp_path, "a.csv", content, for_all=more) for more in ({}, {"width": 128}))
    assert [row.fields["width"] for row in set_.rows] == [128, 128]
    assert len({plain.digest, set_.digest, batch_of(tmp_path, "a.csv", content, seeds=2).digest}) == 3
    assert fields(tmp_path, "a.csv", "seed\n1\n", for_all={"prompt": "a fox"}) == [(2, {"seed": 1, "prompt": "a fox"})]


def test_what_has_no_effect_is_a_warning_with_its_rows(tmp_path: Path) -> None:
    found = batch_of(tmp_path, "a.csv", "prompt,model\na fox,dev\nan owl,dev\n")
    assert found.warnings == (
        "rows 2, 3: model has no effect: the worker draws with the model that it was started with",
    )


def test_the_examples_rows_are_right() -> None:
    found = read_batch(ROOT / "examples" / "prompts.csv")
    assert 6 <= found.pictures == len(found.rows) <= 12
