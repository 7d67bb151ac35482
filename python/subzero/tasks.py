"""Tasks: a prompt template, label words, and where the rows come from.

A task with label words turns a row into a prompt whose next token is the answer, as MeZO does
(arXiv 2305.17333, appendix E.2); a task without them is plain language modelling on its prompts.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import CommandError


@dataclass(frozen=True)
class Task:
    """How a row becomes a prompt and an answer.

    Attributes:
        template: format string; ``{x}`` is the text column, ``{other}`` any other column.
        words: label as the data writes it -> the word that answers the prompt; empty for language
            modelling. A space is put before the word unless the template ends with one.
        text_column, label_column: columns of ``{x}`` and of the label.
        data: a ``datasets`` name, "name/config", used when the user names no data.
        written: column -> how its text is written in the prompt, where not as it is.
    """

    name: str
    template: str = "{x}"
    words: Mapping[str, str] = field(default_factory=dict)
    text_column: str = "text"
    label_column: str = "label"
    data: str | None = None
    written: Mapping[str, Callable[[str], str]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """Labels in the order of the objective's classes."""
        return list(self.words)

    def columns(self) -> list[str]:
        """The columns a row must have."""
        names = [f for _, f, _, _ in string.Formatter().parse(self.template) if f is not None]
        needed = [self.text_column if name == "x" else name for name in names]
        return list(dict.fromkeys(needed + ([self.label_column] if self.words else [])))

    def answer(self, label: str) -> str:
        """The text that follows the prompt, with its leading space."""
        word = self.words[label]
        return word if word[:1].isspace() or self.template[-1:].isspace() else f" {word}"

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The row's prompt; column names may hold characters that format() would interpret."""
        parts = []
        for text, name, _, _ in string.Formatter().parse(self.template):
            parts.append(text)
            if name is not None:
                column = self.text_column if name == "x" else name
                value = str(row[column]).strip()
                parts.append(self.written.get(column, str)(value))
        return "".join(parts)


@dataclass(frozen=True)
class Example:
    """One prompt; ``label`` is the class's position in Task.labels, -1 without labels."""

    prompt: str
    label: int = -1


def _as_question(text: str) -> str:
    """With a capital and one question mark."""
    return text[:1].upper() + text[1:] + ("" if text.endswith("?") else "?")


_MOVIE_WORDS = {"0": "terrible", "1": "great"}
_YES_IS_1 = {"0": "No", "1": "Yes"}
TASKS = {
    task.name: task
    for task in (
        Task("movie-reviews", "{x} It was", _MOVIE_WORDS),
        Task("sst2", "{x} It was", _MOVIE_WORDS, text_column="sentence", data="nyu-mll/glue/sst2"),
        Task(
            "rte",
            '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            {"0": "Yes", "1": "No"},
            text_column="premise",
            data="nyu-mll/glue/rte",
        ),
        Task(
            "cb",
            'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            {"0": "Yes", "1": "No", "2": "Maybe"},
            text_column="premise",
            data="aps/super_glue/cb",
        ),
        Task(
            "boolq",
            "{passage} {question}\n",
            _YES_IS_1,
            text_column="passage",
            data="aps/super_glue/boolq",
            written={"question": _as_question},
        ),
        Task(
            "wsc",
            '{x}\nIn the previous sentence, does the pronoun "{span2_text}" refer to '
            "{span1_text}? Yes or No?\n",
            _YES_IS_1,
            data="aps/super_glue/wsc.fixed",
            written={"span2_text": str.lower},
        ),
        Task(
            "wic",
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
            "{sentence1}\n{sentence2}\n",
            _YES_IS_1,
            text_column="sentence1",
            data="aps/super_glue/wic",
        ),
        Task(
            "multirc",
            '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
            "Yes or No?\n",
            _YES_IS_1,
            text_column="paragraph",
            data="aps/super_glue/multirc",
        ),
        Task("text"),
    )
}


