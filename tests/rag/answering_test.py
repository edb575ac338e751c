"""The modes give what their definitions give, and what PyTorch gives."""

from functools import partial

import jax
import numpy as np
import pytest

from grit_jax.batch import Rows
from grit_jax.data.pipeline import place_batch
from grit_jax.inference.cache import KVCache
from grit_jax.inference.generation import Prompt
from grit_jax.inference.index import Index
from grit_jax.inference.sampling import Sampling
from grit_jax.models.attention import Kind
from grit_jax.models.decoder import Chunk
from grit_jax.rag.answering import Answerer, encode_documents
from grit_jax.rag.caches import HostCaches
from grit_jax.rag.prompts import BEHIND_QUERY, Mode, format_prompt
from grit_jax.sharding import place

DOCUMENTS = [
  {
    'id': 'a',
    'title': 'The parser',
    'text': 'It reads a command.\nThen it ends.',
  },
  {'id': 'b', 'title': 'Groups', 'text': 'Options belong to a group.'},
  {
    'id': 'c',
    'text': 'An error is raised where an action is not known at all.',
  },
]
QUESTIONS = ['What does the parser read?', 'Which group?', 'When is it so?']
NEW_TOKENS = 12
SAMPLING = Sampling(NEW_TOKENS)
CACHING = [Mode.QUERY, Mode.DOC, Mode.QUERY_DOC, Mode.DOC_QUERY]
# Rounding of float32, in sums of a few hundred numbers of size 1.
TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def index(model, tmp_path_factory):
  embeddings = model.encode_corpus(DOCUMENTS)
  index = Index.create(tmp_path_factory.mktemp('rag') / 'i', len(embeddings[0]))
  index.extend(embeddings, DOCUMENTS)
  return index


def make_answerer(model, index, mode, dtype='float32', max_bytes=10**9):
  def make(number):
    return encode_documents(model, index.documents([number]), mode, 512)[1][0]

  caches = HostCaches(make, dtype, max_bytes) if mode.caches_document else None
  return Answerer(model, index, mode, caches)


def generated(model, prompt: str, cache: KVCache | None = None):
  """Returns the tokens that are generated."""
  encoded = model.encode_prompt(prompt, SAMPLING, cache)
  return model.complete([encoded])[0].ids


# With the sources in the prompts, and with caches of all. The command's test
# has the other modes.
@pytest.mark.parametrize('mode', [Mode.DOCUMENT_FIRST, Mode.QUERY_DOC])
def test_questions_together_are_answered_as_each_by_itself(model, index, mode):
  answerer = make_answerer(model, index, mode)
  together = answerer.answer(QUESTIONS, SAMPLING)
  for question, answer in zip(QUESTIONS, together, strict=True):
    (alone,) = answerer.answer([question], SAMPLING)
    assert alone.text == answer.text
    assert alone.question == answer.question == question
    assert [s.number for s in alone.sources] == [
      s.number for s in answer.sources
    ]
  assert len({answer.text for answer in together}) > 1


@pytest.mark.parametrize('mode', CACHING)
def test_answers_go_on_from_the_papers_caches(model, index, mode):
  (answer,) = make_answerer(model, index, mode).answer(QUESTIONS[:1], SAMPLING)
  document = DOCUMENTS[answer.sources[0].number]
  text = ' '.join(filter(None, [document.get('title'), document['text']]))
  _, (query,) = model.encode(QUESTIONS[:1], get_cache=True)
  _, (first,) = model.encode([text], get_cache=True)
  _, (second,) = model.encode(
    [text],
    instruction=BEHIND_QUERY,
    add_special_tokens=False,
    get_cache=True,
  )
  cache = {
    Mode.QUERY: query,
    Mode.DOC: first,
    Mode.QUERY_DOC: KVCache.join([query, second]),
    Mode.DOC_QUERY: KVCache.join([first, query]),
  }[mode]
  prompt = format_prompt(mode, QUESTIONS[0], [document])
  expected = model.generate(prompt, cache=cache, max_new_tokens=NEW_TOKENS)
  assert answer.text == expected


