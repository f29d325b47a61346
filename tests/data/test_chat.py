"""Chat templates: published prompt formats word for word, and what a hostile template cannot do."""

import json
import time
from datetime import datetime
from typing import Any

import pytest

from tenfold.base.errors import TokenizerError
from tenfold.data.chat import ChatTemplate

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set header = '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' %}
    {{- header + (message.content | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

PARTS = """\
{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- '(' + part.text + ')' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
"""


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _render(source: str, *messages: dict[str, Any], **options: Any) -> str:
    return ChatTemplate(source).render(messages or [_user("Hi")], **options)


class TestPublishedFormats:
    def test_chatml(self):
        conversation = [
            {"role": "system", "content": "You are a helpful assistant."},
            _user("Hello!"),
            _assistant("How can I help?"),
            _user("Größe <b> 日本?"),
        ]
        body = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nHello!<|im_end|>\n"
            "<|im_start|>assistant\nHow can I help?<|im_end|>\n"
            "<|im_start|>user\nGröße <b> 日本?<|im_end|>\n"
        )
        assert _render(CHATML, *conversation) == body + "<|im_start|>assistant\n"
        assert _render(CHATML, *conversation, add_generation_prompt=False) == body

    def test_llama_3(self):
        prompt = _render(
            LLAMA_3,
            {"role": "system", "content": "Be brief. "},
            _user(" What is 1+1?"),
            variables={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        )
        assert prompt == (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhat is 1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )

    def test_mistral(self):
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        prompt = _render(MISTRAL, _user("Hi"), _assistant(" Hello. "), _user("Bye"), variables=tokens)
        assert prompt == "<s>[INST] Hi [/INST] Hello.</s>[INST] Bye [/INST]"

    def test_the_templates_own_words_reach_the_user(self):
        with pytest.raises(
            TokenizerError,
            match="refused the conversation: Conversation roles must alternate user/assistant/user/assistant/",
        ):
            _render(MISTRAL, _user("a"), _user("b"), variables={"bos_token": "<s>"})


class TestWhatTemplatesExpect:
    def test_blocks_take_their_line_with_them(self):
        assert _render("a\n    {% if true %}\nb\n    {% endif %}\nc\n") == "a\nb\nc"

    def test_tojson_is_json(self):
        tool = {"b": "<é> & '日本'", "a": [1, 2.5, None, True]}
        assert _render("{{ tools[0] | tojson }}", tools=[tool]) == json.dumps(tool, ensure_ascii=False)
        assert _render(
            "{{ tools[0] | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}", tools=[tool]
        ) == json.dumps(tool, indent=2, sort_keys=True)

    def test_loop_controls(self):
        body = "{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}"
        source = "{% for i in range(9) %}" + body + "{% endfor %}"
        assert _render(source) == "023"

    def test_loop_variables_are_as_without_the_bounds(self):
        source = (
            "{% for x in [1, 2, 3, 4] if x != 2 %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ',' }}"
            "{% else %}none{% endfor %}"
            "{% for x in [[1, [2]]] recursive %}{{ '(' ~ loop(x) ~ ')' if x is iterable else x }}{% endfor %}"
        )
        assert _render(source) == "1/3,2/3,3/3.(1(2))"

    def test_generation_blocks_are_a_scope(self):
        source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
        assert _render(source) == "21"

    def test_the_date(self):
        before = datetime.now()
        rendered = datetime.strptime(_render("{{ strftime_now('%d %b %Y') }}"), "%d %b %Y")
        assert before.date() <= rendered.date() <= datetime.now().date()

    def test_names_that_are_always_there(self):
        source = "{{ tools is none }} {{ documents is none }} {{ bos_token is defined }}"
        assert _render(source) == "True True False"
        assert _render(source, tools=[], variables={"documents": ["x"]}) == "True False False"

    def test_fields_that_are_none_are_left_out(self):
        assert _render("{{ 'content' in messages[0] }}{{ 'name' in messages[0] }}", _user(None) | {"name": "x"}) == (
            "FalseTrue"
        )

    def test_tool_arguments_become_objects(self):
        def call(arguments: Any) -> dict[str, Any]:
            return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

        source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
        assert _render(source, call('{"x": 1}')) == _render(source, call({"x": 1})) == '{"x": 1}'
        assert _render(source, call("")) == "{}"
        assert _render(source, call("[1]")) == '"[1]"'
        assert _render(source, call("{")) == '"{"'

    def test_messages_are_copies(self):
        message = _user([{"type": "text", "text": "a"}])
        _render(CHATML, message)
        _render(CHATML, message, continue_final_message=True, add_generation_prompt=False)
        assert message == _user([{"type": "text", "text": "a"}])


class TestContentParts:
    def test_pass_through_where_the_template_handles_them(self):
        assert ChatTemplate(PARTS).handles_parts
        parts = [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": "c"}]
        assert _render(PARTS, _user(parts), _user("d")) == "<user>(a)(b)(c)<user>d"

    def test_are_joined_where_it_does_not(self):
        assert not ChatTemplate(CHATML).handles_parts
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert _render("{{ messages[0].content }}", _user(parts)) == "a\nb"

    @pytest.mark.parametrize(
        ("source", "handles"),
        [
            ("{% for p in message['content'] %}{% endfor %}", True),
            ("{% for p in m.content | selectattr('type') %}{% endfor %}", True),
            ("{% set c = m['content'] if m.content else '' %}{% for p in c %}{% endfor %}", True),
            ("{% macro show(content) %}{% for p in content %}{% endfor %}{% endmacro %}", True),
            ("{{ m.content | map(attribute='text') | join }}", True),
            ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
            ("{% for part in m.content.split('</think>') %}{% endfor %}", False),
            ("{% set x = m.content | trim %}{{ x }}", False),
        ],
    )
    def test_detection(self, source: str, handles: bool):
        assert ChatTemplate(source).handles_parts is handles

    @pytest.mark.parametrize("source", [PARTS, CHATML])
    @pytest.mark.parametrize(
        "part",
        [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "text", "text": 1}, 7, None],
    )
    def test_anything_but_text_is_refused(self, source: str, part: Any):
        with pytest.raises(TokenizerError, match="reads text only"):
            _render(source, _user([part]))


class TestContinuation:
    def test_the_prompt_ends_inside_the_last_message(self):
        options = {"add_generation_prompt": False, "continue_final_message": True}
        prompt = _render(CHATML, _user("Count"), _assistant("1, 2, "), **options)
        assert prompt == "<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\n1, 2, "
        prompt = _render(LLAMA_3, _user("Count"), _assistant("1, 2, "), **options)
        assert prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n1, 2,")
        assert _render(PARTS, _assistant(["a", "b"]), **options) == "<assistant>(a)(b"
        assert _render(CHATML, _user("same"), _assistant("same"), **options).endswith("assistant\nsame")

    def test_both_at_once_make_no_sense(self):
        with pytest.raises(TokenizerError, match="set one of them to false"):
            _render(CHATML, continue_final_message=True)

    @pytest.mark.parametrize(("source", "content"), [(CHATML, None), (PARTS, [])])
    def test_there_must_be_something_to_continue(self, source: str, content: Any):
        with pytest.raises(TokenizerError, match="needs a final message with text"):
            _render(source, _assistant(content), add_generation_prompt=False, continue_final_message=True)

    def test_the_template_must_write_the_message(self):
        with pytest.raises(TokenizerError, match="cannot be continued"):
            _render("{{ messages | length }}", add_generation_prompt=False, continue_final_message=True)


class TestMistakes:
    @pytest.mark.parametrize("message", [{}, {"content": "Hi"}, {"role": 1, "content": "Hi"}])
    def test_malformed_messages(self, message: Any):
        with pytest.raises(TokenizerError, match="must be an object with a role"):
            _render(CHATML, message)

    def test_no_messages(self):
        with pytest.raises(TokenizerError, match="the conversation is empty"):
            ChatTemplate(CHATML).render([])

    def test_reserved_variables(self):
        with pytest.raises(TokenizerError, match=r"must not be called \['messages'\]"):
            _render(CHATML, variables={"messages": []})

    def test_only_json_values(self):
        with pytest.raises(TokenizerError, match="must be JSON values, and one is a datetime"):
            _render(CHATML, variables={"now": datetime.now()})

    def test_nested_too_deeply(self):
        nested: list[Any] = []
        for _ in range(100_000):
            nested = [nested]
        with pytest.raises(TokenizerError, match="nested too deeply"):
            _render(CHATML, tools=[{"x": nested}])

    def test_a_syntax_error_names_its_line(self):
        with pytest.raises(TokenizerError, match="syntax error in line 2: Unexpected end of template"):
            ChatTemplate("a\n{% if x %}")

    def test_a_failure_names_its_line(self):
        with pytest.raises(TokenizerError, match="failed in line 3 with UndefinedError: 'list object'"):
            _render("a\n\n{{ messages.nothing.at_all }}")


class TestSandbox:
    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ ''.__class__.__base__.__subclasses__() }}",
            "{{ cycler.__init__.__globals__ }}",
            "{{ '{0.__class__.__mro__}'.format(1) }}",
            "{{ '%s'.__mod__(1) }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update(role='x') }}",
            "{% include 'secret' %}",
            "{{ self._TemplateReference__context.eval_ctx.environment.globals.clear() }}",
        ],
    )
    def test_no_way_out(self, source: str):
        with pytest.raises(TokenizerError, match="failed in line 1"):
            _render(source)

    @pytest.mark.parametrize("value", ["'a' * 10**8", "[0] * 10**8", "10**8 * 'a'"])
    def test_size_of_one_value_is_bounded(self, value: str):
        with pytest.raises(TokenizerError, match="more than 100000 characters"):
            ChatTemplate("{% set x = " + value + " %}", max_chars=100_000).render([_user("Hi")])

    @pytest.mark.parametrize(
        "step", ["s + s", "s ~ s", "s | list + s | list", "'%s%s' % (s, s)", "s.replace('a', 'a' * 99)", "s.join(s)"]
    )
    def test_values_do_not_grow_without_bound(self, step: str):
        source = (
            "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set s = ns.s %}"
            "{% set ns.s = " + step + " %}{% endfor %}"
        )
        with pytest.raises(TokenizerError, match="more than 1000 characters"):
            ChatTemplate(source, max_chars=1000).render([_user("Hi")])

    def test_the_prompt_is_bounded(self):
        source = "{% for i in range(99999) %}{{ 'a long line, again and again' }}{% endfor %}"
        with pytest.raises(TokenizerError, match="more than 100000 characters"):
            ChatTemplate(source, max_chars=100_000).render([_user("Hi")])

    @pytest.mark.parametrize(
        "source",
        [
            "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
            "{% set r = range(99999) %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}",
            "{% set r = range(99999) %}{% for i in r recursive %}{{ loop(r) if i and loop.depth < 50 }}{% endfor %}",
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        ],
    )
    def test_time_is_bounded(self, source: str):
        started = time.monotonic()
        with pytest.raises(TokenizerError, match=r"took longer than 0\.2 s"):
            ChatTemplate(source, max_seconds=0.2).render([_user("Hi")])
        assert time.monotonic() - started < 5

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("{{ 9 ** 99999 }}", "too large"),
            ("{{ range(10**9) | list }}", "Range too big"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
            ("{{ lipsum(10**9) }}", "'lipsum' is undefined"),
        ],
    )
    def test_single_steps_that_never_end(self, source: str, message: str):
        with pytest.raises(TokenizerError, match=message):
            _render(source)

    def test_usual_arithmetic_is_untouched(self):
        assert _render("{{ 2 ** 10 }} {{ 7 % 4 }} {{ '-' * 3 }} {{ '%05d' % 42 }} {{ [1] + [2] }} {{ 1 ~ none }}") == (
            "1024 3 --- 00042 [1, 2] 1None"
        )

    def test_a_template_renders_again_after_a_failure(self):
        template = ChatTemplate("{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}fine")
        with pytest.raises(TokenizerError, match="no"):
            template.render([_user("bad")])
        assert template.render([_user("good")]) == "fine"
