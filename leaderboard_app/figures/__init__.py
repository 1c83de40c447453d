"""DataFrame → Figure, pure: no streamlit, no reading, nothing hidden in a module. One file holds the figures of one page."""