def test_causal_doc_caching_is_reading_it_all_in_one_piece(causal_model):
  model, document = causal_model, DOCUMENTS[0]
  prompt = format_prompt(Mode.DOC, QUESTIONS[0], [document])
  _, (cache,) = encode_documents(model, [document], Mode.DOC, 512)
  tokenizer = model.tokenizer
  text = ' '.join(filter(None, [document.get('title'), document['text']]))
  before = tokenizer.encode(f'<s><|embed|>\n{text}')
  ids = np.array([*before, *tokenizer.encode(prompt)], np.int32)
  assert len(cache) == len(before)
  # The same greedy tokens.
  whole = Prompt(ids, np.ones(len(ids), bool), SAMPLING)
  expected = model.complete([whole])[0].ids
  assert generated(model, prompt, cache) == expected
  assert len(set(expected)) > 2
  # The same states, by the decoder as training runs it.
  found = extend(model, cache, ids[len(before) :])
  states = run(model, ids)[len(before) :]
  np.testing.assert_allclose(
    found, states, atol=TOLERANCE * np.abs(states).max()
  )


def extend(model, cache: KVCache, ids: np.ndarray) -> np.ndarray:
  """Returns the states of tokens behind a cache, [T, D]."""
  start, size = len(cache), len(ids)
  places = np.arange(start, start + size, dtype=np.int32)[None]
  put = partial(place, model.mesh)
  chunk = Chunk(
    *(
      put(x, 'rows', 'seq')
      for x in (
        ids[None], places, np.ones((1, size), bool), np.zeros_like(places),
        places,
      )
    ),
    put(np.array(start, np.int32)),
  )  # fmt: skip
  room = ((0, 0), (0, 0), (0, -(start + size) % 128 + size), (0, 0))
  layers = [
    tuple(
      put(np.pad(x[None], room), 'rows', 'kv_heads', 'seq', 'head_dim')
      for x in layer
    )
    for layer in zip(cache.keys, cache.values, strict=True)
  ]
  with jax.set_mesh(model.mesh):
    hidden, _ = jax.jit(type(model.model).extend)(model.model, chunk, layers)
  return np.asarray(hidden)[0]


def run(model, ids: np.ndarray) -> np.ndarray:
  """Returns the states of tokens that are read in one piece, [T, D]."""
  tokens = ids[None]
  rows = place_batch(
    model.mesh,
    Rows(
      tokens, np.ones_like(tokens), np.arange(len(ids), dtype=np.int32)[None],
      np.zeros(tokens.shape, bool),
    ),
  )  # fmt: skip
  with jax.set_mesh(model.mesh):
    (hidden,) = jax.jit(lambda m, r: m([r], [Kind.CAUSAL]))(model.model, rows)
  return np.asarray(hidden)[0]


def test_bidirectional_doc_caching_is_not_reading_it_causally(
  model, causal_model
):
  prompt = format_prompt(Mode.DOC, QUESTIONS[0], DOCUMENTS[:1])
  _, (both,) = encode_documents(model, DOCUMENTS[:1], Mode.DOC, 512)
  _, (causal,) = encode_documents(causal_model, DOCUMENTS[:1], Mode.DOC, 512)
  assert np.abs(both.keys - causal.keys).max() > 0.1
  assert generated(model, prompt, both) != generated(model, prompt, causal)


