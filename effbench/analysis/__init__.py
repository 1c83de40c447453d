"""Analysis: reads records, never runs anything."""
