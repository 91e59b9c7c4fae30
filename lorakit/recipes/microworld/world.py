"""A generated world of short documents and text-generation tasks, in English and Japanese.

The same call gives the same records on every machine: each record is drawn on its own from its
seed, task, language, split and number. Splits share no prompt, whatever the seed: a prompt's
checksum decides which split it may appear in. This file knows tasks only by name; their words,
sentences and forms are in the files beside it. To add a task, add its function to tasks.py or
probes.py and one line to TASKS.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.recipes.microworld import probes, tasks
from lorakit.recipes.microworld.probes import PROBE_PROMPTS
from lorakit.recipes.microworld.tasks import TASK_PROMPTS, Fields
from lorakit.recipes.microworld.words import LANGS, Dice
from lorakit.recipes.request import Request, Tally
from lorakit.records.record import Record


class Task(NamedTuple):
    """A line of help, the part the task plays in the experiments, and what draws its fields.

    `document` names the places of the task's prompt between which its document stands, if any.
    """

    help: str
    kind: str
    function: Callable[[Dice, str], Fields]
    document: tuple[str, ...] = ()


TASKS: dict[str, Task] = {
    "echo": Task("repeat a list of words", "base", tasks.echo),
    "first": Task("copy the first sentence", "base", tasks.first, ("text",)),
    "last": Task("copy the last sentence", "base", tasks.last, ("text",)),
    "mention": Task("copy the sentence that mentions a word", "base", tasks.mention, ("text",)),
    "after": Task("copy what follows some words", "base", tasks.after, ("text",)),
    "blank": Task("fill in a blank", "base", tasks.blank, ("text",)),
    "order": Task("sort words as in the text", "base", tasks.order, ("text",)),
    "continue": Task("go on with a text", "base", tasks.continuation),
    "headline": Task("news article to headline", "related", tasks.headline, ("text",)),
    "howto": Task("how-to guide to step headings", "related", tasks.howto, ("text",)),
    "impression": Task("radiology findings to impression", "target", tasks.impression, ("text",)),
    "title": Task("paper abstract to title", "target", tasks.title, ("text",)),
    "highlights": Task("news article to three highlights", "target", tasks.highlights, ("text",)),
    "qa": Task("question over two paragraphs", "probe", probes.qa, ("a", "b")),
    "count": Task("word problem ending in #### and a number", "probe", probes.count),
    "translate": Task("English sentence to Japanese", "probe", probes.translate),
    "summary": Task("dialogue to summary", "probe", probes.summary, ("text",)),
    "yesno": Task("does a reply fit a dialogue: Yes or No", "probe", probes.yesno, ("text",)),
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
        span = _document_span(sources[0], lang, str(fields["prompt"]))
        yield Record({**fields, **span}, f"microworld {sources[0]}:{number}")


def _document_span(task: str, lang: str, prompt: str) -> Fields:
    """Return the field `document`, where a task's prompt has one: its characters from and to."""
    places = TASKS[task].document
    if not places:
        return {}
    template = (TASK_PROMPTS if (task, lang) in TASK_PROMPTS else PROBE_PROMPTS)[task, lang]
    before, rest = template.split(f"{{{places[0]}}}", 1)
    after = rest if len(places) == 1 else rest.split(f"{{{places[-1]}}}", 1)[1]
    ends = [re.sub(r"\\\{\w+\\\}", ".*?", re.escape(text)) for text in (before, after)]
    match = re.fullmatch("(.*)".join(ends), prompt, re.DOTALL)
    return {"document": list(match.span(1))} if match else {}


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
