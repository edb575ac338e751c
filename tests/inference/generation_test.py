"""Tests of generation, against transformers and our own whole passes."""

import dataclasses
import pathlib
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest

from grit_jax import GritLM
from grit_jax.batch import Rows
from grit_jax.config import Config, MeshConfig, ModelConfig
from grit_jax.convert.hf_folder import RUN_FILE
from grit_jax.convert.to_hf import to_hf
from grit_jax.files import CHECKSUMS
from grit_jax.inference import generation
from grit_jax.inference.cache import KVCache
from grit_jax.inference.sampling import Sampling
from grit_jax.models import presets
from grit_jax.models.attention import Kind, generative_kind
from grit_jax.models.decoder import Decoder

MODEL = dataclasses.replace(
  presets.tiny(), vocab_size=407, rope_theta=100.0, max_positions=4096
)
NEW = 20
# Of 17 to 32 tokens, as the chat: they are read in chunks of one size. And no
# more than four are read side by side: all batches have one shape, those of one
# prompt another.
PROMPTS = [
  'def parse_args(self, args=None):',
  'if not action.option_strings: return',
  'What does the parser read, and how?',
]
CHAT = [{'role': 'user', 'content': 'Why?'}]
# Read in three chunks of 32 tokens.
LONG = 'return self.name ' * 7
# Tokens of the longest prompt with what is generated from it, and more.
LENGTH = 96


@pytest.fixture(scope='module')
def load(
  tmp_path_factory: pytest.TempPathFactory, write_run: Callable
) -> Callable[..., GritLM]:
  """Loads a model of random weights, with changes of its configuration."""
  folder = tmp_path_factory.mktemp('models')
  written: dict[ModelConfig, pathlib.Path] = {}

  def load_changed(mesh: MeshConfig | None = None, **changes) -> GritLM:
    config = dataclasses.replace(MODEL, **changes)
    if config not in written:
      written[config] = folder / str(len(written))
      write_run(written[config], Config(model=config))
    return GritLM.load(written[config], mesh=mesh)

  return load_changed


@pytest.fixture(scope='module')
def model(load: Callable) -> GritLM:
  return load()


@partial(jax.jit, static_argnums=2)
def score_rows(decoder: Decoder, rows: Rows, kind: Kind) -> jax.Array:
  [hidden] = decoder([rows], [kind])
  return decoder.logits(hidden, decoder.gather_head())


def continue_greedily(
  model: GritLM, ids: np.ndarray, in_instruction: np.ndarray, count: int
) -> list[int]:
  """Greedy tokens by whole passes over packed rows, without a cache."""
  kind = generative_kind(model.config.model.attention)
  found: list[int] = []
  for length in range(len(ids), len(ids) + count):
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, :length] = [*ids, *found]
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    segments = (positions < length).astype(np.int32)
    instruction = np.zeros((1, LENGTH), bool)
    instruction[0, : len(ids)] = in_instruction
    rows = Rows(tokens, segments, positions * segments, instruction)
    with jax.set_mesh(model.mesh):
      logits = np.asarray(score_rows(model.model, rows, kind))
    found.append(int(logits[0, length - 1].argmax()))
    if found[-1] == model.tokenizer.eos:
      break
  return found


def test_greedy_tokens_are_those_of_transformers(
  tmp_path: pathlib.Path, write_run: Callable, monkeypatch: pytest.MonkeyPatch
):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  monkeypatch.setattr(generation, 'CHUNK', 32)
  write_run(tmp_path / 'run', Config(model=MODEL))
  to_hf(tmp_path / 'run', tmp_path / 'hf')
  # A folder that others have written says less of the model.
  for name in RUN_FILE, CHECKSUMS:
    (tmp_path / 'hf' / name).unlink()
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'hf', dtype=torch.float32
  )
  ours = GritLM.load(tmp_path / 'hf')
  # As stored: bfloat16 would choose other tokens.
  assert ours.config.model.dtype == 'float32'
  prompts = [
    ours.encode_prompt(text, Sampling(max_new_tokens=NEW))
    for text in (*PROMPTS, LONG)
  ]
  assert len(prompts[-1].ids) > 2 * generation.CHUNK
  found = ours.complete(prompts)
  for prompt, completion in zip(prompts, found, strict=True):
    expected = theirs.generate(
      torch.tensor(prompt.ids[None].astype(np.int64)),
      max_new_tokens=NEW,
      do_sample=False,
      eos_token_id=ours.tokenizer.eos,
      pad_token_id=0,
    )[0, len(prompt.ids) :]
    assert list(completion.ids) == expected.tolist()
    assert completion.prompt_tokens == len(prompt.ids)


