"""Tests of tokenized data sets."""

import json
import pathlib
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow_datasets as tfds

from grit_jax.data import dataset, formats, parts, records, tokenization
from grit_jax.data.dataset import (
  EmbeddingDataset,
  GenerativeDataset,
  open_dataset,
)
from grit_jax.data.examples import NO_ANSWER
from grit_jax.data.records import RecordError
from grit_jax.data.sources import HELD_OUT, TRAIN, FileSource
from grit_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from grit_jax.data.tokenizer_training import train_tokenizer
from grit_jax.errors import UserError

LIMITS = dict(
  max_query_tokens=24,
  max_passage_tokens=32,
  max_generative_tokens=64,
  min_negatives=0,
  held_out_fraction=0.0,
)
ROOT = pathlib.Path(__file__).parents[2]


def make_embedding_records(count: int) -> list[dict]:
  return [
    {
      'query': ['Find', f'query {i} ' + 'long ' * (i % 7)],
      'pos': [
        ['', f'positive {i} {j}\n' * (i % 5 + 1)] for j in range(1 + i % 2)
      ],
      'neg': [f'plain {i} {j}' for j in range(i % 3 + 1)],
    }
    for i in range(count)
  ]


def make_conversations(count: int) -> list[dict]:
  return [
    {'text': [f'user {i}', f'answer {i}'] * (i % 3 + 1)}
    if i % 4
    else {'text': f'plain text {i}'}
    for i in range(count)
  ]


def write_source(path: pathlib.Path, lines: list[dict]) -> FileSource:
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return FileSource(path)


def write_embedding(tmp_path: pathlib.Path, count: int = 20) -> FileSource:
  return write_source(tmp_path / 'a.jsonl', make_embedding_records(count))


def parse_all(source: FileSource) -> list[records.Record]:
  return [records.parse(line.json, '') for line in source.read(0.0)]


def list_folders(directory: pathlib.Path) -> list[str]:
  return sorted(path.name for path in directory.iterdir() if path.is_dir())


