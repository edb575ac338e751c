"""Tests of loading and encoding, against the PyTorch package."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from absl import logging as absl_logging

from grit_jax import GritLM
from grit_jax.config import Config, DataConfig, MeshConfig, ObjectiveConfig
from grit_jax.convert.from_hf import from_hf
from grit_jax.convert.to_hf import MAX_SHARD_BYTES, to_hf
from grit_jax.data.formats import EmbeddingText, FormatError
from grit_jax.errors import ConfigError, UserError
from grit_jax.inference.encoding import LEAST_ROW, Request, round_length
from grit_jax.initial import load_model, open_initial, take_architecture
from grit_jax.models import presets

# Two float32 programs over two layers; embeddings have length 1.
TOLERANCE = 1e-5
# Weights rounded to 8 bits: their errors average out over sums of 32.
INT8_COSINE = 0.99

MODEL = dataclasses.replace(
  presets.tiny(), vocab_size=407, rope_theta=100.0, max_positions=4096
)
TEXTS = [
  'a',
  'Uneven lengths, of texts that share a batch, change nothing.',
  'Bytes: ünïcödé 🙂, and\n\nnewlines\tand tabs',
  'word ' * 64,
  'A literal </s> in the text is the token.',
  'two words ' * 30,
]
INSTRUCTION = 'Find the answer: to the question'


@pytest.fixture(scope='module')
def checkpoint(
  tmp_path_factory: pytest.TempPathFactory, write_run: Callable
) -> pathlib.Path:
  path = tmp_path_factory.mktemp('gritlm') / 'checkpoint'
  write_run(path, Config(model=MODEL))
  return path


@pytest.fixture(scope='module')
def model(checkpoint: pathlib.Path) -> GritLM:
  return GritLM.load(checkpoint)


@pytest.fixture(scope='module')
def encoded(model: GritLM) -> np.ndarray:
  return model.encode(TEXTS, max_length=1024)


@pytest.fixture(scope='module')
def exported(checkpoint: pathlib.Path) -> pathlib.Path:
  """The same model in a Hugging Face folder."""
  folder = checkpoint.parent / 'hf'
  to_hf(checkpoint, folder, None, MAX_SHARD_BYTES)
  return folder


@pytest.mark.parametrize('instruction', ['', INSTRUCTION])
def test_embeddings_are_those_of_the_pytorch_package(
  exported: pathlib.Path, instruction: str
):
  torch = pytest.importorskip('torch')
  gritlm = pytest.importorskip('gritlm')
  theirs = gritlm.GritLM(
    str(exported), mode='embedding', torch_dtype=torch.float32
  )
  user = f'<|user|>\n{instruction}\n' if instruction else ''
  expected = theirs.encode(
    TEXTS, instruction=f'{user}<|embed|>\n', max_length=100
  )
  ours = GritLM.load(exported)
  found = ours.encode(TEXTS, instruction=instruction, max_length=100)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_a_text_has_one_embedding_alone_and_in_any_batch(
  model: GritLM, encoded: np.ndarray
):
  assert encoded.shape == (len(TEXTS), MODEL.embed_dim)
  np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), 1, atol=TOLERANCE)
  order = [3, 0, 5, 1, 4, 2]
  shuffled = model.encode(
    [TEXTS[i] for i in order], max_length=1024, batch_size=1
  )
  np.testing.assert_allclose(shuffled, encoded[order], atol=TOLERANCE)
  alone = model.encode(TEXTS[1])
  assert alone.shape == (MODEL.embed_dim,)
  np.testing.assert_allclose(alone, encoded[1], atol=TOLERANCE)


@pytest.mark.parametrize('count', [1, 3, 40])
def test_few_tokens_have_a_short_row(model: GritLM, count: int):
  request = Request('<s><|embed|>\n', 512, 32)
  encoder = model._encoder
  with jax.set_mesh(model.mesh):
    texts = encoder._tokenize(['Who is it?'] * count, request)
    calls = list(encoder._pack(texts, request))
  tokens = sum(len(text.ids) for text in texts)
  ((_, _, rows, _),) = calls
  # Not of the module's own constants: they are what is tested.
  assert rows.tokens.size < max(2 * tokens, 32)
  assert (rows.segments > 0).sum() == tokens


def test_few_shapes_are_few_for_any_mix_of_lengths(model: GritLM):
  request = Request('', 2048, 16, few_shapes=True)
  rng = np.random.default_rng(0)
  shapes = set()
  with jax.set_mesh(model.mesh):
    for _ in range(200):
      most = 2 ** rng.integers(4, 12)
      texts = [
        EmbeddingText(np.ones(length, np.int32), 0)
        for length in rng.integers(8, most, rng.integers(1, 32), endpoint=True)
      ]
      for members, _, rows, segments in model._encoder._pack(texts, request):
        tokens = sum(len(texts[i].ids) for i in members)
        assert (rows.segments > 0).sum() == tokens
        assert rows.tokens.size <= 16 * 2048
        shapes.add((rows.tokens.shape, segments))
  # 1 row of 16 to 1024 tokens, or 1 to 16 rows of 2048.
  assert len(shapes) == 7 + 5


def test_rows_are_little_longer_than_their_longest_text():
  lengths = {tokens: round_length(tokens) for tokens in range(1, 5000)}
  for tokens, length in lengths.items():
    assert tokens <= length < max(LEAST_ROW + 1, 1.25 * tokens)
  assert len(set(lengths.values())) == 18


def test_embeddings_are_the_same_on_a_mesh(
  checkpoint: pathlib.Path, encoded: np.ndarray
):
  model = GritLM.load(checkpoint, mesh=MeshConfig(data=2, fsdp=-1, tensor=2))
  assert model.mesh.shape['fsdp'] == 2 and model.mesh.size == 8
  found = model.encode(TEXTS, max_length=1024)
  np.testing.assert_allclose(found, encoded, atol=TOLERANCE)


def test_layers_are_read_one_by_one_as_in_a_stack(
  checkpoint: pathlib.Path, model: GritLM
):
  initial = open_initial(checkpoint)
  with jax.set_mesh(model.mesh):
    stacked = load_model(Config(model=MODEL), initial, jax.random.key(0))
    expected = jax.tree.leaves(stacked.unstack())
  found = jax.tree.leaves(model.model)
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_array_equal(x, y)


def test_int8_weights_keep_the_directions(
  checkpoint: pathlib.Path, encoded: np.ndarray
):
  found = GritLM.load(checkpoint, quantization='int8').encode(
    TEXTS, max_length=1024
  )
  assert ((found * encoded).sum(axis=1) > INT8_COSINE).all()
  assert not np.allclose(found, encoded, atol=TOLERANCE)


def test_an_instruction_may_be_formatted_as_in_the_pytorch_package(
  model: GritLM, encoded: np.ndarray
):
  found = model.encode_queries(
    TEXTS, instruction=f'<|user|>\n{INSTRUCTION}\n<|embed|>\n'
  )
  expected = model.encode_queries(TEXTS, instruction=INSTRUCTION)
  np.testing.assert_array_equal(found, expected)
  assert np.abs(found - encoded).max() > 0.01


def test_titles_of_a_corpus_stand_before_their_texts(model: GritLM):
  found = model.encode_corpus([{'title': 'A', 'text': 'b c'}, {'text': 'd'}])
  np.testing.assert_allclose(
    found, model.encode(['A b c', 'd']), atol=TOLERANCE
  )
  with pytest.raises(ValueError, match="no 'text'"):
    model.encode_corpus({'title': 'A'})


def test_empty_and_long_texts_are_counted_and_reported(
  model: GritLM, caplog: pytest.LogCaptureFixture
):
  absl_logging.get_absl_logger().propagate = True
  with caplog.at_level(logging.WARNING):
    found = model.encode(['', 'x ' * 500, 'y'], max_length=64)
  assert not found[0].any()
  assert '1 of 3 texts are longer than max_length=64' in caplog.text
  assert '1 of 3 texts are empty' in caplog.text
  np.testing.assert_allclose(
    found[1], model.encode('x ' * 400, max_length=64), atol=TOLERANCE
  )
  assert model.encode([]).shape == (0, MODEL.embed_dim)


def test_what_cannot_be_encoded_is_refused_by_its_place(model: GritLM):
  with pytest.raises(FormatError, match='leaves none of the 8'):
    model.encode('text', instruction=INSTRUCTION, max_length=8)
  with pytest.raises(TypeError, match=r'sentences\[1\]'):
    model.encode(['text', None])
  with pytest.raises(ValueError, match=r'sentences\[0\]'):
    model.encode(['\ud800'])
  with pytest.raises(ValueError, match='max_length=0'):
    model.encode('text', max_length=0)


def test_choices_that_are_not_there_are_refused(checkpoint: pathlib.Path):
  for name in ('dtype', 'attention', 'pooling', 'quantization'):
    with pytest.raises(ConfigError, match=f"{name}='int4'"):
      GritLM.load(checkpoint, **{name: 'int4'})


def test_bfloat16_weights_stay_near(
  checkpoint: pathlib.Path, encoded: np.ndarray
):
  model = GritLM.load(checkpoint, dtype='bfloat16')
  assert {x.dtype.name for x in jax.tree.leaves(model.model)} == {'bfloat16'}
  found = model.encode(TEXTS, max_length=1024)
  assert ((found * encoded).sum(axis=1) > INT8_COSINE).all()


def test_a_model_saved_without_a_head_embeds_and_says_so(tmp_path, write_hf):
  whole = write_hf(tmp_path / 'whole')
  bare = {
    name.removeprefix('model.'): value
    for name, value in whole.items()
    if name != 'lm_head.weight'
  }
  folder = tmp_path / 'bare'
  write_hf(folder, tensors=bare, architectures=['LlamaModel'])
  model = GritLM.load(folder)
  np.testing.assert_array_equal(
    model.encode('a text'), GritLM.load(tmp_path / 'whole').encode('a text')
  )
  message = f'{folder} has no head'
  with pytest.raises(UserError, match=message):
    model.generate('a text')
  with pytest.raises(UserError, match=message):
    model.score('a', ' text')
  with pytest.raises(UserError, match=message):
    from_hf(folder, tmp_path / 'checkpoint')
  for mode in 'generative', 'unified', 'embedding':
    config = Config(
      model=presets.of_init_from(),
      objective=ObjectiveConfig(mode=mode),
      data=DataConfig(
        'x', max_query_tokens=8, max_passage_tokens=8, max_generative_tokens=8
      ),
      init_from=str(folder),
    )
    if mode == 'embedding':
      taken = take_architecture(config, open_initial(folder))
      assert taken.model.tie_embeddings
    else:
      with pytest.raises(ConfigError, match=f'mode={mode}: {message}'):
        take_architecture(config, open_initial(folder))
  # A head that is lost is another thing.
  write_hf(tmp_path / 'lost', tensors=bare)
  with pytest.raises(UserError, match='lm_head.weight is missing'):
    GritLM.load(tmp_path / 'lost')
