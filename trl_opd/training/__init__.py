"""The parts of one training step, named after what they give."""
