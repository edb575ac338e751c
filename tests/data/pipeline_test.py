"""Tests of grit_jax/data/pipeline.py."""

import json

import jax
import numpy as np
import pytest

from grit_jax.batch import Batch, Rows
from grit_jax.config import (
  Config,
  DataConfig,
  MemoryConfig,
  ObjectiveConfig,
)
from grit_jax.data.dataset import EmbeddingDataset, GenerativeDataset, prepare
from grit_jax.data.filling import RowShards
from grit_jax.data.pipeline import Pipeline, place_batch, reduction_weights
from grit_jax.data.sources import TRAIN, sources

ROW, SEGMENTS, STEPS, CHUNK = 64, 5, 6, 2
# Weights are float32, and float64 sums of 40 products with them.
WEIGHT_TOLERANCE = 1e-6

Datasets = tuple[list[EmbeddingDataset], list[GenerativeDataset]]


@pytest.fixture(scope='module')
def datasets(tmp_path_factory, tokenizer) -> Datasets:
  """Two data sets of records, one with instructions, and one of talks."""
  folder = tmp_path_factory.mktemp('pipeline')
  rng = np.random.default_rng(0)

  def words(most: int) -> str:
    count = rng.integers(1, most)
    return ' '.join(rng.choice(['parse', 'an', 'argument'], count))

  files = {'told': [], 'untold': [], 'talks': []}
  for i in range(20):
    for name, instruction in (('told', 'find'), ('untold', '')):
      record = {
        'query': [instruction, f'{i} {words(6)}'],
        'pos': [['', words(20)] for _ in range(1 + i % 2)],
        'neg': [['' if i % 3 else 'which', words(9)] for _ in range(2 + i % 2)],
      }
      files[name].append(record)
    turns = [words(8) for _ in range(2 * (1 + i % 2))]
    files['talks'].append({'text': turns if i % 4 else words(20)})
  for name, found in files.items():
    lines = [json.dumps(record) + '\n' for record in found]
    (folder / f'{name}.jsonl').write_text(''.join(lines))
  made = [
    prepare(
      source,
      TRAIN,
      tokenizer,
      folder / 'prepared',
      max_query_tokens=32,
      max_passage_tokens=ROW,
      max_generative_tokens=ROW,
      min_negatives=2,
      held_out_fraction=0.0,
    )
    for source in sources(str(folder))
  ]
  embedding = [one for one in made if isinstance(one, EmbeddingDataset)]
  return embedding, [one for one in made if one not in embedding]


def make_config(reduction: str = 'mixed', chunk_rows: int = 0) -> Config:
  return Config(
    objective=ObjectiveConfig(generative_reduction=reduction, mixed_groups=4),
    data=DataConfig(
      embedding_batch=6,
      generative_batch=8,
      num_passages=3,
      row_length=ROW,
      max_segments=SEGMENTS,
      row_buckets=2,
    ),
    memory=MemoryConfig(chunk_rows=chunk_rows),
    steps=STEPS,
  )


@pytest.fixture(scope='module')
def pipeline(datasets) -> Pipeline:
  return Pipeline(make_config(), *datasets, RowShards.whole(2))


@pytest.fixture(scope='module')
def chunked(datasets) -> Pipeline:
  return Pipeline(make_config(chunk_rows=CHUNK), *datasets, RowShards.whole(2))


def assert_equal_batches(one: Batch, other: Batch) -> None:
  leaves = jax.tree_util.tree_leaves_with_path(one)
  for (path, x), y in zip(leaves, jax.tree.leaves(other), strict=True):
    name = jax.tree_util.keystr(path)
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    np.testing.assert_array_equal(x, y, err_msg=name)


def text_at(rows: Rows, row: int, segment: int) -> np.ndarray:
  """The places of a segment, which are one stretch."""
  [places] = np.nonzero(rows.segments[row] == segment)
  np.testing.assert_array_equal(np.diff(places), 1)
  return places


