"""From records on disk to batches on devices."""
