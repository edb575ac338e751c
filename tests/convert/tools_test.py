"""Exports in the tools they are for: every figure is that of our own decoder.

One model is trained by the training command; the other kinds of model have
random weights, since training them would show nothing more.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest

from grit_jax import config as configuration
from grit_jax import objective, pooling, sharding
from grit_jax.batch import Rows
from grit_jax.checkpoint import find_checkpoint
from grit_jax.config import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  ObjectiveConfig,
  RotaryScalingConfig,
)
from grit_jax.convert.to_hf import MAX_SHARD_BYTES, to_hf
from grit_jax.data import formats
from grit_jax.data.filling import Filler, RowShards
from grit_jax.data.packing import pack
from grit_jax.data.records import GenerativeRecord, Text
from grit_jax.data.tokenizer import make_tokenizer
from grit_jax.models import presets
from grit_jax.models.attention import Kind, embedding_kind
from grit_jax.models.decoder import Decoder

pytestmark = pytest.mark.e2e

# Two float32 programs over two layers; logits of size 1 to 10.
LOGIT_TOLERANCE = 1e-4
# The same, of vectors of length 1.
EMBEDDING_TOLERANCE = 1e-5
# Of weights rounded to 8 bits, and sums over 32 of them.
BFLOAT16_TOLERANCE = 0.05

ROW_LENGTH, SEGMENTS = 192, 4
NEW_TOKENS = 12

TEXTS = [
  'a',
  'Uneven lengths, of texts that share a batch, are padded by every tool.',
  ' White space at the ends stays. \n',
  'Bytes: ünïcödé 🙂, and\n\nnewlines\tand tabs',
  'A literal </s> in the text is the token.',
]
# mteb takes white space off the ends of a corpus's texts.
STRIPPED = [text.strip() for text in TEXTS]
INSTRUCTIONS = ['', 'Find the answer: to the question']
CHATS = [
  ['Hello', 'Hi there'],
  ['What is this? ', ' A chat.\n', 'And\nthen', 'more 🙂', 'The third', 'end'],
  ['<|user|>\nspelled out', '</s> in an answer', '', 'to nothing'],
]

TINY = dataclasses.replace(presets.tiny(), vocab_size=407, rope_theta=100.0)
LLAMA3 = RotaryScalingConfig('llama3', 8.0, 1.0, 4.0, original_positions=64)
# What fails by itself shares a model: a kind of weights with a pooling, a mode
# with attention.
VARIANTS: dict[str, dict] = {
  'llama3-tied-cls': {
    'family': 'llama',
    'rotary_scaling': LLAMA3,
    'tie_embeddings': True,
    'embed_dim': 36,
    'head_dim': 10,
    'pooling': 'cls',
  },
  'json-tokenizer': {},
  'mixtral-lasttoken': {
    'num_experts': 4,
    'mlp_dim': 16,
    'pooling': 'lasttoken',
  },
  'causal-lasttoken': {'attention': 'cccc', 'pooling': 'lasttoken'},
  'weightedmean': {'pooling': 'weightedmean'},
  'projection': {'projection_dim': 7},
  'window': {'sliding_window': 9},
  'embedding-prefix': {'attention': 'bbbc'},
  'generative': {},
}
MODES = {'embedding-prefix': 'embedding', 'generative': 'generative'}
EMBEDS = ['trained', *(name for name in VARIANTS if name != 'generative')]
GENERATES = [
  'trained',
  'llama3-tied-cls',
  'json-tokenizer',
  'mixtral-lasttoken',
  'window',
  'generative',
]


def make_config(name: str) -> Config:
  model: ModelConfig = dataclasses.replace(TINY, **VARIANTS[name])
  return Config(
    model=model,
    objective=ObjectiveConfig(mode=MODES.get(name, 'unified')),
    data=DataConfig(paths='pairs.jsonl'),
  )


@pytest.fixture(scope='module')
def trained_run(trained) -> pathlib.Path:
  """The workdir of a short run of the training command."""
  return trained.workdir


@pytest.fixture(scope='module')
def export_of(
  trained_run, write_run, json_tokenizer_files, tmp_path_factory
) -> Callable[[str], tuple['Ours', str]]:
  """Exports a kind of model in float32: our own of it, and the folder."""
  place = tmp_path_factory.mktemp('exports')

  @functools.cache
  def export(name: str) -> tuple[Ours, str]:
    source = trained_run
    if name != 'trained':
      files = json_tokenizer_files if name == 'json-tokenizer' else None
      source = place / f'{name}.checkpoint'
      write_run(source, make_config(name), files)
    # One in many files, as large models are.
    limit = 20_000 if name == 'mixtral-lasttoken' else MAX_SHARD_BYTES
    to_hf(source, place / name, max_shard_bytes=limit)
    return Ours(source), str(place / name)

  return export


class Ours:
  """Our decoder of a checkpoint."""

  def __init__(self, source: pathlib.Path):
    self.source = source
    checkpoint = find_checkpoint(source)
    self.config = configuration.from_dict(checkpoint.read_config())
    self.tokenizer = make_tokenizer(checkpoint.read_tokenizer(), str(source))
    self.mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(self.mesh):
      abstract = jax.eval_shape(
        lambda: {'model': Decoder(self.config.model, jax.random.key(0))}
      )
      self.model = checkpoint.restore(abstract)['model']

  def embed(self, texts: Sequence[str], instruction: str) -> np.ndarray:
    """Embeds texts as training does, several in a row; [texts, D]."""
    encoded = [
      formats.encode_embedding(Text(instruction, text), self.tokenizer, 512)
      for text in texts
    ]
    lengths = np.array([len(text.ids) for text in encoded])
    packed = pack(lengths, ROW_LENGTH, SEGMENTS)
    fill = Filler(
      packed, lengths, packed.num_rows, ROW_LENGTH, 0, RowShards.whole(1)
    )
    in_instruction = [text.in_instruction for text in encoded]
    rows = fill.rows(
      [text.ids for text in encoded], fill.join(in_instruction, bool)
    )
    with jax.set_mesh(self.mesh):
      found = np.asarray(embed_rows(self.model, rows))
    return found[packed.rows, packed.segments - 1]

  def hidden(self, ids: Sequence[int], kind: Kind) -> np.ndarray:
    """Returns the last hidden states of one text, [T, D]."""
    with jax.set_mesh(self.mesh):
      hidden = run_rows(self.model, self._row(ids), kind)
    return np.asarray(hidden)[0, : len(ids)]

  def logits(self, ids: Sequence[int]) -> np.ndarray:
    """Returns the next token's logits after each token of a text, [T, V]."""
    with jax.set_mesh(self.mesh):
      logits = score_rows(self.model, self._row(ids))
    return np.asarray(logits)[0, : len(ids), : self.config.model.vocab_size]

  def prompt(self, instruction: str) -> str:
    """Returns the prefix of a text, without the BOS that tools add."""
    prefix = formats.format_embedding_prefix(instruction, self.tokenizer)
    return prefix.removeprefix(self.tokenizer.bos_piece)

  def _row(self, ids: Sequence[int]) -> Rows:
    length = len(ids)
    place = np.arange(ROW_LENGTH)[None]
    tokens = np.zeros((1, ROW_LENGTH), np.int32)
    tokens[0, :length] = ids
    real = place < length
    positions = np.where(real, place, 0).astype(np.int32)
    return Rows(tokens, real.astype(np.int32), positions, real & False)


