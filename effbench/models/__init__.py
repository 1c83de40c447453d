"""Models: a catalogue of published shapes (data files), their builder, weight sources and text."""
