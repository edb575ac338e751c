"""Tests of grit_jax/data/plan.py."""

import dataclasses
import json

import numpy as np
import pytest

from grit_jax.config import Config, DataConfig
from grit_jax.data.dataset import EmbeddingDataset, GenerativeDataset, prepare
from grit_jax.data.plan import EmbeddingPlan, GenerativePlan, Plan
from grit_jax.data.sources import TRAIN, sources
from grit_jax.errors import ConfigError

# Records of each embedding data set. A batch of 8 leaves 3, 1 and 6 over: ten
# make one more batch of several data sets, and 2 sit the epoch out.
SIZES = {'a': 19, 'b': 9, 'c': 14}
CONVERSATIONS = {'x': 11, 'y': 6}
BATCH, PASSAGES, ROW = 8, 3, 64
EPOCH = 5  # batches: 42 // 8

Datasets = tuple[list[EmbeddingDataset], list[GenerativeDataset]]


@pytest.fixture(scope='module')
def datasets(tmp_path_factory, tokenizer) -> Datasets:
  """Three data sets of records and two of conversations."""
  folder = tmp_path_factory.mktemp('plan')
  rng = np.random.default_rng(0)

  def words() -> str:
    return ' '.join(['word'] * int(rng.integers(1, 8)))

  for name, size in SIZES.items():
    records = [
      {
        'query': ['find', f'{name} {i} {words()}'],
        'pos': [['', words()] for _ in range(1 + i % 3)],
        'neg': [['', words()] for _ in range(PASSAGES - 1 + i % 4)],
      }
      for i in range(size)
    ]
    lines = [json.dumps(record) + '\n' for record in records]
    (folder / f'{name}.jsonl').write_text(''.join(lines))
  for name, size in CONVERSATIONS.items():
    lines = [json.dumps({'text': [words(), words()]}) for _ in range(size)]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
  made = [
    prepare(
      source,
      TRAIN,
      tokenizer,
      folder / 'prepared',
      max_query_tokens=ROW,
      max_passage_tokens=ROW,
      max_generative_tokens=ROW,
      min_negatives=PASSAGES - 1,
      held_out_fraction=0.0,
    )
    for source in sources(str(folder))
  ]
  embedding = [one for one in made if isinstance(one, EmbeddingDataset)]
  return embedding, [one for one in made if one not in embedding]


def make_plan(datasets: Datasets, seed: int = 0, **data) -> Plan:
  config = DataConfig(
    embedding_batch=BATCH,
    generative_batch=4,
    num_passages=PASSAGES,
    row_length=ROW,
    max_segments=8,
  )
  config = dataclasses.replace(config, **data)
  return Plan(Config(data=config, seed=seed), *datasets)


def assert_same(
  one: EmbeddingPlan | GenerativePlan, other: EmbeddingPlan | GenerativePlan
) -> None:
  one, other = dataclasses.asdict(one), dataclasses.asdict(other)
  one |= one.pop('packing')
  other |= other.pop('packing')
  for name, values in one.items():
    np.testing.assert_array_equal(values, other[name], err_msg=name)


def keys_of(plan: EmbeddingPlan | GenerativePlan) -> list[tuple[int, int]]:
  """The data set and record of each place."""
  return list(zip(plan.datasets.tolist(), plan.records.tolist(), strict=True))


def epoch_of(plan: Plan, epoch: int) -> list[list[tuple[int, int]]]:
  steps = range(epoch * EPOCH, (epoch + 1) * EPOCH)
  return [keys_of(plan.embedding_step(step)) for step in steps]


def test_a_step_depends_on_the_seed_and_the_step_alone(datasets):
  one, other = make_plan(datasets), make_plan(datasets)
  forward = [
    (one.embedding_step(step), one.generative_step(step)) for step in range(12)
  ]
  for step in reversed(range(12)):  # asked in another order, over epochs
    embedding, generative = forward[step]
    assert_same(embedding, other.embedding_step(step))
    assert_same(generative, other.generative_step(step))


def test_another_seed_gives_other_records_and_other_passages(datasets):
  one, other = make_plan(datasets), make_plan(datasets, seed=1)
  assert epoch_of(one, 0) != epoch_of(other, 0)
  assert [keys_of(one.generative_step(step)) for step in range(4)] != [
    keys_of(other.generative_step(step)) for step in range(4)
  ]
  # Of the same records, too: the draw of passages has a seed of its own.
  other.embedding_order = one.embedding_order
  for step in range(EPOCH):
    a, b = one.embedding_step(step), other.embedding_step(step)
    assert keys_of(a) == keys_of(b)
    assert (a.texts != b.texts).any()


