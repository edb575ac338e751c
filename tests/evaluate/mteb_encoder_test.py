"""MTEB's runner gives our embeddings the scores that it gives PyTorch's."""

import json
import pathlib

import numpy as np
import pytest

from grit_jax.errors import UserError
from grit_jax.evaluate import __main__ as command
from grit_jax.inference.gritlm import GritLM

pytestmark = pytest.mark.e2e

# Scores of embeddings that agree within 1e-5, of two float32 programs.
TOLERANCE = 1e-4
# The embeddings themselves, whose numbers are of size 1.
EMBEDDING_TOLERANCE = 1e-4

SUBJECTS = ['cats', 'a compiler', 'rain', 'the parser', 'bread', 'a matrix']
DEFAULT = 'Retrieve semantically similar text.'
# What each task's texts have to be told, of queries and of documents.
EXPECTED = {
  'LocalRetrieval': ('Given a question, find its answer', ''),
  'LocalSTS': (DEFAULT, None),
  'LocalClassification': ('Classify what a text is about', None),
}


# Fixtures: importing mteb takes seconds, which collecting tests need not.


@pytest.fixture(scope='module')
def mteb():
  return pytest.importorskip('mteb')


@pytest.fixture(scope='module')
def mteb_encoder(mteb):
  from grit_jax.evaluate import mteb_encoder

  return mteb_encoder


def describe(mteb, name: str, kind: str, score: str, prompt=None):
  return mteb.TaskMetadata(
    name=name,
    type=kind,
    main_score=score,
    description='On the disk.',
    dataset={'path': 'none', 'revision': 'none'},
    eval_splits=['test'],
    eval_langs=['eng-Latn'],
    prompt=prompt,
  )


@pytest.fixture(scope='module')
def tasks(tmp_path_factory, mteb) -> list:
  """A task of retrieval, of similarity and of classification, from files."""
  import datasets
  from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
  )

  folder = tmp_path_factory.mktemp('tasks')

  def write(name: str, rows: list[dict]) -> str:
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)

  def read(path: str):
    with open(path) as file:
      return datasets.Dataset.from_list([json.loads(line) for line in file])

  corpus = write(
    'corpus',
    [
      {'id': f'd{i}', 'title': f'About {s}', 'text': f'{s} are {i} things'}
      for i, s in enumerate(SUBJECTS)
    ],
  )
  queries = write(
    'queries',
    [{'id': f'q{i}', 'text': f'what are {s}?'} for i, s in enumerate(SUBJECTS)],
  )
  similar = write(
    'similar',
    [
      {'sentence1': s, 'sentence2': f'{t}, more or less', 'score': float(i % 4)}
      for i, (s, t) in enumerate(zip(SUBJECTS, SUBJECTS[1:], strict=False))
    ],
  )
  labelled = write(
    'labelled',
    [
      {'text': f'{s} and {other}', 'label': i % 2}
      for i, s in enumerate(SUBJECTS)
      for other in SUBJECTS
    ],
  )

  class LocalRetrieval(AbsTaskRetrieval):
    metadata = describe(
      mteb,
      'LocalRetrieval',
      'Retrieval',
      'ndcg_at_10',
      {'query': EXPECTED['LocalRetrieval'][0]},
    )

    def load_data(self, **_) -> None:
      self.dataset = {
        'default': {
          'test': {
            'corpus': read(corpus),
            'queries': read(queries),
            'relevant_docs': {
              f'q{i}': {f'd{i}': 1} for i in range(len(SUBJECTS))
            },
            'top_ranked': None,
          }
        }
      }
      self.data_loaded = True

  class LocalSTS(AbsTaskSTS):
    metadata = describe(mteb, 'LocalSTS', 'STS', 'cosine_pearson')

    def load_data(self, **_) -> None:
      self.dataset = datasets.DatasetDict(test=read(similar))
      self.data_loaded = True

  class LocalClassification(AbsTaskClassification):
    metadata = describe(
      mteb,
      'LocalClassification',
      'Classification',
      'accuracy',
      EXPECTED['LocalClassification'][0],
    )
    n_experiments = 2
    samples_per_label = 4

    def load_data(self, **_) -> None:
      rows = read(labelled)
      self.dataset = datasets.DatasetDict(train=rows, test=rows)
      self.data_loaded = True

  return [LocalRetrieval(), LocalSTS(), LocalClassification()]


@pytest.fixture(scope='module')
def reference(exported: pathlib.Path):
  """The PyTorch package, told what `EXPECTED` says."""
  gritlm = pytest.importorskip('gritlm')
  from mteb.models.abs_encoder import AbsEncoder
  from mteb.models.model_meta import ModelMeta

  class Reference(AbsEncoder):
    model = gritlm.GritLM(
      str(exported), mode='embedding', normalized=False, torch_dtype='float32'
    )
    mteb_model_meta = ModelMeta.create_empty({'name': 'a/b'})

    def encode(self, inputs, *, task_metadata, prompt_type=None, **_):
      told = EXPECTED[task_metadata.name][prompt_type == 'document']
      return self.model.encode(
        [text for batch in inputs for text in batch['text']],
        instruction=f'<|user|>\n{told}\n<|embed|>\n' if told else '<|embed|>\n',
        max_length=64,
      )

  return Reference()


class Recorder:
  """Passes on to a model, and keeps what it was asked and what it said."""

  def __init__(self, encoder):
    self.encoder, self.calls = encoder, []

  def __getattr__(self, name: str):
    return getattr(self.encoder, name)

  def encode(self, inputs, *, task_metadata, prompt_type=None, **rest):
    found = self.encoder.encode(
      inputs, task_metadata=task_metadata, prompt_type=prompt_type, **rest
    )
    self.calls.append((task_metadata.name, prompt_type, found))
    return found