@pytest.mark.parametrize('step', range(STEPS))
def test_slots_lead_to_the_texts_as_they_are_read_one_by_one(
  pipeline, datasets, step
):
  batch = pipeline.build(step).batch.embedding
  plan = pipeline.plan.embedding_step(step)
  slots = np.concatenate([batch.query_slots[:, None], batch.passage_slots], 1)
  assert slots.shape == (6, 4)
  assert len(np.unique(slots)) == slots.size
  told = 0
  for place, (which, record) in enumerate(
    zip(plan.datasets, plan.records, strict=True)
  ):
    [texts] = datasets[0][which].read([record])
    for slot, chosen in zip(slots[place], plan.texts[place], strict=True):
      text = texts[chosen]
      row, segment = divmod(int(slot), SEGMENTS)
      places = text_at(batch.rows, row, segment + 1)
      np.testing.assert_array_equal(batch.rows.tokens[row, places], text.ids)
      length = len(text.ids)
      np.testing.assert_array_equal(
        batch.rows.positions[row, places], np.arange(length)
      )
      in_instruction = np.arange(length) < text.instruction_length
      np.testing.assert_array_equal(
        batch.rows.in_instruction[row, places], in_instruction
      )
      told += text.instruction_length
  assert told
  # Nothing else lies in the rows.
  assert (batch.rows.segments > 0).sum() == plan.lengths.sum()
  np.testing.assert_array_equal(batch.scored, pipeline.plan.scored(plan))


@pytest.mark.parametrize('step', range(STEPS))
def test_conversations_lie_in_rows_as_they_are_read_one_by_one(
  pipeline, datasets, step
):
  batch = pipeline.build(step).batch.generative
  plan = pipeline.plan.generative_step(step)
  weights = reduction_weights(plan.loss_tokens, 'mixed', 4)
  for record, row, segment, weight in zip(
    plan.records, plan.packing.rows, plan.packing.segments, weights, strict=True
  ):
    [text] = datasets[1][0].read([record])
    places = text_at(batch.rows, row, segment)
    np.testing.assert_array_equal(batch.rows.tokens[row, places], text.ids)
    np.testing.assert_array_equal(
      batch.rows.positions[row, places], np.arange(len(text.ids))
    )
    np.testing.assert_array_equal(
      batch.rows.in_instruction[row, places], text.in_instruction
    )
    np.testing.assert_array_equal(
      batch.loss_weights[row, places], text.in_loss * weight
    )
  assert (batch.rows.segments > 0).sum() == plan.lengths.sum()


def test_padding_is_zero_everywhere(pipeline):
  batch = pipeline.build(0).batch
  for stream in (batch.embedding, batch.generative):
    padding = stream.rows.segments == 0
    assert padding.any()
    assert not stream.rows.tokens[padding].any()
    assert not stream.rows.positions[padding].any()
    assert not stream.rows.in_instruction[padding].any()
  padding = batch.generative.rows.segments == 0
  assert not batch.generative.loss_weights[padding].any()


def test_no_first_token_of_a_segment_is_predicted(pipeline):
  for step in range(STEPS):
    batch = pipeline.build(step).batch.generative
    first = (batch.rows.positions == 0) & (batch.rows.segments > 0)
    assert first.sum() == 8
    assert not batch.loss_weights[first].any()


def weighted_mean(
  losses: list[np.ndarray], reduction: str, groups: int
) -> float:
  counts = np.array([len(loss) for loss in losses])
  weights = reduction_weights(counts, reduction, groups)
  assert weights.dtype == np.float32
  total = sum(w * loss.sum() for w, loss in zip(weights, losses, strict=True))
  return total / (weights * counts).sum(dtype=np.float64)


@pytest.mark.parametrize('reduction', ['token', 'sample', 'mixed'])
def test_weights_give_the_mean_that_the_reduction_names(reduction):
  rng = np.random.default_rng(0)
  losses = [
    rng.uniform(i % 3, 5, count)
    for i, count in enumerate([3, 40, 1, 7, 22, 5, 9, 2])
  ]
  if reduction == 'token':
    expected = np.concatenate(losses).mean()
  elif reduction == 'sample':
    expected = np.mean([loss.mean() for loss in losses])
  else:  # four groups of two conversations
    pairs = zip(losses[::2], losses[1::2], strict=True)
    expected = np.mean([np.concatenate(pair).mean() for pair in pairs])
  np.testing.assert_allclose(
    weighted_mean(losses, reduction, 4), expected, rtol=WEIGHT_TOLERANCE
  )


def test_the_three_reductions_are_three_means():
  losses = [np.zeros(1), np.ones(3), np.full(5, 2.0), np.full(7, 4.0)]
  means = {
    round(weighted_mean(losses, reduction, 2), 4)
    for reduction in ('token', 'sample', 'mixed')
  }
  assert len(means) == 3


@pytest.mark.parametrize('reduction', ['token', 'sample', 'mixed'])
def test_a_batch_holds_the_weights_of_its_reduction(datasets, reduction):
  pipeline = Pipeline(make_config(reduction), *datasets, RowShards.whole(2))
  batch = pipeline.build(0).batch.generative
  sums = {
    'token': pipeline.plan.generative_step(0).loss_tokens.sum(),
    'sample': 8,  # one a conversation
    'mixed': 4,  # one a group
  }
  np.testing.assert_allclose(
    batch.loss_weights.sum(dtype=np.float64),
    sums[reduction],
    rtol=WEIGHT_TOLERANCE,
  )


