"""Modules that techniques put into models: forms of attention, positions, attention-free mixers. Torch inside."""
