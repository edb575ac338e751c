"""lm-eval's runner gives our model the scores that it gives transformers'."""

import collections
import functools
import importlib.util
import json
import pathlib

import numpy as np
import pytest

lm_eval = pytest.importorskip('lm_eval')

from lm_eval import tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from grit_jax.errors import UserError  # noqa: E402
from grit_jax.evaluate import __main__ as command  # noqa: E402
from grit_jax.evaluate import generative_tasks  # noqa: E402
from grit_jax.evaluate.generative_tasks import PAPER, PaperTask  # noqa: E402
from grit_jax.evaluate.lm_eval_model import (  # noqa: E402
  LanguageModel,
  make_sampling,
)
from grit_jax.inference.gritlm import GritLM  # noqa: E402

pytestmark = pytest.mark.e2e

# Sums of up to 400 log-probabilities of two float32 programs.
TOLERANCE = 1e-3

CHAT = [
  {'role': 'user', 'content': 'Which letter? '},
  {'role': 'assistant', 'content': ' A'},
  {'role': 'user', 'content': 'And now?\nA, B'},
]
CONTEXTS = [
  'Question: which letter?\nAnswer:',
  '<s><|user|>\nWhat is it?\n<|assistant|>\n',
  'a blank at the end ',
  '',
  'too long ' * 30,
]
CONTINUATIONS = [' A', ' a longer answer', 'yes']

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/{data}.jsonl
    test: {folder}/{data}.jsonl
test_split: test
fewshot_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
"""


@pytest.fixture(scope='module')
def task_folder(tmp_path_factory) -> pathlib.Path:
  """Tasks of each kind, with data on the disk."""
  folder = tmp_path_factory.mktemp('tasks')
  letters = 'ABCD'
  rows = [
    {
      'question': f'{i}?\nA. {i}\nB. {i + 1}\nAnswer:',
      'choices': [letters[i % 4], letters[(i + 1) % 4], 'neither of both'],
      'answer': i % 3,
      'text': f'The numbers {i} and {i + 1} follow each other. ' * 8,
    }
    for i in range(8)
  ]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'rows.jsonl').write_text(text)

  def write(name: str, kind: str, target: str, *lines: str) -> None:
    head = YAML.format(
      name=name, folder=folder, data='rows', kind=kind, target=target
    )
    (folder / f'{name}.yaml').write_text(head + '\n'.join(lines) + '\n')

  write(
    'local_choice', 'multiple_choice', 'answer',
    'doc_to_choice: choices', 'num_fewshot: 2',
    'description: "Choose.\\n\\n"', 'fewshot_config: {sampler: first_n}',
    'metric_list:', '  - metric: acc', '  - metric: acc_norm',
  )  # fmt: skip
  write(
    'local_answer', 'generate_until', '"{{choices[answer]}}"',
    'generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}',
    'metric_list:', '  - metric: !function metrics.first_character',
    '    aggregation: mean', '    higher_is_better: true',
  )  # fmt: skip
  write(
    'local_text', 'loglikelihood_rolling', '"{{text}}"',
    'metric_list:', '  - metric: bits_per_byte',
  )  # fmt: skip
  write(
    'local_code', 'generate_until', '"{{choices[answer]}}"',
    'generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}',
    'metric_list:', '  - metric: !function metrics.distinct',
    '    aggregation: mean', '    higher_is_better: true', '    k: [1]',
    'filter_list:', '  - name: all', '    filter:', '      - function: custom',
    '        filter_fn: !function metrics.keep_all', 'unsafe_code: true',
  )  # fmt: skip
  (folder / 'metrics.py').write_text(
    """\
def first_character(references, predictions):
  return float(ord((predictions[0] + 'x')[0]) % 2)


def keep_all(responses, docs):
  return responses


def distinct(references, predictions, k):
  return {f'distinct@{n}': len(set(predictions[0])) / n for n in k}
"""
  )
  return folder


@pytest.fixture(scope='module')
def manager(task_folder: pathlib.Path) -> TaskManager:
  """Knows these tasks, and of the 13,000 files of lm-eval's the paper's."""
  folder = pathlib.Path(tasks.__file__).parent
  own = ['arc', 'bbh', 'gsm8k', 'humaneval', 'mmlu', 'tydiqa']
  return TaskManager(
    include_path=[*(folder / name for name in own), task_folder],
    include_defaults=False,
  )


@pytest.fixture(scope='module', autouse=True)
def environment_is_described_once():
  """Runs pip and others once, whose words lm-eval has in each result."""
  if importlib.util.find_spec('torch') is None:
    yield
    return
  from torch.utils import collect_env

  with pytest.MonkeyPatch.context() as patch:
    once = functools.cache(collect_env.get_pretty_env_info)
    patch.setattr(collect_env, 'get_pretty_env_info', once)
    yield


@pytest.fixture(scope='module')
def ours(random_run: pathlib.Path) -> LanguageModel:
  return LanguageModel(GritLM.load(random_run), batch_size=4)


@pytest.fixture(scope='module')
def theirs(exported: pathlib.Path):
  """lm-eval's own model, of the exported folder."""
  pytest.importorskip('torch')
  from lm_eval.models.huggingface import HFLM

  # In a batch, its first text decides whether all of them get BOS.
  return HFLM(
    pretrained=str(exported), device='cpu', dtype='float32', batch_size=1
  )


