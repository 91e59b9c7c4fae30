"""A generated world of short documents and text-generation tasks, in English and Japanese.

The same call gives the same records on every machine: each record is drawn on its own from its
seed, task, language, split and number. Splits share no prompt, whatever the seed: a prompt's
checksum decides which split it may appear in. This file knows tasks only by name; their words,
sentences and forms are in the files beside it. To add a task, add its function to tasks.py or
probes.py and one line to TASKS.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.recipes.microworld import probes, tasks
from lorakit.recipes.microworld.tasks import Fields
from lorakit.recipes.microworld.words import LANGS, Dice
from lorakit.recipes.request import Request, Tally
from lorakit.records import Record


class Task(NamedTuple):
    """A line of help, the task's part in the experiments, and the function that draws fields."""

    help: str
    kind: str
    function: Callable[[Dice, str], Fields]


TASKS: dict[str, Task] = {
    "echo": Task("repeat a list of words", "base", tasks.echo),
    "first": Task("copy the first sentence", "base", tasks.first),
    "last": Task("copy the last sentence", "base", tasks.last),
    "mention": Task("copy the sentence that mentions a word", "base", tasks.mention),
    "after": Task("copy what follows some words", "base", tasks.after),
    "blank": Task("fill in a blank", "base", tasks.blank),
    "order": Task("sort words as in the text", "base", tasks.order),
    "continue": Task("go on with a text", "base", tasks.continuation),
    "headline": Task("news article to headline", "related", tasks.headline),
    "howto": Task("how-to guide to step headings", "related", tasks.howto),
    "impression": Task("radiology findings to impression", "target", tasks.impression),
    "title": Task("paper abstract to title", "target", tasks.title),
    "highlights": Task("news article to three highlights", "target", tasks.highlights),
    "qa": Task("question over two paragraphs", "probe", probes.qa),
    "count": Task("word problem ending in #### and a number", "probe", probes.count),
    "translate": Task("English sentence to Japanese", "probe", probes.translate),
    "summary": Task("dialogue to summary", "probe", probes.summary),
    "yesno": Task("does a reply fit a dialogue: Yes or No", "probe", probes.yesno),
}
SIZES: dict[str, int] = {"train": 2000, "validation": 200, "test": 200}

_BUCKETS: dict[str, range] = {
    "train": range(8),
    "validation": range(8, 9),
    "test": range(9, 10),
}


def microworld(
    task: str, *, lang: str = "en", split: str = "train", seed: int = 0
) -> Iterator[Fields]:
    """Yield the records of one task, language and split (SIZES says how many).

    Prompt and completion are joined as written, with nothing between. Raises LorakitError if the
    task, language or split is unknown.
    """
    _check("task", task, TASKS)
    _check("lang", lang, LANGS)
    _check("split", split, SIZES)
    if task == "translate":
        _check("lang of task 'translate'", lang, ("en",))
    return (_record(task, lang, split, seed, index) for index in range(SIZES[split]))


def microworld_rows(sources: Sequence[str], request: Request, _: Tally) -> Iterator[Record]:
    """Yield the records of the task that is the only source; the default --lang is en."""
    if len(sources) != 1:
        raise LorakitError(f"microworld takes one task as SOURCE; choose from {', '.join(TASKS)}")
    lang = request.lang or "en"
    records = microworld(sources[0], lang=lang, split=request.split, seed=request.seed)
    for number, fields in enumerate(records, 1):
        yield Record(fields, f"microworld {sources[0]}:{number}")


def _check(what: str, name: str, choices: Collection[str]) -> None:
    """Raise LorakitError if a name is not among the choices."""
    if name not in choices:
        raise LorakitError(f"unknown {what} {name!r}; choose one of {', '.join(choices)}")


def _record(task: str, lang: str, split: str, seed: int, index: int) -> Fields:
    """Draw one record, as often as needed for its prompt's checksum to fall into the split."""
    dice = Dice(f"{seed} {task} {lang} {split} {index}")
    fields = TASKS[task].function(dice, lang)
    while zlib.crc32(str(fields["prompt"]).encode()) % 10 not in _BUCKETS[split]:
        fields = TASKS[task].function(dice, lang)
    return {
        "id": f"{task}-{lang}-{split}-{seed}-{index:06d}",
        **fields,
        "task": task,
        "lang": lang,
    }
