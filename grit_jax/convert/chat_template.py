"""The prompt format of generation as a Jinja template, for chat tools."""

import string

from grit_jax.data.formats import ASSISTANT, USER
from grit_jax.data.tokenizer import Tokenizer

# The hyphens of the tags take away the white space around them.
_TEMPLATE = string.Template("""\
{{- $bos -}}
{%- for message in messages -%}
{%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
{{- raise_exception('The roles of a chat are user, assistant, user and so on \
in turn, and there is no system role; found: ' + message['role']) -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '' if loop.first else $newline -}}
{{- $user + message['content'] + $newline -}}
{%- else -%}
{{- $assistant + (message['content'] | trim) + $eos -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages[-1]['role'] != 'user' -%}
{{- raise_exception('Only a turn of the user is answered.') -}}
{%- endif -%}
{{- $assistant -}}
{%- endif -%}
""")


def chat_template(tokenizer: Tokenizer) -> str:
  """Returns the template, with the tokenizer's own BOS and EOS.

  It gives the text that `formats.format_conversation` does, and with
  `add_generation_prompt` that of `formats.format_chat_prompt`. It raises for a
  system message, and where user and assistant are not in turn.
  """
  return _TEMPLATE.substitute(
    bos=_quote(tokenizer.bos_piece),
    eos=_quote(tokenizer.eos_piece),
    newline=_quote('\n'),
    user=_quote(USER),
    assistant=_quote(ASSISTANT),
  )


def _quote(text: str) -> str:
  """Returns a string literal of Jinja."""
  escaped = text.replace('\\', r'\\').replace("'", r'\'').replace('\n', r'\n')
  return f"'{escaped}'"
