"""The compiler's dump is read while the compiler writes it."""

from grit_jax.aot import compiler


def test_a_dump_without_its_buffers_is_not_finished(tmp_path):
  program = tmp_path / 'step.after_optimizations_after_buffer_assignment.txt'
  program.write_text('HloModule step\n\nENTRY main {\n}\n\n')
  assert not compiler._is_scheduled(tmp_path, limit_gib=1.0)
