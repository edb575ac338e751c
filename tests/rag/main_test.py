"""`python -m grit_jax.rag index` and `ask`, from documents to answers."""

import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from json_damage import check_every_damage_is_named
from safetensors.numpy import load_file, save_file

from grit_jax import encode
from grit_jax.errors import UserError
from grit_jax.files import LockedError
from grit_jax.inference.cache import KVCache
from grit_jax.inference.corpus import writing_index
from grit_jax.inference.index import Index
from grit_jax.rag import __main__ as command
from grit_jax.rag.caches import DiskCaches
from grit_jax.rag.prompts import Mode

NOTES = '\n\n'.join(
  f'{name} lives in {place} and parses {thing}.'
  for name, place, thing in [
    ('Ada', 'London', 'arguments'),
    ('Alan', 'Manchester', 'options'),
    ('Grace', 'New York', 'actions'),
    ('Edsger', 'Rotterdam', 'groups'),
  ]
)
# Half of the last of bfloat16's 8 bits.
BFLOAT16 = 2**-8
INDEX_FLAGS = ('--max_length=40', '--shard_documents=2', '--batch_size=2')


def run(*argv) -> None:
  command.answer(command.make_parser().parse_args([*map(str, argv)]))


@pytest.fixture(scope='module')
def notes(tmp_path_factory):
  path = tmp_path_factory.mktemp('docs') / 'notes.md'
  path.write_text(NOTES)
  return path


@pytest.fixture(scope='module')
def index_of(folder, notes, tmp_path_factory):
  """Writes the index of the notes with caches for a mode, or without."""
  place = tmp_path_factory.mktemp('indexes')

  def write(caches: str) -> pathlib.Path:
    target = place / (caches or 'plain')
    if not target.exists():
      flags = [f'--caches={caches}'] if caches else []
      run(
        'index', f'--source={notes}', f'--model={folder}', f'--index={target}',
        *INDEX_FLAGS, *flags,
      )  # fmt: skip
    return target

  return write


@pytest.mark.parametrize('mode', [command.AUTO, *(m.value for m in Mode)])
def test_ask_answers_and_shows_the_sources(index_of, capsys, mode):
  caches = {'query-doc-caching': 'query-doc-caching', 'auto': 'doc-caching'}
  target = index_of(caches.get(mode, ''))
  capsys.readouterr()
  run(
    'ask', f'--index={target}', f'--mode={mode}', '--json',
    '--max_new_tokens=4', '--answer_start=So', 'Who parses?', 'Where?',
  )  # fmt: skip
  found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [answer['question'] for answer in found] == ['Who parses?', 'Where?']
  texts = {d['id']: d['text'] for d in documents(target)}
  for answer in found:
    assert answer['mode'] == (mode if mode != 'auto' else 'doc-caching')
    assert answer['answer'].startswith('So')
    assert len(answer['sources']) == (mode != 'no-retrieval')
    for source in answer['sources']:
      assert texts[source['id']].startswith(source['line'])
      assert source['title'] == 'notes.md'


def documents(target):
  index = Index.open(target)
  return index.documents(range(len(index)))


def test_questions_come_from_standard_input_too(index_of, capsys, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO('Who parses?\n\nWhere?\n'))
  target = index_of('')
  capsys.readouterr()
  run('ask', f'--index={target}', '--documents=2', '--max_new_tokens=3')
  shown = capsys.readouterr().out
  assert shown.count('  [1] ') == shown.count('  [2] ') == 2
  assert 'notes.md:' in shown


def test_sources_are_the_best_of_the_index(index_of, model, capsys):
  target = index_of('')
  capsys.readouterr()
  run(
    'ask', f'--index={target}', '--documents=3', '--json',
    '--max_new_tokens=1', 'Grace lives where',
  )  # fmt: skip
  (line,) = capsys.readouterr().out.splitlines()
  shown = json.loads(line)['sources']
  passages = documents(target)
  scores = model.encode_corpus(passages) @ model.encode('Grace lives where')
  best = np.argsort(-scores)[:3]
  assert [source['id'] for source in shown] == [passages[i]['id'] for i in best]
  np.testing.assert_allclose(
    [source['score'] for source in shown], scores[best], atol=1e-5
  )


