"""Chat templates of folders and GGUF files are rendered alike, and errors are one line."""

from __future__ import annotations

import json
import threading
import time

import pytest
from runner_tokenizers import edit_json, folder_tokenizer, gguf_tokenizer
from transformers import AutoTokenizer

from flashdecpp import ModelError
from flashdecpp.loading import templates
from flashdecpp.loading.tokenizer import FolderTokenizer

QUESTION = [{"role": "user", "content": "it's <b>é</b>"}]
TALK = [
    {"role": "system", "content": "be kind"},
    *QUESTION,
    {"role": "assistant", "content": "no"},
    *QUESTION,
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def add(a: int) -> int:
    """
    Adds one.

    Args:
        a: A number.
    """
    return a + 1


SCHEMA = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ eos_token }}",
        "{{ bos_token }}{% if add_generation_prompt %}go{% endif %}{{ pad_token }}{{ unk_token }}",
        "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}.",
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}{{ m.role }}\n  {% endfor %}",
        "{%- for m in messages %}\n    {{- m.content | trim }}\n{%- endfor %}",
    ],
)
def test_the_prompt_is_what_transformers_makes_of_it(tmp_path, kind, template):
    ours = folder_tokenizer(tmp_path, chat_template=template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if kind == "gguf":
        ours = gguf_tokenizer(chat_template=template, padding_token_id=258)
    for messages in (QUESTION, TALK):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.chat_prompt(messages) == expected
        assert ours.encode_chat(messages) == theirs.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_tools_reach_the_template(tmp_path, kind):
    template = "{{ tools | tojson }}{% for m in messages %}{{ m['tool_calls'] | tojson }}{% endfor %}"
    ours = folder_tokenizer(tmp_path, chat_template=template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if kind == "gguf":
        ours = gguf_tokenizer(chat_template=template)
    messages = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    for tools in ([SCHEMA], [add], (SCHEMA, add), None):
        expected = theirs.apply_chat_template(
            messages, tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=True
        )
        assert ours.chat_prompt(messages, tools) == expected
    assert ours.chat_prompt(messages, []) == ours.chat_prompt(messages)


def test_one_of_several_templates_is_for_tools(tmp_path):
    named = {"default": "plain", "tool_use": "with tools"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    file = {"chat_template": "plain", "chat_template__tool_use": "with tools"}
    for ours in (folder_tokenizer(tmp_path, chat_template=listed), gguf_tokenizer(**file)):
        assert ours.chat_prompt(QUESTION) == "plain"
        assert ours.chat_prompt(QUESTION, [SCHEMA]) == "with tools"


def test_a_template_in_a_file_of_its_own(tmp_path):
    folder_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda values: values.pop("chat_template", None))
    (tmp_path / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert FolderTokenizer(tmp_path).chat_prompt(QUESTION) == "file: " + QUESTION[0]["content"]


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages[9]['content'] }}", "has no element 9"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ raise_exception('one role\nonly') }}", "one role$"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|__class__"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
    ],
)
def test_a_template_that_fails(tmp_path, kind, template, reason):
    make = gguf_tokenizer if kind == "gguf" else lambda **more: folder_tokenizer(tmp_path, **more)
    with pytest.raises(ModelError, match=f"the chat template refuses these messages: .*({reason})") as error:
        make(chat_template=template).encode_chat(QUESTION)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "loops",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set a = range(99999) | list %}{{ a | map('string') | map('list') | map('sort') | list | length }}"
        * 99,
    ],
)
def test_an_endless_template(loops, monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.3)
    tokenizer = gguf_tokenizer(chat_template=loops)
    started = time.perf_counter()
    with pytest.raises(ModelError, match=r"the chat template did not finish within 0\.3 seconds"):
        tokenizer.chat_prompt(QUESTION)
    assert time.perf_counter() - started < 5
    for thread in threading.enumerate():
        if thread.name == "chat template":
            thread.join(20)
            assert not thread.is_alive()  # it does not continue in the background


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_no_template(tmp_path, kind):
    tokenizer = gguf_tokenizer() if kind == "gguf" else folder_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ModelError, match="has no chat template; use generate"):
        tokenizer.chat_prompt(QUESTION)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "messages must be a list of messages, got a value of type str"),
        ({"role": "user", "content": "hi"}, "messages must be a list of messages, got a value of type dict"),
        (None, "messages must be a list of messages, got None"),
        (5, "messages must be a list"),
        ([], "at least one message"),
        (["hi"], r"messages\[0\] must be like .*, got a value of type str"),
        ([*QUESTION, None], r"messages\[1\] must be like .*, got None"),
        ([{"content": "hi"}], r"messages\[0\]\['role'\] must be a string, got None"),
        ([{"role": 5, "content": "hi"}], r"messages\[0\]\['role'\] must be a string"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] must be a string or a list of parts, got None"),
        ([{"role": "user", "content": None}], r"messages\[0\]\['content'\] must be"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\] must be"),
    ],
)
def test_invalid_messages(messages, reason):
    tokenizer = gguf_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ModelError, match=reason):
        tokenizer.encode_chat(messages)


@pytest.mark.parametrize("tools", ["add", {"type": "function"}, 5, [5], [None], [SCHEMA, "add"]])
def test_invalid_tools(tools):
    with pytest.raises(ModelError, match=r"^tools(\[\d\])? must be"):
        gguf_tokenizer(chat_template="x").chat_prompt(QUESTION, tools)


def test_other_valid_messages(tmp_path):
    """Content parts reach the template, and the arguments are not modified."""
    template = (
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    tokenizer = gguf_tokenizer(chat_template=template)
    messages = ({"role": "user", "content": [{"type": "text", "text": text}]} for text in ("a", "b"))
    assert tokenizer.chat_prompt(messages) == "ab"
    called = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    before = json.dumps(called)
    assert (
        gguf_tokenizer(chat_template="{{ messages[0].tool_calls[0].function.name }}").chat_prompt(called)
        == "add"
    )
    assert json.dumps(called) == before


@pytest.mark.parametrize("content", ["a\ud800", "caf\udce9"])
def test_content_that_is_not_unicode(content):
    tokenizer = gguf_tokenizer(chat_template="{{ messages[0].content }}")
    with pytest.raises(ModelError, match=r"the text has U\+D[0-9A-F]{3} at character [13]"):
        tokenizer.encode_chat([{"role": "user", "content": content}])