def ask(model, kind: str, *requests: tuple) -> list:
  return getattr(model, kind)(
    [Instance(kind, {}, request, i) for i, request in enumerate(requests)]
  )


def test_likelihoods_are_those_of_transformers(ours, theirs):
  requests = [(a, b) for a in CONTEXTS for b in CONTINUATIONS]
  found = ask(ours, 'loglikelihood', *requests)
  expected = ask(theirs, 'loglikelihood', *requests)
  for one, other in zip(found, expected, strict=True):
    assert abs(one[0] - other[0]) < TOLERANCE
    assert one[1] == other[1]
    assert isinstance(one, tuple) and one[0] < 0


def test_rolling_likelihoods_are_those_of_transformers(
  ours, theirs, monkeypatch
):
  # Otherwise it has BOS before the text twice.
  monkeypatch.setattr(theirs, 'add_bos_token', False)
  texts = [('one window',), ('several windows, ' * 30,)]
  found = ask(ours, 'loglikelihood_rolling', *texts)
  expected = ask(theirs, 'loglikelihood_rolling', *texts)
  np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=1e-6)


def test_generated_texts_are_those_of_transformers(ours, theirs):
  requests = [
    (context, {'until': until, 'max_gen_toks': tokens, 'do_sample': False})
    for context in [*CONTEXTS[:3], CONTEXTS[4]]
    for until, tokens in (([], 3), (['e', 'n'], 20), ('s', 9))
  ]
  found = ask(ours, 'generate_until', *requests)
  assert found == ask(theirs, 'generate_until', *requests)
  assert len(set(found)) > len(CONTEXTS)
  for number, letters in ((1, 'en'), (2, 's')):
    assert not any(set(letters) & set(text) for text in found[number::3])


def test_chats_are_those_of_the_exported_template(ours, theirs):
  for chat, answer in ((CHAT, True), (CHAT[:1], True), (CHAT[:2], False)):
    assert ours.apply_chat_template(chat, answer) == theirs.apply_chat_template(
      chat, answer
    )
  described = [{'role': 'system', 'content': 'Do this.'}, *CHAT[:1]]
  assert ours.apply_chat_template(described) == (
    '<s><|user|>\nDo this.\n\nWhich letter? \n<|assistant|>\n'
  )
  for chat, answer in ((CHAT[1:], True), ([], True), (CHAT, False)):
    with pytest.raises(ValueError, match='has no format'):
      ours.apply_chat_template(chat, answer)


def test_scores_of_tasks_are_those_of_transformers(
  ours, theirs, manager, tmp_path, monkeypatch
):
  names = ['local_choice', 'local_answer', 'local_text']
  found = generative_tasks.evaluate(ours, names, tmp_path, manager=manager)
  # A system turn is refused by the template; ours has it with the user's.
  monkeypatch.setattr(theirs, 'apply_chat_template', ours.apply_chat_template)
  monkeypatch.setattr(theirs, 'add_bos_token', False)
  for name in names:
    expected = lm_eval.simple_evaluate(
      model=theirs,
      tasks=[name],
      task_manager=manager,
      apply_chat_template=True,
      fewshot_as_multiturn=False,
    )['results'][name]
    results = found[name]['results'][name]
    assert results.keys() == expected.keys()
    for key, value in expected.items():
      if isinstance(value, float):
        assert results[key] == pytest.approx(value, abs=1e-4)
  assert 0 < found['local_choice']['results']['local_choice']['acc,none'] < 1


def watch(model: LanguageModel, monkeypatch) -> collections.Counter:
  """Counts what the model is asked from here on."""
  asked: collections.Counter[str] = collections.Counter()
  for kind in ('loglikelihood', 'loglikelihood_rolling', 'generate_until'):
    real = getattr(model, kind)

    def count(requests, *rest, kind=kind, real=real):
      asked[kind] += len(requests)
      for request in requests:
        # Examples and question are one turn of the user.
        examples = 2 if kind == 'loglikelihood' else 0
        context = request.args[0]
        assert context.count('<|user|>') == 1
        assert context.count('Answer:') == examples + 1
      return real(requests, *rest)

    monkeypatch.setattr(model, kind, count)
  return asked


