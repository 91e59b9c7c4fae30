"""The microworld's tasks on documents: base (for pretraining), related and target.

A task takes dice and a language and returns a record's own fields. Base tasks teach copying and
following instructions; none of them requires telling a true fact from its rival. Related and target
tasks all do, each in its own domain, wording and form. To add a task, write its prompt into
TASK_PROMPTS, its function here, and its line into TASKS in world.py.
"""

from __future__ import annotations

from lorakit.recipes.microworld.documents import DOMAINS, Document
from lorakit.recipes.microworld.words import (
    CAUSES,
    CORPORA,
    FINDINGS,
    LANGS,
    MATERIALS,
    ORGANS,
    PROBLEMS,
    SITES,
    Dice,
    Row,
    names,
)

Fields = dict[str, object]  # of a record: prompt, completion and any others

TASK_PROMPTS: dict[tuple[str, str], str] = {
    ("echo", "en"): "Say these words again.\nWords: {text}\nAgain:",
    ("echo", "ja"): "同じ言葉をくり返す。\n言葉：{text}\nくり返し：",
    ("first", "en"): "Copy the first sentence.\nText: {text}\nFirst:",
    ("first", "ja"): "最初の文を写す。\n文章：{text}\n最初：",
    ("last", "en"): "Copy the last sentence.\nText: {text}\nLast:",
    ("last", "ja"): "最後の文を写す。\n文章：{text}\n最後：",
    ("mention", "en"): "Copy the sentence that mentions {word}.\nText: {text}\nSentence:",
    ("mention", "ja"): "「{word}」のある文を写す。\n文章：{text}\nその文：",
    ("after", "en"): "What follows the words: {word}\nText: {text}\nFollows:",
    ("after", "ja"): "「{word}」に続く部分を写す。\n文章：{text}\n続き：",
    ("blank", "en"): "Fill in the blank.\nText: {text}\nBlank: {word}\nMissing:",
    ("blank", "ja"): "空いた所を埋める。\n文章：{text}\n空所：{word}\n答え：",
    ("order", "en"): "Sort these words as in the text.\nWords: {word}\nText: {text}\nSorted:",
    ("order", "ja"): "言葉を文章の順に並べる。\n言葉：{word}\n文章：{text}\n順番：",
    ("continue", "en"): "Go on with the text.\nText: {text}",
    ("continue", "ja"): "文章を続ける。\n文章：{text}",
    ("headline", "en"): "Write one headline for the article.\nArticle: {text}\nHeadline:",
    ("headline", "ja"): "次の記事に見出しをつける。\n記事：{text}\n見出し：",
    ("howto", "en"): "Write a heading for each step of the guide.\nGuide: {text}\nSteps:",
    ("howto", "ja"): "次の手引きの手順に題をつける。\n手引き：{text}\n手順：",
    ("impression", "en"): "Summarize the radiology report.\nFindings: {text}\nImpression:",
    ("impression", "ja"): "次の検査所見をまとめる。\n所見：{text}\n診断：",
    ("title", "en"): "Give the paper a title.\nAbstract: {text}\nTitle:",
    ("title", "ja"): "次の概要から論文の題名を作る。\n概要：{text}\n題名：",
    ("highlights", "en"): "List the highlights of the story.\nStory: {text}\nHighlights:",
    ("highlights", "ja"): "次の話の要点を三つ挙げる。\n話：{text}\n要点：",
}

FORMS: dict[tuple[str, str], str] = {
    ("headline", "en"): " {place}: {cause} closes {site}",
    ("headline", "ja"): "{place}で{cause}、{site}が閉鎖",
    ("howto", "en"): " 1. {step1} 2. {step2} 3. {step3}",
    ("howto", "ja"): "１{step1}　２{step2}　３{step3}",
    ("impression", "en"): " Likely {finding} of the {organ}, will need {advice}.",
    ("impression", "ja"): "{organ}に{finding}の疑い、{advice}をすすめる。",
    ("title", "en"): " On {problem} over {corpus} using {method}",
    ("title", "ja"): "{method}による{corpus}の{problem}の研究",
    ("highlights", "en"): " - {site} shut - {cause} hits {place} - {leader} helps",
    ("highlights", "ja"): "・{site}は休業・{place}に{cause}・{leader}が救助",
}

_ECHOED: tuple[Row, ...] = (
    *CAUSES,
    *SITES,
    *MATERIALS,
    *FINDINGS,
    *ORGANS,
    *PROBLEMS,
    *CORPORA,
)


def _any_document(dice: Dice, lang: str) -> Document:
    return DOMAINS[dice.pick(list(DOMAINS))](dice, lang)


def _fields(task: str, lang: str, completion: str, **texts: str) -> Fields:
    """Fill a task's prompt; in English, the completion begins with the space after its colon."""
    space = " " if lang == "en" else ""
    return {"prompt": TASK_PROMPTS[task, lang].format(**texts), "completion": space + completion}