@pytest.mark.parametrize(
  'changes',
  [
    {'attention': 'bbbc', 'num_experts': 4, 'mlp_dim': 16},
    {'attention': 'cccc', 'sliding_window': 6, 'tie_embeddings': True},
  ],
)
def test_every_kind_of_model_generates_as_whole_passes_do(
  load: Callable, changes: dict
):
  model = load(**changes)
  turns = [*CHAT, {'role': 'assistant', 'content': 'So.'}, *CHAT]
  settings = Sampling(max_new_tokens=6)
  prompts = [model.encode_prompt(text, settings) for text in (*PROMPTS, turns)]
  assert not prompts[-1].in_instruction.all()
  for prompt, found in zip(prompts, model.complete(prompts), strict=True):
    expected = continue_greedily(
      model, prompt.ids, prompt.in_instruction, len(found.ids)
    )
    assert list(found.ids) == expected


def test_a_text_is_the_same_alone_and_in_any_batch(model: GritLM):
  together = model.generate(PROMPTS, max_new_tokens=NEW)
  assert len(set(together)) == len(PROMPTS)
  assert [model.generate(p, max_new_tokens=NEW) for p in PROMPTS] == together
  assert model.generate(PROMPTS, max_new_tokens=NEW, batch_size=1) == together


def test_a_mesh_changes_no_token(load: Callable, model: GritLM):
  mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  settings = {'max_new_tokens': 8, 'temperature': 1.0, 'top_k': 20, 'seed': 3}
  found = load(mesh=mesh).generate(PROMPTS, **settings)
  assert found == model.generate(PROMPTS, **settings)


def test_a_seed_draws_the_same_text_whatever_is_beside_it(model: GritLM):
  settings = {'max_new_tokens': NEW, 'temperature': 1.5}
  prompt = PROMPTS[0]
  first = model.generate(prompt, seed=7, **settings)
  found = model.generate([PROMPTS[2], prompt, PROMPTS[1]], seed=6, **settings)
  assert found[1] == first
  assert model.generate(prompt, seed=8, **settings) != first
  # The prompts of a call have seeds of their own.
  assert len(set(model.generate([prompt] * 3, seed=7, **settings))) == 3


def test_prompts_of_a_batch_have_settings_of_their_own(model: GritLM):
  settings = [
    Sampling(max_new_tokens=3),
    Sampling(max_new_tokens=NEW, temperature=2.0, seed=5),
    Sampling(max_new_tokens=NEW),
  ]
  prompts = [model.encode_prompt(PROMPTS[0], s) for s in settings]
  short, drawn, greedy = model.complete(prompts)
  assert short.ids == greedy.ids[:3] and short.finish_reason == 'length'
  assert drawn.ids != greedy.ids
  [alone] = model.complete([prompts[1]])
  assert alone.ids == drawn.ids