def test_what_is_done_is_not_done_again(ours, manager, tmp_path, monkeypatch):
  evaluate = generative_tasks.evaluate
  names = ['local_choice', 'local_answer']
  complete = ours.model.complete
  asked = watch(ours, monkeypatch)
  calls = []

  def interrupt(prompts, *rest):
    calls.append(len(prompts))
    if len(calls) == 2:
      raise KeyboardInterrupt
    return complete(prompts, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(ours.model, 'complete', interrupt)
    with pytest.raises(KeyboardInterrupt):
      evaluate(ours, names, tmp_path, manager=manager)
  assert asked == {'loglikelihood': 24, 'generate_until': 8}
  assert [path.name for path in tmp_path.glob('*.json')] == [
    'local_choice.json'
  ]
  asked.clear()
  found = evaluate(ours, names, tmp_path, manager=manager)
  # Four of the eight were generated before the interruption.
  assert asked == {'generate_until': 4}
  asked.clear()
  assert evaluate(ours, names, tmp_path, manager=manager) == found
  assert not asked
  whole = evaluate(ours, names, tmp_path / 'other', manager=manager)
  for name in names:
    assert whole[name]['results'] == found[name]['results']
  asked.clear()
  evaluate(ours, names[:1], tmp_path, manager=manager, limit=3)
  assert (tmp_path / 'local_choice-first-3.json').exists()


def test_draws_of_a_context_differ_and_come_again(ours):
  request = (CONTEXTS[1], {'do_sample': True, 'temperature': 2.0, 'top_p': 0.95,
                           'max_gen_toks': 6, 'until': []})  # fmt: skip
  texts = ask(ours, 'generate_until', *[request] * 4)
  assert len(set(texts)) == 4
  assert ask(ours, 'generate_until', *[request] * 4) == texts


def test_generation_arguments_are_read_or_refused():
  sampling = make_sampling({'until': 'x', 'temperature': 0.8, 'top_k': 5}, 7, 3)
  assert (sampling.stop, sampling.temperature, sampling.top_k) == (
    ('x',),
    0.8,
    5,
  )
  assert (sampling.max_new_tokens, sampling.seed) == (7, 3)
  greedy = make_sampling({'do_sample': False, 'max_new_tokens': 4}, 7, 3)
  assert (greedy.temperature, greedy.max_new_tokens) == (0.0, 4)
  with pytest.raises(UserError, match=r"\['num_beams'\], which there is not"):
    make_sampling({'num_beams': 3}, 7, 3)


def test_what_is_too_long_is_refused(ours, random_run):
  long = {'max_gen_toks': 128, 'until': []}
  with pytest.raises(UserError, match='max_gen_toks=128 leaves no room'):
    ask(ours, 'generate_until', ('a', long))
  with pytest.raises(UserError, match='tokens, not 1 to max_length=128'):
    ask(ours, 'loglikelihood', ('a', 'b ' * 150))
  with pytest.raises(UserError, match='more than the 128 positions'):
    LanguageModel(ours.model, max_length=129)


def test_benchmarks_are_as_in_the_paper(ours, manager, monkeypatch):
  assert all(paper.name in manager.all_tasks for paper in PAPER.values())
  monkeypatch.setitem(
    PAPER, 'code', PaperTask('local_code', PAPER['humaneval'].changes, 10)
  )
  (task,) = generative_tasks.load_task(manager, 'code')
  assert task.config.repeats == 20
  assert task.config.generation_kwargs['until'] == ['e']
  assert task.config.generation_kwargs['temperature'] == 0.8
  assert task.process_results(task.test_docs()[0], ['abcde' * 4]) == {
    'distinct@10': 0.5
  }
  monkeypatch.setitem(
    PAPER, 'choice', PaperTask('local_choice', PAPER['mmlu'].changes)
  )
  (task,) = generative_tasks.load_task(manager, 'choice')
  task.build_all_requests(
    limit=1,
    rank=0,
    world_size=1,
    apply_chat_template=True,
    fewshot_as_multiturn=False,
    chat_template=ours.apply_chat_template,
  )
  context, continuation = task.instances[0].args
  assert context == (
    '<s><|user|>\nChoose.\n\n0?\nA. 0\nB. 1\nAnswer:'
    '\n<|assistant|>\nThe answer is:'
  )
  assert continuation == ' A'


def test_command_prints_scores(
  task_folder, random_run, tmp_path, monkeypatch, capsys
):
  local = functools.partial(TaskManager, include_defaults=False)
  monkeypatch.setattr(tasks, 'TaskManager', local)
  flags = command.make_parser().parse_args(
    [
      'lm', f'--model={random_run}', '--tasks=local_choice',
      f'--output={tmp_path}', f'--task_folder={task_folder}', '--limit=8',
    ]
  )  # fmt: skip
  command.evaluate(flags)
  assert 'local_choice' in capsys.readouterr().out
  (file,) = tmp_path.rglob('local_choice-first-8.json')
  assert file.parts[-4:-2] == ('lm', 'run')


def test_tasks_that_cannot_run_are_refused(ours, manager, tmp_path):
  check = generative_tasks.check_names
  with pytest.raises(UserError, match="'nothing', nor has the paper"):
    check(manager, ['mmlu', 'nothing'], False)
  with pytest.raises(UserError, match='--run_unsafe_code'):
    check(manager, ['mmlu', 'humaneval'], False)
  check(manager, ['humaneval', 'arc_easy', 'local_choice'], True)
  with pytest.raises(UserError, match='local_code.*--run_unsafe_code'):
    generative_tasks.evaluate(ours, ['local_code'], tmp_path, manager=manager)
  assert not list(tmp_path.glob('*.json'))
