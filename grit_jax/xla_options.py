"""XLA's options for the train step: one table, a chip a row."""

import jax

# On these chips a grouped product is a convolution over all experts otherwise;
# v5p has the kernel by default.
_GROUPED_PRODUCT = {'xla_tpu_enable_ragged_dot_kernel': True}

# By `jax.Device.device_kind`.
OPTIONS: dict[str, dict[str, bool]] = {
  'TPU v4': _GROUPED_PRODUCT,
  'TPU v5 lite': _GROUPED_PRODUCT,
  'TPU v6 lite': _GROUPED_PRODUCT,
  'TPU7x': _GROUPED_PRODUCT,
}


def compiler_options(device: jax.Device) -> dict[str, bool]:
  """Returns the options for a device; none for a kind that needs none."""
  return OPTIONS.get(device.device_kind, {})