def test_a_record_comes_with_other_passages_in_another_step(
  datasets, monkeypatch
):
  plan = make_plan(datasets)
  same = plan.embedding_order.records(0)
  monkeypatch.setattr(plan.embedding_order, 'records', lambda step: same)
  one, other = plan.embedding_step(0), plan.embedding_step(1)
  assert keys_of(one) == keys_of(other)
  assert (one.texts != other.texts).any()


def test_an_epoch_takes_every_record_once_but_those_left_out(datasets):
  plan = make_plan(datasets)
  total = sum(SIZES.values())
  assert plan.embedding_order.batches_per_epoch == EPOCH
  assert plan.embedding_order.left_out_per_epoch == total - EPOCH * BATCH
  names = list(SIZES)
  for epoch in range(3):
    taken = [key for batch in epoch_of(plan, epoch) for key in batch]
    assert len(taken) == len(set(taken)) == EPOCH * BATCH
    assert all(0 <= record < SIZES[names[which]] for which, record in taken)


def test_an_epoch_takes_every_conversation_once_but_those_left_out(datasets):
  plan = make_plan(datasets)
  total = sum(CONVERSATIONS.values())
  order = plan.generative_order
  assert (order.batches_per_epoch, order.left_out_per_epoch) == (4, 1)
  for epoch in range(3):
    steps = range(4 * epoch, 4 * epoch + 4)
    taken = [key for s in steps for key in keys_of(plan.generative_step(s))]
    assert len(taken) == len(set(taken)) == total - 1
    assert {which for which, _ in taken} == {0, 1}


def test_batches_are_of_one_data_set_but_for_the_leftover_ones(datasets):
  plan = make_plan(datasets)
  for epoch in range(3):
    kinds = [{key[0] for key in batch} for batch in epoch_of(plan, epoch)]
    whole = sorted(min(kind) for kind in kinds if len(kind) == 1)
    assert whole == [0, 0, 1, 2]  # 19 // 8, 9 // 8 and 14 // 8 batches
    assert sum(len(kind) > 1 for kind in kinds) == 1


def test_epochs_differ_in_the_order_of_records_and_of_batches(datasets):
  plan = make_plan(datasets)
  epochs = [epoch_of(plan, epoch) for epoch in range(4)]
  assert len({str(epoch) for epoch in epochs}) == 4
  orders = {
    tuple(batch[0][0] if len({k[0] for k in batch}) == 1 else -1 for batch in e)
    for e in epochs
  }
  assert len(orders) > 1
  # Batches of other records, not the same ones in another order.
  groups = [{frozenset(batch) for batch in epoch} for epoch in epochs]
  assert not groups[0] & groups[1]


def test_who_sits_out_changes_with_the_epoch(datasets):
  plan = make_plan(datasets)
  taken = [
    frozenset(key for batch in epoch_of(plan, epoch) for key in batch)
    for epoch in range(6)
  ]
  assert len(set(taken)) > 1
  assert len(frozenset.union(*taken)) == sum(SIZES.values())


def test_passages_are_one_positive_and_negatives_without_repetition(datasets):
  plan = make_plan(datasets)
  positives_seen, negatives_seen = set(), set()
  for step in range(4 * EPOCH):
    planned = plan.embedding_step(step)
    assert planned.texts.shape == (BATCH, 1 + PASSAGES)
    for (which, record), texts in zip(
      keys_of(planned), planned.texts.tolist(), strict=True
    ):
      dataset = datasets[0][which]
      positives = int(dataset.num_positives[record])
      count = int(np.diff(dataset.offsets[record : record + 2])[0])
      query, positive, *negatives = texts
      assert query == 0
      assert 1 <= positive <= positives
      assert all(positives < text < count for text in negatives)
      assert len(set(negatives)) == PASSAGES - 1
      positives_seen.add((positives, positive))
      many = count - 1 - positives
      negatives_seen |= {(many, text - positives) for text in negatives}
  # Every positive and every negative has its turn, the last one too.
  for seen, counts in ((positives_seen, (1, 2, 3)), (negatives_seen, (2, 5))):
    for many in counts:
      assert {(many, one) for one in range(1, many + 1)} <= seen