def test_a_stop_string_ends_the_text_before_it(model: GritLM):
  whole = model.generate(PROMPTS[0], max_new_tokens=NEW)
  middle = whole[len(whole) // 2 :][:3]
  [stopped] = model.complete(
    [model.encode_prompt(PROMPTS[0], Sampling(NEW, stop=('never', middle)))]
  )
  assert stopped.text == whole[: whole.index(middle)]
  assert stopped.finish_reason == 'stop'
  assert model.generate(PROMPTS[0], max_new_tokens=NEW, stop=middle) == (
    stopped.text
  )


def test_end_of_text_ends_it(load: Callable, model: GritLM):
  [first] = model.complete(
    [model.encode_prompt(PROMPTS[0], Sampling(max_new_tokens=NEW))]
  )
  # A tokenizer whose end of text is a token that does come.
  eos = first.ids[4]
  other = load()
  other.tokenizer.eos = eos
  [found] = other.complete(
    [other.encode_prompt(PROMPTS[0], Sampling(max_new_tokens=NEW))]
  )
  stop = first.ids.index(eos) + 1
  assert found.ids == first.ids[:stop]
  assert found.finish_reason == 'stop'


@pytest.mark.parametrize('stop', [(), ('e',)])
def test_streamed_pieces_join_to_the_texts(model: GritLM, stop: tuple):
  settings = {'max_new_tokens': NEW, 'temperature': 1.0, 'stop': stop}
  pieces: dict[int, list[str]] = {i: [] for i in range(len(PROMPTS))}
  found = model.generate(
    PROMPTS, callback=lambda i, piece: pieces[i].append(piece), **settings
  )
  assert found == model.generate(PROMPTS, **settings)
  assert [''.join(pieces[i]) for i in range(len(PROMPTS))] == found
  assert stop or max(map(len, pieces.values())) > 3


def test_a_piece_shows_no_half_character_and_no_half_stop_string(
  model: GritLM,
):
  tokenizer = model.tokenizer
  ids = tokenizer.encode('a🙂 stop')
  settings = Sampling(100, stop=(' stops',))
  prompt = generation.Prompt(np.array([tokenizer.bos]), np.ones(1), settings)
  text = generation.Text(tokenizer, prompt)
  shown = ''
  for token in ids:
    text.add([token])
    shown += text.take_new()
    assert '\ufffd' not in shown
  assert shown == 'a🙂'
  text.add(tokenizer.encode('x')[-1:])
  assert shown + text.take_new() == text.text


def test_a_prompt_goes_on_from_a_cache(model: GritLM):
  documents = ['The first document.', 'The second, which is longer.', 'Last.']
  _, caches = model.encode(documents, get_cache=True)
  rest = '\n<|user|>\nWhy?\n<|assistant|>\n'
  found = model.generate([rest] * 3, cache=caches, max_new_tokens=NEW)
  assert len(set(found)) == 3
  one = model.generate(rest, cache=caches[1], max_new_tokens=NEW)
  assert one == found[1]
  joined = KVCache.join(caches)
  assert model.generate(rest, cache=joined, max_new_tokens=4)


def test_programs_are_shared_by_prompts_of_like_lengths(model: GritLM):
  def count() -> list[int]:
    kind = model.mesh.devices.flat[0].device_kind
    return [
      program.of_kind(kind)._cache_size()
      for program in (generation._decode, generation._read)
    ]

  model.generate(PROMPTS[0], max_new_tokens=4)
  before = count()
  model.generate(PROMPTS[1], max_new_tokens=9, temperature=0.5, stop='x')
  model.generate(CHAT, max_new_tokens=2, seed=4)
  assert count() == before


def test_batches_of_one_size_share_programs_whatever_is_in_them(model: GritLM):
  def count() -> int:
    kind = model.mesh.devices.flat[0].device_kind
    return generation._decode.of_kind(kind)._cache_size()

  places = generation.count_places(MODEL, 300, 40)
  compiled = 0
  for number, prompts in enumerate(([PROMPTS[0]], PROMPTS, [LONG, LONG * 3])):
    settings = Sampling(max_new_tokens=4 + 18 * number)
    encoded = [model.encode_prompt(prompt, settings) for prompt in prompts]
    compiled -= count()
    with jax.set_mesh(model.mesh):
      batch = generation.Generation(
        model.model, model.tokenizer, encoded, 4, places
      )
      while not batch.done:
        batch.step(generation.BURST)
    compiled += count()
    found = [batch.complete(row).text for row in range(len(prompts))]
    assert found == model.generate(
      prompts, max_new_tokens=settings.max_new_tokens
    )
  assert compiled == 1


def test_a_long_prompt_is_read_as_few_more_tokens_than_it_has():
  shapes = set()
  for tokens in range(1, 3000):
    chunks = generation.split_prompt(tokens)
    rest = tokens % generation.CHUNK
    assert tokens <= sum(chunks)
    assert sum(chunks) - tokens < max(rest, generation.LEAST_CHUNK)
    assert set(chunks[1:]) <= {generation.CHUNK}
    shapes.update(chunks)
  assert len(shapes) == 6
  assert generation.split_prompt(1025, whole=True) == [2048]


def test_prompts_that_cannot_be_are_refused(model: GritLM):
  with pytest.raises(ValueError, match="role 'system'"):
    model.generate([{'role': 'system', 'content': 'x'}])
  with pytest.raises(ValueError, match="must be the user's"):
    model.generate([*CHAT, {'role': 'assistant', 'content': 'x'}])
  with pytest.raises(TypeError, match=r"messages\[0\]\['content'\]"):
    model.generate([{'role': 'user'}])
  with pytest.raises(ValueError, match='more than the 4096 positions'):
    model.generate('x', max_new_tokens=4096)
  with pytest.raises(ValueError, match='2 prompts and 1 caches'):
    empty = np.zeros((2, 2, 3, MODEL.head_dim), np.float32)
    model.generate(['x', 'y'], cache=KVCache(empty, empty))
  with pytest.raises(ValueError, match='temperature'):
    model.generate('x', temperature=-1)


def test_chat_messages_are_answered_in_the_prompt_format(model: GritLM):
  found = model.generate(CHAT, max_new_tokens=8)
  assert found == model.generate(
    '<s><|user|>\nWhy?\n<|assistant|>\n', max_new_tokens=8
  )
  assert model.generate([CHAT] * 3, max_new_tokens=8) == [found] * 3