def test_useful_and_computed_tokens_are_counted(pipeline):
  for step in range(STEPS):
    host = pipeline.build(step)
    streams = (host.batch.embedding, host.batch.generative)
    useful = sum((stream.rows.segments > 0).sum() for stream in streams)
    assert host.useful_tokens == useful
    computed = sum(stream.rows.tokens.size for stream in streams)
    assert host.computed_tokens == computed


def test_computed_tokens_with_chunks_are_those_of_the_chunks_in_use(chunked):
  idle = 0
  for step in range(STEPS):
    host = chunked.build(step)
    streams = (host.batch.embedding, host.batch.generative)
    used = sum(int(stream.chunks) for stream in streams)
    assert host.computed_tokens == used * CHUNK * ROW
    idle += sum(len(stream.rows.tokens) for stream in streams) - used
    useful = sum((stream.rows.segments > 0).sum() for stream in streams)
    assert host.useful_tokens == useful
  assert idle  # some step has chunks that it does not compute


def test_every_step_has_the_shape_of_a_bucket(pipeline):
  assert 1 <= len(pipeline.buckets) <= 2
  for step in range(STEPS):
    batch = pipeline.build(step).batch
    shapes = [s.rows.tokens.shape for s in (batch.embedding, batch.generative)]
    assert tuple(rows for rows, _ in shapes) in pipeline.buckets
    assert all(rows % 2 == 0 and length == ROW for rows, length in shapes)


