"""Tasks and data: what a row becomes, who is held out, and one clear error for each mistake."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from tiny_task import save_rows, sentences, tokenizer

from subzero.data import load_examples, split_examples
from subzero.errors import CommandError
from subzero.tasks import Example, Task, make_task, word_ids

MOVIES = make_task("movie-reviews")


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


def test_the_same_rows_from_csv_tsv_and_jsonl(tmp_path):
    rows = [('he said "no", twice', 0), ("NA", 1), ('a 9" screen', 1), ("ünïcode", 0)]
    want = [Example(f"{text} It was", label) for text, label in rows]
    csv = tmp_path / "rows.csv"
    quoted = [text.replace('"', '""') for text, _ in rows]
    csv.write_text(
        "label,text\n" + "".join(f'{n},"{t}"\n' for t, (_, n) in zip(quoted, rows, strict=True)),
        encoding="utf-8",
    )
    tsv = tmp_path / "rows.tsv"
    tsv.write_text("text\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in rows), encoding="utf-8")
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text(
        "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows), encoding="utf-8"
    )
    for path in (csv, tsv, jsonl):
        assert load_examples(MOVIES, str(path)) == want


def test_windows_line_ends_and_labels_with_spaces(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\r\nfine,1 \r\nawful, 0\r\n")
    assert [e.label for e in load_examples(MOVIES, str(path))] == [1, 0]


def test_a_datasets_name_with_class_labels(tmp_path):
    """A local folder of parquet serves as a name; labels may be given by name or by number."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    (tmp_path / "saved").mkdir()
    data.to_parquet(str(tmp_path / "saved" / "train.parquet"))
    numbered = load_examples(MOVIES, str(tmp_path / "saved"))
    named = load_examples(
        make_task("movie-reviews", label_words="pos=great,neg=terrible"), str(tmp_path / "saved")
    )
    assert [e.label for e in numbered] == [1, 0]
    assert [e.label for e in named] == [0, 1]


def test_templates_take_any_column():
    task = Task("t", "{premise} | {x}?", text_column="hypothesis")
    assert task.columns() == ["premise", "hypothesis"]
    assert task.prompt({"premise": "{x} rains", "hypothesis": " wet "}) == "{x} rains | wet?"
    assert make_task(None, template=r"{x}\nAnswer:").template == "{x}\nAnswer:"


def test_words_get_one_space_before_them():
    assert MOVIES.answer("1") == " great"
    assert make_task(None, "{x}\n", "a=yes,b=no").answer("a") == "yes"