def test_lengths_and_loss_tokens_are_those_of_the_texts(datasets):
  plan = make_plan(datasets)
  embedding, generative = plan.embedding_step(1), plan.generative_step(1)
  for place, (which, record) in enumerate(keys_of(embedding)):
    [texts] = datasets[0][which].read([record])
    expected = [len(texts[text].ids) for text in embedding.texts[place]]
    assert embedding.lengths[place].tolist() == expected
  for place, (which, record) in enumerate(keys_of(generative)):
    [text] = datasets[1][which].read([record])
    assert generative.lengths[place] == len(text.ids)
    assert generative.loss_tokens[place] == text.in_loss.sum()


def test_all_texts_of_a_step_are_packed(datasets):
  plan = make_plan(datasets)
  for planned in (plan.embedding_step(0), plan.generative_step(0)):
    assert planned.packing.rows.shape == (planned.lengths.size,)
    ends = planned.packing.offsets + planned.lengths.reshape(-1)
    assert ends.max() <= ROW
    assert planned.packing.rows.max() == planned.packing.num_rows - 1


def test_one_passage_a_query_needs_no_negatives(datasets):
  plan = make_plan(datasets, num_passages=1)
  assert plan.embedding_step(0).texts.shape == (BATCH, 2)


@pytest.mark.parametrize('key', ['embedding_batch', 'generative_batch'])
def test_a_batch_larger_than_the_data_is_refused_by_its_key(datasets, key):
  size = sum((SIZES if key == 'embedding_batch' else CONVERSATIONS).values())
  make_plan(datasets, **{key: size})  # all of it is a batch
  with pytest.raises(ConfigError, match=rf'data\.{key}={size + 1}.*{size}'):
    make_plan(datasets, **{key: size + 1})


def test_an_epoch_takes_as_many_records_as_weights_and_caps_say(datasets):
  plan = make_plan(
    datasets,
    weights='a=2,b=0.52,y=0',
    caps='a=30,c=4,x=99',
    generative_batch=2,
  )
  assert plan.embedding_order.takes == [30, 5, 4]  # 38 capped, 4.68, 14 capped
  assert plan.generative_order.takes == [11, 0]
  # 3 batches of `a` alone, and one of the 6 left of it and of b and c.
  order = plan.embedding_order
  assert (order.batches_per_epoch, order.left_out_per_epoch) == (4, 7)
  seen = set()
  for step in range(40):
    keys = keys_of(plan.embedding_step(step))
    assert len(set(keys)) == BATCH
    seen |= set(keys)
    assert (plan.generative_step(step).datasets == 0).all()
  # What an epoch does not take, another does.
  assert len(seen) == sum(SIZES.values())
  assert plan.generative_order.batches_per_epoch == 5


def test_data_sets_left_out_are_named(datasets, caplog):
  with caplog.at_level('INFO'):
    make_plan(datasets, weights='y=0')
  assert 'y: an epoch takes 0 of its 6 records; the data set is left out' in (
    caplog.text
  )
  assert 'a: an epoch' not in caplog.text
  caplog.clear()
  with caplog.at_level('INFO'):
    make_plan(datasets, mixing='none', embedding_batch=10)
  assert 'b: 9 different records an epoch are no batch of 10' in caplog.text
  assert caplog.text.count('never used') == 1


@pytest.mark.parametrize('key', ['weights', 'caps'])
def test_a_number_for_an_unknown_data_set_is_refused(datasets, key):
  make_plan(datasets, **{key: 'a=2,x=3'})
  message = f"data.{key}='a=2,z=1': 'z' is none of .*: a, b, c, x, y"
  with pytest.raises(ConfigError, match=message):
    make_plan(datasets, **{key: 'a=2,z=1'})


@pytest.mark.parametrize('mixing', ['none', 'all'])
def test_batches_mix_data_sets_as_configured(datasets, mixing):
  plan = make_plan(datasets, mixing=mixing)
  count = {'none': 4, 'all': 5}[mixing]
  assert plan.embedding_order.batches_per_epoch == count
  assert plan.embedding_order.left_out_per_epoch == 42 - count * BATCH
  kinds = [set(plan.embedding_step(s).datasets.tolist()) for s in range(20)]
  assert {len(kind) for kind in kinds} == ({1} if mixing == 'none' else {2, 3})
  # Conversations mix in any case.
  assert any(len(set(plan.generative_step(s).datasets)) > 1 for s in range(4))