def test_chunks_hold_the_rows_of_the_one_pass_batch(pipeline, chunked):
  for step in range(STEPS):
    one, other = (p.build(step).batch for p in (pipeline, chunked))
    for stream in ('embedding', 'generative'):
      x, y = getattr(one, stream), getattr(other, stream)
      rows = getattr(pipeline.plan, f'{stream}_step')(step).packing.num_rows
      assert int(x.chunks) == 0
      assert int(y.chunks) == -(-rows // CHUNK)
      assert y.rows.tokens.shape[1:] == (CHUNK, ROW)
      for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        name = path[-1].name
        inside = y.rows if hasattr(y.rows, name) else y
        found = getattr(inside, name)
        if found.ndim == 3:
          flat = found.reshape(-1, ROW)
          np.testing.assert_array_equal(flat[:rows], leaf[:rows], err_msg=name)
          assert not flat[rows:].any() and not leaf[rows:].any(), name
        elif name != 'chunks':
          np.testing.assert_array_equal(found, leaf, err_msg=name)


def test_all_steps_have_one_shape_with_chunks(chunked):
  shapes = {
    str(jax.tree.map(np.shape, chunked.build(step).batch))
    for step in range(STEPS)
  }
  assert len(shapes) == 1


@pytest.mark.parametrize('chunk_rows', [0, CHUNK])
@pytest.mark.parametrize('absent', ['embedding', 'generative'])
def test_a_stream_without_data_is_absent(datasets, absent, chunk_rows):
  embedding, generative = datasets
  if absent == 'embedding':
    embedding = []
  else:
    generative = []
  config = make_config(chunk_rows=chunk_rows)
  pipeline = Pipeline(config, embedding, generative, RowShards.whole(2))
  host = pipeline.build(0)
  assert getattr(host.batch, absent) is None
  present = 'generative' if absent == 'embedding' else 'embedding'
  stream = getattr(host.batch, present)
  assert host.useful_tokens == (stream.rows.segments > 0).sum()
  chunks = int(stream.chunks)
  computed = chunks * CHUNK * ROW if chunk_rows else stream.rows.tokens.size
  assert host.computed_tokens == computed


def test_the_iterator_gives_every_step_once_in_order(pipeline):
  batches = list(pipeline.iterate())
  assert len(batches) == STEPS
  for step, host in enumerate(batches):
    assert_equal_batches(host.batch, pipeline.build(step).batch)


@pytest.mark.parametrize('done', [0, 1, 4])
def test_an_iterator_goes_on_from_the_state_of_another(datasets, done):
  one = Pipeline(make_config(), *datasets, RowShards.whole(2)).iterate()
  for _ in range(done):
    next(one)
  state = json.loads(json.dumps(one.get_state()))  # as in a checkpoint
  other = Pipeline(make_config(), *datasets, RowShards.whole(2)).iterate()
  next(other)
  other.set_state(state)
  rest, found = list(one), list(other)
  assert len(rest) == len(found) == STEPS - done
  for x, y in zip(rest, found, strict=True):
    assert_equal_batches(x.batch, y.batch)


@pytest.mark.parametrize('chunk_rows', [0, 8])
def test_rows_are_split_over_devices_and_slots_are_everywhere(
  datasets, mesh_of, chunk_rows
):
  mesh = mesh_of(2, 2, 2)
  config = make_config(chunk_rows=chunk_rows)
  batch = Pipeline(config, *datasets, RowShards.whole(4)).build(0).batch
  placed = place_batch(mesh, batch)
  assert_equal_batches(jax.tree.map(np.asarray, placed), batch)
  axis = 1 if chunk_rows else 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
    name = path[-1].name
    assert leaf.sharding.mesh == mesh
    shards = {shard.data.shape for shard in leaf.addressable_shards}
    if name in ('query_slots', 'passage_slots', 'scored', 'chunks'):
      assert leaf.is_fully_replicated, name
      continue
    expected = list(leaf.shape)
    expected[axis] //= 4  # data and fsdp split rows, tensor does not
    assert shards == {tuple(expected)}, name
    assert len(leaf.sharding.device_set) == 8, name


def take_shards(x: np.ndarray, axis: int, own: tuple[int, ...]) -> np.ndarray:
  """The rows of some of four shards of a global array."""
  return np.concatenate([np.split(x, 4, axis)[i] for i in own], axis)


@pytest.mark.parametrize('chunk_rows', [0, 4])
@pytest.mark.parametrize(
  'hosts', [((0, 1), (2, 3)), ((1, 3), (0, 2)), ((0,), (1,), (2,), (3,))]
)
def test_hosts_build_the_rows_of_one_global_batch(datasets, hosts, chunk_rows):
  config = make_config(chunk_rows=chunk_rows)
  whole = Pipeline(config, *datasets, RowShards.whole(4))
  parts = [Pipeline(config, *datasets, RowShards(4, own)) for own in hosts]
  for step in range(STEPS):
    expected = whole.build(step)
    for own, part in zip(hosts, parts, strict=True):
      found = part.build(step)
      assert found.useful_tokens == expected.useful_tokens
      assert found.computed_tokens == expected.computed_tokens
      leaves = jax.tree_util.tree_leaves_with_path(expected.batch)
      for (path, x), y in zip(
        leaves, jax.tree.leaves(found.batch), strict=True
      ):
        name = path[-1].name
        if name not in ('query_slots', 'passage_slots', 'scored', 'chunks'):
          x = take_shards(x, x.ndim - 2, own)
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_a_host_reads_no_record_without_a_text_in_its_rows(
  datasets, monkeypatch
):
  pipeline = Pipeline(make_config(), *datasets, RowShards(4, (2,)))
  reads = []
  for kind in EmbeddingDataset, GenerativeDataset:
    read = kind.read

    def count(self, indices, read=read):
      reads.extend((self.name, int(index)) for index in indices)
      return read(self, indices)

    monkeypatch.setattr(kind, 'read', count)
  fewer = 0
  for step in range(STEPS):
    reads.clear()
    batch = pipeline.build(step).batch
    expected = set()
    for stream, sets, rows in (
      ('embedding', datasets[0], batch.embedding.rows),
      ('generative', datasets[1], batch.generative.rows),
    ):
      plan = getattr(pipeline.plan, f'{stream}_step')(step)
      size = len(rows.tokens)
      texts = np.flatnonzero(plan.packing.rows // size == 2)
      places = texts // (plan.lengths.size // len(plan.records))
      expected |= {
        (sets[plan.datasets[i]].name, int(plan.records[i])) for i in places
      }
    assert sorted(reads) == sorted(expected)  # and each of them once
    fewer += len(expected) < 6 + 8
  assert fewer == STEPS


def test_a_step_that_was_not_counted_gets_a_shape_that_holds_it(
  datasets, monkeypatch
):
  monkeypatch.setattr('grit_jax.data.pipeline.COUNTED_STEPS', 1)
  config = make_config()
  sampled = Pipeline(config, *datasets, RowShards.whole(2))
  assert len(sampled.buckets) == 1
  counts = np.array([sampled._count_rows(step) for step in range(STEPS)])
  beyond = (counts > sampled.buckets[0]).any(axis=1)
  assert beyond.any()
  for step in range(STEPS):
    batch = sampled.build(step).batch
    shape = (
      len(batch.embedding.rows.tokens),
      len(batch.generative.loss_weights),
    )
    assert all(rows % 2 == 0 for rows in shape)
    if beyond[step]:
      assert shape == tuple(-(-counts[step] // 2) * 2)
    else:
      assert shape == sampled.buckets[0]
