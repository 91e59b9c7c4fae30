"""lorakit's header: what is malformed is refused, what is missing is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.adapters.storage import load_adapter
from lorakit.errors import LorakitError
from tests.support.adapters import save_tensors, tiny

HEADERS = {
    "not JSON": ("{", "is not JSON"),
    "NaN": ('{"settings": NaN}', "is not JSON"),
    "key twice": ('{"chat": "on", "chat": "off"}', "'chat' stands in it twice"),
    "a list": ("[]", "is not an object"),
    "later format": ('{"format": 2}', "has format 2; update lorakit"),
    "format a text": ('{"format": "1"}', r"header.format is not an integer"),
    "base a text": ('{"base": "tiny"}', r"header.base is not an object"),
    "chat a boolean": ('{"chat": true}', r"header.chat is not a text"),
    "blocks an object": ('{"blocks": {}}', r"header.blocks is not a list"),
    "block a text": ('{"blocks": ["xs"]}', r"header.blocks\[0\] is not an object"),
    "offset a text": (
        '{"blocks": [{"modules": {"q": {"offset": "0"}}}]}',
        r"header.blocks\[0\].modules.q.offset is not an integer",
    ),
    "blocks of one name": ('{"blocks": [{"name": "x"}, {"name": "x"}]}', "names two blocks 'x'"),
    "history a text": ('{"history": "merge"}', r"header.history is not a list"),
    "no such module": ('{"blocks": [{"modules": {"q": {}}}]}', "block 'q' is outside the adapter"),
    "beyond the rank": (
        '{"blocks": [{"modules": {"model.layers.0.self_attn.q_proj": {"offset": 1, "rank": 2}}}]}',
        "is outside the adapter",
    ),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_a_malformed_header_is_refused_in_one_line(
    header: str, message: str, tmp_path: Path
) -> None:
    adapter = tiny()
    save_tensors(
        adapter.tensors,
        tmp_path / "x",
        adapter_config=json.dumps(adapter.config),
        lorakit=header,
    )
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(tmp_path / "x"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("header", ["{}", '{"base": null, "blocks": [null], "new": [1]}'])
def test_a_header_may_lack_anything(header: str, tmp_path: Path) -> None:
    adapter = tiny()
    config = json.dumps(adapter.config)
    save_tensors(adapter.tensors, tmp_path / "x", adapter_config=config, lorakit=header)
    assert load_adapter(str(tmp_path / "x")).header == json.loads(header)
