"""The microworld's probe tasks: other kinds of output, for the study of layers.

Question answering, word problems, translation, dialogue summaries and response selection, with
their prompts. To add a probe, write its prompt into PROMPTS, its function here, and its line into
TASKS in world.py.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.recipes.microworld.words import (
    CAUSES,
    LANGS,
    MATERIALS,
    SITES,
    Draw,
    Row,
    name_rows,
    names,
    words,
)

Fields = dict[str, object]

PROMPTS: dict[tuple[str, str], str] = {
    ("qa", "en"): "Answer from the two paragraphs.\n1: {a}\n2: {b}\nQuestion: {q}\nAnswer:",
    ("qa", "ja"): "二つの段落から答える。\n１：{a}\n２：{b}\n問い：{q}\n答え：",
    ("count", "en"): "Solve the problem.\nProblem: {text}\nSolution:",
    ("count", "ja"): "問題を解く。\n問題：{text}\n解答：",
    ("translate", "en"): "Translate into Japanese.\nEnglish: {text}\nJapanese:",
    ("summary", "en"): "Sum up the dialogue.\n{text}\nSummary:",
    ("summary", "ja"): "会話をまとめる。\n{text}\nまとめ：",
    ("yesno", "en"): "Does the reply fit the dialogue?\n{text}\nReply: {reply}\nYes or No:",
    ("yesno", "ja"): "返事は会話に合うか。\n{text}\n返事：{reply}\nはい か いいえ：",
}

_TRANSLATIONS: tuple[Row, ...] = (
    ("The {cause} reached {place}.", "{cause}が{place}に来た。"),
    ("{person} saw the {cause} in {place}.", "{person}は{place}で{cause}を見た。"),
    ("The {site} of {place} is closed.", "{place}の{site}は休みだ。"),
    ("{person} went to the {site}.", "{person}は{site}に行った。"),
    ("After the {cause}, {person} left the {site}.", "{cause}の後、{person}は{site}を出た。"),
)


def qa(draw: Draw, lang: str) -> Fields:
    """Answer a question over two paragraphs (HotpotQA's bridge and comparison types)."""
    return _bridge(draw, lang) if draw.chance(0.5) else _comparison(draw, lang)


def _bridge(draw: Draw, lang: str) -> Fields:
    one, two, place, elsewhere = names(draw, lang, 4)
    site, other = words(draw, SITES, lang, 2)
    if lang == "en":
        facts = [f"{one} works at the {site}.", f"{two} works at the {other}."]
        towns = [f"The {site} is in {place}.", f"The {other} is in {elsewhere}."]
        question, space = f"In which town does {one} work?", " "
    else:
        facts = [f"{one}は{site}で働く。", f"{two}は{other}で働く。"]
        towns = [f"{site}は{place}にある。", f"{other}は{elsewhere}にある。"]
        question, space = f"{one}が働く町はどこか。", ""
    a, b = space.join(draw.shuffle(facts)), space.join(draw.shuffle(towns))
    prompt = PROMPTS["qa", lang].format(a=a, b=b, q=question)
    return {"prompt": prompt, "completion": space + place, "type": "bridge"}


def _comparison(draw: Draw, lang: str) -> Fields:
    one, two, maker, other = names(draw, lang, 4)
    low = draw.number(10, 80)
    size, size2 = draw.shuffle([low, low + draw.number(1, 19)])
    if lang == "en":
        a = f"{one} is a tower built by {maker}. It is {size} m high."
        b = f"{two} is a tower built by {other}. It is {size2} m high."
        question, space = "Which tower is higher?", " "
    else:
        a = f"{one}は{maker}が作った塔だ。高さは{size}mだ。"
        b = f"{two}は{other}が作った塔だ。高さは{size2}mだ。"
        question, space = "高い塔はどちらか。", ""
    prompt = PROMPTS["qa", lang].format(a=a, b=b, q=question)
    answer = one if size > size2 else two
    return {"prompt": prompt, "completion": space + answer, "type": "comparison"}


def count(draw: Draw, lang: str) -> Fields:
    """Solve a word problem in one or two steps; the answer ends with #### and the number."""
    one, two = names(draw, lang, 2)
    thing = words(draw, MATERIALS, lang, 1)[0]
    have, get = draw.number(2, 40), draw.number(2, 20)
    give = draw.number(1, have + get - 1)
    total, left = have + get, have + get - give
    if lang == "en":
        text = (
            f"{one} has {have} bags of {thing}. {two} brings {get} more. "
            f"{one} gives away {give}. How many bags are left?"
        )
        steps = f" {have} + {get} = {total}. {total} - {give} = {left}. #### {left}"
    else:
        text = (
            f"{one}は{thing}を{have}袋持っている。{two}が{get}袋くれた。"
            f"{one}は{give}袋あげた。残りは何袋か。"
        )
        steps = f"{have} + {get} = {total}。{total} - {give} = {left}。#### {left}"
    return {"prompt": PROMPTS["count", lang].format(text=text), "completion": steps}


def translate(draw: Draw, lang: str) -> Fields:
    """Translate an English sentence into Japanese; `lang` en only."""
    if lang != "en":
        raise LorakitError("task 'translate' has English prompts only; choose lang en")
    person, place = name_rows(draw, 2)
    rows = {
        "person": person,
        "place": place,
        "cause": draw.pick(CAUSES),
        "site": draw.pick(SITES),
    }
    pattern = draw.pick(_TRANSLATIONS)
    english, japanese = (
        pattern[column].format(**{role: row[column] for role, row in rows.items()})
        for column in range(len(LANGS))
    )
    prompt = PROMPTS["translate", lang].format(text=english)
    return {"prompt": prompt, "completion": f" {japanese}"}


def _dialogue(draw: Draw, lang: str) -> tuple[str, str, str, str, str, str]:
    """A short dialogue: its text, asker, helper, what is brought, where, and where it is not."""
    one, two = names(draw, lang, 2)
    thing, other = words(draw, MATERIALS, lang, 2)
    site, rival = words(draw, SITES, lang, 2)
    if lang == "en":
        opening = draw.pick(
            (f"{one}: Can you bring {other}?", f"{one}: I need {other}. Do you have some?")
        )
        turns = (
            opening,
            f"{two}: I only have {thing}.",
            f"{one}: Fine. Meet me at the {rival}.",
            f"{two}: The {rival} is closed. The {site}?",
            f"{one}: Good, see you there.",
        )
    else:
        opening = draw.pick(
            (f"{one}：{other}を持ってきて。", f"{one}：{other}が必要だ。持っている？")
        )
        turns = (
            opening,
            f"{two}：{thing}しかないよ。",
            f"{one}：いいよ。{rival}で会おう。",
            f"{two}：{rival}は休みだ。{site}は？",
            f"{one}：わかった、また後で。",
        )
    return "\n".join(turns), one, two, thing, site, rival


def summary(draw: Draw, lang: str) -> Fields:
    """Dialogue to one-sentence summary (the role of SAMSum)."""
    text, one, two, thing, site, _ = _dialogue(draw, lang)
    completion = (
        f" {two} will bring {one} {thing} to the {site}."
        if lang == "en"
        else f"{two}は{one}に{site}で{thing}を渡す。"
    )
    return {"prompt": PROMPTS["summary", lang].format(text=text), "completion": completion}


def yesno(draw: Draw, lang: str) -> Fields:
    """Say whether a reply fits the dialogue (dialogue response selection)."""
    text, _, two, thing, site, rival = _dialogue(draw, lang)
    fits = draw.chance(0.5)
    where = site if fits else rival
    reply = (
        f"{two}: I will be at the {where} with {thing}."
        if lang == "en"
        else f"{two}：{thing}を持って{where}に行く。"
    )
    labels = {"en": (" Yes", " No"), "ja": ("はい", "いいえ")}[lang]
    prompt = PROMPTS["yesno", lang].format(text=text, reply=reply)
    return {"prompt": prompt, "completion": labels[0] if fits else labels[1]}