@pytest.fixture
def prepare(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> Callable:
  """`dataset.prepare` in a folder of its own, limits as in LIMITS."""

  def run(source, split=TRAIN, tokenizer=tokenizer, **limits):
    return dataset.prepare(
      source, split, tokenizer, tmp_path / 'prepared', **(LIMITS | limits)
    )

  return run


@pytest.fixture
def count_encoded(monkeypatch) -> list[int]:
  """Collects the sizes of the batches that are tokenized."""
  sizes: list[int] = []
  encode_batch = SentencePieceTokenizer.encode_batch

  def count(self, texts, num_threads=-1):
    sizes.append(len(texts))
    return encode_batch(self, texts, num_threads)

  monkeypatch.setattr(SentencePieceTokenizer, 'encode_batch', count)
  return sizes


def test_embedding_records_read_back_as_they_were_encoded(
  prepare, tmp_path, tokenizer
):
  source = write_embedding(tmp_path)
  data = prepare(source)
  assert isinstance(data, EmbeddingDataset)
  assert (data.name, data.kind, len(data)) == ('a', records.EMBEDDING, 20)
  order = [3, 19, 0, 3]
  for i, texts in zip(order, data.read(np.array(order)), strict=True):
    record = parse_all(source)[i]
    assert len(texts) == len(record.texts)
    for j, (text, read) in enumerate(zip(record.texts, texts, strict=True)):
      expected = formats.encode_embedding(text, tokenizer, 32 if j else 24)
      assert read.ids.tolist() == expected.ids.tolist()
      assert read.ids.dtype == np.int32
      assert read.instruction_length == expected.instruction_length


def test_conversations_read_back_as_they_were_encoded(
  prepare, tmp_path, tokenizer
):
  source = write_source(tmp_path / 'a.jsonl', make_conversations(20))
  data = prepare(source)
  assert isinstance(data, GenerativeDataset)
  for i, read in enumerate(data.read(range(20))):
    record = parse_all(source)[i]
    expected = formats.encode_conversation(record, tokenizer, 64)
    for name in 'ids', 'in_loss', 'in_instruction':
      assert getattr(read, name).tolist() == getattr(expected, name).tolist()
    assert data.lengths[i] == len(read.ids)
    assert data.loss_tokens[i] == read.in_loss.sum()


def test_the_embedding_index_describes_the_texts(prepare, tmp_path):
  data = prepare(write_embedding(tmp_path))
  assert data.offsets.dtype == np.int64 and data.lengths.dtype == np.int32
  for i, texts in enumerate(data.read(range(20))):
    lengths = data.lengths[data.offsets[i] : data.offsets[i + 1]]
    assert lengths.tolist() == [len(text.ids) for text in texts]
    assert data.num_positives[i] == 1 + i % 2
  assert data.offsets[-1] == len(data.lengths)


def test_equal_texts_have_equal_hashes_whatever_their_instructions(
  prepare, tmp_path
):
  lines = [
    {'query': ['Find', 'same'], 'pos': ['same', ['', 'other']], 'neg': []},
    {'query': ['Find', 'other'], 'pos': [['', 'same ']], 'neg': ['same']},
  ]
  hashes = prepare(write_source(tmp_path / 'a.jsonl', lines)).text_hashes
  assert hashes.dtype == np.uint64
  same, other, blank = hashes[0], hashes[2], hashes[4]
  assert hashes.tolist() == [same, same, other, other, blank, same]
  assert len({int(same), int(other), int(blank)}) == 3


def test_the_index_stays_on_disk(prepare, tmp_path):
  data = prepare(write_embedding(tmp_path))
  for values in data.lengths, data.offsets, data.num_positives, data.record_ids:
    assert isinstance(values, np.memmap)


def test_parts_and_batches_keep_the_order(prepare, tmp_path, monkeypatch):
  whole = prepare(write_embedding(tmp_path), max_query_tokens=60)
  monkeypatch.setattr(parts, '_BATCH_RECORDS', 3)
  monkeypatch.setattr(parts, 'PART_RECORDS', 7)
  cut = prepare(write_embedding(tmp_path), max_query_tokens=61)
  shards = [path.name for path in tmp_path.rglob('tokens-train*-of-00003')]
  assert len(shards) == 3
  a, b = whole.read(range(20)), cut.read(range(20))
  for one, other in zip(a, b, strict=True):
    assert [text.ids.tolist() for text in one] == [
      text.ids.tolist() for text in other
    ]
  for name in 'offsets', 'lengths', 'num_positives', 'text_hashes':
    values = getattr(cut, name)
    assert values.dtype == getattr(whole, name).dtype
    assert values.tolist() == getattr(whole, name).tolist()
  assert cut.record_ids.tolist() == list(range(1, 21))
  assert cut.report == whole.report


def test_tfds_reads_what_is_written(prepare, tmp_path):
  data = prepare(write_embedding(tmp_path, 100), held_out_fraction=0.3)
  (folder,) = tmp_path.rglob('records')
  info = tfds.builder_from_directory(folder).info
  assert info.splits['train'].num_examples == len(data)
  assert info.splits['held_out'].num_examples == 100 - len(data)


def test_marks_of_a_json_tokenizer_read_back(prepare, tmp_path, llama3):
  lines = make_embedding_records(20)
  for i, line in enumerate(lines):
    line['pos'][0][1] = '\n' * (i % 4) + line['pos'][0][1]
  source = write_source(tmp_path / 'a.jsonl', lines)
  data = prepare(source, tokenizer=llama3, max_query_tokens=60)
  for i, texts in enumerate(data.read(range(20))):
    record = parse_all(source)[i]
    for j, (text, read) in enumerate(zip(record.texts, texts, strict=True)):
      expected = formats.encode_embedding(text, llama3, 32 if j else 60)
      assert read.ids.tolist() == expected.ids.tolist()
      assert read.instruction_length == expected.instruction_length
  source = write_source(tmp_path / 'b.jsonl', make_conversations(20))
  data = prepare(source, tokenizer=llama3)
  for i, read in enumerate(data.read(range(20))):
    record = parse_all(source)[i]
    expected = formats.encode_conversation(record, llama3, 64)
    assert read.ids.tolist() == expected.ids.tolist()
    assert read.in_loss.tolist() == expected.in_loss.tolist()


def test_the_report_counts_what_was_cut(prepare, tmp_path, tokenizer):
  source = write_embedding(tmp_path)
  data = prepare(source)
  texts = cut_texts = cut_tokens = 0
  for record in parse_all(source):
    for i, text in enumerate(record.texts):
      limit = 32 if i else 24
      cut = formats.encode_embedding(text, tokenizer, limit).cut
      texts += 1
      cut_texts += cut > 0
      cut_tokens += cut
  report = data.report
  assert (report.records, report.texts) == (20, texts)
  assert (report.cut_texts, report.cut_tokens) == (cut_texts, cut_tokens)
  assert report.cut_texts > 0
  assert report.tokens == data.lengths.sum()
  assert report.dropped == {}


def test_a_conversation_without_room_for_an_answer_is_dropped_and_counted(
  prepare, tmp_path
):
  lines = make_conversations(3)
  lines.insert(1, {'text': ['much too long ' * 50, 'answer']})
  data = prepare(write_source(tmp_path / 'a.jsonl', lines))
  assert len(data) == data.report.records == 3
  assert data.report.dropped == {NO_ANSWER: 1}
  assert data.record_ids.tolist() == [1, 3, 4]
  assert data.where(1) == f'{tmp_path}/a.jsonl:3'


def test_splits_part_the_records(prepare, tmp_path):
  source = write_embedding(tmp_path, 100)
  parts = [
    prepare(source, split, held_out_fraction=0.3) for split in (TRAIN, HELD_OUT)
  ]
  numbers = [part.record_ids.tolist() for part in parts]
  assert sorted(sum(numbers, [])) == list(range(1, 101))
  assert len(parts[1]) > 0


def test_a_split_without_records_is_refused(prepare, tmp_path):
  source = write_embedding(tmp_path)
  with pytest.raises(RecordError, match='a.jsonl: no record for .*held_out'):
    prepare(source, HELD_OUT)


def test_a_data_set_is_tokenized_once(prepare, tmp_path, count_encoded):
  source = write_embedding(tmp_path)
  first = prepare(source)
  assert len(count_encoded) == 1
  again = prepare(FileSource(tmp_path / 'a.jsonl'), max_generative_tokens=7)
  assert len(count_encoded) == 1
  assert again.report == first.report
  assert again.where(0) == first.where(0)


def test_what_changes_the_tokens_makes_a_new_data_set(
  prepare, tmp_path, count_encoded
):
  source = write_embedding(tmp_path)
  prepare(source, max_query_tokens=60)
  prepare(source, max_query_tokens=61)
  prepare(source, max_query_tokens=60, max_passage_tokens=20)
  other = SentencePieceTokenizer(
    train_tokenizer(['some other text ' * 20], 280)
  )
  prepare(source, max_query_tokens=60, tokenizer=other)
  prepare(source, max_query_tokens=60, held_out_fraction=0.1)
  prepare(write_embedding(tmp_path, 21), max_query_tokens=60)
  assert len(count_encoded) == 6
  assert len(list_folders(tmp_path / 'prepared')) == 6


def test_two_that_prepare_at_once_do_the_work_once(
  prepare, tmp_path, count_encoded
):
  source = write_embedding(tmp_path)
  lengths = []
  threads = [
    threading.Thread(target=lambda: lengths.append(len(prepare(source))))
    for _ in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert lengths == [20, 20, 20]
  assert len(count_encoded) == 1


BAD_LINES = {
  'malformed': ('{"query": ', 'not valid JSON'),
  'another kind': ('{"text": "t"}', 'found a record of the generative kind'),
  'no negatives': (
    '{"query": "q", "pos": ["p"], "neg": []}',
    'neg: found 0 negatives, expected 1 or more; .* num_passages',
  ),
  'no room': (
    json.dumps({'query': 'q', 'pos': ['p'], 'neg': ['n', ['x ' * 99, 't']]}),
    r'neg\[1\]: the instruction takes \d+ tokens',
  ),
  'no room in the query': (
    json.dumps({'query': ['x ' * 99, 't'], 'pos': ['p'], 'neg': ['n']}),
    r'query: the instruction takes \d+ tokens .* the 24 allowed',
  ),
}


@pytest.mark.parametrize('name', BAD_LINES)
def test_a_bad_record_stops_with_its_line(prepare, tmp_path, name):
  line, message = BAD_LINES[name]
  path = tmp_path / 'a.jsonl'
  write_embedding(tmp_path, 5)
  path.write_text(path.read_text() + line + '\n')
  with pytest.raises(RecordError, match=f'^{path}:6: {message}'):
    prepare(FileSource(path), min_negatives=1)
  assert not list((tmp_path / 'prepared').glob('*/dataset.json'))


def test_too_few_negatives_show_in_a_data_set_that_was_made_for_fewer(
  prepare, tmp_path, count_encoded
):
  source = write_embedding(tmp_path)
  prepare(source, min_negatives=1)
  with pytest.raises(RecordError, match='a.jsonl:1: neg: found 1 negatives'):
    prepare(source, min_negatives=2)
  assert len(count_encoded) == 1


def test_a_remote_directory_is_refused(tmp_path, tokenizer):
  source = write_embedding(tmp_path)
  with pytest.raises(UserError, match='gs://bucket: .* mounted disk'):
    dataset.prepare(source, TRAIN, tokenizer, 'gs://bucket', **LIMITS)


def test_memory_does_not_grow_with_the_records(prepare, tmp_path, monkeypatch):
  # With more, as much as one whole part is read ahead.
  monkeypatch.setattr(tokenization, 'count_cores', lambda: 1)
  monkeypatch.setattr(parts, '_BATCH_RECORDS', 16)
  monkeypatch.setattr(parts, 'PART_RECORDS', 32)
  line = {'text': ['user', 'an answer ' * 20], 'other': 'x' * 4000}
  peaks = []
  # The first one pays for what is imported and cached. The others are larger
  # than the blocks that files are read in.
  for name, count in ('first', 64), ('few', 280), ('many', 600):
    source = write_source(tmp_path / f'{name}.jsonl', [line] * count)
    tracemalloc.start()
    prepare(source)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  # The lines alone are 1.3 MB more, their tokens as much again. What each part
  # leaves to be merged is a few kilobytes.
  assert peaks[2] - peaks[1] < 200_000


def test_neither_tensorflow_nor_torch_nor_jax_is_imported(
  tmp_path, model_bytes
):
  (tmp_path / 'tokenizer.model').write_bytes(model_bytes)
  write_embedding(tmp_path)
  program = f"""
import sys
from grit_jax.data import dataset, sources, tokenizer
(source,) = sources.sources({str(tmp_path / 'a.jsonl')!r})
data = dataset.prepare(
  source, "train", tokenizer.load_tokenizer({str(tmp_path)!r} +
  "/tokenizer.model"), {str(tmp_path / 'prepared')!r}, **{LIMITS!r}
)
assert len(data.read([0, 1])) == 2
print([name for name in ("tensorflow", "torch", "jax") if name in sys.modules])
"""
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stdout) == (0, '[]\n'), done.stderr


CLASS = 'tensorflow_datasets.core.features.tensor_feature.Tensor'


@pytest.mark.parametrize(
  ('name', 'old', 'new'),
  [
    # Importing the module `this` prints a poem.
    ('features.json', CLASS, 'this.Tensor'),
    ('features.json', '"int32"', '"int64"'),
    ('features.json', '}', ''),
    ('dataset_info.json', '{DATASET}-', '../{DATASET}-'),
    ('dataset_info.json', '"name": "train"', '"name": "../train"'),
    ('dataset_info.json', '"array_record"', '"riegeli"'),
    ('dataset_info.json', '"splits"', '"others"'),
  ],
)
def test_what_tfds_would_trust_is_compared_before_it_reads(
  prepare, tmp_path, name, old, new
):
  prepare(write_embedding(tmp_path), TRAIN)
  (path,) = tmp_path.glob(f'**/records/{name}')
  content = path.read_text()
  assert old in content
  path.write_text(content.replace(old, new))
  with pytest.raises(UserError, match=f'^{path}'):
    open_dataset(path.parents[1], TRAIN)
  assert 'this' not in sys.modules