def test_word_ids_are_the_tokens_that_continue_the_prompt(tok):
    ids = word_ids(MOVIES, tok)
    assert tok.convert_ids_to_tokens(ids) == ["Ġterrible", "Ġgreat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0=extraordinary,1=great", "' extraordinary' of label '0' is not one token"),
        ("0=great,1=great", "are the same token"),
    ],
)
def test_words_that_cannot_answer(tok, words, message):
    with pytest.raises(CommandError, match=message):
        word_ids(make_task("movie-reviews", label_words=words), tok)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("sst3",),
            "--task: expected one of movie-reviews, sst2, rte, cb, "
            "boolq, wsc, wic, multirc, text, got 'sst3'",
        ),
        ((None, "{x} It was", "great"), "expected label=word pairs"),
        ((None, "{x} It was", "0=great"), "at least two labels"),
        ((None, "{x} It was", "0=a,0=b"), "label '0' is given twice"),
        ((None, None, "0=a,1=b"), "--template: expected with --label-words"),
        ((None, "no field"), r"expected {x} where the text goes"),
        ((None, "{x} {"), "--template: "),
        ((None, None, None, None, "y"), "--label-words: expected with --label-column"),
    ],
)
def test_tasks_that_make_no_sense(arguments, message):
    with pytest.raises(CommandError, match=message):
        make_task(*arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.tsv", None, "no such file: .*none.tsv"),
        ("rows.tsv", "", "the file is empty"),
        ("rows.tsv", "text\tlabel\n", "no rows"),
        ("rows.tsv", "sentence\tlabel\na\t1\n", "no column 'text', found sentence, label"),
        ("rows.tsv", "text\tlabel\na\t1\nb\t2\n", "row 2 has label '2', expected one of '0', '1'"),
        ("rows.tsv", "text\tlabel\na\t1\n \t0\n", "row 2 has no text in column 'text'"),
        ("rows.csv", 'text,label\n"a,1\n', "cannot be read as CSV"),
        ("rows.jsonl", '{"text": "a", "label"', "cannot be read as JSONL"),
        ("rows.txt", "a", "expected a file ending in .csv"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CommandError, match=message) as error:
        load_examples(MOVIES, str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_task_without_data():
    with pytest.raises(CommandError, match="--data: task 'movie-reviews' needs"):
        load_examples(MOVIES, None)


def test_splits_are_disjoint_stratified_and_drawn_by_seed(tmp_path):
    examples = load_examples(MOVIES, str(save_rows(tmp_path / "rows.tsv")))
    splits, duplicates = split_examples(examples, 60, 20, 40, seed=3)
    assert duplicates == 0
    assert {name: len(rows) for name, rows in splits.items()} == {
        "test": 40,
        "dev": 20,
        "train": 60,
    }
    prompts = [e.prompt for rows in splits.values() for e in rows]
    assert len(set(prompts)) == 120
    for rows in splits.values():
        counts = Counter(e.label for e in rows)
        assert counts[0] == counts[1]
    assert split_examples(examples, 60, 20, 40, seed=3)[0] == splits
    assert split_examples(examples, 60, 20, 40, seed=4)[0]["test"] != splits["test"]


def test_unequal_labels_keep_their_proportions():
    examples = [Example(f"{i}", int(i % 10 == 0)) for i in range(1000)]
    splits, _ = split_examples(examples, 800, 50, 101, seed=0)
    for name, size in (("test", 101), ("dev", 50), ("train", 800)):
        assert len(splits[name]) == size
        assert abs(sum(e.label for e in splits[name]) - size / 10) <= 1


def test_duplicates_never_cross_splits():
    doubled = [Example(text, label) for text, label in sentences()]
    doubled += [Example(text.upper().replace(" ", "  "), label) for text, label in sentences()]
    splits, duplicates = split_examples(doubled, 1000, 30, 30, seed=0)
    assert duplicates == 128
    seen = [" ".join(e.prompt.lower().split()) for rows in splits.values() for e in rows]
    assert len(seen) == len(set(seen)) == 128


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((10, 0, 5), "--dev-examples: expected at least 1, got 0"),
        ((0, 5, 5), "--train-examples: expected at least 1"),
        ((10, 64, 64), "leave nothing to train on: the data has 128 distinct examples"),
    ],
)
def test_splits_that_would_be_empty(sizes, message):
    examples = [Example(text, label) for text, label in sentences()]
    with pytest.raises(CommandError, match=message):
        split_examples(examples, *sizes, seed=0)


@pytest.mark.parametrize(
    "name, row, prompt, answer",
    [
        ("sst2", {"sentence": "a warm film ", "label": 1}, "a warm film It was", " great"),
        (
            "rte",
            {"premise": "It rained.", "hypothesis": "It was wet.", "label": 0},
            'It rained.\nDoes this mean that "It was wet." is true? Yes or No?\n',
            "Yes",
        ),
        (
            "cb",
            {"premise": "He left.", "hypothesis": "he is here", "label": 1},
            'Suppose He left. Can we infer that "he is here"? Yes, No, or Maybe?\n',
            "No",
        ),
        (
            "boolq",
            {"passage": "Ice floats.", "question": "does ice float", "label": 1},
            "Ice floats. Does ice float?\n",
            "Yes",
        ),
        (
            "boolq",
            {"passage": "Ice floats.", "question": "Is ice dense?", "label": 0},
            "Ice floats. Is ice dense?\n",
            "No",
        ),
        (
            "wsc",
            {
                "text": "Ann saw Eve. She left.",
                "span1_text": "Eve",
                "span2_text": "She",
                "label": 0,
            },
            'Ann saw Eve. She left.\nIn the previous sentence, does the pronoun "she" refer to '
            "Eve? Yes or No?\n",
            "No",
        ),
        (
            "wic",
            {
                "word": "bank",
                "sentence1": "A bank lends.",
                "sentence2": "The bank pays.",
                "label": 1,
            },
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
            "A bank lends.\nThe bank pays.\n",
            "Yes",
        ),
        (
            "multirc",
            {"paragraph": "Ann ran.", "question": "Who ran?", "answer": "Eve", "label": 0},
            'Ann ran.\nQuestion: Who ran?\nI found this answer "Eve". Is that correct? '
            "Yes or No?\n",
            "No",
        ),
    ],
)
def test_mezo_prompts(name, row, prompt, answer, tmp_path):
    """Each named task on a row with the columns of its dataset, from a local file."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    task = make_task(name)
    (example,) = load_examples(task, str(path))
    assert example.prompt == prompt
    assert task.answer(task.labels[example.label]) == answer