@jax.jit
def embed_rows(model: Decoder, rows: Rows) -> jax.Array:
  kind = embedding_kind(model.config.attention)
  [hidden] = model([rows], [kind])
  found = objective.pool_texts(model, hidden, rows, SEGMENTS)
  return pooling.normalise(found)


@functools.partial(jax.jit, static_argnums=2)
def run_rows(model: Decoder, rows: Rows, kind: Kind) -> jax.Array:
  return model([rows], [kind])[0]


@jax.jit
def score_rows(model: Decoder, rows: Rows) -> jax.Array:
  [hidden] = model([rows], [Kind.CAUSAL])
  return model.logits(hidden, model.gather_head())


def assert_close(found, expected: np.ndarray, tolerance: float) -> None:
  found = np.asarray(found)
  assert found.shape == expected.shape
  difference = np.abs(found - expected).max()
  print(f'largest difference: {difference:.2g}')
  assert difference < tolerance


@pytest.mark.parametrize('name', GENERATES)
def test_transformers_gives_our_logits(export_of, name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  ours, folder = export_of(name)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  assert model.dtype == torch.float32
  for text in TEXTS:
    inputs = tokenizer(text, return_tensors='pt')
    ids = [ours.tokenizer.bos, *ours.tokenizer.encode(text)]
    assert inputs['input_ids'].tolist() == [ids]
    with torch.no_grad():
      [logits] = model(**inputs).logits
    assert_close(logits, ours.logits(ids), LOGIT_TOLERANCE)


@pytest.mark.parametrize('name', GENERATES)
def test_transformers_generates_our_tokens(export_of, name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  ours, folder = export_of(name)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  settings = model.generation_config
  assert settings.eos_token_id == ours.tokenizer.eos
  assert settings.bos_token_id == ours.tokenizer.bos
  settings.eos_token_id = None
  for question in CHATS[1][::2]:
    prompt = formats.format_chat_prompt([question], ours.tokenizer)
    ids = ours.tokenizer.encode(prompt)
    tokens = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS)
    generated = tokens[0, len(ids) :].tolist()
    assert len(generated) == NEW_TOKENS
    # Each is the best after those before it, of which alone its logits are.
    best = ours.logits([*ids, *generated])[len(ids) - 1 : -1].argmax(axis=1)
    assert generated == best.tolist()
    # A model that repeats one token would agree with nearly anything.
    assert len(set(generated)) > 3 or name == 'trained'


@pytest.mark.parametrize(
  'name', ['trained', 'llama3-tied-cls', 'mixtral-lasttoken', 'window']
)
def test_transformers_attends_both_ways_when_told(export_of, name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  ours, folder = export_of(name)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModel.from_pretrained(folder)
  batch = tokenizer(TEXTS, padding=True, return_tensors='pt')
  # Causal states of the others are those that their logits are made of.
  kinds = [Kind.CAUSAL] if name == 'trained' else []
  for kind in *kinds, Kind.BIDIRECTIONAL:
    with torch.no_grad():
      theirs = model(**batch, is_causal=kind is Kind.CAUSAL).last_hidden_state
    for states, text in zip(theirs, TEXTS, strict=True):
      ids = [ours.tokenizer.bos, *ours.tokenizer.encode(text)]
      expected = ours.hidden(ids, kind)
      assert_close(states[: len(ids)], expected, LOGIT_TOLERANCE)


@pytest.mark.parametrize('name', EMBEDS)
def test_sentence_transformers_gives_our_embeddings(export_of, name):
  library = pytest.importorskip('sentence_transformers')
  ours, folder = export_of(name)
  if name == 'weightedmean':
    assert not (pathlib.Path(folder) / 'modules.json').exists()
    return
  model = library.SentenceTransformer(folder, device='cpu')
  assert model.max_seq_length == 512
  for instruction in INSTRUCTIONS:
    expected = ours.embed(TEXTS, instruction)
    prompt = ours.prompt(instruction)
    together = model.encode(TEXTS, prompt=prompt)
    assert_close(together, expected, EMBEDDING_TOLERANCE)
  singly = np.stack([model.encode(text, prompt=prompt) for text in TEXTS])
  assert_close(singly, expected, EMBEDDING_TOLERANCE)
  expected = ours.embed(TEXTS, '')
  for encode in model.encode, model.encode_query, model.encode_document:
    assert_close(encode(TEXTS), expected, EMBEDDING_TOLERANCE)
  similarity = model.similarity(model.encode(TEXTS), model.encode(TEXTS))
  assert_close(similarity, expected @ expected.T, EMBEDDING_TOLERANCE)


@pytest.mark.parametrize(
  'name', [name for name in EMBEDS if name != 'projection']
)
def test_gritlm_gives_our_embeddings(export_of, name):
  library = pytest.importorskip('gritlm')
  ours, folder = export_of(name)
  letters = ours.config.model.attention[:2]
  modes = ['embedding', 'unified'] if name in GENERATES else ['embedding']
  for mode in modes:
    model = library.GritLM(
      folder,
      mode=mode,
      pooling_method=ours.config.model.pooling,
      attn={'bb': 'bbcc', 'cc': 'cccc'}[letters],
      device='cpu',
    )
    for instruction in INSTRUCTIONS:
      expected = ours.embed(TEXTS, instruction)
      prompt = ours.prompt(instruction)
      together = model.encode(TEXTS, instruction=prompt)
      assert_close(together, expected, EMBEDDING_TOLERANCE)
    singly = [model.encode(text, instruction=prompt) for text in TEXTS]
    assert_close(np.stack(singly), expected, EMBEDDING_TOLERANCE)


def test_bfloat16_embeds_nearly_alike(export_of, tmp_path):
  torch = pytest.importorskip('torch')
  library = pytest.importorskip('sentence_transformers')
  ours, folder = export_of('projection')
  to_hf(ours.source, tmp_path / 'out', 'bfloat16')
  model = library.SentenceTransformer(
    str(tmp_path / 'out'), device='cpu', model_kwargs={'dtype': 'auto'}
  )
  assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
  found = model.encode(TEXTS)
  assert_close(found, ours.embed(TEXTS, ''), BFLOAT16_TOLERANCE)


@pytest.mark.parametrize('name', ['trained', 'json-tokenizer'])
@pytest.mark.parametrize('turns', CHATS, ids=len)
def test_chat_template_gives_the_ids_of_training(export_of, name, turns):
  transformers = pytest.importorskip('transformers')
  ours, folder = export_of(name)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  roles = ['user', 'assistant'] * len(turns)
  messages = [
    {'role': role, 'content': turn}
    for role, turn in zip(roles, turns, strict=False)
  ]
  found = tokenizer.apply_chat_template(messages, return_dict=False)
  record = GenerativeRecord(turns=tuple(turns), plain=False)
  expected = formats.encode_conversation(record, ours.tokenizer, 10_000).ids
  assert found == expected.tolist()
  for count in range(1, len(turns), 2):
    found = tokenizer.apply_chat_template(
      messages[:count], add_generation_prompt=True, return_dict=False
    )
    prompt = formats.format_chat_prompt(turns[:count], ours.tokenizer)
    assert found == ours.tokenizer.encode(prompt)


@pytest.mark.parametrize(
  'roles, prompt, message',
  [
    (['system', 'user'], True, 'no system role; found: system'),
    (['user', 'user'], True, 'found: user'),
    (['assistant'], False, 'found: assistant'),
    (['user', 'assistant', 'tool'], False, 'found: tool'),
    (['user', 'assistant'], True, 'Only a turn of the user is answered'),
  ],
)
def test_chat_template_refuses_what_was_not_trained(
  export_of, roles, prompt, message
):
  transformers = pytest.importorskip('transformers')
  _, folder = export_of('trained')
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  messages = [{'role': role, 'content': 'a'} for role in roles]
  with pytest.raises(Exception, match=message):
    tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)


def make_tasks(mteb):
  """Makes a retrieval and a similarity task of STRIPPED, for mteb's runner."""
  datasets = pytest.importorskip('datasets')
  from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS

  def describe(name: str, kind: str, score: str):
    return mteb.TaskMetadata(
      name=name,
      type=kind,
      main_score=score,
      description='In memory.',
      dataset={'path': 'none', 'revision': 'none'},
      eval_splits=['test'],
      eval_langs=['eng-Latn'],
    )

  class Retrieval(AbsTaskRetrieval):
    metadata = describe('Retrieval', 'Retrieval', 'ndcg_at_10')

    def load_data(self, **_) -> None:
      corpus = [
        {'id': f'd{i}', 'text': text} for i, text in enumerate(STRIPPED)
      ]
      queries = [
        {'id': f'q{i}', 'text': text} for i, text in enumerate(STRIPPED)
      ]
      self.dataset = {
        'default': {
          'test': {
            'corpus': datasets.Dataset.from_list(corpus),
            'queries': datasets.Dataset.from_list(queries),
            'relevant_docs': {f'q{i}': {f'd{i}': 1} for i in range(5)},
            'top_ranked': None,
          }
        }
      }
      self.data_loaded = True

  class Similarity(AbsTaskSTS):
    metadata = describe('Similarity', 'STS', 'cosine_pearson')

    def load_data(self, **_) -> None:
      self.dataset = datasets.DatasetDict(
        test=datasets.Dataset.from_dict(
          {
            'sentence1': STRIPPED,
            'sentence2': STRIPPED[1:] + STRIPPED[:1],
            'score': [0.0, 2.0, 5.0, 1.0, 3.0],
          }
        )
      )
      self.data_loaded = True

  return Retrieval(), Similarity()


def test_mteb_runs_on_our_embeddings(export_of, tmp_path):
  library = pytest.importorskip('sentence_transformers')
  mteb = pytest.importorskip('mteb')
  ours, folder = export_of('trained')
  model = library.SentenceTransformer(folder, device='cpu')
  results = mteb.evaluate(
    model, make_tasks(mteb), cache=None, prediction_folder=tmp_path
  )
  expected = ours.embed(STRIPPED, '')
  [path] = tmp_path.rglob('Retrieval*.json')
  found = json.loads(path.read_text())['default']['test']
  scores = [
    [found[f'q{i}'][f'd{j}'] for j in range(len(STRIPPED))]
    for i in range(len(STRIPPED))
  ]
  assert_close(scores, expected @ expected.T, EMBEDDING_TOLERANCE)
  cosines = (expected * np.roll(expected, -1, axis=0)).sum(axis=1)
  pearson = np.corrcoef(cosines, [0, 2, 5, 1, 3])[0, 1]
  assert abs(results[1].get_score() - pearson) < 1e-4
