import pytest

from grit_jax.rag.prompts import BEHIND_QUERY, Mode, format_prompt

DOCUMENT = {'id': '7', 'title': 'Ada', 'text': 'Ada wrote it.'}
OPTIONALLY = 'Optionally using the prior context answer the query prior to it'
ANSWER = 'Answer the prior query while optionally using the context prior to it'
# Written out from the paper's prompts, a whole string each.
EXPECTED = {
  'no-retrieval': '<|user|>\nWho?\n<|assistant|>\n',
  'query-first': (
    f'<|user|>\nWho?\n\nAda Ada wrote it.\n\n{OPTIONALLY}\n<|assistant|>\n'
  ),
  'document-first': (
    f'<|user|>\nAda Ada wrote it.\n\nWho?\n\n{ANSWER}\n<|assistant|>\n'
  ),
  'query-caching': (
    f'\n<|user|>\nAda Ada wrote it.\n\n{OPTIONALLY}\n<|assistant|>\n'
  ),
  'doc-caching': f'\n<|user|>\nWho?\n\n{ANSWER}\n<|assistant|>\n',
  'query-doc-caching': f'\n<|user|>\n{OPTIONALLY}\n<|assistant|>\n',
  'doc-query-caching': f'\n<|user|>\n{ANSWER}\n<|assistant|>\n',
}


@pytest.mark.parametrize('mode', Mode)
def test_prompts_are_the_papers(mode):
  assert format_prompt(mode, 'Who?', [DOCUMENT]) == EXPECTED[mode.value]
  started = format_prompt(mode, 'Who?', [DOCUMENT], 'The answer is')
  assert started == EXPECTED[mode.value] + 'The answer is'


def test_several_documents_stand_in_a_row():
  documents = [DOCUMENT, {'text': 'No title.'}]
  found = format_prompt(Mode.QUERY, 'Who?', documents)
  assert found.startswith('\n<|user|>\nAda Ada wrote it.\n\nNo title.\n\nOpt')


def test_a_document_behind_a_query_begins_on_a_new_line_without_bos():
  assert BEHIND_QUERY == '\n<|embed|>\n'