def test_bfloat16_caches_change_little_and_their_size_is_half(model, tmp_path):
  _, (cache,) = encode_documents(model, DOCUMENTS[:1], Mode.DOC, 512)
  cache.astype('bfloat16').save(tmp_path / 'cache.npy')
  stored = KVCache.open(tmp_path / 'cache.npy')
  assert isinstance(stored.keys.base, np.memmap)
  assert stored.nbytes * 2 == cache.nbytes
  ids = np.array(model.tokenizer.encode('\n<|user|>\nWho?'), np.int32)
  expected = extend(model, cache, ids)
  error = np.abs(extend(model, stored, ids) - expected).max()
  # A key or a value is off by 2**-9 of itself; states, normalised, by a few
  # times that after two layers.
  assert 0 < error < 2**-5 * np.abs(expected).max()
  cache.save(tmp_path / 'whole.npy')
  exact = KVCache.open(tmp_path / 'whole.npy')
  np.testing.assert_array_equal(exact.keys, cache.keys)
  np.testing.assert_array_equal(exact.values, cache.values)


def test_caches_in_memory_are_made_once_and_the_oldest_go(model, index):
  made = []

  def make(number):
    made.append(number)
    documents = index.documents([number])
    return encode_documents(model, documents, Mode.DOC, 512)[1][0]

  sizes = [make(i).astype('bfloat16').nbytes for i in range(3)]
  made.clear()
  caches = HostCaches(make, 'bfloat16', sizes[1] + sizes[2])
  for number in 1, 2, 1, 2, 0, 1:
    assert caches.read(number).nbytes == sizes[number]
  assert made == [1, 2, 0, 1]
  assert caches.nbytes <= sizes[1] + sizes[2]


@pytest.fixture(scope='module')
def theirs(folder):
  """The PyTorch package's model of the same folder."""
  library = pytest.importorskip('gritlm')
  return library.GritLM(str(folder), mode='unified', attn='bbcc', device='cpu')


@pytest.mark.parametrize('mode', CACHING)
@pytest.mark.parametrize('number', range(len(DOCUMENTS)))
def test_caching_generates_what_pytorch_gritlm_does(
  model, theirs, mode, number
):
  """As the example of its README and its evaluation go, in float32."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  document, question = DOCUMENTS[number], QUESTIONS[number]
  prompt = format_prompt(mode, question, [document])

  def encode(text, instruction, **settings):
    _, cache = theirs.encode(
      [text], instruction=instruction, get_cache=True, **settings
    )
    return [(layer.keys, layer.values) for layer in cache.layers]

  text = ' '.join(filter(None, [document.get('title'), document['text']]))
  behind = mode is Mode.QUERY_DOC
  pieces = {
    'query': encode(question, '<|embed|>\n'),
    'document': encode(
      text, BEHIND_QUERY if behind else '<|embed|>\n',
      add_special_tokens=not behind,
    ),
  }  # fmt: skip
  order = {
    Mode.QUERY: ['query'],
    Mode.DOC: ['document'],
    Mode.QUERY_DOC: ['query', 'document'],
    Mode.DOC_QUERY: ['document', 'query'],
  }[mode]
  layers = [
    tuple(torch.cat(parts, dim=2) for parts in zip(*layer, strict=True))
    for layer in zip(*(pieces[name] for name in order), strict=True)
  ]
  cache = transformers.DynamicCache(layers)
  length = cache.get_seq_length()
  inputs = theirs.tokenizer(
    prompt, add_special_tokens=False, return_tensors='pt'
  )
  ids = inputs['input_ids']
  with torch.no_grad():
    out = theirs.generate(
      input_ids=ids,
      attention_mask=torch.ones((1, length + ids.shape[1]), dtype=torch.long),
      cache=cache,
      max_new_tokens=NEW_TOKENS,
      do_sample=False,
    )
  expected = out[0, ids.shape[1] :].tolist()

  queries, documents = (
    model.encode([question], get_cache=True)[1],
    encode_documents(model, [document], mode, 512)[1],
  )
  ours = {'query': queries[0], 'document': documents[0]}
  found = generated(model, prompt, KVCache.join([ours[name] for name in order]))
  assert list(found) == expected
  assert len(set(expected)) > 2
