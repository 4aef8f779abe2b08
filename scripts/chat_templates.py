"""Writes tests/golden/chat.json: what Hugging Face Transformers makes of templates that use what published ones use.

    python scripts/chat_templates.py         # needs transformers and jinja2

Each case has a tokenizer_config.json, a chat_template.jinja where one is meant, and for several talks, with and without
the beginning of an answer, the text and its ids, or what the template says when it refuses. The clock stands still.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "chat.json"
NOW = datetime.datetime(2026, 11, 22, 17, 4, 5)
SPECIAL = ["<s>", "</s>", "<|begin|>", "<|end|>", "<|head|>", "<|/head|>", "[INST]", "[/INST]"]

MARKED = """{#- one line a message -#}
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' -%}
        {{ '<|begin|>system\\nAnswer briefly.<|end|>\\n' }}
    {%- endif -%}
    {{ '<|begin|>' + message.role + '\\n' + message.content + '<|end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|begin|>assistant\\n' }}{% endif %}
"""

HEADED = """{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else 'unknown' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{{- '<|head|>system<|/head|>' }}
{{- '\\nToday: ' ~ date ~ '\\n' ~ system ~ eos_token }}
{%- if tools is not none and tools is defined %}
    {{- 'Tools: ' ~ tools | tojson }}
{%- endif %}
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' ~ message.role) }}{% endif %}
    {{- '<|head|>' ~ message.role ~ '<|/head|>\\n' ~ message.content | trim ~ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n' }}
{%- endif %}
"""

FOLDED = """{% if messages[0]['role'] == 'system' %}
{% set system, turns = messages[0]['content'], messages[1:] %}
{% else %}
{% set system, turns = none, messages %}
{% endif %}
{{ bos_token -}}
{% for turn in turns %}
{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must take turns: user, assistant,\\n user, ...') }}
{% endif %}
{% if turn['role'] == 'user' %}
{{ '[INST] ' }}{% if loop.first and system %}{{ '<<' + system.strip() + '>>\\n\\n' }}{% endif %}
{{ turn['content'].strip() + ' [/INST]' -}}
{% else %}
{{ ' ' + turn['content'].strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}
"""

COUNTED = """{%- macro part(name, body, last=false) -%}
    {{ '<|begin|>' ~ name | upper | replace('ASSISTANT', 'MODEL') }}
    {%- if last %} (last){% endif %}
    {{- ': ' ~ body ~ '<|end|>' }}
{%- endmacro -%}
{%- set seen = namespace(users=0, quoted=[], kind='none') -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set seen.users = seen.users + 1 -%}
        {%- set seen.quoted = seen.quoted + [message.content[:3]] -%}
    {%- elif message.role == 'system' -%}
        {%- set seen.kind = 'system' -%}
        {%- continue -%}
    {%- endif -%}
    {%- if loop.index > 6 %}{% break %}{% endif -%}
    {{ part(message.role, message.content, loop.last) }}
{%- endfor -%}
{{ '|%d|%s|' % (seen.users, seen.kind) }}{{ seen.quoted | join(',') }}|{{ missing | default('no such name') }}
{%- if add_generation_prompt is defined and add_generation_prompt %}{{ part('assistant', '')[:-7] }}{% endif -%}
"""

DUMPED = """{{ bos_token }}{% for message in messages %}
{{ message | tojson }}
{{ {'n': loop.index0, 'left': loop.revindex0, 'html': '<a href="x">&</a>'} | tojson(indent=2) }}
{{ {'é': dict(a=1, b=[none, true])} | tojson }}
{{ messages | map(attribute='role') | list | tojson(separators=(',', ':')) }}
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ unk_token is defined }}{{ eos_token }}
"""

LEARNED = """{% for message in messages %}
{% if message.role == 'assistant' %}
<|begin|>{{ message.role }}: {% generation %}
{{ message.content.split('</think>')[-1].lstrip('\\n') }}<|end|>{% endgeneration %}

{% else %}
<|begin|>{{ message.role }}: {{ message.content }}<|end|>
{% endif %}
{%- if not loop.last and messages[loop.index].role == message.role %}
    {{- raise_exception('two of ' ~ message.role) }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|begin|>assistant: {% endif %}
"""

LAST = """{%- set ns = namespace(last=-1) -%}
{%- for message in messages[::-1] -%}
    {%- set index = (messages | length - 1) - loop.index0 -%}
    {%- if ns.last < 0 and message.role == 'user' and message.content is string -%}
        {%- set ns.last = index -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if enable_thinking is defined and enable_thinking is false %}off{% endif -%}
    {{- '<|begin|>%s\\n%s<|end|>\\n' | format(message.role, content) }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|begin|>assistant\\n<think>{{ '\\n' }}{%- endif -%}
"""

USER, ANSWER = {"role": "user", "content": " Hello, <b>you</b> & me "}, {"role": "assistant", "content": "Good day.\n"}
SYSTEM = {"role": "system", "content": '  Speak as a "poet" in Ελλάδα.  '}
THOUGHT = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nFour."}
AGAIN = {"role": "user", "content": "And then?<|end|>"}
TALKS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, AGAIN],
    "thought": [USER, THOUGHT, AGAIN],
    "twice": [USER, AGAIN],
    "many": [SYSTEM, *[USER, ANSWER] * 4, AGAIN],
    "answered": [USER, ANSWER],
}
PLAIN = {"bos_token": "<s>", "eos_token": "</s>"}
OBJECTS = {key: {"content": token, "__type": "AddedToken", "special": True} for key, token in PLAIN.items()}
TEMPLATES: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "marked": (MARKED, {"eos_token": "<|end|>"}, None),
    "headed": ([{"name": "tool_use", "template": "no"}, {"name": "default", "template": HEADED}], OBJECTS, None),
    "folded": (FOLDED, PLAIN, None),
    "counted": (COUNTED, PLAIN, None),
    "dumped": (DUMPED, PLAIN, None),
    "learned": (LEARNED, {}, None),
    "last": ("not this one", PLAIN, LAST),
}


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes, and special tokens; a BOS begins what is encoded with special tokens around it."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate([*SPECIAL, *letters])}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return made


class Clock(datetime.datetime):
    """Stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return NOW


def asked(folder: Path, talk: list[dict[str, str]], prompt: bool) -> dict[str, Any]:
    """What Transformers makes of the folder's template."""
    import transformers

    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        text = fast.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        return {"error": str(error)}
    ids = {"ids": fast.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)} if prompt else {}
    return {"text": text, **ids}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import transformers
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = Clock
    cases: list[dict[str, Any]] = []
    for name, (template, tokens, file) in TEMPLATES.items():
        config = {**tokens, "chat_template": template}
        with tempfile.TemporaryDirectory() as folder:
            tokenizer().save(f"{folder}/tokenizer.json")
            Path(folder, "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
            if file is not None:
                Path(folder, "chat_template.jinja").write_text(file, "utf-8")
            made = [
                {"talk": talk, "prompt": prompt, **asked(Path(folder), messages, prompt)}
                for talk, messages in TALKS.items()
                for prompt in (True, False)
            ]
        cases.append({"name": name, "config": config, "file": file, "made": made})
        refused = sum("error" in each for each in made)
        sys.stdout.write(f"{name}: {len(made)} texts, {refused} of them refused\n")
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    found = {"versions": versions, "now": NOW.isoformat(), "talks": TALKS, "cases": cases}
    found["tokenizer"] = json.loads(tokenizer().to_str())
    GOLDEN.write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main()