def test_fixed_negatives_are_the_first_of_the_record(datasets):
  plan = make_plan(datasets, hard_negatives='fixed')
  positives = set()
  for step in range(2 * EPOCH):
    planned = plan.embedding_step(step)
    for (which, record), texts in zip(
      keys_of(planned), planned.texts.tolist(), strict=True
    ):
      count = int(datasets[0][which].num_positives[record])
      assert texts[2:] == [1 + count, 2 + count]
      positives.add((count, texts[1]))
  assert {(3, 1), (3, 2), (3, 3)} <= positives


def scored_one_by_one(
  plan: Plan, step: int, datasets: list[EmbeddingDataset], negatives: str
) -> np.ndarray:
  """What each query is compared with, from the texts as they are read."""
  planned = plan.embedding_step(step)
  read = []
  for which, record in keys_of(planned):
    [texts] = datasets[which].read([record])
    texts = [tuple(text.ids[text.instruction_length :]) for text in texts]
    read.append((texts, int(datasets[which].num_positives[record])))
  scored = []
  for place, (texts, count) in enumerate(read):
    row = []
    for other, (passages, _) in enumerate(read):
      for number, text in enumerate(planned.texts[other, 1:]):
        right = passages[text] in texts[1 : 1 + count]
        own = other == place
        compared = not right and (own or negatives != 'hard')
        row.append(compared or (own and number == 0))
    scored.append(row)
  return np.array(scored)


@pytest.mark.parametrize(
  ('negatives', 'passages', 'mixing'),
  [('all', 3, 'leftovers'), ('hard', 3, 'none'), ('in_batch', 1, 'all')],
)
def test_queries_are_compared_with_all_but_their_known_positives(
  datasets, negatives, passages, mixing
):
  plan = make_plan(
    datasets, negatives=negatives, num_passages=passages, mixing=mixing
  )
  data = plan.config.data
  masked = 0
  for step in range(4):
    scored = plan.scored(plan.embedding_step(step))
    expected = scored_one_by_one(plan, step, datasets[0], negatives)
    np.testing.assert_array_equal(scored, expected)
    masked += data.compared_pairs - scored.sum()
  assert masked > 0
  # As in the reference.
  plan = make_plan(
    datasets,
    negatives=negatives,
    num_passages=passages,
    mixing=mixing,
    mask_known_positives=False,
  )
  for step in range(4):
    scored = plan.scored(plan.embedding_step(step))
    assert scored.sum() == data.compared_pairs


@pytest.mark.parametrize('hard_negatives', ['sampled', 'fixed'])
@pytest.mark.parametrize('passages', [1, PASSAGES])
def test_records_are_ordered_by_the_tokens_they_have_on_average(
  datasets, hard_negatives, passages, monkeypatch
):
  monkeypatch.setattr('grit_jax.data.plan._CHUNK', 4)
  plan = make_plan(
    datasets, hard_negatives=hard_negatives, num_passages=passages
  )
  expected = []
  for dataset in datasets[0]:
    for record in range(len(dataset)):
      [texts] = dataset.read([record])
      query, *others = [len(text.ids) for text in texts]
      count = int(dataset.num_positives[record])
      negatives = others[count:]
      if hard_negatives == 'fixed':
        negatives = negatives[: passages - 1]
      mean = query + np.mean(others[:count])
      if passages > 1:
        mean += (passages - 1) * np.mean(negatives)
      expected.append(mean)
  # They are kept as whole numbers.
  np.testing.assert_allclose(plan.embedding_order.lengths, expected, atol=0.5)


def test_a_stream_without_data_has_no_plan(datasets):
  embedding, generative = datasets
  assert make_plan(([], generative)).embedding_step(0) is None
  assert make_plan((embedding, [])).generative_step(0) is None


def test_records_are_named_by_file_and_line(datasets):
  plan = make_plan(datasets)
  names = plan.describe_records(2)
  planned = [plan.embedding_step(2), plan.generative_step(2)]
  expected = [
    (name, record + 1)  # lines count from 1
    for kind, one in zip((SIZES, CONVERSATIONS), planned, strict=True)
    for which, record in keys_of(one)
    for name in [list(kind)[which]]
  ]
  assert len(names) == BATCH + 4
  for name, (file, line) in zip(names, expected, strict=True):
    assert name.endswith(f'/{file}.jsonl:{line}'), name