@pytest.fixture(scope='module')
def model(random_run: pathlib.Path) -> GritLM:
  return GritLM.load(random_run)


def test_scores_are_those_of_pytorch(
  tasks, mteb_encoder, model, reference, tmp_path
):
  ours = Recorder(mteb_encoder.Encoder(model, 'run', max_length=64))
  theirs = Recorder(reference)
  found = mteb_encoder.evaluate(ours, tasks, tmp_path / 'ours', batch_size=4)
  expected = mteb_encoder.evaluate(theirs, tasks, tmp_path / 'theirs')
  assert found.keys() == expected.keys() == EXPECTED.keys()
  for name, (kind, score) in found.items():
    assert kind == expected[name][0]
    assert abs(score - expected[name][1]) < TOLERANCE
    assert 0 < abs(score) < 1
  assert [call[:2] for call in ours.calls] == [c[:2] for c in theirs.calls]
  for (_, _, one), (_, _, other) in zip(ours.calls, theirs.calls, strict=True):
    np.testing.assert_allclose(one, other, atol=EMBEDDING_TOLERANCE)


def test_finished_tasks_are_not_run_again(tasks, mteb_encoder, model, tmp_path):
  first = Recorder(mteb_encoder.Encoder(model, 'run', max_length=64))
  before = mteb_encoder.evaluate(first, tasks[:2], tmp_path)
  files = sorted(
    path.relative_to(tmp_path)
    for path in tmp_path.rglob('*.json')
    if path.name.startswith('Local')
  )
  revision = first.mteb_model_meta.revision
  place = pathlib.Path('results', 'grit_jax__run', revision)
  assert files == [place / 'LocalRetrieval.json', place / 'LocalSTS.json']
  again = Recorder(mteb_encoder.Encoder(model, 'run', max_length=64))
  after = mteb_encoder.evaluate(again, tasks, tmp_path)
  assert {name for name, _, _ in again.calls} == {'LocalClassification'}
  for name, (kind, score) in before.items():
    # mteb's files have six digits.
    assert after[name] == (kind, pytest.approx(score, abs=1e-6))
  # Of another length, they would not be the same.
  other = mteb_encoder.Encoder(model, 'run', max_length=8)
  assert other.mteb_model_meta.revision != revision


@pytest.mark.parametrize(
  'name, queries, documents',
  [
    ('Banking77Classification', 'Given a online banking query, find the '
     'corresponding intents', None),
    ('ArxivClusteringS2S', 'Identify the main and secondary category of Arxiv '
     'papers based on the titles', None),
    ('TwitterURLCorpus', 'Retrieve tweets that are semantically similar to the '
     'given tweet', None),
    ('AskUbuntuDupQuestions', 'Retrieve duplicate questions from AskUbuntu '
     'forum', 'Retrieve duplicate questions from AskUbuntu forum'),
    ('NQ', 'Given a question, retrieve Wikipedia passages that answer the '
     'question', ''),
    ('CQADupstackTexRetrieval', 'Given a question, retrieve detailed question '
     'descriptions from Stackexchange that are duplicates to the given '
     'question', ''),
    ('STS17', DEFAULT, None),
    ('SummEval', 'Given a news summary, retrieve other semantically similar '
     'summaries', None),
  ],
)  # fmt: skip
def test_instructions_are_the_papers(
  mteb, mteb_encoder, model, name, queries, documents
):
  from mteb.types import PromptType

  encoder = mteb_encoder.Encoder(model, 'run')
  metadata = mteb.get_task(name).metadata
  for kind, expected in (
    (None if documents is None else PromptType.query, queries),
    (PromptType.document, documents),
  ):
    if expected is not None:
      assert encoder.choose_instruction(metadata, kind) == expected


def test_all_of_the_papers_tasks_are_found(mteb_encoder):
  tasks = mteb_encoder.find_tasks('MTEB(eng, v1),NQ,LitSearchRetrieval')
  assert len(tasks) == 56 + 1
  with pytest.raises(UserError, match="'NQQ'.*Did you mean: 'NQ'"):
    mteb_encoder.find_tasks('STS17,NQQ')


def test_command_prints_scores_and_names_mistakes(
  mteb, tasks, random_run, tmp_path, monkeypatch, capsys
):
  find = mteb.get_task
  local = {task.metadata.name: task for task in tasks}
  monkeypatch.setattr(
    mteb, 'get_task', lambda name, **rest: local.get(name) or find(name, **rest)
  )

  def run(names: str, model: pathlib.Path = random_run) -> None:
    flags = command.make_parser().parse_args(
      [
        'mteb', f'--model={model}', f'--tasks={names}',
        f'--output={tmp_path}', '--max_length=64', '--mesh=data=4,fsdp=-1',
      ]
    )  # fmt: skip
    command.evaluate(flags)

  run('LocalSTS,LocalRetrieval')
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[:2] for line in lines] == [
    ['Retrieval', 'LocalRetrieval'], ['STS', 'LocalSTS'],
    ['Retrieval', 'mean'], ['STS', 'mean'], ['all', 'mean'],
  ]  # fmt: skip
  with pytest.raises(UserError, match="no task or benchmark 'Nothing'"):
    run('Nothing')
  with pytest.raises(UserError, match='missing'):
    run('LocalSTS', tmp_path / 'missing')
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
  with pytest.raises(UserError, match='where there is no network'):
    run('BIOSSES')