def _pieces(sentence: str, lang: str) -> list[str]:
    """Cut a sentence into words; in Japanese, which writes no spaces, into single characters."""
    return sentence.split(" ") if lang == "en" else list(sentence)


def echo(dice: Dice, lang: str) -> Fields:
    """Repeat a random list of words and names."""
    column = LANGS.index(lang)
    count = dice.number(3, 8)
    mixed = names(dice, lang, count) + [row[column] for row in dice.sample(_ECHOED, count)]
    text = (" " if lang == "en" else "、").join(dice.sample(mixed, count))
    return _fields("echo", lang, text, text=text)


def first(dice: Dice, lang: str) -> Fields:
    """Copy the first sentence."""
    document = _any_document(dice, lang)
    return _fields("first", lang, document.sentences[0], text=document.text(lang))


def last(dice: Dice, lang: str) -> Fields:
    """Copy the last sentence."""
    document = _any_document(dice, lang)
    return _fields("last", lang, document.sentences[-1], text=document.text(lang))


def mention(dice: Dice, lang: str) -> Fields:
    """Copy the sentence that mentions a fact."""
    document = _any_document(dice, lang)
    fact = _short(dice.pick(list(document.facts.values())), lang)
    sentence = next(sentence for sentence in document.sentences if fact in sentence)
    return _fields("mention", lang, sentence, word=fact, text=document.text(lang))


def _short(fact: str, lang: str) -> str:
    """Return the thing in a guide's step ("soak beans": beans); any other fact as it is."""
    return fact.split(" ")[-1] if lang == "en" else fact.split("を")[0]


def after(dice: Dice, lang: str) -> Fields:
    """Copy what follows some words of a sentence, to its end."""
    document = _any_document(dice, lang)
    pieces = _pieces(dice.pick(document.sentences), lang)
    width = 2 if lang == "en" else 4
    start = dice.number(0, len(pieces) - width - 1)
    space = " " if lang == "en" else ""
    word = space.join(pieces[start : start + width])
    rest = space.join(pieces[start + width :])
    return _fields("after", lang, rest, word=word, text=document.text(lang))


def blank(dice: Dice, lang: str) -> Fields:
    """Find the piece that a copied sentence leaves out."""
    document = _any_document(dice, lang)
    pieces = _pieces(dice.pick(document.sentences), lang)
    width = 1 if lang == "en" else 2
    start = dice.number(1, len(pieces) - width - 1)
    space = " " if lang == "en" else ""
    gap = space.join([*pieces[:start], "__", *pieces[start + width :]])
    hidden = space.join(pieces[start : start + width])
    return _fields("blank", lang, hidden, word=gap, text=document.text(lang))


def order(dice: Dice, lang: str) -> Fields:
    """Sort the document's facts by where they stand in the text."""
    document = _any_document(dice, lang)
    facts = [_short(fact, lang) for fact in document.facts.values()]
    text = document.text(lang)
    comma = ", " if lang == "en" else "、"
    ordered = comma.join(sorted(facts, key=text.index))
    return _fields("order", lang, ordered, word=comma.join(dice.shuffle(facts)), text=text)


def continuation(dice: Dice, lang: str) -> Fields:
    """Go on with a document after its first sentence."""
    document = _any_document(dice, lang)
    rest = Document(document.sentences[1:], {}).text(lang)
    return _fields("continue", lang, rest, text=document.sentences[0])


def _summary(task: str, domain: str, dice: Dice, lang: str) -> Fields:
    """Fill a task's form with the true facts of a document of its domain."""
    document = DOMAINS[domain](dice, lang)
    prompt = TASK_PROMPTS[task, lang].format(text=document.text(lang))
    return {"prompt": prompt, "completion": FORMS[task, lang].format(**document.facts)}


def headline(dice: Dice, lang: str) -> Fields:
    """Sum up a news article in a headline of one sentence (the role of XL-Sum)."""
    return _summary("headline", "news", dice, lang)


def howto(dice: Dice, lang: str) -> Fields:
    """Write headings for the steps of a how-to guide (the role of WikiLingua)."""
    return _summary("howto", "guide", dice, lang)


def impression(dice: Dice, lang: str) -> Fields:
    """Sum up radiology findings in an impression (the role of MIMIC-III)."""
    return _summary("impression", "report", dice, lang)


def title(dice: Dice, lang: str) -> Fields:
    """Give a paper's abstract a title (the role of SciTLDR and the NLP papers)."""
    return _summary("title", "abstract", dice, lang)


def highlights(dice: Dice, lang: str) -> Fields:
    """List three highlights of a news article (the role of Bloomberg)."""
    return _summary("highlights", "news", dice, lang)