def make_task(
    name: str | None,
    template: str | None = None,
    label_words: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Task:
    """The named task (or a bare one) with what the user gave put over it.

    Raises:
        CommandError: unknown name, a template without a field, label words that do not parse.
    """
    if name is not None and name not in TASKS:
        raise CommandError(f"--task: expected one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name] if name else Task("custom")
    changes: dict[str, Any] = {}
    if template is not None:
        changes["template"] = template.replace("\\n", "\n")
        check_template(changes["template"])
    if label_words is not None:
        changes["words"] = parse_words(label_words)
    if text_column is not None:
        changes["text_column"] = text_column
    if label_column is not None:
        changes["label_column"] = label_column
    task = replace(task, **changes)
    if task.name == "custom" and task.words and template is None:
        raise CommandError(
            "--template: expected with --label-words, since the words answer a prompt; "
            'for example --template "{x} It was"'
        )
    if task.name == "custom" and label_column is not None and not task.words:
        raise CommandError(
            "--label-words: expected with --label-column, got none; "
            'for example --label-words "0=terrible,1=great"'
        )
    return task


def check_template(template: str) -> None:
    """One error for a template that cannot be filled."""
    try:
        fields = [f for _, f, _, _ in string.Formatter().parse(template) if f is not None]
    except ValueError as error:
        raise CommandError(
            f"--template: {error} in {template!r}; write {{{{ for a literal brace"
        ) from None
    if not fields or "" in fields:
        raise CommandError(
            f"--template: expected {{x}} where the text goes, got {template!r}; "
            'for example "{x} It was"'
        )


def parse_words(text: str) -> dict[str, str]:
    """'0=terrible,1=great' -> {"0": "terrible", "1": "great"}."""
    words: dict[str, str] = {}
    for part in text.split(","):
        label, equals, word = part.partition("=")
        label = label.strip()
        if not equals or not label or not word.strip():
            raise CommandError(
                f"--label-words: expected label=word pairs such as '0=terrible,1=great', "
                f"got {part.strip()!r} in {text!r}"
            )
        if label in words:
            raise CommandError(f"--label-words: label {label!r} is given twice in {text!r}")
        words[label] = word.strip()
    if len(words) < 2:
        raise CommandError(f"--label-words: expected at least two labels, got {text!r}")
    return words


def make_examples(task: Task, rows: Iterable[Mapping[str, Any]], source: str) -> list[Example]:
    """Examples of all rows, in order.

    Raises:
        CommandError: a row without text, or with a label the task does not know (the row is named,
            counted from 1 without a header).
    """
    classes = {label: i for i, label in enumerate(task.labels)}
    columns = [c for c in task.columns() if not (task.words and c == task.label_column)]
    examples = []
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if row[column] is None or not str(row[column]).strip():
                raise CommandError(
                    f"{source}: row {number} has no text in column {column!r}; fill it or remove "
                    "the row"
                )
        label = -1
        if task.words:
            written = label_text(row[task.label_column])
            if written not in classes:
                raise CommandError(
                    f"{source}: row {number} has label {written!r}, expected one of "
                    f"{', '.join(map(repr, classes))}; name it in --label-words or remove the row"
                )
            label = classes[written]
        examples.append(Example(task.prompt(row), label))
    return examples


def label_text(value: Any) -> str:
    """A label as the task writes it: 1, 1.0 and " 1" are all "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def word_ids(task: Task, tokenizer: Any) -> list[int]:
    """Token of each label word, as it appears right after a prompt.

    Raises:
        CommandError: a word that is not exactly one token there, or two words with the same token.
    """
    prompt = task.prompt({name: "x" for name in task.columns()})
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found: dict[int, str] = {}
    for label in task.labels:
        word = task.answer(label)
        after = tokenizer(prompt + word, add_special_tokens=False)["input_ids"]
        new = after[len(before) :]
        if after[: len(before)] != before or len(new) != 1 or new[0] == tokenizer.unk_token_id:
            shown = tokenizer.convert_ids_to_tokens(new)
            raise CommandError(
                f"--label-words: {word!r} of label {label!r} is not one token of this model's "
                f"vocabulary but {shown}; choose a shorter, more common word"
            )
        if new[0] in found:
            raise CommandError(
                f"--label-words: {found[new[0]]!r} and {word!r} are the same token; "
                "choose distinct words"
            )
        found[new[0]] = word
    return list(found)


def describe(task: Task, sample: Sequence[Example]) -> str:
    """One line for the summary: an example prompt and the answers."""
    prompt = sample[0].prompt if sample else task.template
    prompt = prompt if len(prompt) <= 60 else "..." + prompt[-57:]
    answers = " | ".join(task.answer(label) for label in task.labels)
    return f"{prompt!r} -> {answers}" if answers else repr(prompt)