def test_caches_are_the_documents_and_their_size_is_told(
  index_of, model, folder, notes, tmp_path, capsys
):
  target = index_of('doc-caching')
  passages = documents(target)
  _, expected = model.encode_corpus(passages, get_cache=True)
  caches = DiskCaches(target)
  tokens = 0
  for number, cache in enumerate(expected):
    found = caches.read(number)
    assert found.keys.dtype.name == 'bfloat16'
    for part in 'keys', 'values':
      np.testing.assert_allclose(
        np.asarray(getattr(found, part), np.float32),
        getattr(cache, part),
        rtol=BFLOAT16,
        atol=1e-5,
      )
    tokens += len(cache)
  capsys.readouterr()
  # Again: nothing is left to do, and the size is told.
  run(
    'index', f'--source={notes}', f'--model={folder}', f'--index={target}',
    *INDEX_FLAGS, '--caches=doc-caching',
  )  # fmt: skip
  shown = capsys.readouterr().out
  # 2 * 2 layers * 2 heads * 10 numbers of 2 bytes.
  assert f'{tokens} tokens in bfloat16: 160 B a token' in shown
  assert '0 B of that yet to write' in shown


def test_a_stopped_index_goes_on_to_the_same(
  index_of, folder, notes, tmp_path, monkeypatch
):
  whole, target = index_of('doc-caching'), tmp_path / 'index'
  flags = (
    'index', f'--source={notes}', f'--model={folder}', f'--index={target}',
    *INDEX_FLAGS, '--caches=doc-caching',
  )  # fmt: skip
  write, count = DiskCaches.write, 0

  def stop_at_fourth(self, number, cache):
    nonlocal count
    count += 1
    if count == 4:
      raise KeyboardInterrupt
    write(self, number, cache)

  monkeypatch.setattr(DiskCaches, 'write', stop_at_fourth)
  with pytest.raises(KeyboardInterrupt):
    run(*flags)
  # The shard whose caches were not all there is not in the index.
  assert len(Index.open(target)) == 2
  monkeypatch.setattr(DiskCaches, 'write', write)
  run(*flags)
  files = sorted(
    path.relative_to(whole)
    for path in whole.rglob('*')
    if path.is_file() and not path.name.endswith('lock')
  )
  assert sum(path.parts[0] == 'caches' for path in files) > 4
  for path in files:
    expected = (whole / path).read_bytes()
    # It names the corpus, which lies in its folder.
    expected = expected.replace(bytes(whole), bytes(target))
    assert (target / path).read_bytes() == expected, path


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--mode=doc-caching', '--documents=2'), 'of 1 document, not 2'),
    (('--mode=query-doc-caching',), 'are for doc-caching, not for query-doc'),
    (('--temperature=-1',), '--temperature: .-1. is not a number'),
    (('--max_new_tokens=2000',), 'more than the 1024 positions'),
    ((' ',), 'Question 1 of 2 is blank'),
    (('--model={missing}',), 'missing'),
  ],
)
def test_mistakes_end_in_one_message(index_of, tmp_path, flags, message):
  target = index_of('doc-caching')
  flags = [flag.format(missing=tmp_path / 'missing') for flag in flags]
  with pytest.raises(UserError, match=message) as stopped:
    run('ask', f'--index={target}', *flags, 'Who?')
  assert '\n' not in str(stopped.value)


def test_documents_that_the_index_was_not_begun_with_change_nothing(
  index_of, folder, notes, tmp_path
):
  target = shutil.copytree(index_of('doc-caching'), tmp_path / 'index')

  def read_files():
    return {
      path: path.read_bytes()
      for path in target.rglob('*')
      if path.is_file() and not path.name.endswith('lock')
    }

  before = read_files()
  more = tmp_path / 'more.md'
  more.write_text('Another document.')
  with pytest.raises(UserError, match=f'another content of input .*{more} has'):
    run(
      'index', f'--source={notes}', f'--source={more}', f'--model={folder}',
      f'--index={target}', '--caches=doc-caching', *INDEX_FLAGS,
    )  # fmt: skip
  assert read_files() == before


def test_a_second_command_is_refused_and_changes_nothing(
  index_of, folder, notes, tmp_path
):
  target = shutil.copytree(index_of(''), tmp_path / 'index')
  before = {p: p.read_bytes() for p in target.glob('*.json*')}
  with writing_index(target):
    with pytest.raises(LockedError, match=f'{target}: process .* since 2'):
      run(
        'index', f'--source={notes}', f'--model={folder}', f'--index={target}'
      )
    with pytest.raises(LockedError, match=f'{target}: process .* since 2'):
      encode.encode(
        encode.make_parser().parse_args(
          [
            f'--model={folder}',
            f'--input={target}/passages.jsonl',
            f'--output={target}',
          ]
        )
      )
  assert before == {p: p.read_bytes() for p in target.glob('*.json*')}


def test_an_index_is_asked_when_it_is_whole(index_of, tmp_path):
  target = shutil.copytree(index_of(''), tmp_path / 'index')
  fields = json.loads((target / 'index.json').read_text())
  whole = fields['documents']
  del fields['shards'][-1]
  (target / 'index.json').write_text(json.dumps(fields))
  with pytest.raises(UserError, match=rf': \d+ of {whole} passages are in'):
    run('ask', f'--index={target}', 'Who?')


def test_an_index_is_asked_from_another_folder(
  folder, notes, tmp_path, monkeypatch
):
  monkeypatch.chdir(folder.parent)
  run(
    'index', f'--source={notes}', f'--model={folder.name}',
    f'--index={tmp_path / "index"}', *INDEX_FLAGS,
  )  # fmt: skip
  monkeypatch.chdir(tmp_path)
  run('ask', '--index=index', '--max_new_tokens=1', 'Who?')
  path = tmp_path / 'index' / 'index.json'
  path.write_text(path.read_text().replace(str(folder), str(tmp_path / 'gone')))
  with pytest.raises(UserError, match='gone, is not there. Say .* --model'):
    run('ask', '--index=index', 'Who?')


def test_another_models_index_is_refused(index_of, folder, tmp_path, capsys):
  other = shutil.copytree(folder, tmp_path / 'other')
  (other / 'README.md').write_text('A note.')
  (other / 'checksums.json').unlink()
  ask = ('ask', f'--index={index_of("")}', f'--model={other}')
  run(*ask, '--max_new_tokens=1', 'Who?')
  # A comment in the file of the weights: they are the same, the file is not.
  weights = other / 'model.safetensors'
  save_file(load_file(weights), weights, {'format': 'changed'})
  with pytest.raises(UserError, match='has another content of model.safetens'):
    run(*ask, 'Who?')
  save_file(
    {name: 2 * value for name, value in load_file(weights).items()}, weights
  )
  with pytest.raises(UserError, match='is not the model that made this index'):
    run(*ask, 'Who?')


def test_a_full_disk_is_refused_before_work(
  folder, notes, tmp_path, monkeypatch
):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(UserError, match='the caches need .* and 1 kB are free'):
    run(
      'index', f'--source={notes}', f'--model={folder}',
      f'--index={tmp_path / "index"}', '--caches=doc-caching',
    )  # fmt: skip
  assert not (tmp_path / 'index' / 'index.json').exists()


def test_a_damaged_cache_is_named(index_of, tmp_path):
  target = shutil.copytree(index_of('doc-caching'), tmp_path / 'index')
  for path in (target / 'caches').rglob('*.npy'):
    path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match=r'caches/00000/0000000\d\d\.npy is not'):
    run('ask', f'--index={target}', 'Who?')
  with pytest.raises(ValueError, match='is not the file of a KV cache'):
    KVCache.open(tmp_path / 'nowhere.npy')


def test_ask_names_a_damaged_key_of_the_index(index_of, tmp_path):
  target = shutil.copytree(index_of('doc-caching'), tmp_path / 'index')
  check_every_damage_is_named(
    target / 'index.json',
    lambda: run('ask', f'--index={target}', '--max_new_tokens=1', 'Who?'),
    unread=[
      'documents', 'shards.*', 'metadata/caches gone',
      'metadata/(input|input_sha256|instruction|max_length|shard_documents|'
      'cache_dtype|model_files/.*)',
    ],
  )  # fmt: skip
